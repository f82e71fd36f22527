"""Methods side by side: the same data, seeds, budget and loop; each run its own process.

A run in a process of its own has its own peak memory and its own random state, and a
comparison that was killed goes on where it stopped.
"""

from .compare import compare, load_results
from .plan import DEMO, LEARNING_RATES, Comparison
from .single import worker

__all__ = [
    "DEMO",
    "LEARNING_RATES",
    "Comparison",
    "compare",
    "load_results",
    "worker",
]
