"""Methods side by side: the same data, seeds, budget and loop; each run its own process.

A run in a process of its own has its own peak memory and its own random state, and a
comparison that was killed goes on where it stopped.
"""

from .compare import check_output, compare
from .events import Event
from .memory import PeakMemory
from .plan import (
    DEMO,
    DEMO_STEPS,
    DEMO_TASK,
    LEARNING_RATES,
    Comparison,
    demonstration,
)
from .process import worker
from .results import load_results

__all__ = [
    "DEMO",
    "DEMO_STEPS",
    "DEMO_TASK",
    "LEARNING_RATES",
    "Comparison",
    "Event",
    "PeakMemory",
    "check_output",
    "compare",
    "demonstration",
    "load_results",
    "worker",
]
