"""Learning curves: histories averaged over seeds, in one frame or in many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .style import GRID, MUTED, Look, dodge, frame, shorten
from .summary import Results, Row, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "curve_cell", "curve_panel", "learning_curves"]

#: Points of a curve that a picture can tell apart; denser ones are averaged.
POINTS = 60

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A method's history over its seeds, each array of shape (points,).

    Parameters
    ----------
    method, label : str
        As in the runs.
    steps, mean, low, high : ndarray of float64
        Step, and mean, lowest and highest value over the seeds.
    """

    method: str
    label: str
    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


def learning_curves(
    results: Results, key: str, rows: Iterable[Row], scale: float = 1.0
) -> list[Curve]:
    """Gather ``key`` of every history, averaged over seeds at the steps they share.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`.
    key : str
        ``"loss"`` or ``"score"``.
    rows : iterable of Row
        Methods to take, in this order; those without a history are left out.
    scale : float
        Factor of the values.

    Returns
    -------
    list of Curve
        Long histories are averaged in at most `POINTS` equal stretches.
    """
    found = []
    for row in rows:
        values: dict[int, list[float]] = {}
        runs = [run for run in results["runs"] if run["method"] == row.method]
        for run in runs:
            for entry in run.get("history") or ():
                if finite(entry.get(key)):
                    values.setdefault(int(entry["step"]), []).append(entry[key])
        full = max(map(len, values.values()), default=0)
        steps = sorted(step for step, there in values.items() if len(there) == full)
        if not steps:
            continue
        table = scale * np.array([values[step] for step in steps], dtype=np.float64)
        parts = min(len(steps), POINTS)
        edges = np.linspace(0, len(steps), parts + 1).astype(int)
        sizes = np.diff(edges)
        table = np.add.reduceat(table, edges[:-1], axis=0) / sizes[:, None]
        places = np.add.reduceat(np.array(steps, dtype=np.float64), edges[:-1]) / sizes
        found.append(
            Curve(
                row.method, row.label, places, table.mean(1), table.min(1), table.max(1)
            )
        )
    return found


def curve_panel(
    curves: Sequence[Curve],
    looks: Mapping[str, Look],
    levels: Mapping[str, tuple[str, float]],
) -> Figure:
    """Draw all curves in one frame, labelled at their ends.

    Parameters
    ----------
    curves : sequence of Curve
        Methods with a history.
    looks : mapping of str to Look
        Look of each method.
    levels : mapping of str to (str, float)
        Label and value of methods without a history, drawn as a level.
    """
    from matplotlib.ticker import MaxNLocator

    names = [curve.label for curve in curves] + [label for label, _ in levels.values()]
    right = 0.3 + 0.06 * max(len(shorten(name)) for name in names)
    figure, axes = frame(2.75, left=0.42, right=right)
    low, high = _limits(curves, [value for _, value in levels.values()])
    axes.set_ylim(low, high)
    last = max(float(curve.steps[-1]) for curve in curves)
    ends = []
    for method, (label, value) in levels.items():
        look = looks[method]
        axes.axhline(value, color=look.colour, lw=1, ls=(0, (4, 3)), zorder=1)
        ends.append((last, value, label, look))
    for curve in curves:
        look = looks[curve.method]
        _draw(axes, curve, look)
        ends.append((float(curve.steps[-1]), float(curve.mean[-1]), curve.label, look))
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step")
    gap = 0.16 * (high - low) / 2.1
    heights = dodge([end[1] for end in ends], gap, low, high)
    for (x, y, label, look), height in zip(ends, heights, strict=True):
        axes.plot(
            [x, last * 1.035, last * 1.06],
            [y, height, height],
            color=look.colour,
            lw=1,
            clip_on=False,
        )
        axes.text(last * 1.075, height, shorten(label), va="center", fontsize=8)
    return figure


def curve_cell(
    curve: Curve, others: Sequence[Curve], look: Look, level: float | None
) -> Figure:
    """Draw one method's curve before those of all others in grey."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = frame(1.5, width=2.15, left=0.42, right=0.1, top=0.08, bottom=0.3)
    low, high = _limits([curve, *others], [] if level is None else [level])
    for other in others:
        axes.plot(other.steps, other.mean, color=GRID, lw=1, zorder=1)
    if level is not None:
        axes.axhline(level, color=MUTED, lw=0.7, ls=(0, (4, 3)), zorder=1)
    _draw(axes, curve, look)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(float(c.steps[-1]) for c in (curve, *others)) * 1.03)
    axes.grid(False)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="y", nbins=3)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def _draw(axes: Axes, curve: Curve, look: Look) -> None:
    """Draw a mean within its band; a single point as a marker."""
    if (curve.high > curve.low).any():
        axes.fill_between(
            curve.steps, curve.low, curve.high, color=look.colour, alpha=0.14, lw=0
        )
    axes.plot(
        curve.steps,
        curve.mean,
        color=look.colour,
        marker=look.marker if len(curve.steps) <= 12 else "",
        ms=3.6,
        mfc=look.face,
        ls=(0, (3, 1.6)) if look.hollow else "-",
        zorder=3,
    )


def _limits(curves: Sequence[Curve], levels: Sequence[float]) -> tuple[float, float]:
    """Return limits that hold every mean, and bands short of their extremes."""
    values: list[Any] = [curve.mean for curve in curves]
    values += [np.quantile(curve.low, [0.03]) for curve in curves]
    values += [np.quantile(curve.high, [0.97]) for curve in curves]
    every = np.concatenate([*values, np.asarray(levels, dtype=np.float64)])
    low, high = float(every.min()), float(every.max())
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
