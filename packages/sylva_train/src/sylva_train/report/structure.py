"""Pictures of why blocks were chosen: block scores and a Kronecker factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .style import INK, LEVELS, MUTED, SURFACE, THEME, WIDTH, Look, frame, in_powers
from .summary import BYTES, finite, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

__all__ = [
    "PERCENTILES",
    "block_structure",
    "heat_map",
    "score_grid",
    "score_ranges",
    "spectra",
]

Floats = NDArray[np.float64]

#: Percentiles that stand for a layer's distribution of block scores.
PERCENTILES = (5, 25, 50, 75, 95, 100)
#: Paper to deep blue; the page inverts it on a dark ground.
DEPTH = ["#f7f6f3", "#cfe0ee", "#8fbbdc", "#4a8cc2", "#1d5a97", "#0b2e5c"]


def score_ranges(
    layers: Sequence[tuple[int, Sequence[float], float | None]],
    limits: tuple[float, float],
    look: Look,
    *,
    numbered: bool = True,
) -> Figure:
    """Draw the block scores of one part of the model across its transformer layers.

    Parameters
    ----------
    layers : sequence of (int, 101 floats, float or None)
        Index of the transformer layer, percentiles of its block scores and the
        threshold of selection.
    limits : (float, float)
        Limits of the logarithmic axis, shared by all parts.
    look : Look
        Look of the method.
    numbered : bool
        Whether the indices mean something to a reader.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = frame(1.75, width=2.3, left=0.48, right=0.1, top=0.08, bottom=0.36)
    indices = np.array([index for index, _, _ in layers])
    table = np.array([[q[p] for p in PERCENTILES] for _, q, _ in layers])
    table = np.clip(table, *limits)
    low, lower, median, upper, high, top = table.T
    span = max(1, int(indices.max() - indices.min() + 1))
    wide = min(6.0, 0.62 * 1.72 * 72 / span)
    colour = look.colour
    axes.vlines(indices, low, high, color=colour, lw=max(0.7, wide / 6), alpha=0.55)
    axes.vlines(indices, lower, upper, color=colour, lw=wide)
    axes.plot(indices, median, ls="", marker="_", ms=wide, mew=1, color=SURFACE)
    axes.plot(indices, top, ls="", marker="o", ms=min(2.2, wide), color=colour, mew=0)
    cuts = np.array([np.nan if cut is None else cut for _, _, cut in layers], float)
    axes.plot(
        indices,
        cuts,
        ls="",
        marker="_",
        ms=1.35 * wide + 1,
        mew=1.3,
        color=THEME["frame"][0],
    )
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(in_powers)
    axes.set_xlim(indices.min() - 0.8, indices.max() + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if numbered:
        axes.set_xlabel("transformer layer", fontsize=8, labelpad=1)
    else:
        axes.set_xticks([])
    axes.tick_params(labelsize=8)
    return figure


def _magnitudes(
    axes: Axes, values: Floats, top: float, decades: int, label: str
) -> None:
    """Draw the magnitude of a matrix's entries on a logarithmic scale, and its key."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    image = axes.imshow(
        np.abs(values),
        norm=LogNorm(top / 10**decades, top, clip=True),
        cmap=LinearSegmentedColormap.from_list("depth", DEPTH),
        interpolation="none",
    )
    _plain(axes)
    place = axes.inset_axes((1.03, 0.0, 0.035, 1.0))
    key = axes.figure.colorbar(image, place, format=in_powers)
    for steps in place.collections:
        steps.set_rasterized(True)  # hundreds of rectangles
    key.outline.set_visible(False)
    key.minorticks_off()
    place.tick_params(labelsize=8, pad=1, size=0)
    axes.text(1.03, 1.03, label, transform=axes.transAxes, color=MUTED, fontsize=8)


def _plain(axes: Axes) -> None:
    """Take ticks and grid from a picture of a matrix; leave a hairline round it."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=MUTED, linewidth=0.5)


def heat_map(magnitudes: Floats, size: int, top: float) -> Figure:
    """Draw the magnitude of a matrix's entries on a logarithmic scale.

    Parameters
    ----------
    magnitudes : ndarray of float64, shape (m, m)
        Sampled or averaged from an ``(n, n)`` matrix.
    size : int
        The true ``n``, for the label.
    top : float
        Largest magnitude, where the colours end, shared by pictures to be compared.
    """
    figure, axes = frame(2.6, width=2.9, left=0.1, right=0.62, top=0.25, bottom=0.22)
    _magnitudes(axes, magnitudes, top, 4, "|entry|")
    axes.set_xlabel(f"{size} × {size}", fontsize=8, labelpad=3)
    return figure


def score_grid(values: Floats, blocks: NDArray[np.int64]) -> Figure:
    """Draw one layer's block scores in place, the chosen blocks framed.

    Parameters
    ----------
    values : ndarray of float64, shape (R, C)
        Score of each block.
    blocks : ndarray of int64, shape (k, 2)
        The chosen blocks.
    """
    rows, columns = values.shape
    width = 2.9
    side = (width - 0.9) * min(1.0, columns / rows)
    height = max(0.9, min(3.2, side * rows / columns)) + 0.5
    figure, axes = frame(
        height, width=width, left=0.28, right=0.62, top=0.25, bottom=0.25
    )
    _magnitudes(axes, values, float(values.max(initial=0.0)) or 1.0, 3, "score")
    axes.add_collection(_outline(values.shape, blocks))
    axes.set_xlabel("in", fontsize=8, labelpad=2)
    axes.set_ylabel("out", fontsize=8, labelpad=2)
    return figure


def _outline(shape: tuple[int, ...], blocks: NDArray[np.int64]) -> LineCollection:
    """Return the border between chosen blocks and others, a line an edge."""
    from matplotlib.collections import LineCollection

    chosen = np.zeros((shape[0] + 2, shape[1] + 2), dtype=bool)
    chosen[blocks[:, 0] + 1, blocks[:, 1] + 1] = True
    rows, columns = np.nonzero(chosen[1:] != chosen[:-1])
    across = np.stack([columns - 1.5, rows - 0.5, columns - 0.5, rows - 0.5], axis=1)
    rows, columns = np.nonzero(chosen[:, 1:] != chosen[:, :-1])
    down = np.stack([columns - 0.5, rows - 1.5, columns - 0.5, rows - 0.5], axis=1)
    lines = np.concatenate([across, down]).reshape(-1, 2, 2)
    return LineCollection(
        list(lines),
        colors=THEME["frame"][0],
        linewidths=1.3,
        capstyle="projecting",
        clip_on=False,
    )


class Level(NamedTuple):
    """A level of a hierarchical matrix, or its leaves: rank and bytes are its note."""

    title: str
    note: str
    colour: str


def levels_of(factor: Mapping[str, Any]) -> list[Level]:
    """Return the levels, the coarsest first, and the leaves last."""
    *sizes, leaves = [quantity(float(size), BYTES) for size in factor["level_bytes"]]
    shades = np.linspace(0, len(LEVELS) - 2, len(sizes)).round().astype(int)
    parts = zip(factor["level_ranks"], sizes, shades, strict=True)
    levels = [
        Level(f"level {number}", f"rank {rank}\n{size}", LEVELS[shade])
        for number, (rank, size, shade) in enumerate(parts)
    ]
    return [*levels, Level("leaves", f"dense\n{leaves}", LEVELS[-1])]


def _add_square(axes: Axes, x: float, y: float, size: float, colour: str) -> None:
    """Draw a block."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), size, size, fc=colour, ec=SURFACE, lw=0.7))


def _unit_square(axes: Axes) -> None:
    """Make a picture of a matrix span from 0 to 1, rows down."""
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    _plain(axes)


def block_structure(factor: Mapping[str, Any]) -> Figure:
    """Draw which blocks a hierarchical matrix keeps at each level, rank and bytes.

    An MLR matrix is a sum, so each of its terms gets a square; a HODLR matrix is one
    partition, so all levels share a square.

    Parameters
    ----------
    factor : mapping
        The ``factor`` of the results.
    """
    if str(factor["kind"]).upper() == "HODLR":
        return _partition(factor)
    from matplotlib.figure import Figure

    levels = levels_of(factor)
    across = 5 if len(levels) > 4 else 4
    down = math.ceil(len(levels) / across)
    size = (WIDTH, down * (WIDTH / across + 0.4))  # with title and note
    figure = Figure(figsize=size, layout="constrained")
    squares = figure.subplots(down, across, squeeze=False).ravel()
    for axes in squares[len(levels) :]:
        axes.remove()
    for number, (level, axes) in enumerate(zip(levels, squares, strict=False)):
        axes.set_box_aspect(1)
        # The leaves are as many as the blocks of a next level would be.
        side = 1 / 2**number
        for place in range(2**number):
            _add_square(axes, place * side, place * side, side, level.colour)
        _unit_square(axes)
        axes.set_title(level.title, fontsize=8, pad=3, loc="left")
        axes.set_xlabel(level.note, fontsize=8, labelpad=3, loc="left")
        if level is not levels[-1] and (number + 1) % across:
            axes.text(1.15, 0.5, "+", ha="center", va="center", color=MUTED)
    return figure


def _partition(factor: Mapping[str, Any]) -> Figure:
    """Draw the one partition of a HODLR matrix, its levels listed beside it."""
    from matplotlib.patches import Patch

    *levels, leaves = levels_of(factor)
    figure, axes = frame(2.3, left=0.05, right=2.2, top=0.05, bottom=0.1)
    size = 1.0
    for number, level in enumerate(levels):
        size /= 2
        for pair in range(2**number):
            start = 2 * pair * size
            _add_square(axes, start + size, start, size, level.colour)
            _add_square(axes, start, start + size, size, level.colour)
    for leaf in range(2 ** len(levels)):
        _add_square(axes, leaf * size, leaf * size, size, leaves.colour)
    _unit_square(axes)
    notes = [(level, level.note.replace("\n", ", ")) for level in (*levels, leaves)]
    _list_beside(
        axes,
        [Patch(color=level.colour, label=f"{level.title}: {x}") for level, x in notes],
    )
    return figure


def _list_beside(axes: Axes, handles: list[Any] | None = None) -> None:
    """Name what is drawn, to the right of the frame."""
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.04), frameon=False,
        fontsize=8, handlelength=1.2, handletextpad=0.5,
    )  # fmt: skip


def spectra(factor: Mapping[str, Any]) -> Figure:
    """Draw the values that each level keeps against the dense factor's spectrum."""
    figure, axes = frame(2.6, left=0.5, right=0.75)
    # In the order of the levels, the factor itself last: most curves meet at their ends.
    series = [
        (level.title, _positive(values), level.colour, 2.2)
        for level, values in zip(
            levels_of(factor), factor["singular_values"], strict=False
        )
    ]
    series.append(("dense", _positive(factor["spectrum_dense"]), INK, 0.0))
    top = max((float(v[0]) for _, v, _, _ in series if v.size), default=1.0)
    floor = top * 1e-7
    longest = max((v.size for _, v, _, _ in series), default=1)
    for name, every, colour, size in series:
        values = every[every >= floor]
        if values.size:
            axes.plot(
                np.arange(1, values.size + 1), values, "o-", ms=size, mew=0, lw=1.2,
                color=colour, label=name,
            )  # fmt: skip
    _list_beside(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlim(0.9, longest * 1.05)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(in_powers)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    axes.grid(True)
    return figure


def _positive(values: Sequence[float]) -> Floats:
    """Return the positive values, the largest first."""
    array = np.asarray([v for v in values if finite(v)], dtype=np.float64)
    return np.sort(array[array > 0])[::-1]
