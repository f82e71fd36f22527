"""Methods side by side: the same data, seeds, budget and loop; each run its own process.

A run in a process of its own has its own peak memory and its own random state, and a
comparison that was killed goes on where it stopped.
"""

from .compare import check_plan, compare
from .events import Event, Watcher
from .jobs import check_output, jobs_folder, run_jobs
from .memory import PeakMemory
from .plan import LEARNING_RATES, Comparison, demonstration, suited
from .process import Job, worker
from .provenance import made
from .results import FORMAT, load_results
from .tuning import (
    TUNING_SEED,
    attempt,
    best_rates,
    check_multiples,
    rate_jobs,
    tuning_metric,
)

__all__ = [
    "FORMAT",
    "LEARNING_RATES",
    "TUNING_SEED",
    "Comparison",
    "Event",
    "Job",
    "PeakMemory",
    "Watcher",
    "attempt",
    "best_rates",
    "check_multiples",
    "check_output",
    "check_plan",
    "compare",
    "demonstration",
    "jobs_folder",
    "load_results",
    "made",
    "rate_jobs",
    "run_jobs",
    "suited",
    "tuning_metric",
    "worker",
]
