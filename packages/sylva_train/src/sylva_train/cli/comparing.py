"""Comparisons on the command line: progress while they run, and the demo's story."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sylva_train._files import write_text
from sylva_train.comparison import Comparison, Event, compare
from sylva_train.progress import Progress, duration
from sylva_train.report import markdown_table, write_report

from .show import score_text

__all__ = ["publish", "row_text", "run_comparison", "show_event"]


def publish(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write the report and the table beside the results, and return these."""
    write_report(results, output / "report.html")
    write_text(output / "table.md", markdown_table(results))
    return results


def run_comparison(
    comparison: Comparison,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    command: str,
    workers: int = 1,
    tune: Sequence[float] = (),
) -> dict[str, Any]:
    """Run a comparison with its progress on stderr, and write its report."""
    text = partial(row_text, metric=comparison.metric)
    with Progress(enabled=not quiet) as bars:
        results = compare(
            comparison,
            output,
            resume=resume,
            overwrite=overwrite,
            watch=partial(show_event, bars, text=text),
            workers=workers,
            tune=tune,
            command=command,
        )
    return publish(results, output)


def row_text(row: Mapping[str, Any], metric: str = "score") -> str:
    """Print a run's score with its name; ``metric`` where the row does not tell it."""
    if row["score"] is None:
        return "diverged"
    return score_text(row["metrics"].get("metric", metric), row["score"])


def show_event(
    bars: Progress, event: Event, text: Callable[[dict[str, Any]], str]
) -> None:
    """Show what happened to a job; ``text`` says what a row has found."""
    name = event.label
    place = f"{event.number}/{event.count}"
    if event.kind == "stage":
        bars.report(
            "comparison",
            event.number - 1,
            event.count,
            left=event.left,
            words=f"run {event.number} of {event.count}",
            lines=False,
        )
        words = f"{name}: {event.stage}"
        bars.report(event.stage, event.done, event.total, words=words, lines=False)
    elif event.row is not None:
        kept = "  (finished before)" if event.kind == "kept" else ""
        left = ""
        if event.left:
            tens = round(event.left, -1) if event.left >= 60 else event.left
            left = f"; about {duration(tens)} left"
        bars.say(f"{place:>6}  {name}: {text(event.row)}{kept}{left}")
