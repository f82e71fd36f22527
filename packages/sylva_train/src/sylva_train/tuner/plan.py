"""What a new adapter will be, checked in full before the model is touched."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from peft import load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import check_masks, find_saved, warn_of_statistics
from sylva_train.masks import LayerMask, Masks
from sylva_train.options import NEEDS_DATA
from sylva_train.selection import select_as
from sylva_train.targets import is_inside, is_supported, matches

from .base import check_base
from .files import read_adapter, state_blocks, verify

__all__ = ["plan"]


def choose_masks(model: nn.Module, config: SylvaConfig) -> Mapping[str, LayerMask]:
    """Return the masks of a new adapter: those given, or chosen now without data.

    Raises
    ------
    ConfigError
        If the rule needs data.
    """
    masks = config.masks
    if isinstance(masks, str | os.PathLike):
        return Masks.load(masks)
    if masks is not None:
        return masks
    if config.importance in NEEDS_DATA:
        msg = (
            f'`importance="{config.importance}"` needs data to choose blocks by: call'
            " `scores = sylva_train.score(model, dataloader, config)` and"
            " `sylva_train.select(scores, ...)` first, and pass the result as `masks`."
        )
        raise ConfigError(msg)
    if config.modules_to_save:
        config = copy.copy(config)
        whole = [
            n
            for n, module in model.named_modules()
            if is_supported(module) and is_inside(n, config.modules_to_save)
        ]
        exclude = config.exclude_modules or []
        if isinstance(exclude, str):
            exclude = [n for n, _ in model.named_modules() if matches(n, exclude)]
        config.exclude_modules = [*exclude, *whole]
    scores = score(model, None, config)
    return select_as(config, scores)


def saved_embeddings(config: SylvaConfig) -> Mapping[str, torch.Tensor] | None:
    """Return the embeddings that a saved adapter brings for a resized vocabulary."""
    if config.hub:
        tensors = load_peft_weights(device="cpu", **config.hub)
        return verify(tensors, config, str(config.folder)).embeddings
    if config.folder and (config.folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return read_adapter(config.folder).embeddings
    return None


def plan(model: nn.Module, config: SylvaConfig) -> Mapping[str, LayerMask] | None:
    """Check everything about a new adapter, and write its layers into ``config``.

    Parameters
    ----------
    model : torch.nn.Module
        Without adapters.
    config : SylvaConfig
        A copy of the user's, changed in place.

    Returns
    -------
    mapping of str to LayerMask, or None
        None for an adapter that was saved, whose blocks are loaded afterwards.
    """
    if config.masks is None and config.block_counts is not None:
        check_base(model, config, saved_embeddings(config))
        return None
    masks = choose_masks(model, config)
    layers = check_masks(model, masks, config.modules_to_save)
    warn_of_statistics(model, config.modules_to_save)
    find_saved(model, config.modules_to_save)
    masks = {name: masks[name] for name in layers}
    state_blocks(config, masks)
    config.base_fingerprint = config.checksum = None
    return masks
