"""Embedding blocks in a whole model, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn

from sylva_train._checks import ConfigError, TargetError
from sylva_train.masks import LayerMask
from sylva_train.targets import (
    check_embeddable,
    check_tied,
    check_unscaled,
    is_inside,
    tied_weights,
    weight_view,
)

from .linear import SparseEmbeddedLinear
from .storage import check_in_memory

__all__ = [
    "check_masks",
    "check_unembedded",
    "embed",
    "embed_blocks",
    "embedded_layers",
    "find_saved",
    "merge",
    "sync",
    "uncovered_statistics",
    "unload",
    "warn_of_statistics",
]


def embedded_layers(model: nn.Module) -> dict[str, SparseEmbeddedLinear]:
    """Return a model's embedded layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseEmbeddedLinear)
    }


def check_unembedded(model: nn.Module) -> None:
    """Raise `TargetError` if a model has embedded blocks."""
    if embedded_layers(model):
        msg = "`model` has embedded blocks already; `unload` or `merge` it first."
        raise TargetError(msg)


def find_saved(model: nn.Module, endings: Iterable[str] | None) -> dict[str, nn.Module]:
    """Find the outermost modules that ``modules_to_save`` names, as PEFT would.

    Raises
    ------
    TargetError
        If no module has such a name, or one shares a parameter with the rest.
    """
    endings = list(endings or ())
    named = dict(model.named_modules())
    found = {
        name: module
        for name, module in named.items()
        if any(name.endswith(end) for end in endings)
        and not is_inside(name.rpartition(".")[0], endings)
    }
    if endings and not found:
        msg = (
            f"no module of this {type(model).__name__} has a name that ends in one of"
            f" `modules_to_save`={endings!r}; its outermost modules are"
            f" {', '.join(repr(name) for name, _ in model.named_children())}."
        )
        raise TargetError(msg)
    inside = {id(p): name for name, m in found.items() for p in m.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not is_inside(name.rpartition(".")[0], endings):
            msg = (
                f"`modules_to_save` names `{inside[id(parameter)]}`, whose weight is"
                f" shared with `{name}`: training it would change both. Leave it out,"
                " name all that share it, or untie it first"
                " (`config.tie_word_embeddings=False`)."
            )
            raise TargetError(msg)
    return found


def check_masks(
    model: nn.Module,
    masks: Mapping[str, LayerMask],
    modules_to_save: Iterable[str] | None,
) -> dict[str, nn.Module]:
    """Find the layers that masks are for, in a model without adapters.

    Returns
    -------
    dict of str to torch.nn.Module
        The layers that have an active block.

    Raises
    ------
    TargetError
        If a layer does not exist, cannot hold blocks, or is tied to another.
    ConfigError
        If a mask has the wrong shape, no mask has a block, or a layer is inside a module
        that is trained whole.
    """
    check_unscaled(model)
    endings = list(modules_to_save or ())
    modules = dict(model.named_modules())
    layers, tied = {}, tied_weights(model)
    for name, mask in masks.items():
        if not isinstance(cast("object", mask), LayerMask):
            msg = (
                f"`masks` must have a LayerMask for each layer; got a {type(mask).__name__}"
                f" for `{name}`. `sylva_train.select` makes masks of scores."
            )
            raise ConfigError(msg)
        if name not in modules:
            inner = next((n for n in modules if n.endswith(f".{name}")), None)
            msg = f"`masks` names a layer `{name}` that the model does not have" + (
                f"; `{inner}` is inside a wrapping (PEFT, DistributedDataParallel,"
                " torch.compile), which goes around a model that has its blocks."
                if inner
                else "."
            )
            raise TargetError(msg)
        if not len(mask):
            continue
        if is_inside(name, endings):
            msg = (
                f"`masks` has blocks in `{name}`, which `modules_to_save`={endings!r}"
                " trains whole; leave it out of one of them."
            )
            raise ConfigError(msg)
        check_embeddable(modules[name])
        check_in_memory(modules[name])
        holder = modules[name.rpartition(".")[0]]
        if getattr(holder, "base_layer", None) is modules[name]:
            msg = (
                f"`masks` has blocks in `{name}`, the base of a {type(holder).__name__}:"
                " merging that would be undone in the blocks. Merge it into the model"
                " first (`merge_and_unload`)."
            )
            raise TargetError(msg)
        check_tied({name: modules[name]}, tied)
        shape = tuple(weight_view(modules[name]).shape)
        if mask.shape != shape:
            msg = (
                f"`masks` has one of shape {mask.shape} for `{name}`, whose weight is"
                f" {shape}: they, or the scores they come from, are another model's."
            )
            raise ConfigError(msg)
        layers[name] = modules[name]
    if not layers:
        msg = "`masks` has no active block in any layer; there is nothing to train."
        raise ConfigError(msg)
    return layers


def uncovered_statistics(
    model: nn.Module, modules_to_save: Iterable[str] | None
) -> str | None:
    """Return the first module with running statistics that no adapter holds."""
    name: str
    for name, module in model.named_modules():
        counts = getattr(module, "running_mean", None) is not None
        # Whose singular vectors each pass in training mode brings on by a step.
        counts |= type(module).__name__ == "_SpectralNorm"
        if counts and not is_inside(name, modules_to_save):
            return name
    return None


def warn_of_statistics(model: nn.Module, modules_to_save: Iterable[str] | None) -> None:
    """Warn of running statistics that training changes and no adapter holds."""
    name = uncovered_statistics(model, modules_to_save)
    if name is not None:
        warnings.warn(
            f"training changes the running statistics of `{name}`, a"
            f" {type(model.get_submodule(name)).__name__}, which an adapter does not hold:"
            " name such modules in `modules_to_save`, or keep them in evaluation mode.",
            stacklevel=3,
        )


def embed(
    model: nn.Module,
    masks: Mapping[str, LayerMask],
    *,
    modules_to_save: list[str] | None = None,
) -> nn.Module:
    """Make the masked blocks of a model trainable, in place, and freeze the rest.

    Parameters
    ----------
    model : torch.nn.Module
        The pretrained model; cast it to its dtype first.
    masks : mapping of str to LayerMask
        From `sylva_train.select`; layers without an active block are left alone.
    modules_to_save : list of str, optional
        Endings of the names of modules to train whole, such as a new head.

    Returns
    -------
    torch.nn.Module
        The same model. The parameters that require a gradient are the blocks' values,
        (k, b, b) float32 in each layer, and those of ``modules_to_save``.

    Raises
    ------
    TargetError
        If a layer or module does not exist, cannot be trained or is tied to another, or
        the model is embedded already.
    ConfigError
        If a mask has the wrong shape, no mask has a block, or a layer is inside a module
        that is trained whole.
    """
    warn_of_statistics(model, modules_to_save)
    return embed_blocks(model, masks, modules_to_save)


def embed_blocks(
    model: nn.Module, masks: Mapping[str, LayerMask], modules_to_save: list[str] | None
) -> nn.Module:
    """As `embed`, also where the blocks may be there for their values alone."""
    check_unembedded(model)
    # Nothing is changed before everything was found good.
    layers = check_masks(model, masks, modules_to_save)
    saved = find_saved(model, modules_to_save)
    model.requires_grad_(False)
    for name, module in layers.items():
        layer = SparseEmbeddedLinear(module)
        layer.add("default", masks[name])
        layer.embedded = "default"
        layer.train(module.training)
        model.set_submodule(name, layer)
        if not layer.base_layer.weight.is_meta:
            layer.sync()
    for module in saved.values():
        module.requires_grad_(True)
    model.sylva_modules_to_save = list(modules_to_save or ())  # type: ignore[assignment]
    return model


def sync(model: nn.Module) -> None:
    """Write every embedded layer's values into its dense weight, changed or not.

    Never between a forward pass and its backward pass.
    """
    for layer in embedded_layers(model).values():
        layer.sync(force=True)
        layer.update_columns()


def merge(model: nn.Module) -> nn.Module:
    """Keep the trained values in the dense weights and take the layers' wrapping away."""
    if hasattr(model, "merge_and_unload"):
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged
    sync(model)
    return take_out(model)


def unload(model: nn.Module) -> nn.Module:
    """Put the base weights back, bit for bit, and take the layers' wrapping away.

    Modules that were trained whole keep their weights; a PEFT model has copies of their
    first weights and puts those back as well.
    """
    if hasattr(model, "merge_and_unload"):
        base: nn.Module = model.unload()  # type: ignore[operator]
        return base
    for layer in embedded_layers(model).values():
        layer.restore_()
    return take_out(model)


def take_out(model: nn.Module) -> nn.Module:
    """Replace embedded layers by their base layers."""
    for name, layer in embedded_layers(model).items():
        model.set_submodule(name, layer.base_layer)
        layer.let_go()
    if hasattr(model, "sylva_modules_to_save"):
        del model.sylva_modules_to_save
    return model
