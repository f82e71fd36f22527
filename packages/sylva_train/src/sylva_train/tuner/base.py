"""The base model under an adapter: having it in place, and telling it from others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sylva_train._checks import AdapterError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.layers import (
    SparseEmbeddedLinear,
    check_in_memory,
    uncovered_statistics,
)
from sylva_train.targets import (
    check_embeddable,
    check_unscaled,
    fingerprint,
    is_packed,
    stacked_experts,
    weight_view,
)

__all__ = ["bare", "base_fingerprint", "base_in_place", "base_name", "check_base"]


@contextlib.contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Take every adapter out of a model for a while: its modules and its weights."""
    wrapped = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, SparseEmbeddedLinear | AuxiliaryTrainingWrapper)
    ]
    shown = []
    try:
        for name, module in wrapped:
            if isinstance(module, SparseEmbeddedLinear):
                if module.shown.adapter is not None:
                    shown.append(module)
                module.restore_()
                model.set_submodule(name, module.base_layer)
            else:
                model.set_submodule(name, module.original_module)
        yield
    finally:
        for name, module in wrapped:
            model.set_submodule(name, module)
        # Graphs that were captured go on with the weights, and do not look.
        for module in shown:
            module.sync()


@contextlib.contextmanager
def replaced(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a model have other weights for a while.

    Raises
    ------
    AdapterError
        If it has none of such a name and shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        found = tuple(own[name].shape) if name in own else None
        if found != tuple(weight.shape):
            msg = (
                f"the adapter comes with `{name}` of shape {tuple(weight.shape)}, of a base"
                f" whose vocabulary was resized, but the model has {found or 'none'}: call"
                f" `model.resize_token_embeddings({len(weight)})` before it is loaded."
            )
            raise AdapterError(msg)
    before = {name: own[name].data for name in weights}
    try:
        for name, weight in weights.items():
            own[name].data = weight.to(before[name])
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


def base_fingerprint(model: nn.Module, modules_to_save: list[str] | None) -> str:
    """Identify the base of a model that may have adapters in it."""
    with base_in_place(model):
        return fingerprint(model, modules_to_save)


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside data parallelism, `torch.compile` and averages of weights."""
    kinds = DistributedDataParallel, nn.DataParallel, AveragedModel
    while True:
        # Not as an attribute, which wrappers hand on to what is inside them.
        inner = model._modules.get(
            "module" if isinstance(model, kinds) else "_orig_mod"
        )
        if inner is None:
            return model
        model = inner


def base_name(model: nn.Module) -> str | None:
    """Name or path that a model was loaded from."""
    return getattr(model, "name_or_path", None) or None


def counted(model: nn.Module, modules_to_save: list[str] | None) -> str:
    """Say, amid a message, that training may have changed a base's running statistics."""
    name = uncovered_statistics(model, modules_to_save)
    if name is None:
        return ""
    return (
        f" Or training changed the running statistics of `{name}`, which this adapter does"
        " not hold: train anew with such modules in `modules_to_save` or in evaluation mode."
    )


def check_base(
    model: nn.Module,
    config: SylvaConfig,
    embeddings: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Raise `AdapterError` unless an adapter was made for this model's weights.

    It is a `TargetError` if these are offloaded, sharded or quantized.

    Parameters
    ----------
    model : torch.nn.Module
        Without adapters.
    config : SylvaConfig
        Of the adapter, with its layers' shapes and its base's fingerprint.
    embeddings : mapping of str to torch.Tensor, optional
        Weights that come with the adapter and are going to replace the model's: new rows
        of a resized vocabulary are random.
    """
    check_unscaled(model)
    modules = dict(model.named_modules())
    for name in config.layer_shapes or {}:
        check_in_memory(modules.get(name, model))
        if is_packed(modules.get(name, model)):
            check_embeddable(modules[name])
        if name not in modules and stacked_experts(model):
            msg = (
                f"the adapter has blocks for `{name}`, but the experts of this model are"
                " stacks of matrices: call `sylva_train.split_experts(model)` before it is"
                " loaded."
            )
            raise AdapterError(msg)
    theirs = config.base_fingerprint
    known = f"`{config.base_model_name_or_path}` ({str(theirs)[:12]}…)"
    if theirs is not None:
        with replaced(model, embeddings or {}):
            ours = fingerprint(model, config.modules_to_save)
        if ours != theirs:
            strange = next(
                (n for n in config.layer_shapes or {} if n not in modules), ""
            )
            if strange:
                strange = (
                    f" It has no layer `{strange}`, of which the adapter has blocks; one that"
                    " was saved of a module around the model (Lightning's) goes into"
                    " such a module."
                )
            msg = (
                f"the adapter was made for the base model {known}, but this one is"
                f" `{base_name(model)}` ({ours[:12]}…). Its weights differ; load the base"
                " that the adapter was trained on (in float16 if it was so then, otherwise"
                " in float32 or bfloat16)."
                + strange
                + counted(model, config.modules_to_save)
            )
            if embeddings is None and config.folder is None:
                # Those of a file are a mapping, if an empty one.
                msg += (
                    " If its vocabulary was resized, use `PeftModel.from_pretrained(model,"
                    " path)` without a `config`: the new embeddings lie beside the adapter,"
                    " and other ways to load it do not say where that is."
                )
            raise AdapterError(msg)
    for name, shape in (config.layer_shapes or {}).items():
        try:
            check_embeddable(modules[name])
            found = tuple(weight_view(modules[name]).shape)
        except (KeyError, TargetError):
            found = None
        if found != tuple(shape):
            msg = (
                f"the adapter has blocks for `{name}` of shape {tuple(shape)}, but the"
                f" model has {found or 'no such layer'}; it was made for {known}."
            )
            raise AdapterError(msg)
