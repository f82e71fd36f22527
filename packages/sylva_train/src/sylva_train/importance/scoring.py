"""Scoring a model's layers by one rule, or by several in one pass over the data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sylva_train._checks import ConfigError, TargetError, check_choice
from sylva_train.config import SylvaConfig
from sylva_train.curvature import (
    LayerCurvature,
    Loss,
    Store,
    collect_curvature,
    not_reached,
    settings,
)
from sylva_train.options import (
    EVERYTHING,
    FACTORS,
    IMPORTANCES,
    KRONECKER,
    NEEDS_DATA,
    SCORING,
)
from sylva_train.processes import from_first, is_first, together
from sylva_train.progress import Report
from sylva_train.targets import (
    check_block_size,
    check_weights,
    find_targets,
    is_patched,
    is_plain,
    loaded_weight,
    warn_of_others,
    warn_of_strays,
)

from .rules import RULES, Inputs
from .scores import LayerScores, Scores, check_finite

__all__ = ["score", "score_rules"]

#: File of the layers that are done, beside the sums of the others.
DONE = "scores.safetensors"


def score(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    config: SylvaConfig | None = None,
    *,
    loss: Loss | None = None,
    progress: Report | None = None,
    log: Callable[[str], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 10.0,
) -> Scores:
    """Score the weights of a pretrained model by how much they matter for a task.

    Parameters
    ----------
    model : torch.nn.Module
        The pretrained model; nothing in it is changed. It is run in evaluation mode.
    dataloader : iterable of mappings, optional
        Batches with ``labels``, at least ``config.samples`` sequences of them (1024 where
        it is None) or as many as there are. Not needed by the rules ``"magnitude"`` and ``"random"``.
    config : SylvaConfig, optional
        Targets, rule and its options.
    loss : callable, optional
        Mean loss of (model, batch), where the model does not compute its own.
    progress : callable, optional
        Called with (samples done, samples in all).
    log : callable, optional
        Called with lines of text: the number of passes over the data, and their bytes.
    checkpoint : path, optional
        Folder to keep the statistics in meanwhile. Scoring that was interrupted goes on
        with what is there, to the same scores; scoring that is finished is read back.
    checkpoint_minutes : float
        Time between two savings.

    Returns
    -------
    Scores

    Raises
    ------
    TargetError
        If ``model`` is none, no layer matches, one that matches cannot be used or is in an adapter, or the
        model is quantized or has weights that were never loaded.
    ConfigError
        If a layer that was named is smaller than a block or out of the loss's reach, or one
        is above the memory budget, the rule needs data and got none, passes or processes are given different batches, or ``checkpoint``
        has scoring with other settings.
    AdapterError
        If a file in ``checkpoint`` is damaged.
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
    ``"kfac-element"`` ``Γ² / (diag G⁻¹ · diag A⁻¹)``; ``"kfac-diag"`` the root of the Fisher
    matrix's diagonal, ``√(diag G · diag A)``; ``"fisher-diag"`` the mean squared
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
    targets = checked_targets(model, config)
    store = None
    if checkpoint is not None:
        must = settings(model, targets, config)
        store = Store(Path(checkpoint), checkpoint_minutes, must)
    rule = config.importance
    return run_rules(
        model, targets, dataloader, config, [rule], store, loss=loss, progress=progress,
        log=log,
    )[rule]  # fmt: skip


