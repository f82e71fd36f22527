"""Masks of the best blocks within a budget, as options say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from sylva_train._checks import (
    ConfigError,
    NonFiniteError,
    check_choice,
    check_columns,
    check_density,
    check_integer,
    check_positive,
    check_spread,
)
from sylva_train.config import SylvaConfig
from sylva_train.importance import Scores, score
from sylva_train.masks import LayerMask, Masks
from sylva_train.options import SCOPES, SUITABLE
from sylva_train.targets import shared_inputs

from .ranking import (
    best_of_all,
    caps,
    concentrate,
    share_out,
    spread_out,
    top_blocks,
)

__all__ = ["blocks_of", "check_selection", "select", "select_as"]


def with_defaults(
    scores: Scores,
    scope: str,
    max_columns: float,
    spread: float | None,
    allocation: float | None,
) -> tuple[float, float]:
    """Return ``spread`` and ``allocation``: as given, else what suits the scores' rule.

    Raises
    ------
    ConfigError
        If one cannot be used, or not together with ``scope`` or ``max_columns``.
    """
    suitable = SUITABLE.get(scores.metadata.get("importance", ""), (0.0, 0.0))
    if allocation is None:
        allocation = suitable[0] if scope == "layer" else 0.0
    if spread is None:
        spread = suitable[1] if max_columns == 1 else 0.0
    check_positive("allocation", allocation, zero=True)
    if allocation and scope != "layer":
        msg = (
            "`allocation` gives each layer a budget of its own, and with"
            f' `scope="{scope}"` all blocks compete for one: give one of them.'
        )
        raise ConfigError(msg)
    if spread and max_columns < 1:
        msg = (
            "`spread` keeps blocks apart and `max_columns` together: give one of them."
        )
        raise ConfigError(msg)
    return spread, allocation


def blocks_of(scores: Scores, block_size: int) -> dict[str, torch.Tensor]:
    """Return the layers' block scores.

    Raises
    ------
    NonFiniteError
        If one is NaN or infinite.
    """
    blocks = {name: layer.blocks(block_size) for name, layer in scores.items()}
    for name, block in blocks.items():
        if not bool(block.isfinite().all()):
            msg = f"`scores` of `{name}` are NaN or infinite: none are the highest."
            raise NonFiniteError(msg)
    return blocks


def allotted(
    blocks: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    density: float,
    allocation: float,
) -> dict[str, int]:
    """Return how many blocks each layer gets: that fraction, or by its mean score.

    ``whole`` has the scores of all blocks, ``blocks`` minus infinity where none may be.
    """
    counts = {n: math.floor(density * b.numel() + 1e-9) for n, b in blocks.items()}
    if not (allocation and blocks):
        return counts
    room = torch.tensor([int(b.isfinite().sum()) for b in blocks.values()])
    # As many in all as with the same fraction of each, where that is any.
    budget = sum(counts.values()) or math.floor(
        density * sum(b.numel() for b in blocks.values()) + 1e-9
    )
    means = torch.stack([block.mean() for block in whole.values()])
    given = share_out(means, room, budget, allocation).tolist()
    return dict(zip(blocks, given, strict=True))


def none_left(
    blocks: Mapping[str, torch.Tensor], density: float, block_size: int, *, alone: bool
) -> ConfigError:
    """Return the error of a density too small for a block, of each layer ``alone``."""
    sizes = [block.numel() for block in blocks.values()]
    has, share = f"the model has {sum(sizes)}", ""
    if alone:
        has = f"the largest layer has {max(sizes, default=0)}"
        share = ', or let the layers share a budget with `scope="model"`'
    msg = (
        f"`density` {density} leaves no whole block to train: {has} blocks of side"
        f" {block_size}. Raise `density`, or lower `block_size`{share}."
    )
    return ConfigError(msg)


def select(
    scores: Scores,
    density: float = 0.05,
    block_size: int = 32,
    scope: str = "layer",
    spread: float | None = None,
    *,
    allocation: float | None = None,
    max_columns: float = 1.0,
    together: Iterable[Iterable[str]] = (),
) -> Masks:
    """Choose the blocks with the highest scores: exactly as many as fit the budget.

    Parameters
    ----------
    scores : Scores
        From `sylva_train.score`.
    density : float
        Fraction of the blocks to train, in (0, 1]; rounded down to whole blocks, in each
        layer unless they all compete.
    block_size : int
        Side of a block.
    scope : str
        ``"layer"``: the blocks of a layer compete, and each layer keeps that fraction of
        its blocks, as in the paper, or what ``allocation`` gives it;
        ``"model"``: all blocks compete, each by its score over its layer's mean score;
        ``"absolute"``: all compete by their scores as they are, which shares the budget
        out by predicted decrease for rules that predict one (``"kfac-block"``,
        ``"kfac-natural"``).
    spread : float, optional
        Lets no row and no column of blocks have more than this many times its share,
        ``density`` of its blocks, rounded up, while others have room: rank-one scores
        heap blocks onto a few outlying dimensions. At least 1, or 0: no limit. None: 1
        for ``"kfac-natural"`` and ``"kfac-block"``, unless ``max_columns`` is below 1; no
        limit for other rules.
    allocation : float, optional
        With ``scope="layer"`` alone, the power of a layer's mean score that its density
        is proportional to: 0, the same for all layers; the larger, the more go to the
        layers with the highest scores. None: 4 for ``"kfac-natural"`` and
        ``"kfac-block"``, 0 for other rules, whose scores do not compare between layers.
    max_columns : float
        Largest fraction of a layer's block columns that may have blocks, at least
        ``density``; rounded down to whole columns, but to no fewer than ``density``
        needs. The backward pass keeps only these columns of the layer's input. Below 1
        the sum of the scores is lower: the best columns are chosen first, then the best
        blocks in them.
    together : iterable of iterables of str
        Layers that read the same input (`sylva_train.shared_inputs`), which are to have
        their blocks in the same columns if ``max_columns`` is below 1.

    Returns
    -------
    Masks

    Raises
    ------
    ConfigError
        If ``scores`` are none, an option cannot be used, a layer is smaller than a block,
        or the density is too small for a single block.
    NonFiniteError
        If a block's score is NaN or infinite.
    """
    if not isinstance(cast("object", scores), Scores):
        msg = (
            f"`scores` must be Scores, from `sylva_train.score`; got a"
            f" {type(scores).__name__}."
        )
        raise ConfigError(msg)
    check_density(density)
    check_integer("block_size", block_size, 1)
    check_choice("scope", scope, SCOPES)
    check_columns(max_columns, density)
    check_spread(spread)
    spread, allocation = with_defaults(scores, scope, max_columns, spread, allocation)
    whole = blocks_of(scores, block_size)
    blocks = whole
    if max_columns < 1:
        blocks = concentrate(whole, density, max_columns, together)
    counts = allotted(blocks, whole, density, allocation)
    preferred: dict[str, torch.Tensor | None] = dict.fromkeys(blocks)
    if spread:
        for name, block in blocks.items():
            own = counts[name] / block.numel() if allocation else density
            preferred[name] = spread_out(block, *caps(block.shape, spread * own))
    if scope == "layer":
        chosen = {
            name: top_blocks(block, counts[name], preferred[name])
            for name, block in blocks.items()
        }
    else:
        if scope == "model":
            # A mean below zero must not turn the order round.
            typical = {name: block.mean().abs() for name, block in whole.items()}
            blocks = {n: b / (typical[n] or 1) for n, b in blocks.items()}
        chosen = best_of_all(blocks, density, preferred)
    if not any(len(flat) for flat in chosen.values()):
        alone = scope == "layer" and not allocation
        raise none_left(blocks, density, block_size, alone=alone)
    masks = {
        name: LayerMask.from_flat(scores[name].shape, block_size, flat)
        for name, flat in chosen.items()
    }
    metadata = dict(scores.metadata) | {
        "density": density,
        "block_size": block_size,
        "scope": scope,
        "max_columns": max_columns,
        "spread": spread,
        "allocation": allocation,
    }
    return Masks(masks, metadata)


def select_as(
    config: SylvaConfig,
    scores: Scores,
    model: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> Masks:
    """Choose blocks as an adapter's options say; otherwise as `select`.

    Where they are to lie in few columns, layers that read one input have them in the same
    ones. Which do, one of the ``batches`` shows in ``model``.
    """
    together: list[list[str]] = []
    if config.max_columns < 1 and model is not None and batches is not None:
        patterns = config.target_modules, config.exclude_modules
        together = shared_inputs(model, next(iter(batches)), *patterns)
    return select(
        scores,
        config.density,
        config.block_size,
        config.scope,
        config.spread,
        allocation=config.allocation,
        max_columns=config.max_columns,
        together=together,
    )


def check_selection(config: SylvaConfig, model: nn.Module) -> Masks:
    """Find what scores could not be chosen by, before they are made; return blocks by lot.

    Raises
    ------
    ConfigError
        As `select` of a model's scores.
    """
    drawn = score(model, config=dataclasses.replace(config, importance="random"))
    # What suits the rule counts, not what suits chance.
    drawn.metadata["importance"] = config.importance
    return select_as(config, drawn)
