"""Files of scores or masks as one HTML page: their blocks, scores and agreement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from sylva_train._files import write_text
from sylva_train.comparison import FORMAT
from sylva_train.masks import LayerMask, Masks

from . import layers, masks
from .headline import Headline
from .page import document
from .page_parts import Page, section, table

__all__ = ["AGREEMENT", "agreement_cells", "write_choices"]

#: Columns of what is told of a layer.
AGREEMENT = ("Spearman", "overlap", "of score")
#: Colour of the blocks that both have; one's own have the colour it has elsewhere.
BOTH = "var(--navy)"

#: A file's name, and its masks and scores as in the results of a comparison.
Choice = tuple[str, Mapping[str, Any]]


def write_choices(
    choices: Sequence[Choice],
    path: str | os.PathLike[str],
    agreement: Mapping[str, Any] | None = None,
) -> Path:
    """Draw one choice of blocks, or two that are held against each other, as a page.

    Parameters
    ----------
    choices : sequence of (str, mapping), one or two
        For each file its name, and its ``masks`` and, where it has them, the ``scores``
        of their blocks, as in the results of a comparison. The first one is held against
        the second.
    path : path-like
        The file; replaced if it exists, and only by a whole page.
    agreement : mapping, optional
        What `sylva_train.agreement` tells of the two.

    Returns
    -------
    pathlib.Path
        The file.
    """
    # The page of a comparison, of runs that have measured nothing.
    results: dict[str, Any] = {"format": FORMAT, "runs": [], "masks": {}, "scores": {}}
    for method, (name, choice) in zip("ab", choices, strict=False):
        results["runs"].append({"method": method, "label": name, "seed": 0})
        for kind in choice:
            results[kind][method] = choice[kind]
    page = Page(results)
    sections = [layers.chosen_blocks(page), layers.block_scores(page)]
    if agreement is not None:
        sections.insert(0, agreed(page, agreement))
    names = " · ".join(name for name, _ in choices)
    text = document("Sylva blocks", names, title(page, agreement), sections)
    write_text(path, text)
    return Path(path)


def title(page: Page, agreement: Mapping[str, Any] | None) -> Headline:
    """Return what the page says first."""
    if agreement is None:
        (grid,) = page.masks.values()
        return Headline(f"{grid.blocks:,} blocks in {len(grid)} layers", (), ())
    medians = agreement["median"]
    figures = [
        (fraction(agreement["chance"]), "would be the same by chance"),
        (number(medians["spearman"]), "rank correlation, median layer"),
        (fraction(medians["score_share"]), "of the score, median layer"),
    ]
    return Headline(
        f"{fraction(agreement['overlap'])} of the blocks are the same",
        (),
        tuple((value, words) for value, words in figures if value != "-"),
    )


def agreed(page: Page, agreement: Mapping[str, Any]) -> str:
    """Return the blocks of both in one picture, and a table of the layers."""
    here, there = map(escape, page.labels.values())
    one, other = page.masks.values()
    own, others = (f"var(--{page.looks[method].name})" for method in page.masks)
    found = agreement["layers"]
    both, mine, theirs = divided({n: (one[n], other[n]) for n in found})
    swatch = '<i class="swatch" style="--c:{}"></i>'
    key = (
        f'<p class="note">{swatch.format(BOTH)}in both, {swatch.format(own)}only in'
        f" {here}, {swatch.format(others)}only in {there}.</p>"
    )
    drawn = both.blocks + mine.blocks + theirs.blocks
    picture = (
        masks.mask_grid(both, BOTH, [(mine, own), (theirs, others)])
        if drawn <= layers.MOST_BLOCKS
        else ""
    )
    rows = [
        (name, f"{layer['blocks']:,}", *agreement_cells(layer))
        for name, layer in found.items()
    ]
    rows += [
        (name, "", *agreement_cells(agreement[name])) for name in ("least", "median")
    ]
    heads = "".join(
        f"<th scope=col>{name}</th>" for name in ("layer", "blocks", *AGREEMENT)
    )
    lines = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{value}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    )
    note = (
        f"Overlap: the part of the blocks of {there} that {here} has. Of score: what"
        f" these have of the score of {there}, over what its own have."
    )
    return section(
        "How far they agree",
        f"{key if picture else ''}{picture}{table('summary', heads, lines)}"
        f'<p class="note">{note}</p>',
    )


def agreement_cells(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Print what `sylva_train.agreement` tells of a layer, as `AGREEMENT` names it."""
    return (
        number(layer["spearman"]),
        fraction(layer["overlap"]),
        fraction(layer["score_share"]),
    )


def number(value: float | None) -> str:
    """Print a correlation."""
    return "-" if value is None else f"{value:.3f}"


def fraction(value: float | None) -> str:
    """Print a fraction in percent."""
    return "-" if value is None else f"{value:.1%}"


def divided(pairs: Mapping[str, tuple[LayerMask, LayerMask]]) -> list[Masks]:
    """Return the blocks that both have, and those that only one has."""
    parts: tuple[dict[str, LayerMask], ...] = ({}, {}, {})
    for name, (one, other) in pairs.items():
        shared = torch.isin(one.flat, other.flat)
        alone = ~torch.isin(other.flat, one.flat)
        blocks = one.indices[shared], one.indices[~shared], other.indices[alone]
        for part, indices in zip(parts, blocks, strict=True):
            part[name] = LayerMask(one.shape, one.block_size, indices)
    return [Masks(part) for part in parts]
