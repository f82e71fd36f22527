"""Saving and loading adapters of models without a `peft.PeftModel` around them."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn

from sylva_train._checks import AdapterError, ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.layers import (
    check_unembedded,
    embed_blocks,
    embedded_layers,
    find_saved,
    sync,
)
from sylva_train.targets import holders, is_inside

from .base import bare, base_fingerprint, base_name, check_base
from .files import (
    INDICES,
    PREFIX,
    VALUES,
    checksum,
    read_adapter,
    state_blocks,
    write_adapter,
)

__all__ = ["load_adapter", "save_adapter"]


def trained_modules(model: nn.Module) -> list[str]:
    """Names of what an embedded model trains whole.

    Those given to `embed`, and modules that were set to require a gradient since.
    """
    endings = list(getattr(model, "sylva_modules_to_save", ()))
    layers = embedded_layers(model)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        holder = next((place for place in holders(name) if place in layers), None)
        own = holder is not None and name.startswith(f"{holder}.{VALUES}.")
        if not parameter.requires_grad or own or is_inside(owner, endings):
            continue
        if holder is not None or not owner:
            msg = (
                f"the parameter `{name}` requires a gradient, but an adapter holds blocks"
                " and whole modules; save the merged model instead, or freeze it."
            )
            raise ConfigError(msg)
        endings.append(owner)
    return endings


def describe(
    model: nn.Module, config: SylvaConfig | None
) -> tuple[SylvaConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the tensors of a model from `embed`."""
    layers = embedded_layers(model)
    for layer in layers.values():
        layer.sync(force=True)  # which finds indices that were changed
    masks = {name: layer.mask(str(layer.wanted())) for name, layer in layers.items()}
    config = SylvaConfig(target_modules=list(layers)) if config is None else config
    config = copy.copy(config)
    state_blocks(config, masks)
    config.modules_to_save = trained_modules(model) or None
    config.base_model_name_or_path = base_name(model)
    if config.task_type is None:  # what PEFT's auto classes load the base by
        kind = type(model)
        config.auto_mapping = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    config.base_fingerprint = base_fingerprint(model, config.modules_to_save)
    tensors = {}
    for name, layer in layers.items():
        wanted = str(layer.wanted())
        tensors[f"{name}.{VALUES}"] = layer.sylva_values[wanted]
        tensors[f"{name}.{INDICES}"] = layer.sylva_indices[wanted]
    for name, module in find_saved(model, config.modules_to_save).items():
        tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
    config.checksum = checksum(tensors, config)
    return config, tensors


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: SylvaConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model's active blocks, and its modules trained whole, to a folder.

    The folder is what `peft.PeftModel.save_pretrained` writes; `load_adapter` and
    `peft.PeftModel.from_pretrained` both read it. It is written whole or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        From `sylva_train.embed` or `peft.get_peft_model`, also as DistributedDataParallel,
        `torch.compile` or AveragedModel wrap it; of several adapters the active one is
        saved.
    path : path
        The folder.
    config : SylvaConfig, optional
        Options that the masks of an embedded model came from, to be written with them; a
        PEFT model has its own.
    overwrite : bool
        Whether to replace what is at ``path``.

    Raises
    ------
    ConfigError
        If the model has no blocks, or trains something that an adapter cannot hold.
    OutputExistsError
        If there is something at ``path`` and not ``overwrite``.
    """
    model = bare(model)
    if not embedded_layers(model):
        msg = "`model` has no embedded blocks; `sylva_train.embed` makes some."
        raise ConfigError(msg)
    tensors: dict[str, Any]
    if hasattr(model, "peft_config"):
        layers: Any = embedded_layers(model).values()
        name = next((n for n in (layer.active() for layer in layers) if n), None)
        if name is None:
            msg = "`model` has no active adapter; `set_adapter` makes one active."
            raise ConfigError(msg)
        tensors = get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
        configs: Any = model.peft_config
        config = configs[name]
    else:
        config, tensors = describe(model, config)
    named = {PREFIX + name.removeprefix(PREFIX): t for name, t in tensors.items()}
    assert config is not None
    write_adapter(path, config, named, overwrite=overwrite)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Embed a saved adapter's blocks in its base model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, without adapters; a head of its own matters only where the
        adapter brings one.
    path : path
        A folder from `save_adapter` or `peft.PeftModel.save_pretrained`.

    Returns
    -------
    torch.nn.Module
        The same model, as `sylva_train.embed` makes it: blocks and ``modules_to_save``
        have the adapter's values and require a gradient.

    Raises
    ------
    AdapterError
        If the adapter is damaged, was made for another base, or has two weights where the
        model has one. The model is unchanged.
    TargetError
        If the model is embedded already.
    """
    adapter, given, model = read_adapter(path), model, bare(model)
    check_unembedded(model)
    check_base(model, adapter.config, adapter.embeddings)
    own: dict[str, torch.Tensor] = dict(model.named_buffers())
    own.update(model.named_parameters(remove_duplicate=False))
    firsts: dict[int, str] = {}
    for name, tensor in adapter.modules.items():
        found = tuple(own[name].shape) if name in own else None
        if found != tuple(tensor.shape):
            msg = (
                f"the adapter has `{name}` of shape {tuple(tensor.shape)}, but the model"
                f" has {found or 'no such tensor'}; load the base with the same head"
                " (the same labels)."
            )
            raise AdapterError(msg)
        first = firsts.setdefault(id(own[name]), name)
        if first != name and not torch.equal(tensor, adapter.modules[first]):
            msg = (
                f"the adapter has other weights for `{name}` than for `{first}`, which"
                " share one in this model: PEFT trained a copy of each. Load it with"
                " `peft.PeftModel.from_pretrained`, or into a base that is loaded with"
                " `tie_word_embeddings=False`."
            )
            raise AdapterError(msg)
    endings = adapter.config.modules_to_save if adapter.modules else None
    embed_blocks(model, adapter.masks, endings)
    with torch.no_grad():
        for name, layer in embedded_layers(model).items():
            layer.sylva_values["default"].copy_(adapter.values[name])
        for name, tensor in (adapter.modules | adapter.embeddings).items():
            own[name].copy_(tensor)
    sync(model)
    return given
