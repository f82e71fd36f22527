"""Charts of the methods: scores, differences, trade-off and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import INK, MUTED, SURFACE, Look, dodge, frame, shorten
from .summary import Metric, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "OVERLAY",
    "bars",
    "differences",
    "label_rows",
    "score_dots",
    "seeds_line",
    "stragglers",
    "trade_off",
]

#: Methods that one frame can hold and still be told apart.
OVERLAY = 6

ROW = 0.27


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Give a chart one labelled line for each label, the first on top."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)


def _rows_frame(
    labels: Sequence[str], notes: Sequence[str], best: Sequence[bool]
) -> tuple[Figure, Axes]:
    """Return a chart with one labelled line a method, the first on top.

    Each line ends in its note, to the right of the frame; those of the best are bold.
    """
    labels = [shorten(label) for label in labels]
    left, bottom = 0.18 + 0.064 * max(map(len, labels)), 0.42
    right = 0.1 + 0.077 * max(map(len, notes))
    height = ROW * len(labels) + bottom + 0.1
    figure, axes = frame(height, left=left, right=right, top=0.1, bottom=bottom)
    label_rows(axes, labels)
    axes.tick_params(axis="y", pad=6)
    axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
    for place, (note, bold) in enumerate(zip(notes, best, strict=True)):
        axes.annotate(
            note,
            (1.0, place),
            (6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontweight="bold" if bold else "normal",
        )
    return figure, axes


def seeds_line(
    axes: Axes, place: float, values: Sequence[float], spread: float, look: Look
) -> None:
    """Draw one method's line: a dot a seed, the mean, and a bar for the spread."""
    mean = float(np.mean(values))
    if math.isfinite(spread) and spread:
        axes.plot(
            [mean - spread, mean + spread],
            [place, place],
            color=look.colour,
            lw=2.2,
            alpha=0.45,
            zorder=2,
        )
    if len(values) > 1:
        axes.plot(
            values,
            [place] * len(values),
            ls="",
            marker="|",
            ms=6.5,
            mew=1.1,
            color=look.colour,
            zorder=3,
        )
    axes.plot([mean], [place], ms=6.2, zorder=4, **look.point)


