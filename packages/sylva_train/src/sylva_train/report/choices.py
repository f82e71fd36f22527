"""Files of scores or masks as one HTML page: their blocks, scores and agreement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sylva_train._checks import atomic_write

from . import layers, masks
from .headline import Headline
from .page import document
from .parts import Page, section
from .summary import FORMAT

__all__ = ["write_choices"]

#: Columns of the table of layers.
COLUMNS = ("layer", "blocks", "Spearman", "overlap", "of score")
#: Colours of the blocks that both have, and that one has.
BOTH, HERE, THERE = "var(--navy)", "var(--orange)", "var(--sky)"

#: A file's name, and its masks and scores.
Choice = tuple[str, Mapping[str, masks.Layers]]


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
        sections.insert(0, agreed(agreement, choices))
    names = [name for name, _ in choices]
    text = document(
        "Sylva blocks", " · ".join(names), title(choices, agreement), sections
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def title(choices: Sequence[Choice], agreement: Mapping[str, Any] | None) -> Headline:
    """Return what the page says first."""
    if agreement is None:
        grid = choices[0][1]["masks"]
        count = sum(len(mask["indices"]) for mask in grid.values())
        return Headline(f"{count:,} blocks in {len(grid)} layers", (), ())
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


def agreed(agreement: Mapping[str, Any], choices: Sequence[Choice]) -> str:
    """Return the blocks of both in one picture, and a table of the layers."""
    here, there = (escape(name) for name, _ in choices)
    one, other = (choice["masks"] for _, choice in choices)
    found = agreement["layers"]
    both, mine, theirs = divided(
        {n: one[n] for n in found}, {n: other[n] for n in found}
    )
    swatch = '<i class="swatch" style="--c:{}"></i>'
    key = (
        f'<p class="note">{swatch.format(BOTH)}in both, {swatch.format(HERE)}only in'
        f" {here}, {swatch.format(THERE)}only in {there}.</p>"
    )
    drawn = sum(
        len(mask["indices"]) for grid in (both, mine, theirs) for mask in grid.values()
    )
    picture = (
        masks.mask_grid(both, BOTH, [(mine, HERE), (theirs, THERE)])
        if drawn <= layers.MOST_BLOCKS
        else ""
    )
    rows = [
        (name, f"{layer['blocks']:,}", *cells(layer)) for name, layer in found.items()
    ]
    rows += [(name, "", *cells(agreement[name])) for name in ("least", "median")]
    heads = "".join(f"<th scope=col>{name}</th>" for name in COLUMNS)
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
        f"{key if picture else ''}{picture}"
        '<div class="scroll"><table class="summary">'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
        f'<p class="note">{note}</p>',
    )


def cells(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Print what is told of a layer."""
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


def divided(
    one: masks.Layers, other: masks.Layers
) -> tuple[masks.Layers, masks.Layers, masks.Layers]:
    """Return the blocks that both have, and those that only one has."""
    found: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, mask in one.items():
        pair = [
            np.asarray(m["indices"], dtype=np.int64).reshape(-1, 2)
            for m in (mask, other[name])
        ]
        mine, theirs = (blocks[:, 0] << 32 | blocks[:, 1] for blocks in pair)
        shared = np.isin(mine, theirs)
        parts = pair[0][shared], pair[0][~shared], pair[1][~np.isin(theirs, mine)]
        for grid, blocks in zip(found, parts, strict=True):
            grid[name] = {**mask, "indices": blocks}
    return found  # type: ignore[return-value]
