"""Sparse embedded linear layers: trainable blocks that live inside a frozen weight.

A layer keeps its dense weight as a frozen parameter and, for each adapter, float32
values of the active blocks as a parameter of shape (k, b, b). The values are written
into the dense weight whenever they changed, so forward and input gradient are the base
layer's own and cost nothing more; only the gradient of the active blocks is added.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import AdapterError, ConfigError, TargetError
from .kernels import block_sddmm, gather_blocks, scatter_blocks_
from .masks import LayerMask
from .targets import (
    as_matrix,
    check_tied,
    is_inside,
    is_supported,
    weight_view,
)

__all__ = [
    "SparseEmbeddedLinear",
    "embed",
    "embedded_layers",
    "merge",
    "replace_module",
    "sync",
    "unload",
]


class _BlockGradient(torch.autograd.Function):
    """Pass a layer's output through, and give its blocks their gradient on the way back.

    Being an identity beside the base layer, rather than a layer of its own, it leaves
    the base layer's forward, hooks, autocast and input gradient as they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, indices)
        ctx.block_size, ctx.dtype = values.shape[-1], values.dtype
        # An alias, not `y` itself: autograd would make that a view, and refuse an
        # activation in place after it.
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, indices = ctx.saved_tensors
        gradient = block_sddmm(
            dy.flatten(0, -2) if dy.dim() > 1 else dy[None],
            (x.flatten(0, -2) if x.dim() > 1 else x[None]).to(dy.dtype),
            indices.long(),
            ctx.block_size,
        )
        return dy, None, gradient.to(ctx.dtype), None


class _Masters(nn.ParameterDict):
    """Parameters that keep their precision when the model is cast.

    ``model.to(torch.bfloat16)`` moves and casts every floating-point tensor; steps of a
    fine-tuning would vanish in bfloat16 values. Cast as integers, they only move.
    """

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.detach().view(torch.int32)).view(torch.float32), recurse
        )
        return self


class _Tables(nn.Module):
    """Named buffers: the block indices of each adapter."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get_buffer(name)

    def __setitem__(self, name: str, table: torch.Tensor) -> None:
        self._buffers[name] = table

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def keys(self) -> Iterator[str]:
        return iter(self._buffers)


@functools.cache
def watch_optimizers() -> None:
    """See that steps of every optimizer count as changes of the values.

    Fused optimizers, Trainer's default among them, write parameters without counting up
    their version, and the dense weights would stay as they were for good.
    """

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "writes_through", False):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if getattr(parameter, "sylva_shown", False):
                    torch.autograd.graph.increment_version(parameter)

    register_optimizer_step_post_hook(count)


def check_embeddable(layer: nn.Module) -> None:
    """Raise `TargetError` unless a layer's weight can hold float32 values."""
    if not is_supported(layer) or weight_view(layer).element_size() > 4:
        weight = getattr(layer, "weight", None)
        msg = (
            "`base_layer` must be a torch.nn.Linear or Conv1D with a dense float32,"
            f" bfloat16 or float16 weight; got a {type(layer).__name__}"
            + (f" of {weight.dtype}." if isinstance(weight, torch.Tensor) else ".")
        )
        raise TargetError(msg)


