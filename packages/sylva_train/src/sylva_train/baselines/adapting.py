"""The methods of a comparison, and how each makes a model trainable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.importance import Scores, score
from sylva_train.layers import embed
from sylva_train.masks import Masks
from sylva_train.options import CURVATURES, METHODS
from sylva_train.progress import Report
from sylva_train.selection import select_as
from sylva_train.targets import find_targets, is_inside, weight_view

from .rivals import lora_config, prune, shira_config, supertuning_config
from .serial import add_serial_adapters

__all__ = ["Adapted", "Method", "adapt", "parse_method"]

#: What people call each of `METHODS`.
LABELS = {
    "frozen": "Frozen features + head",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "adapter": "Serial adapter (Houlsby)",
    "shira": "SHiRA, random weights",
    "supertuning": "Super-Tuning, largest weights",
    "kfac-pruner": "K-FAC pruner",
    "sylva:kfac:mlr": "Sylva, K-FAC (MLR)",
    "sylva:kfac:hodlr": "Sylva, K-FAC (HODLR)",
    "sylva:kfac:dense": "Sylva, K-FAC (exact factors)",
    "sylva:kfac-block": "Sylva, K-FAC decrease of a block",
    "sylva:kfac-natural": "Sylva, K-FAC natural gradient",
    "sylva:kfac-element": "Sylva, K-FAC element by element",
    "sylva:kfac-diag": "Sylva, K-FAC diagonal",
    "sylva:fisher-diag": "Sylva, diagonal Fisher",
    "sylva:magnitude": "Sylva, magnitude",
    "sylva:wanda": "Sylva, Wanda",
    "sylva:gradient": "Sylva, gradient",
    "sylva:weight-gradient": "Sylva, weight × gradient",
    "sylva:random": "Sylva, random blocks",
}
#: Options of PEFT's methods.
PEFT: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lora_config,
    "shira": shira_config,
    "supertuning": supertuning_config,
}


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Parameters
    ----------
    name : str
        One of `sylva_train.options.METHODS`.
    label : str
        For people.
    rule, curvature : str or None
        Sylva's scoring rule, and how its Kronecker factors are kept.
    """

    name: str
    label: str
    rule: str | None = None
    curvature: str | None = None


def parse_method(name: str) -> Method:
    """Read a method's name: ``"full"``, ``"sylva:kfac"``, ``"sylva:kfac:dense"``, ...

    Raises
    ------
    ConfigError
        If there is no such method.
    """
    name = f"{name}:{CURVATURES[0]}" if name == "sylva:kfac" else name
    if name not in LABELS:
        msg = f"`method` must be one of {', '.join(METHODS)}; got {name!r}."
        raise ConfigError(msg)
    if name == "kfac-pruner":
        return Method(name, LABELS[name], name, "dense")
    _, rule, curvature = (*name.split(":"), None, None)[:3]
    return Method(name, LABELS[name], rule, curvature)


@dataclass(frozen=True)
class Adapted:
    """A model made trainable by a method.

    Parameters
    ----------
    model : torch.nn.Module
        What to train: the parameters that require a gradient.
    scores, masks : Scores, Masks or None
        Where blocks were chosen.
    trainable, head : int
        Trainable weights of the backbone, and of the head beside them.
    """

    model: nn.Module
    scores: Scores | None
    masks: Masks | None
    trainable: int
    head: int


def adapt(
    method: Method,
    model: nn.Module,
    config: SylvaConfig,
    loader: Iterable[Mapping[str, Any]] | None = None,
    *,
    scores: Scores | None = None,
    progress: Report | None = None,
) -> Adapted:
    """Make a pretrained model trainable by a method, in place.

    Parameters
    ----------
    method : Method
        From `parse_method`; ``"frozen"`` has nothing to train and is `probe`'s.
    model : torch.nn.Module
        The pretrained model.
    config : SylvaConfig
        Targets, density, block size, scoring options, modules to train whole.
    loader : iterable of batches, optional
        What to score with.
    scores : Scores, optional
        Computed before; nothing is scored then.
    progress : callable, optional
        Called with (samples scored, samples in all).

    Returns
    -------
    Adapted

    Raises
    ------
    ConfigError, TargetError, DataError, NonFiniteError
        As `sylva_train.score` and `sylva_train.select`.
    """
    masks = None
    every = find_targets(model, config.target_modules, config.exclude_modules)
    # What has no room for a block, a gate of one output, is left out by rules too.
    targets = {
        name: module
        for name, module in every.items()
        if min(weight_view(module).shape) >= config.block_size
    } or every
    if method.name == "full":
        model.requires_grad_(True)
    elif method.name in PEFT:
        model = add_adapter(method.name, model, targets, config)
    elif method.name == "adapter":
        add_serial_adapters(
            model, targets, config.density, config.modules_to_save, seed=config.seed
        )
    elif method.rule is not None:
        scoring = replace(
            config,
            importance=method.rule,
            curvature=method.curvature or config.curvature,
        )
        if scores is None:
            scores = score(model, loader, scoring, progress=progress)
        masks = select_as(config, scores, model, loader)
        if method.name == "kfac-pruner":
            prune(model, masks)
        embed(model, masks, modules_to_save=config.modules_to_save)
    else:
        msg = f"`method` {method.name!r} has nothing to train; see `probe`."
        raise ConfigError(msg)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(
        size
        for name, size in sizes.items()
        if is_inside(name.rpartition(".")[0], config.modules_to_save)
    )
    trainable = masks.trainable if masks is not None else sum(sizes.values()) - head
    return Adapted(model, scores, masks, trainable, head)


def add_adapter(
    name: str, model: nn.Module, targets: Mapping[str, nn.Module], config: SylvaConfig
) -> nn.Module:
    """Add the adapter of one of PEFT's methods, with the budget of the blocks."""
    seed = {"seed": config.seed} if name == "shira" else {}
    options = PEFT[name](targets, config.density, config.modules_to_save, **seed)
    invariants = torch.sparse.check_sparse_tensor_invariants
    if not invariants.is_enabled():
        invariants.disable()  # as it is, but said: torch warns of SHiRA's otherwise
    # PEFT draws LoRA's first factors from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return peft.get_peft_model(model, options)