def stragglers(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Return methods so far below the frozen model that they would squeeze the others.

    Further than half of what full fine-tuning is above it; none where it is not above.
    """
    sign = 1 if metric.higher else -1
    means = {row.method: sign * row.mean for row in rows if row.mean is not None}
    frozen, full = (means.get(method, math.nan) for method in ("frozen", "full"))
    if not full > frozen:
        return []
    low = frozen - (full - frozen) / 2
    return [row for row in rows if means.get(row.method, math.inf) < low]


def score_dots(
    rows: Sequence[Row], metric: Metric, looks: Mapping[str, Look]
) -> Figure:
    """Draw every method's score: mean, a tick a seed, a bar of one deviation.

    Stragglers are arrows at the edge.
    """
    rows = [row for row in rows if row.mean is not None]
    beyond = stragglers(rows, metric)
    figure, axes = _rows_frame(
        [row.label for row in rows],
        [metric.number(row.mean or 0.0) + metric.spread(row.std) for row in rows],
        [row.best for row in rows],
    )
    for place, row in enumerate(rows):
        values = [metric.factor * score for score in row.scores]
        deviation = metric.factor * (row.std or 0.0)
        look = looks[row.method]
        if row.method in {"frozen", "full"}:
            mean = float(np.mean(values))
            axes.axvline(mean, color=look.colour, lw=0.8, ls=(0, (4, 3)), zorder=1)
        if row in beyond:
            axes.plot(
                [0.01 if metric.higher else 0.99],
                [place],
                color=look.colour,
                marker="<" if metric.higher else ">",
                ms=6,
                mew=0,
                transform=axes.get_yaxis_transform(),
            )
        else:
            seeds_line(axes, place, values, deviation, look)
    axes.margins(x=0.06)
    axes.set_xlabel(metric.title)
    return figure


def differences(
    rows: Sequence[Row], metric: Metric, looks: Mapping[str, Look]
) -> Figure:
    """Draw the paired differences to random blocks, with Student's 95% interval."""
    found = [(row, row.versus_random) for row in rows if row.versus_random]
    figure, axes = _rows_frame(
        [row.rule for row, _ in found],
        [metric.signed(pair.mean) + metric.spread(pair.std) for _, pair in found],
        [row.best for row, _ in found],
    )
    axes.axvline(0, color=INK, lw=0.8, zorder=1)
    for place, (row, pair) in enumerate(found):
        values = [metric.factor * value for value in pair.differences]
        seeds_line(
            axes, place, values, metric.factor * pair.margin(), looks[row.method]
        )
    axes.margins(x=0.06)
    unit = "points of " if metric.percent else ""
    axes.set_xlabel(f"difference to random blocks, {unit}{metric.words}")
    return figure


def bars(
    rows: Sequence[Row],
    values: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    unit: str,
    looks: Mapping[str, Look],
    number: Callable[[float], str],
) -> Figure:
    """Draw one quantity by method as bars from zero, with a line for its range."""
    rows = [row for row in rows if row.method in values]
    figure, axes = _rows_frame(
        [row.label for row in rows],
        [number(values[row.method]) for row in rows],
        [row.best for row in rows],
    )
    for place, row in enumerate(rows):
        look, value = looks[row.method], values[row.method]
        axes.barh(
            place,
            value,
            height=0.56,
            color=SURFACE if look.hollow else look.colour,
            edgecolor=look.colour,
            lw=1.2 if look.hollow else 0,
        )
        if row.method in ranges:
            axes.plot(ranges[row.method], [place, place], color=INK, lw=0.9)
    axes.set_xlim(0, None)
    axes.set_xlabel(unit)
    return figure


def trade_off(rows: Sequence[Row], metric: Metric, looks: Mapping[str, Look]) -> Figure:
    """Draw score against trained weights; labels stand beside their points."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = frame(0.9 + max(2.1, 0.2 * len(rows)), left=0.7, right=0.25)
    for row in rows:
        # No ranges: rules train equally many weights, and theirs would cover each other.
        mean, look = metric.factor * (row.mean or 0.0), looks[row.method]
        axes.plot([row.trainable], [mean], ms=6.5, zorder=3, **look.point)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    low, high = map(math.log10, axes.get_xlim())
    if math.floor(high) <= math.ceil(low):
        # Less than two powers of ten are in view, which would leave no scale.
        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel("trained weights")
    axes.set_ylabel(metric.title)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(True, axis="x")
    _beside(axes, rows, metric)
    return figure


def _beside(axes: Axes, rows: Sequence[Row], metric: Metric) -> None:
    """Label points on their roomier side, all labels of a side clear of each other."""
    height = axes.bbox.height / axes.figure.dpi
    axes.autoscale_view()  # limits are otherwise those of before, until it is drawn
    to_axes = axes.transScale + axes.transLimits
    places = np.array(
        [
            to_axes.transform((row.trainable, metric.factor * (row.mean or 0.0)))
            for row in rows
        ]
    )
    # Points less than a marker apart stand in one column and share its labels' column.
    order = np.argsort(places[:, 0], kind="stable")
    breaks = np.flatnonzero(np.diff(places[order, 0]) > 0.03) + 1
    groups = [(group, places[group, 0].mean()) for group in np.split(order, breaks)]
    left = places[:, 0] <= 0.6
    heights = np.empty(len(rows))
    for part in (left, ~left):
        heights[part] = dodge(places[part, 1].tolist(), 0.165 / height, 0.0, 1.0)
    for group, x in groups:
        side = 1 if left[group[0]] else -1
        for index in group:
            y = heights[index]
            crowded = abs(y - places[index, 1]) > 0.02
            axes.annotate(
                shorten(rows[index].label),
                xy=tuple(places[index]),
                xycoords="axes fraction",
                xytext=(x + side * (0.085 if len(group) > 1 else 0.035), y),
                textcoords="axes fraction",
                va="center",
                ha="left" if side > 0 else "right",
                fontsize=8,
                fontweight="bold" if rows[index].best else "normal",
                arrowprops={
                    "arrowstyle": "-",
                    "relpos": (0 if side > 0 else 1, 0.5),
                    "color": MUTED,
                    "lw": 0.5,
                    "shrinkA": 1,
                    "shrinkB": 4,
                }
                if crowded or len(group) > 1
                else None,
            )
