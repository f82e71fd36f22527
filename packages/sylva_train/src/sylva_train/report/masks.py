"""The chosen blocks of every layer, drawn in place, and what rules share of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from sylva_train.masks import LayerMask, Masks

__all__ = [
    "OUTSIDE",
    "Place",
    "chance",
    "layer_places",
    "mask_grid",
    "mask_key",
    "mask_path",
    "overlaps",
    "touched",
]

Floats = NDArray[np.float64]

#: Title of the layers outside the lists of transformer layers.
OUTSIDE = "other layers"

#: Pixels of the longest side of a matrix, and between two matrices.
LONGEST, GAP = 144, 4


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the model.

    Parameters
    ----------
    stack : str
        Name of the list of transformer layers; empty for a layer outside any.
    index : int
        Which of them; -1 outside.
    part : str
        Which of its linear layers, in as few words as tell it apart.
    """

    stack: str
    index: int
    part: str


def layer_places(names: Iterable[str]) -> dict[str, Place]:
    """Read the transformer layer and the part of it from module names.

    Parameters
    ----------
    names : iterable of str
        Such as ``"encoder.layer.3.attention.self.query"``, which is part ``"query"`` of
        layer 3.

    Returns
    -------
    dict of str to Place
        In the order of ``names``.
    """
    found = {}
    for name in names:
        match = re.match(r"(.*?)\.?\b(\d+)\.(.+)", name)
        found[name] = Place(match[1], int(match[2]), match[3]) if match else None
    parts: dict[str, set[str]] = {}
    for place in filter(None, found.values()):
        parts.setdefault(place.stack, set()).add(place.part)
    short = {
        (stack, part): _shortest(part, among)
        for stack, among in parts.items()
        for part in among
    }
    return {
        name: Place(place.stack, place.index, short[place.stack, place.part])
        if place
        else Place("", -1, name)
        for name, place in found.items()
    }


def _shortest(part: str, parts: Iterable[str]) -> str:
    """Return the shortest dotted ending that no other part shares."""
    pieces = part.split(".")
    endings = [".".join(pieces[k:]) for k in reversed(range(len(pieces)))]
    others = [f".{other}" for other in parts if other != part]
    return next(
        (e for e in endings if not any(o.endswith(f".{e}") for o in others)), part
    )


def mask_path(mask: LayerMask) -> str:
    """Draw active blocks as an SVG path to be stroked one unit wide, a run a stroke.

    Returns
    -------
    str
        Path data in units of one block; empty for no blocks.
    """
    blocks = mask.indices.numpy()
    first = np.ones(len(blocks), dtype=bool)
    first[1:] = (np.diff(blocks, axis=0) != [0, 1]).any(1)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(blocks)))
    strokes = zip(blocks[starts].tolist(), lengths.tolist(), strict=True)
    return "".join(f"M{c} {r}.5h{length}" for (r, c), length in strokes)


def active_lines(mask: LayerMask) -> list[int]:
    """Return how many block rows and block columns hold an active block."""
    return [len(lines.unique()) for lines in mask.indices.T]


def overlaps(masks: Sequence[Masks]) -> Floats:
    """Return the share of blocks that two of m masks have in common.

    Returns
    -------
    ndarray of float64, shape (m, m)
        Common blocks by the smaller of the two counts, over all layers.
    """
    shares = np.eye(len(masks))
    for i, j in itertools.combinations(range(len(masks)), 2):
        less, more = sorted((masks[i], masks[j]), key=lambda mask: mask.blocks)
        shares[i, j] = shares[j, i] = less.overlap(more) if less.blocks else 0.0
    return shares


def chance(masks: Masks) -> float:
    """Return the share of blocks that two random draws, as many a layer, have in common."""
    expected = sum(len(m) ** 2 / math.prod(m.grid_shape) for m in masks.values())
    return expected / max(1, masks.blocks)


def touched(masks: Masks) -> tuple[float, float]:
    """Return the mean share of block rows and block columns that hold a block."""
    shares = [np.divide(active_lines(m), m.grid_shape) for m in masks.values()]
    rows, columns = np.mean(shares, axis=0)
    return float(rows), float(columns)


