"""How far two files of scores or masks agree, layer by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from ._checks import ConfigError, check_density, check_integer
from .importance import LayerScores, Scores
from .masks import LayerMask, Masks
from .selection import blocks_of, top_blocks

__all__ = ["agreement", "best_blocks", "usual_block_size"]

#: What is told of each layer, and of all.
MEASURES = ("spearman", "overlap", "score_share")


def agreement(
    reference: Scores | Masks,
    other: Scores | Masks,
    density: float | None = None,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Hold scores or masks against others of the same model's layers.

    Of scores, the best blocks of each layer are looked at, whatever a choice by
    `sylva_train.select` would make of them: as many as ``density`` says, or, beside
    masks, as many as these have.

    Parameters
    ----------
    reference : Scores or Masks
        What is taken for right.
    other : Scores or Masks
        What is held against it.
    density : float, optional
        Fraction of each layer's blocks, in (0, 1], rounded down but at least one block;
        0.05 by default. Masks have their own.
    block_size : int, optional
        Side of a block; by default 32, or what both scores can be summed over. Masks
        have their own.

    Returns
    -------
    dict
        JSON. ``layers``, those that are in both, each with its ``shape``, its number of
        ``blocks`` that the reference chooses, and ``spearman``, the rank correlation of
        all blocks' scores; ``overlap``, the part of the reference's blocks that the other
        one has; ``score_share``, what these have of the reference's score, over what its
        own have. None stands for what cannot be told: of masks, of scores that are all
        alike or whose best are not above zero, of no blocks. ``least`` and ``median`` of
        them over the layers; ``overlap`` of all blocks together, and ``chance``, what two
        independent random choices of as many would have; ``only_reference`` and
        ``only_other``, names of layers that the other one lacks; ``density`` (None beside
        masks) and ``block_size``.

    Raises
    ------
    ConfigError
        If they have no layer in common or different shapes or blocks in one, an option
        does not fit, or an argument is something else.
    NonFiniteError
        If a score is NaN or infinite.

    Examples
    --------
    >>> import torch, sylva_train as sylva
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> config = sylva.SylvaConfig(importance="magnitude", block_size=16)
    >>> scores = sylva.score(model, config=config)
    >>> masks = sylva.select(scores, density=0.25, block_size=16)
    >>> sylva.agreement(scores, masks)["layers"]["0"]["score_share"]
    1.0
    """
    pair: list[Scores | Masks] = [reference, other]
    for name, value in zip(("reference", "other"), pair, strict=True):
        if not isinstance(cast("object", value), Scores | Masks):
            msg = f"`{name}` must be Scores or Masks; got a {type(value).__name__}."
            raise ConfigError(msg)
    shared = [name for name in reference if name in other]
    if not shared:
        msg = (
            f"they have no layer in common: {named(reference)} there,"
            f" {named(other)} here. Take those of one model."
        )
        raise ConfigError(msg)
    masks = [value for value in pair if isinstance(value, Masks)]
    if density is None:
        density = 0.05
    elif masks:
        msg = "`density` is of scores; beside masks it is theirs. Leave it out."
        raise ConfigError(msg)
    check_density(density)
    check_shapes(shared, *pair)
    pair = [type(v)({name: v[name] for name in shared}, v.metadata) for v in pair]  # type: ignore[misc]
    side = check_side(pair, shared, block_size)
    like = masks[0] if masks else None
    best, found = (best_blocks(value, side, density, like) for value in pair)
    layers = {
        name: layer_agreement([value[name] for value in pair], best[name], found[name])
        for name in shared
    }
    expected = sum(
        len(mask) * len(found[name]) / math.prod(mask.grid_shape)
        for name, mask in best.items()
    )
    chosen = best.blocks
    return {
        "density": None if masks else density,
        "block_size": side,
        "layers": layers,
        "least": over(layers.values(), min),
        "median": over(layers.values(), statistics.median),
        "overlap": best.overlap(found) if chosen else None,
        "chance": expected / chosen if chosen else None,
        "only_reference": [name for name in reference if name not in other],
        "only_other": [name for name in other if name not in reference],
    }