def check_shape(mask: LayerMask, shape: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless a mask is for a weight of this (out, in) shape."""
    if mask.shape != shape:
        msg = f"`mask` must be for a {shape} weight; got one for {mask.shape}."
        raise ConfigError(msg)


class SparseEmbeddedLinear(nn.Module):
    """A linear layer some of whose blocks of weights can be trained.

    Parameters
    ----------
    base_layer : torch.nn.Linear or Conv1D
        The layer; its weight and bias are kept as they are, and frozen.

    Attributes
    ----------
    sylva_values : torch.nn.ParameterDict
        For each adapter the values of its blocks, (k, b, b), float32 whatever the
        weight's dtype (float64 weights are refused), zero beyond a ragged edge.
    sylva_indices : mapping of str to torch.Tensor
        For each adapter the block rows and block columns, (k, 2), int32.

    Raises
    ------
    TargetError
        If the layer's weight is not a dense floating-point matrix of at most 32 bits.

    Notes
    -----
    The values reach the dense weight before the next forward pass, when
    `sync` is called, and after every step of `sylva_train.SparseAdamW`. A change is seen
    by the tensors' version counters, which every optimizer of PyTorch's kind counts up;
    values changed through ``.data`` need `sync`, unless the mode changes after it.
    """

    _original: torch.Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        check_embeddable(base_layer)
        watch_optimizers()
        self.base_layer = base_layer.requires_grad_(False)
        self.sylva_values = _Masters()
        self.sylva_indices = _Tables()
        self.register_buffer("_original", None, persistent=False)
        self._written: str | None = None
        self._seen: tuple[Any, ...] = ()
        self._checked: dict[str, tuple[int, int]] = {}
        self.embedded: str | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the base layer stores it, up to date."""
        self.sync()
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Number of rows of the (out, in) weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Number of columns of the (out, in) weight."""
        return self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out, inputs = weight_view(self.base_layer).shape
        return out, inputs

    def mask(self, name: str = "default") -> LayerMask:
        """Return the mask of an adapter."""
        values = self.sylva_values[name]
        return LayerMask(self.shape, values.shape[-1], self.sylva_indices[name])

    def add(self, name: str, mask: LayerMask) -> None:
        """Add an adapter whose values start as the base weight's.

        Raises
        ------
        ConfigError
            If the mask is for a weight of another shape.
        """
        check_shape(mask, self.shape)
        self.restore_()
        weight = weight_view(self.base_layer)
        indices = mask.indices.to(weight.device)
        values = gather_blocks(weight, indices, mask.block_size).float()
        self.sylva_values[name] = nn.Parameter(values)
        self.sylva_indices[name] = indices.to(torch.int32)

    def original(self) -> torch.Tensor:
        """Return the base weight's blocks under the written adapter: (k, b, b)."""
        if self._original is None:
            msg = "no adapter is written into this layer's weight: call `sync` first"
            raise RuntimeError(msg)
        return self._original

    def wanted(self) -> str | None:
        """Name of the adapter that the weight is to show, or None for the base."""
        return self.embedded

    def snapshot(self) -> tuple[Any, ...]:
        """Return what tells whether values or weight changed since the last write."""
        assert self._written is not None
        values = self.sylva_values[self._written]
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        # The tensor itself is kept, not its id: a new one may come to have the same.
        return (
            values,
            values.data_ptr(),
            values._version,
            weight.data_ptr(),
            weight._version,
        )

    def check_indices(self, name: str) -> None:
        """Raise `AdapterError` unless an adapter's indices are blocks of this weight."""
        table = self.sylva_indices[name]
        seen = (table.data_ptr(), table._version)
        if self._checked.get(name) != seen:
            try:
                mask = LayerMask(self.shape, self.sylva_values[name].shape[-1], table)
                sound = torch.equal(mask.indices, table.cpu().long())
            except ConfigError:
                sound = False
            if not sound:
                msg = (
                    f"the block indices of adapter `{name}` do not fit this"
                    f" {self.shape} weight; the adapter is damaged or for another model."
                )
                raise AdapterError(msg)
            self._checked[name] = seen

    @torch.no_grad()
    def sync(self, *, force: bool = False) -> None:
        """Make the dense weight show the wanted adapter's values.

        Parameters
        ----------
        force : bool
            Write even if no change was seen (values changed through ``.data``).
        """
        wanted = self.wanted()
        if wanted != self._written:
            self.restore_()
        if wanted is None:
            return
        if wanted == self._written and not force:
            now = self.snapshot()
            if self._seen and self._seen[0] is now[0] and self._seen[1:] == now[1:]:
                return
        self.check_indices(wanted)
        weight = weight_view(self.base_layer)
        indices, values = self.sylva_indices[wanted].long(), self.sylva_values[wanted]
        if self._written is None:
            self._original = gather_blocks(weight, indices, values.shape[-1])
        scatter_blocks_(weight, indices, values)
        values.sylva_shown = True
        self._written = wanted
        self._seen = self.snapshot()

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._written is not None:
            indices = self.sylva_indices[self._written].long()
            scatter_blocks_(weight_view(self.base_layer), indices, self.original())
            self._written, self._original = None, None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        self.sync()
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self._written is not None and torch.is_grad_enabled():
            values = self.sylva_values[self._written]
            if values.requires_grad:
                indices = self.sylva_indices[self._written]
                y = _BlockGradient.apply(y, x, values, indices)  # type: ignore[no-untyped-call]
        return y

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and write again if it changes, so that evaluation is exact."""
        if mode != self.training:
            self._seen = ()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save a weight that shows the values as they are now."""
        self.sync(force=True)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load values, and keep this layer's own base weight under them.

        A saved weight shows the values that were written into it. What lies under them
        is only known here, so it is put into the weight before that is loaded.
        """
        self.restore_()
        key, own = f"{prefix}base_layer.weight", weight_view(self.base_layer)
        tables = {
            n: state_dict.get(f"{prefix}sylva_indices.{n}") for n in self.sylva_indices
        }
        for name, table in tables.items():
            # Indices that do not fit are found out when they are used.
            with contextlib.suppress(ConfigError):
                if table is None or key not in state_dict or own.is_meta:
                    continue
                size = self.sylva_values[name].shape[-1]
                inside = LayerMask(self.shape, size, table).dense().to(own.device)
                shown = as_matrix(self.base_layer, state_dict[key].detach()).to(own)
                if shown.shape == own.shape:
                    clean = torch.where(inside, own, shown)
                    state_dict[key] = as_matrix(self.base_layer, clean)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say how much of the weight is trainable."""
        parts = []
        for name, values in self.sylva_values.items():
            count, side, _ = values.shape
            fraction = min(1.0, values.numel() / (self.shape[0] * self.shape[1]))
            parts.append(f"{name}: {count} blocks of {side}×{side} ({fraction:.1%})")
        return ", ".join(parts)


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


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
                f" shared with `{name}`: training it would change both. Leave it out, or"
                " untie it first (`config.tie_word_embeddings=False`)."
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
    endings = list(modules_to_save or ())
    modules = dict(model.named_modules())
    layers = {}
    for name, mask in masks.items():
        if name not in modules:
            msg = f"`masks` names a layer `{name}` that the model does not have."
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
        check_tied(model, name, modules[name])
        check_shape(mask, tuple(weight_view(modules[name]).shape))
        layers[name] = modules[name]
    if not layers:
        msg = "`masks` has no active block in any layer; there is nothing to train."
        raise ConfigError(msg)
    return layers


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
        replace_module(model, name, layer)
    for module in saved.values():
        module.requires_grad_(True)
    model.sylva_modules_to_save = list(modules_to_save or ())  # type: ignore[assignment]
    return model


def sync(model: nn.Module) -> None:
    """Write every embedded layer's values into its dense weight, changed or not."""
    for layer in embedded_layers(model).values():
        layer.sync(force=True)


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
        replace_module(model, name, layer.base_layer)
    if hasattr(model, "sylva_modules_to_save"):
        del model.sylva_modules_to_save
    return model
