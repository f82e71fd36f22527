"""Scoring a model's layers by one rule, or by several in one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sylva_train._checks import ConfigError, check_choice
from sylva_train.config import IMPORTANCES, KRONECKER, NEEDS_DATA, SylvaConfig
from sylva_train.curvature import LayerCurvature, collect_curvature
from sylva_train.targets import check_block_size, find_targets, weight_view

from .rules import RULES, Inputs
from .scores import LayerScores, Scores, check_finite

__all__ = ["score", "score_rules"]


def score(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    config: SylvaConfig | None = None,
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score the weights of a pretrained model by how much they matter for a task.

    Parameters
    ----------
    model : torch.nn.Module
        The pretrained model; nothing in it is changed. It is run in evaluation mode.
    dataloader : iterable of mappings, optional
        Batches with ``labels``, at least ``config.samples`` sequences of them or as many
        as there are. Not needed by the rules ``"magnitude"`` and ``"random"``.
    config : SylvaConfig, optional
        Targets, rule and its options.
    loss : callable, optional
        Mean loss of (model, batch), where the model does not compute its own.
    progress : callable, optional
        Called with (samples done, samples in all).

    Returns
    -------
    Scores

    Raises
    ------
    TargetError
        If no layer matches, or one that matches cannot be used.
    ConfigError
        If a layer is smaller than a block, or the rule needs data and got none.
    DataError
        If the data is empty or has no labels.
    NonFiniteError
        If the loss, an activation or a gradient is NaN or infinite.

    Notes
    -----
    Rules, for a weight matrix ``W`` with mean gradient ``Γ`` and damped Kronecker factors
    ``A``, ``G`` of its Fisher matrix, each summed over blocks: ``"kfac"`` the product of
    row and column importance (Mu et al. 2024, eq. 18-20); ``"kfac-block"`` the decrease
    that training a block alone gives, ``tr(Γ_abᵀ G_aa⁻¹ Γ_ab A_bb⁻¹)``;
    ``"kfac-natural"`` the natural gradient's decrease, ``Γ ∘ G⁻¹ Γ A⁻¹``;
    ``"kfac-element"`` ``Γ² / (diag G⁻¹ · diag A⁻¹)``; ``"fisher-diag"`` the mean squared
    per-sample gradient (Sung et al. 2021, FISH); ``"magnitude"`` ``|W|``; ``"wanda"``
    ``|W|`` times the inputs' root mean square (Sun et al. 2024); ``"gradient"`` ``|Γ|``;
    ``"weight-gradient"`` ``|W ∘ Γ|`` (Molchanov et al. 2019, first order); ``"random"``;
    and ``"kfac-pruner"`` the saliency ``W² / (diag A⁻¹ · diag G⁻¹)``.

    Examples
    --------
    >>> import torch, sylva_train as sylva
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> config = sylva.SylvaConfig(importance="magnitude", block_size=16)
    >>> sylva.select(sylva.score(model, config=config), density=0.25, block_size=16)
    Masks(2 layers, 8 blocks, 2,048 of 8,192 weights = 25.00%)
    """
    config = config or SylvaConfig()
    rule = config.importance
    return score_rules(model, dataloader, config, [rule], loss=loss, progress=progress)[
        rule
    ]


def score_rules(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    config: SylvaConfig,
    rules: Sequence[str],
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Scores]:
    """Score by several rules in one pass over the data.

    Parameters
    ----------
    model, dataloader, loss, progress
        As for `score`.
    config : SylvaConfig
        As for `score`; its own rule does not count.
    rules : sequence of str
        Of `sylva_train.config.IMPORTANCES`.

    Returns
    -------
    dict of str to Scores
        What `score` gives for each rule.

    Raises
    ------
    TargetError, ConfigError, DataError, NonFiniteError
        As `score`.
    """
    for rule in rules:
        check_choice("rules", rule, IMPORTANCES)
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    check_block_size(targets, config.block_size)
    seen = 0
    layers = dict.fromkeys(targets, LayerCurvature())
    needy = [rule for rule in rules if rule in NEEDS_DATA]
    if needy:
        if dataloader is None:
            msg = (
                f"`importance` {needy[0]!r} needs labelled samples: pass `dataloader`, or"
                ' use "magnitude" or "random".'
            )
            raise ConfigError(msg)
        wanted = {statistic for rule in needy for statistic in RULES[rule][1]}
        layers, seen = collect_curvature(
            model, targets, dataloader, config, wanted, loss=loss, progress=progress
        )
    generator = torch.Generator().manual_seed(config.seed)
    found: dict[str, dict[str, LayerScores]] = {rule: {} for rule in rules}
    bad = 0
    for name, module in targets.items():
        # One for all rules: they share the inverse diagonals.
        inputs = Inputs(weight_view(module), layers[name], config, generator)
        for rule in rules:
            found[rule][name] = RULES[rule][0](inputs)
        bad += inputs.indefinite
    if bad:
        warnings.warn(
            f"{bad} entries of the inverse diagonals are not positive: truncated HODLR"
            " factors are indefinite, and scores that divide by them are noise."
            ' `curvature="mlr"` stays positive definite.',
            stacklevel=3,
        )
    options = ("curvature", "levels", "rank", "tokens", "damping", "seed")
    common = {name: getattr(config, name) for name in options}
    for scores in found.values():
        check_finite(scores)
    return {
        rule: Scores(
            scores,
            {
                "importance": rule,
                **common,
                "samples": seen if rule in NEEDS_DATA else 0,
                "indefinite": bad if rule in KRONECKER else 0,
            },
        )
        for rule, scores in found.items()
    }