def layer_agreement(
    pair: Iterable[LayerScores | LayerMask], best: LayerMask, found: LayerMask
) -> dict[str, Any]:
    """Hold one layer against another, whose best blocks are these, as `agreement` does."""
    scores = [
        layer.blocks(best.block_size) if isinstance(layer, LayerScores) else None
        for layer in pair
    ]
    both = int(torch.isin(best.flat, found.flat).sum())
    return {
        "shape": list(best.shape),
        "blocks": len(best),
        "spearman": rank_correlation(*scores),
        "overlap": both / len(best) if len(best) else None,
        "score_share": score_share(scores[0], best, found),
    }


def named(layers: Iterable[str]) -> str:
    """Name the first of some layers."""
    return next((f"`{name}`" for name in layers), "none")


def over(layers: Iterable[Mapping[str, Any]], reduce: Any) -> dict[str, Any]:
    """Return the least or the median of what is known of layers."""
    layers = list(layers)
    known = {m: [x[m] for x in layers if x[m] is not None] for m in MEASURES}
    return {name: reduce(found) if found else None for name, found in known.items()}


def usual_block_size(layers: Iterable[LayerScores]) -> int:
    """Return 32, or, where scores are not to be had for that, a side that they allow."""
    layers = list(layers)
    unit = math.lcm(*(layer.unit for layer in layers))
    fixed = any(not layer.additive for layer in layers)
    least = min((min(layer.shape) for layer in layers), default=1)
    if unit == 1:
        return min(32, least)
    return 32 if not fixed and 32 % unit == 0 and least >= 32 else unit


def check_side(
    pair: Iterable[Scores | Masks], shared: Iterable[str], block_size: int | None
) -> int:
    """Return the side of a block, which masks settle.

    Raises
    ------
    ConfigError
        If masks have blocks of several sides, or of another one.
    """
    parts = [value[name] for name in shared for value in pair]
    sides = {part.block_size for part in parts if isinstance(part, LayerMask)}
    if block_size is not None:
        check_integer("block_size", block_size, 1)
        sides.add(block_size)
    if not sides:
        return usual_block_size(p for p in parts if isinstance(p, LayerScores))
    if len(sides) > 1:
        one, *_, last = sorted(sides)
        msg = (
            f"blocks of side {one} cannot be held against blocks of side {last}: masks"
            " are of the blocks that they were chosen for."
        )
        raise ConfigError(msg)
    return sides.pop()


def check_shapes(
    shared: Iterable[str], one: Scores | Masks, other: Scores | Masks
) -> None:
    """Raise `ConfigError` where a layer is of two shapes."""
    for name in shared:
        shapes = [tuple(value[name].shape) for value in (one, other)]
        if shapes[0] != shapes[1]:
            msg = (
                f"`{name}` is of shape {shapes[0]} in one and {shapes[1]} in the other;"
                " take those of one model."
            )
            raise ConfigError(msg)


def best_blocks(
    choice: Scores | Masks, block_size: int, density: float, like: Masks | None = None
) -> Masks:
    """Return the best blocks of each layer of scores; masks are what they are.

    Parameters
    ----------
    choice : Scores or Masks
        Where the blocks are from.
    block_size : int
        Side of a block.
    density : float
        Fraction of each layer's blocks, rounded down but at least one block.
    like : Masks, optional
        What says how many blocks of each of its layers instead.

    Raises
    ------
    ConfigError
        If the scores cannot be summed over such blocks.
    NonFiniteError
        If a score is NaN or infinite.
    """
    if isinstance(choice, Masks):
        return choice
    found = {}
    for name, blocks in blocks_of(choice, block_size).items():
        count = max(1, math.floor(density * blocks.numel() + 1e-9))
        if like is not None and name in like:
            count = len(like[name])
        flat = top_blocks(blocks, count)
        found[name] = LayerMask.from_flat(choice[name].shape, block_size, flat)
    return Masks(found, choice.metadata)


def score_share(
    scores: torch.Tensor | None, best: LayerMask, found: LayerMask
) -> float | None:
    """Return the score of found blocks over that of the best; None without one."""
    if scores is None:
        return None
    values = scores.flatten()
    whole, part = (float(values[mask.flat].sum()) for mask in (best, found))
    return part / whole if whole > 0 else None


def rank_correlation(
    one: torch.Tensor | None, other: torch.Tensor | None
) -> float | None:
    """Return Spearman's correlation; None where there is no order to speak of."""
    from scipy.stats import spearmanr

    if one is None or other is None or min(len(x.unique()) for x in (one, other)) < 2:
        return None
    return float(spearmanr(one.flatten().numpy(), other.flatten().numpy()).statistic)
