"""What a comparison tells while it runs, and how long it will take."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Clock", "Event", "Watcher", "decode_event", "send"]

#: Begins the lines of a run's process that are meant for its parent.
MARK = "\x1esylva "


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job.

    Parameters
    ----------
    kind : str
        ``"begin"`` and ``"end"`` of a run, ``"kept"`` for one that was finished before,
        ``"stage"`` for progress within a run.
    label : str
        The run's name for people.
    number, count : int
        The run's place, from 1, among all of them.
    stage, done, total
        What the run is doing and how far it is.
    left : float or None
        Estimated seconds until all of them are done.
    row : dict or None
        The run's results at its end.
    """

    kind: str
    label: str
    number: int
    count: int
    stage: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None
    row: dict[str, Any] | None = None


Watcher = Callable[[Event], None]


class Clock:
    """Estimate how long the rest of some jobs takes, from those that are done.

    A job takes as long as the last one of its kind; of a kind that has not run yet, as
    long as the mean of those that have.

    Parameters
    ----------
    kinds : sequence of str
        The kind of each job.
    workers : int
        Jobs at a time.
    """

    def __init__(self, kinds: Sequence[str], workers: int = 1):
        self.kinds, self.workers = kinds, workers
        self.known: dict[str, float] = {}
        self.waiting = set(range(len(kinds)))

    def finish(self, number: int, seconds: float | None = None) -> None:
        """Take note that a job is done, and of its time if it ran."""
        self.waiting.discard(number)
        if seconds is not None:
            self.known[self.kinds[number]] = seconds

    def left(self, number: int | None = None, elapsed: float = 0.0) -> float | None:
        """Return the seconds left, after as many in job ``number``.

        None before any job is done.
        """
        if not self.known:
            return None
        mean = statistics.fmean(self.known.values())
        times = {n: self.known.get(self.kinds[n], mean) for n in self.waiting}
        if number in times:
            times[number] = max(0.0, times[number] - elapsed)
        return sum(times.values()) / self.workers


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
    sys.stdout.write(f"{MARK}{json.dumps(body)}\n")
    sys.stdout.flush()
