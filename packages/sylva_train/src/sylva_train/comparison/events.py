"""What a comparison tells while it runs, and how long it will take."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Clock", "Event", "Watcher", "decode_event", "encode_event", "send"]

#: Begins the lines of a run's process that are meant for its parent.
MARK = "\x1esylva "


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a comparison.

    Parameters
    ----------
    kind : str
        ``"begin"`` and ``"end"`` of a run, ``"kept"`` for one that was finished before,
        ``"stage"`` for progress within a run.
    method, label : str
        The run's method, and its name for people.
    seed : int
        The run's seed.
    number, count : int
        The run's place, from 1, among all of them.
    stage, done, total
        What the run is doing and how far it is.
    left : float or None
        Estimated seconds until the whole comparison is done.
    row : dict or None
        The run's results at its end.
    """

    kind: str
    method: str
    label: str
    seed: int
    number: int
    count: int
    stage: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None
    row: dict[str, Any] | None = None


Watcher = Callable[[Event], None]


@dataclass
class Clock:
    """Estimate how long the rest of a comparison takes, from the runs that are done.

    A run takes as long as the last one of its method; of a method that has not run yet,
    as long as the mean of those that have.

    Parameters
    ----------
    methods : list of str
        The method of each run, in order.
    """

    methods: list[str]
    known: dict[str, float] = field(default_factory=dict)

    def finish(self, method: str, seconds: float) -> None:
        """Take note of a run's time."""
        self.known[method] = seconds

    def left(self, number: int, elapsed: float = 0.0) -> float | None:
        """Return the seconds left in run ``number`` (from 0) and after it.

        None before any run is done.
        """
        if not self.known:
            return None
        mean = statistics.fmean(self.known.values())
        times = [self.known.get(method, mean) for method in self.methods[number:]]
        return max(0.0, times[0] - elapsed) + sum(times[1:]) if times else 0.0


def encode_event(body: dict[str, Any]) -> str:
    """Return a line for the parent process."""
    return f"{MARK}{json.dumps(body)}\n"


def decode_event(line: str) -> dict[str, Any] | None:
    """Return what a line says, or None for a line that is not for the parent."""
    if not line.startswith(MARK):
        return None
    try:
        body = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def send(**body: Any) -> None:
    """Tell the parent process something."""
    sys.stdout.write(encode_event(body))
    sys.stdout.flush()
