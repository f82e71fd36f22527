"""What is to be done in a process of its own, and where that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RUNS", "Job", "done"]

RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do in a process of its own.

    Parameters
    ----------
    name : str
        Of its files.
    label : str
        For people.
    kind : str
        Jobs of one kind take about as long as each other.
    spec : dict
        What is to be done, as JSON: the function's argument.
    function : str
        ``module:function`` of (spec, tell), which returns the job's row as JSON.
    """

    name: str
    label: str
    kind: str
    spec: dict[str, Any]
    function: str = "sylva_train.comparison.single:run"

    def files(self, output: Path) -> tuple[Path, Path]:
        """Return the paths of the row and of the spec."""
        runs = output / RUNS
        return runs / f"{self.name}.json", runs / f"{self.name}.spec.json"


def done(job: Job, output: Path) -> bool:
    """Whether a job is finished."""
    return all(path.exists() for path in job.files(output))
