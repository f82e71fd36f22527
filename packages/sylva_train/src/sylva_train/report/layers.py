"""Sections of the page that look into the model: masks, block scores, one factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np

from sylva_train.masks import LayerMask, Masks

from . import masks, structure
from .page_parts import Page, cells, facts, pair, section, table
from .summary import BYTES, finite, percentage, quantity

__all__ = ["block_scores", "chosen_blocks", "factor"]

#: Blocks drawn in all masks together, the best rule's aside, to bound the page's size.
MOST_BLOCKS = 150_000

#: The two Kronecker factors of a layer.
SIDES = {"in": "A, of the inputs", "out": "G, of the output gradients"}


#: Transformer layer, percentiles of its block scores, threshold.
Range = tuple[int, Sequence[float], float | None]


def chosen_blocks(page: Page) -> str:
    """Return the masks over the layers: the best rule's, the others' folded away."""
    every = page.masks
    if not every:
        return ""
    first = page.best if page.best in every else next(iter(every))
    intro = (
        "Every rectangle is a weight matrix, rows (out) down and columns (in) across, "
        "all to one scale. Filled: the trained blocks, where they lie"
        f"{', of the first seed' if page.several else ''}."
    )
    parts = [f'<p class="lede">{intro}</p>', masks.mask_key(every[first])]
    drawn = 0
    for method in (first, *(other for other in every if other != first)):
        grid = every[method]
        drawn += grid.blocks
        name, body = page.named(method), _mask_body(page, method, grid)
        if method == first:
            parts.append(f"<h3>{name}</h3>{body}")
        elif drawn > MOST_BLOCKS:
            left_out = "left out, to keep the page small."
            parts.append(f'<p class="note">{name}: {left_out}</p>')
        else:
            state = " open" if len(every) == 2 and len(grid) <= 100 else ""
            parts.append(f"<details{state}><summary>{name}</summary>{body}</details>")
    return section("The chosen blocks", "".join(parts) + _overlap(page, every))


def _mask_body(page: Page, method: str, grid: Masks) -> str:
    """Return one method's masks under the share of rows and columns they touch."""
    rows, columns = masks.touched(grid)
    colour = f"var(--{page.looks[method].name})"
    return (
        f'<p class="note">In the mean matrix the blocks touch {rows:.0%} of the block '
        f"rows and {columns:.0%} of the block columns.</p>"
        f"{masks.mask_grid(grid, colour)}"
    )


def _overlap(page: Page, every: Mapping[str, Masks]) -> str:
    """Return which share of their blocks the rules have in common."""
    methods = list(every)
    if len(methods) < 2:
        return ""
    shares = 100 * masks.overlaps(list(every.values()))
    expected = 100 * masks.chance(every[methods[0]])
    chance = f" Two independent random draws would share about {expected:.2g}%."
    if len(methods) == 2:
        one, other = (escape(page.labels[method]) for method in methods)
        text = f"{one} and {other} share {shares[0, 1]:.0f}% of their blocks.{chance}"
        return f'<p class="note">{text}</p>'
    heads = "".join(f"<th scope=col>{n + 1}</th>" for n in range(len(methods) - 1))
    lines = "".join(
        f"<tr><th scope=row><span><small>{place + 1}</small>{page.named(method)}</span>"
        "</th>"
        + "".join(
            f'<td style="--v:{share:.0f}%">{share:.0f}</td>'
            for share in shares[place, :place]
        )
        + "</tr>"
        for place, method in enumerate(methods)
    )
    note = f"Of the smaller mask, over all layers; first seed.{chance}"
    return (
        "<h3>Blocks that two rules have in common, %</h3>"
        f"{table('overlap', f'<th></th>{heads}', lines)}"
        f'<p class="note">{note}</p>'
    )


def block_scores(page: Page) -> str:
    """Return the block scores of one rule: the best, unless that is the control."""
    every = page.by_method("scores")
    control = {row.method for row in page.rows if row.is_random}
    scored = [method for method in every if method not in control] or list(every)
    if not scored:
        return ""
    method = page.best if page.best in scored else scored[0]
    grid = every[method]
    pictures = _score_pictures(page, method, grid)
    examples = _example(page, method, grid)
    if not pictures and not examples:
        return ""
    text = (
        "For each matrix: thick bar, the middle half of its block scores, its gap the "
        "median; thin line, 5th to 95th percentile; dot, the largest; wide tick, the threshold above which "
        "a block is trained. One logarithmic scale for all, in the rule's own unit."
    )
    lede = f'<p class="lede">{page.named(method)}. {text}</p>' if pictures else ""
    return section("Block scores", f"{lede}{cells(pictures)}{examples}")


