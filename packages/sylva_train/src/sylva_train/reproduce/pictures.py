"""A picture of a table: every run a tick, every mean a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sylva_train.baselines import parse_method
from sylva_train.report import (
    Metric,
    deviation,
    label_rows,
    looks,
    seeds_line,
    shorten,
)

from .tables import cells, metric, printed_value, scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

#: Perplexities that differ by more than this are drawn on a logarithmic axis.
FAR = 10
#: Inches of a line, and around the lines of a setting.
LINE, AROUND = 0.24, 0.75


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw the results of `reproduce`: a frame a setting, a line a method and value."""
    from matplotlib.figure import Figure

    found = cells(results)
    settings = list(results["settings"])
    lines = {s: [cell for cell in found if cell.setting == s] for s in settings}
    heights = [LINE * len(lines[setting]) + AROUND for setting in settings]
    figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
    frames = figure.subplots(len(settings), squeeze=False, height_ratios=heights)
    look = looks(dict.fromkeys(cell.method for cell in found))
    for setting, axes in zip(settings, frames[:, 0], strict=True):
        shown = metric(results, setting)
        labels = []
        for place, cell in enumerate(lines[setting]):
            scores = [shown.factor * run["score"] for run in scored(found[cell])]
            if scores:
                spread = deviation(scores) or 0.0
                seeds_line(axes, place, scores, spread, look[cell.method])
            label = parse_method(cell.method).label
            value = printed_value(results, cell.value, found[cell])
            labels.append(label if cell.value is None else f"{label}, {value}")
        label_rows(axes, [shorten(label, 40) for label in labels])
        axes.margins(x=0.06)
        _scale(axes, shown)
        axes.set_xlabel(shown.title)
        option = results["option"] and results["option"].replace("_", " ")
        title = f"{setting}, by {option}" if option else setting
        axes.set_title(title, loc="left", fontsize=9)
    return figure


def _scale(axes: Axes, shown: Metric) -> None:
    """Give perplexities that are far from each other a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.dataLim.intervalx
    if shown.name == "perplexity" and high > FAR * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
