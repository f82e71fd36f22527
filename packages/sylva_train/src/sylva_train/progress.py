"""How far a job is: bars with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

__all__ = ["PATIENCE", "Progress", "Report", "duration", "size_words"]

#: Told (done, total).
Report = Callable[[int, int], None]

#: Seconds after which a stage shows its progress.
PATIENCE = 2.0
#: Seconds between lines, where there is no terminal.
INTERVAL = 20.0


def duration(seconds: float) -> str:
    """Print a length of time as people say it.

    Examples
    --------
    >>> from sylva_train.progress import duration
    >>> [duration(s) for s in (0.42, 8.2, 75, 400, 9000)]
    ['0.4 s', '8 s', '1 min 15 s', '7 min', '2 h 30 min']
    """
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 180:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def size_words(size: float) -> str:
    """Print a number of bytes as people say it."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * scale:  # what three digits round to it
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"


@dataclass
class Stage:
    """A part of a job under way: when it began, where, and its bar."""

    begin: float
    first: float
    bar: Any = None


class Progress:
    """Progress of a job's stages, on stderr; nothing of what takes under two seconds.

    A context manager.

    Parameters
    ----------
    enabled : bool
        Whether to show anything.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(
            stderr=True, highlight=False, soft_wrap=True, emoji=False
        )
        self.live = enabled and self.console.is_interactive
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[left]}", markup=False),
            console=self.console,
            transient=True,
            expand=True,
            disable=not self.live,
        )
        self.stages: dict[str, Stage] = {}
        self.spoken = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bars where there are any."""
        if self.enabled:
            self.console.print(text, markup=False)

    def stage(self, name: str) -> Report:
        """Return the function of (done, total) that shows a stage."""
        return functools.partial(self.report, name)

    def report(
        self,
        name: str,
        done: float,
        total: float,
        *,
        left: float | None = None,
        words: str | None = None,
        lines: bool = True,
    ) -> None:
        """Show how far a stage is; one that is done goes away.

        Parameters
        ----------
        name : str
            The stage.
        done, total : float
            How far it is, and all of it.
        left : float, optional
            Seconds left, where they do not follow from the part that is done.
        words : str, optional
            What to call it at present.
        lines : bool
            Whether a line may tell of it where there is no terminal.
        """
        if not self.enabled:
            return
        now = time.perf_counter()
        stage = self.stages.setdefault(name, Stage(now, done))
        if left is None and done > stage.first:
            left = (now - stage.begin) * (total - done) / (done - stage.first)
        # An estimate that has run out says nothing.
        rest = f"{duration(left)} left" if left and left >= 0.05 else ""
        words = words or name
        if done >= total:
            self.end(name)
        elif now - stage.begin < PATIENCE:
            return
        elif self.live:
            self.bars.start()
            if stage.bar is None:
                stage.bar = self.bars.add_task(words, total=total, left=rest)
            self.bars.update(
                stage.bar, completed=done, total=total, description=words, left=rest
            )
        elif lines and now - self.spoken > INTERVAL:
            self.spoken = now
            self.say(f"  {words}: {done / total:.0%}" + (f", {rest}" if rest else ""))

    def end(self, name: str) -> None:
        """Take a stage away, done or not."""
        stage = self.stages.pop(name, None)
        if stage is not None and stage.bar is not None:
            self.bars.remove_task(stage.bar)