def _score_pictures(page: Page, method: str, grid: Mapping[str, Any]) -> list[str]:
    """Return a picture for each part of a layer, all on one scale."""
    parts = _ranges(grid)
    values = [
        quantiles[p]
        for part in parts.values()
        for _, quantiles, _ in part
        for p in structure.PERCENTILES
    ]
    positive = [value for value in values if finite(value) and value > 0]
    if not positive:
        return []
    limits = min(positive) / 1.5, max(positive) * 1.5
    return [
        page.cell(
            partial(
                structure.score_ranges,
                found,
                limits,
                page.looks[method],
                numbered=part != masks.OUTSIDE,
            ),
            escape(part),
            f"Block scores of {part} by transformer layer",
        )
        for part, found in parts.items()
    ]


def _ranges(grid: Mapping[str, Any]) -> dict[str, list[Range]]:
    """Return transformer layer, percentiles and threshold for each part of a layer."""
    places = masks.layer_places(grid)
    stacks = {place.stack for place in places.values() if place.index >= 0}
    parts: dict[str, list[Range]] = {}
    for order, (name, place) in enumerate(places.items()):
        quantiles = grid[name].get("block_scores_quantiles")
        if quantiles:
            stack = f"{place.stack.split('.')[0]}: " if len(stacks) > 1 else ""
            inside = place.index >= 0
            part = f"{stack}{place.part}" if inside else masks.OUTSIDE
            index = place.index if inside else order
            entry = (index, quantiles, grid[name].get("threshold"))
            parts.setdefault(part, []).append(entry)
    return {part: sorted(found, key=lambda e: e[0]) for part, found in parts.items()}


def _example(page: Page, method: str, grid: Mapping[str, Any]) -> str:
    """Return the block scores of the matrix that has them all, in place and sorted."""
    name = next((name for name in grid if grid[name].get("grid")), None)
    if name is None:
        return ""
    chosen: Mapping[str, LayerMask] = page.masks.get(method, {})
    blocks = np.zeros((0, 2), dtype=np.int64)
    if name in chosen:
        blocks = chosen[name].indices.numpy()
    values = np.asarray(grid[name]["grid"], dtype=np.float64)
    rows, columns = np.argsort(-values.sum(1)), np.argsort(-values.sum(0))
    moved = np.stack(
        [np.argsort(rows)[blocks[:, 0]], np.argsort(columns)[blocks[:, 1]]], axis=1
    )
    place = masks.layer_places(grid)[name]
    short = f"layer {place.index}, {place.part}" if place.index >= 0 else name
    return pair(
        [
            page.picture(
                partial(structure.score_grid, values, blocks),
                f"One matrix: {short}",
                "Block scores in place. Framed: the trained blocks.",
            ),
            page.picture(
                partial(structure.score_grid, values[rows][:, columns], moved),
                "The same, sorted",
                "Block rows and columns by their total score. Where a score is a row's "
                "times a column's, the chosen blocks form a staircase.",
            ),
        ],
        "pair small",
    )


def factor(page: Page) -> str:
    """Return a Kronecker factor beside its hierarchical form."""
    found: Mapping[str, Any] | None = page.results.get("factor")
    if not found:
        return ""
    stored, whole = float(found["bytes"]), float(found["dense_bytes"])
    pairs = [
        ("layer", found["layer"]),
        ("factor", SIDES[found["side"]]),
        ("size", f"{quantity(stored, BYTES)} ({stored / whole:.0%} of dense)"),
        ("relative Frobenius error", percentage(float(found["error"]))),
    ]
    intro = (
        "K-FAC scores divide by the inverse of two covariances a layer. They are kept "
        "in hierarchical form; this is one of them. Both maps show the magnitude of "
        "entries on one logarithmic scale."
    )
    return section(
        "Inside a Kronecker factor",
        f'<p class="lede">{intro}</p>{facts(pairs)}'
        f"{pair(_entries(page, found), 'pair small')}{pair(_levels(page, found))}",
    )


def _entries(page: Page, found: Mapping[str, Any]) -> list[str]:
    """Return maps of a factor's entries: of the factor itself, and as it is kept."""
    dense = np.asarray(found["magnitude"], dtype=np.float64)
    top = float(dense.max(initial=0.0)) or 1.0
    maps = {"Dense": dense}
    if int(found["levels"]):
        maps[f"As {found['kind']}"] = np.asarray(found["approximation"])
    return [
        page.picture(partial(structure.heat_map, values, int(found["n"]), top), title)
        for title, values in maps.items()
    ]


def _levels(page: Page, found: Mapping[str, Any]) -> list[str]:
    """Return pictures of a factor's levels: their blocks, and their spectra."""
    kind, pictures = str(found["kind"]), []
    if int(found["levels"]):
        words = (
            "A partition: off-diagonal blocks of low rank, dense leaves."
            if kind.upper() == "HODLR"
            else "A sum of block diagonals: each level adds low-rank blocks half the "
            "size, the leaves are dense."
        )
        draw = partial(structure.block_structure, found)
        pictures.append(page.picture(draw, f"{kind}, level by level", words))
    pictures.append(
        page.picture(
            partial(structure.spectra, found),
            "Spectrum of each level",
            "All blocks of a level together, largest first, and the dense factor. "
            "Values below 10⁻⁷ of the largest are not drawn.",
        )
    )
    return pictures