def score_rules(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    config: SylvaConfig,
    rules: Sequence[str],
    *,
    loss: Loss | None = None,
) -> dict[str, Scores]:
    """Score by several rules in one pass over the data.

    Parameters
    ----------
    model, dataloader, loss
        As for `score`.
    config : SylvaConfig
        As for `score`; its own rule does not count.
    rules : sequence of str
        Of `sylva_train.options.IMPORTANCES`.

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
    targets = checked_targets(model, config)
    return run_rules(model, targets, dataloader, config, rules, None, loss=loss)


def checked_targets(model: nn.Module, config: SylvaConfig) -> dict[str, nn.Module]:
    """Return the layers to score, all of them good."""
    if not isinstance(cast("object", model), nn.Module):
        msg = f"`model` must be a torch.nn.Module; got a {type(model).__name__}."
        raise TargetError(msg)
    check_weights(model)
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    wrapped = next((name for name in targets if name.endswith(".base_layer")), None)
    if wrapped is not None:
        msg = (
            f"`{wrapped}` is inside an adapter's layer, and its scores would be of a name"
            " that the base model does not have: `merge` or `unload` the adapter first."
        )
        raise TargetError(msg)
    named = config.target_modules not in EVERYTHING
    targets = check_block_size(targets, config.block_size, named=named)
    if not named:
        warn_of_others(model)
    for option in ("target_modules", "exclude_modules"):
        warn_of_strays(model, option, getattr(config, option))
    return targets


def check_data(targets: Mapping[str, nn.Module], dataloader: object, rule: str) -> None:
    """Raise unless a rule that needs data has some, and layers that are but products.

    Raises
    ------
    TargetError
        If a layer computes more than the product that the rule goes by.
    ConfigError
        If there is no data.
    """
    odd = [
        name
        for name, module in targets.items()
        if not is_plain(module) or is_patched(module)
    ]
    if odd:
        msg = (
            f"`{odd[0]}`, a {type(targets[odd[0]]).__name__}, has a forward pass of its own,"
            f" of which `importance={rule!r}` knows nothing: leave it out"
            ' (`exclude_modules`), or choose its blocks with "magnitude".'
        )
        raise TargetError(msg)
    if dataloader is None:
        msg = (
            f"`importance` {rule!r} needs labelled samples: pass `dataloader`, or use"
            ' "magnitude" or "random".'
        )
        raise ConfigError(msg)


def load_done(store: Store) -> tuple[dict[str, LayerScores], dict[str, Any]]:
    """Return the scores of the layers that are done, and the facts beside them."""
    if not (store.folder / DONE).exists():
        return {}, {}
    found = Scores.load(store.folder / DONE)
    store.check(found.metadata["settings"])
    return found.layers, found.metadata


def run_rules(
    model: nn.Module,
    targets: dict[str, nn.Module],
    dataloader: Iterable[Mapping[str, Any]] | None,
    config: SylvaConfig,
    rules: Sequence[str],
    store: Store | None,
    **options: Any,
) -> dict[str, Scores]:
    """Score layers by rules, and go on where one rule's scoring was interrupted.

    ``options`` are ``loss``, ``progress`` and ``log`` of `score`.
    """
    done, facts = ({}, {}) if store is None else from_first(load_done(store))
    found: dict[str, dict[str, LayerScores]] = {rule: {} for rule in rules}
    found[rules[0]] = done
    bad, seen = facts.get("indefinite", 0), facts.get("samples", 0)
    unreached: list[str] = facts.get("unreached", [])
    layers: Mapping[str, LayerCurvature] = dict.fromkeys(targets, LayerCurvature())

    def keep() -> None:
        if store is not None:
            now = {"samples": seen, "indefinite": bad, "settings": store.settings}
            now["unreached"] = unreached
            now["data"] = getattr(layers, "data", None)
            with together():  # the others would wait for a first one that cannot write
                if is_first():
                    Scores(done, now).save(store.folder / DONE)

    for rule in rules:
        if rule in NEEDS_DATA:
            check_data(targets, dataloader, rule)
    wanted = {statistic for rule in rules for statistic in RULES[rule][1]}
    targets = {name: m for name, m in targets.items() if name not in unreached}
    if wanted and len(done) < len(targets):
        assert dataloader is not None
        layers = collect_curvature(
            model, targets, dataloader, config, wanted, known=done,
            data=facts.get("data"), store=store, between=keep, **options,
        )  # fmt: skip
        seen = layers.samples
    generator = torch.Generator().manual_seed(config.seed)
    for name, module in targets.items():
        if name in done:
            continue
        curvature = layers.get(name)
        if curvature is None:
            unreached.append(name)
            continue
        # One for all rules: they share the inverse diagonals.
        inputs = Inputs(loaded_weight(module), curvature, config, generator)
        for rule in rules:
            found[rule][name] = RULES[rule][0](inputs)
        bad += inputs.indefinite
        # The next layer's statistics may come from another pass, in this one's memory.
        del inputs, curvature
    for rule in rules:
        found[rule] = from_first(
            {name: found[rule][name] for name in targets if name in found[rule]}
        )
        check_finite(found[rule])
    keep()
    if store is not None:
        store.clear()
    if unreached:
        warnings.warn(
            f"{not_reached(unreached)} They will not be trained.", stacklevel=3
        )
    if bad:
        warnings.warn(
            f"{bad} entries of the inverse diagonals are not positive: truncated HODLR"
            " factors are indefinite, and scores that divide by them are noise."
            ' `curvature="mlr"` stays positive definite.',
            stacklevel=3,
        )
    every = find_targets(model, config.target_modules, config.exclude_modules)
    left = (
        {"left_out": names} if (names := sorted(every.keys() - found[rules[0]])) else {}
    )
    return {
        rule: Scores(scores, described(rule, config, seen, bad) | left)
        for rule, scores in found.items()
    }


def described(
    rule: str, config: SylvaConfig, samples: int, indefinite: int
) -> dict[str, Any]:
    """Return what is worth keeping with scores: how they were made."""
    used = [name for name in SCORING if rule in KRONECKER or name not in FACTORS]
    return {
        "importance": rule,
        **{name: getattr(config, name) for name in used},
        "samples": samples if rule in NEEDS_DATA else 0,
        "indefinite": indefinite if rule in KRONECKER else 0,
    }