def mask_grid(
    layers: Masks, colour: str, beside: Sequence[tuple[Masks, str]] = ()
) -> str:
    """Draw every layer's mask as HTML, one group a transformer layer.

    Parameters
    ----------
    layers : Masks
        What to draw.
    colour : str
        CSS colour of the blocks.
    beside : sequence of (Masks, str)
        Further masks of these layers, drawn into the same matrices, and their colours.

    Returns
    -------
    str
        All matrices to one scale, rows (out) down and columns (in) across.
    """
    scale = _scale(layers)

    def box(name: str) -> str:
        mask = layers[name]
        (out, width), size = mask.shape, mask.block_size
        rows, columns = active_lines(mask)
        told = escape(
            f"{name}, {out} × {width}: {len(mask)} blocks in {rows} block "
            f"rows and {columns} block columns"
        )
        more = "".join(
            f'<path style="--c:{other}" d="{mask_path(those[name])}"/>'
            for those, other in beside
        )
        # The last row and column of blocks may be ragged: the view box cuts them.
        return (
            f'<svg viewBox="0 0 {width / size:g} {out / size:g}" role="img" '
            f'aria-label="{told}"><title>{told}</title>'
            f'<path d="{mask_path(mask)}"/>{more}</svg>'
        )

    cards = "".join(
        _card(title, names, layers, scale, box)
        for title, names in _groups(layers).items()
    )
    return f'<div class="masks" style="--c:{colour}">{cards}</div>'


def mask_key(layers: Masks) -> str:
    """Draw the matrices of one transformer layer larger, with names and shapes."""
    places = layer_places(layers)
    title, names = max(_groups(layers).items(), key=lambda group: len(group[1]))

    def box(name: str) -> str:
        out, width = layers[name].shape
        words = escape(places[name].part)
        words = re.sub(r"([._])", r"\1<wbr>", words)
        kind = " class=upright" if out > 2 * width else ""
        kind = " class=flat" if width > 3 * out else kind
        return f"<span{kind}>{words}<small>{out}×{width}</small></span>"

    scale = 2 * _scale({name: layers[name] for name in names})
    card = _card(f"Key: {title}", names, layers, scale, box)
    return f'<div class="masks key">{card}</div>'


def _scale(layers: Mapping[str, LayerMask]) -> float:
    """Return pixels a weight."""
    return LONGEST / max(max(mask.shape) for mask in layers.values())


def _groups(layers: Masks) -> dict[str, list[str]]:
    """Return layer names by transformer layer."""
    places = layer_places(layers)
    stacks = {place.stack for place in places.values() if place.index >= 0}
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        title = OUTSIDE
        if place.index >= 0:
            stack = f"{place.stack.split('.')[0]} " if len(stacks) > 1 else ""
            title = f"{stack}layer {place.index}"
        groups.setdefault(title, []).append(name)
    return groups


def _card(
    title: str,
    names: Sequence[str],
    layers: Masks,
    scale: float,
    box: Callable[[str], str],
) -> str:
    """Lay out one transformer layer: tall matrices beside rows of the others."""
    sizes = {
        name: [max(scale * side, GAP) for side in layers[name].shape] for name in names
    }
    tall = [name for name in names if sizes[name][0] > 1.6 * sizes[name][1]]
    rest = sorted(set(names) - set(tall), key=names.index)
    rest.sort(key=lambda name: (sizes[name][1], -sizes[name][0]))
    columns = []
    for items in filter(None, (tall, rest)):
        widths = [sizes[name][1] for name in items]
        # Rows of the narrowest about as wide as the widest, or as they are many.
        step = min(widths) + GAP
        across = max(math.ceil(max(widths) / step), math.ceil(math.sqrt(len(items))))
        limit = sum(widths) + GAP * len(items) if items is tall else across * step
        boxes = "".join(
            f'<div class="mask" style="width:{sizes[name][1]:.1f}px;'
            f'height:{sizes[name][0]:.1f}px">{box(name)}</div>'
            for name in items
        )
        columns.append(f'<div style="max-width:{limit:.0f}px">{boxes}</div>')
    return (
        f'<figure class="card"><figcaption class="name">{escape(title)}</figcaption>'
        f"<div>{''.join(columns)}</div></figure>"
    )
