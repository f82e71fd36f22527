"""Choices that ``study_rules.py`` tries beside the package's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sylva_train import Scores, SylvaConfig
from sylva_train.curvature import block_sums, collect_curvature, loss_units
from sylva_train.importance import LayerScores
from sylva_train.targets import find_targets


def in_layers(blocks: Scores, layers: Scores, size: int) -> Scores:
    """Give the blocks of a layer the order of the one, and the mean of the other."""
    made = {}
    for name, other in layers.items():
        grid = blocks[name].blocks(size)
        grid += other.blocks(size).mean() - grid.mean()
        made[name] = LayerScores(other.shape, grid=grid, unit=size)
    return Scores(made, blocks.metadata)


def shuffled(scores: Scores, size: int, sides: Sequence[int], seed: int) -> Scores:
    """Put each layer's block rows (side 0) or columns (1), or both, in random order."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in scores.items():
        grid = layer.blocks(size)
        for side in sides:
            order = torch.randperm(grid.shape[side], generator=generator)
            grid = grid.index_select(side, order)
        made[name] = LayerScores(layer.shape, grid=grid, unit=size)
    return Scores(made, scores.metadata)


def unbiased(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], config: SylvaConfig
) -> Scores:
    """Score as `kfac-natural` does, without what the gradient's noise adds to it.

    By ``(Γ₁ ∘ G⁻¹ Γ₂ A⁻¹ + Γ₂ ∘ G⁻¹ Γ₁ A⁻¹) / 2``: the gradients of every other batch and
    of the rest have noise of their own, which their product does not add up as a square.
    """
    targets = find_targets(model)
    whole = collect_curvature(model, targets, batches, config, ["factors", "gradient"])
    half = collect_curvature(model, targets, batches[::2], config, ["gradient"])
    terms, others = (
        sum(loss_units(model, batch) for batch in part)
        for part in (batches[::2], batches[1::2])
    )
    scores = {}
    for name in targets:
        A, G = whole[name].A, whole[name].G
        λ_A, λ_G = (config.damping * factor.mean_eigenvalue() for factor in (A, G))
        total, first = (part[name].gradient.double() for part in (whole, half))
        second = ((terms + others) * total - terms * first) / others
        products = (
            one * G.solve(A.solve(other.T, λ_A).T, λ_G)
            for one, other in ((first, second), (second, first))
        )
        grid = block_sums(sum(products) / 2, config.block_size)
        scores[name] = LayerScores(
            tuple(total.shape), grid=grid, unit=config.block_size
        )
    return Scores(scores, {"importance": "kfac-natural-unbiased"})
