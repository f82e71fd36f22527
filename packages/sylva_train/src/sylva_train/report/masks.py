"""The chosen blocks of every layer, drawn in place, and what rules share of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "OUTSIDE",
    "Place",
    "active_lines",
    "chance",
    "layer_places",
    "mask_grid",
    "mask_key",
    "mask_path",
    "overlaps",
    "touched",
]

Floats = NDArray[np.float64]

#: Layer name to mask, as in the results.
Layers = Mapping[str, Mapping[str, Any]]

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


def mask_path(indices: Sequence[Sequence[int]]) -> str:
    """Draw blocks as an SVG path to be stroked one unit wide, a run a stroke.

    Parameters
    ----------
    indices : sequence of (int, int), length k
        Block row and block column of the active blocks.

    Returns
    -------
    str
        Path data in units of one block; empty for no blocks.
    """
    blocks = np.asarray(indices, dtype=np.int64).reshape(-1, 2)
    blocks = blocks[np.lexsort((blocks[:, 1], blocks[:, 0]))]
    first = np.ones(len(blocks), dtype=bool)
    first[1:] = (np.diff(blocks, axis=0) != [0, 1]).any(1)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(blocks)))
    strokes = zip(blocks[starts].tolist(), lengths.tolist(), strict=True)
    return "".join(f"M{c} {r}.5h{length}" for (r, c), length in strokes)


def active_lines(mask: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many block rows and block columns hold an active block."""
    blocks = np.asarray(mask["indices"], dtype=np.int64).reshape(-1, 2)
    return len(np.unique(blocks[:, 0])), len(np.unique(blocks[:, 1]))


def overlaps(masks: Mapping[str, Mapping[str, Any]]) -> Floats:
    """Return the share of blocks that two methods have in common.

    Parameters
    ----------
    masks : mapping of m methods
        Layer name to mask, for each method.

    Returns
    -------
    ndarray of float64, shape (m, m)
        Common blocks by the smaller of the two counts, over all layers.
    """
    names = {
        name: place for place, name in enumerate(sorted(set().union(*masks.values())))
    }
    codes = []
    for layers in masks.values():
        code = [
            np.asarray(mask["indices"], dtype=np.int64).reshape(-1, 2) @ [1 << 20, 1]
            + (names[name] << 40)
            for name, mask in layers.items()
        ]
        codes.append(np.concatenate([np.zeros(0, dtype=np.int64), *code]))
    shares = np.eye(len(codes))
    for i, j in itertools.combinations(range(len(codes)), 2):
        common = len(np.intersect1d(codes[i], codes[j]))
        shares[i, j] = shares[j, i] = common / max(1, min(len(codes[i]), len(codes[j])))
    return shares


def chance(layers: Layers) -> float:
    """Return the share of blocks that two random draws, as many a layer, have in common."""
    counts = np.array([len(mask["indices"]) for mask in layers.values()], dtype=float)
    totals = [
        math.prod(-(-side // mask["block_size"]) for side in mask["shape"])
        for mask in layers.values()
    ]
    return float((counts**2 / totals).sum() / max(1.0, counts.sum()))


def touched(layers: Layers) -> tuple[float, float]:
    """Return the mean share of block rows and block columns that hold a block."""
    shares = [
        (
            rows / -(-mask["shape"][0] // mask["block_size"]),
            columns / -(-mask["shape"][1] // mask["block_size"]),
        )
        for mask in layers.values()
        for rows, columns in [active_lines(mask)]
    ]
    rows, columns = np.mean(shares, axis=0)
    return float(rows), float(columns)


def mask_grid(
    layers: Layers, colour: str, beside: Sequence[tuple[Layers, str]] = ()
) -> str:
    """Draw every layer's mask as HTML, one group a transformer layer.

    Parameters
    ----------
    layers : mapping
        Layer name to mask.
    colour : str
        CSS colour of the blocks.
    beside : sequence of (mapping, str)
        Further masks of these layers, drawn into the same matrices, and their colours.

    Returns
    -------
    str
        All matrices to one scale, rows (out) down and columns (in) across.
    """
    scale = _scale(layers)

    def box(name: str) -> str:
        mask = layers[name]
        out, width = mask["shape"]
        size = mask["block_size"]
        rows, columns = active_lines(mask)
        told = escape(
            f"{name}, {out} × {width}: {len(mask['indices'])} blocks in {rows} block "
            f"rows and {columns} block columns"
        )
        more = "".join(
            f'<path style="--c:{other}" d="{mask_path(those[name]["indices"])}"/>'
            for those, other in beside
        )
        # The last row and column of blocks may be ragged: the view box cuts them.
        return (
            f'<svg viewBox="0 0 {width / size:g} {out / size:g}" role="img" '
            f'aria-label="{told}"><title>{told}</title>'
            f'<path d="{mask_path(mask["indices"])}"/>{more}</svg>'
        )

    cards = "".join(
        _card(title, names, layers, scale, box)
        for title, names in _groups(layers).items()
    )
    return f'<div class="masks" style="--c:{colour}">{cards}</div>'


def mask_key(layers: Layers) -> str:
    """Draw the matrices of one transformer layer larger, with names and shapes."""
    places = layer_places(layers)
    title, names = max(_groups(layers).items(), key=lambda group: len(group[1]))

    def box(name: str) -> str:
        out, width = layers[name]["shape"]
        words = escape(places[name].part)
        words = re.sub(r"([._])", r"\1<wbr>", words)
        kind = " class=upright" if out > 2 * width else ""
        return f"<span{kind}>{words}<small>{out}×{width}</small></span>"

    card = _card(f"Key: {title}", names, layers, 2 * _scale(layers), box)
    return f'<div class="masks key">{card}</div>'


def _scale(layers: Layers) -> float:
    """Return pixels a weight."""
    return LONGEST / max(float(max(mask["shape"])) for mask in layers.values())


def _groups(layers: Layers) -> dict[str, list[str]]:
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
    layers: Layers,
    scale: float,
    box: Callable[[str], str],
) -> str:
    """Lay out one transformer layer: tall matrices beside rows of the others."""
    sizes = {
        name: [max(scale * side, GAP) for side in layers[name]["shape"]]
        for name in names
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
        f'<figure class="card"><h4>{escape(title)}</h4>'
        f"<div>{''.join(columns)}</div></figure>"
    )
