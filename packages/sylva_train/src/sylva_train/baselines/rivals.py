"""Options of PEFT's methods at the budget of blocks, and the pruner."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import TargetError
from sylva_train.masks import LayerMask
from sylva_train.targets import weight_view

__all__ = ["lora_config", "prune", "shira_config", "supertuning_config"]


def lora_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
) -> peft.LoraConfig:
    """Return LoRA options with as many trainable weights as blocks of a density.

    Each layer gets rank ``density · in · out / (in + out)``, rounded, at least 1, and
    scale 2 (``lora_alpha = 2 r``); no dropout.
    """
    ranks = {}
    for name, module in targets.items():
        out, inputs = weight_view(module).shape
        ranks[name] = max(1, round(density * inputs * out / (inputs + out)))
    return peft.LoraConfig(
        r=1,
        lora_alpha=2,
        # PEFT reads the keys as patterns of whole names or endings.
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}": 2 * rank for name, rank in ranks.items()},
        target_modules=list(targets),
        modules_to_save=modules_to_save,
        # PEFT would set it itself, with a warning.
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in targets.values()),
    )


def shira_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
    *,
    seed: int = 0,
) -> peft.ShiraConfig:
    """Return options of SHiRA with as many trainable weights as blocks of a density.

    Single weights at random (Bhardwaj et al. 2024); PEFT gives each layer ``r · (in +
    out)`` of them, with one ``r`` for all layers, which is rounded to at least 1.

    Raises
    ------
    TargetError
        If a layer is not one that PEFT's SHiRA knows.
    """
    check_linear("shira", targets)
    shapes = [weight_view(module).shape for module in targets.values()]
    r = density * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)
    # A small layer beside large ones has no room for the r of all.
    most = min(m * n // (m + n) for m, n in shapes)
    return peft.ShiraConfig(
        r=min(max(1, round(r)), most),
        random_seed=seed,
        target_modules=list(targets),
        modules_to_save=modules_to_save,
    )


def supertuning_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
) -> peft.PeftConfig:
    """Return options of Super-Tuning with the largest weights of each layer, by number.

    Raises
    ------
    TargetError
        If a layer is not one that PEFT's Super-Tuning knows.
    """
    check_linear("supertuning", targets)
    return peft.SupertuningConfig(
        sparsity=1 - density,
        target_modules=list(targets),
        modules_to_save=modules_to_save,
    )


def check_linear(method: str, targets: Mapping[str, nn.Module]) -> None:
    """Raise `TargetError` unless all layers are `torch.nn.Linear`."""
    other = {
        name: type(module).__name__
        for name, module in targets.items()
        if not isinstance(module, nn.Linear)
    }
    if other:
        name, kind = next(iter(other.items()))
        msg = (
            f"PEFT's {method} takes torch.nn.Linear layers alone; `{name}` is a {kind}."
            " Leave the method out of `methods`."
        )
        raise TargetError(msg)


@torch.no_grad()
def prune(model: nn.Module, masks: Mapping[str, LayerMask]) -> nn.Module:
    """Set every weight of the masked layers outside the blocks to zero, in place."""
    for name, mask in masks.items():
        weight = weight_view(model.get_submodule(name))
        weight.mul_(mask.dense().to(weight.device))
    return model
