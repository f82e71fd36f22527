"""Sparse embedded linear layers: trainable blocks that live inside a frozen weight.

A layer keeps its dense weight as a frozen parameter and, for each adapter, float32
values of the active blocks as a parameter of shape (k, b, b). The values are written
into the dense weight whenever they changed, so forward and input gradient are the base
layer's own and cost nothing more; only the gradient of the active blocks is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ._checks import ConfigError, TargetError
from .kernels import block_sddmm, gather_blocks, scatter_blocks_
from .masks import LayerMask
from .targets import check_tied, is_supported, matches, weight_view

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
        return super()._apply(
            lambda t: fn(t.detach().view(torch.int32)).view(torch.float32), recurse
        )


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
    by the tensors' version counters; values changed through ``.data`` need `sync`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not is_supported(base_layer) or weight_view(base_layer).element_size() > 4:
            weight = getattr(base_layer, "weight", None)
            msg = (
                "`base_layer` must be a torch.nn.Linear or Conv1D with a dense float32,"
                f" bfloat16 or float16 weight; got a {type(base_layer).__name__}"
                + (f" of {weight.dtype}." if isinstance(weight, torch.Tensor) else ".")
            )
            raise TargetError(msg)
        self.base_layer = base_layer.requires_grad_(False)
        self.sylva_values = _Masters()
        self.sylva_indices = _Tables()
        self.register_buffer("_original", None, persistent=False)
        self._written: str | None = None
        self._seen: tuple[int, ...] = ()
        self.embedded: str | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the base layer stores it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

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
        if mask.shape != self.shape:
            msg = f"`mask` must be for a {self.shape} weight; got one for {mask.shape}."
            raise ConfigError(msg)
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

    def state(self) -> tuple[int, ...]:
        """Return what tells whether values or weight changed since the last write."""
        values, weight = self.sylva_values[self._written], self.weight
        return id(values), values._version, weight.data_ptr(), weight._version

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
        if wanted is None or (
            wanted == self._written and not force and self.state() == self._seen
        ):
            return
        weight = weight_view(self.base_layer)
        indices, values = self.sylva_indices[wanted].long(), self.sylva_values[wanted]
        if self._written is None:
            self._original = gather_blocks(weight, indices, values.shape[-1])
        scatter_blocks_(weight, indices, values)
        self._written = wanted
        self._seen = self.state()

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

    def extra_repr(self) -> str:
        """Say how much of the weight is trainable."""
        parts = []
        for name in self.sylva_values:
            mask = self.mask(name)
            parts.append(
                f"{name}: {len(mask)} blocks of {mask.block_size}×{mask.block_size}"
                f" ({mask.trainable / mask.total:.1%})"
            )
        return ", ".join(parts)


def embedded_layers(model: nn.Module) -> dict[str, SparseEmbeddedLinear]:
    """Return a model's embedded layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseEmbeddedLinear)
    }


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
        Names or name endings of modules to train whole, such as a new head.

    Returns
    -------
    torch.nn.Module
        The same model. The parameters that require a gradient are the blocks' values,
        (k, b, b) float32 in each layer, and those of ``modules_to_save``.

    Raises
    ------
    TargetError
        If a masked layer does not exist, cannot hold blocks, is tied to another, or the
        model is embedded already.
    ConfigError
        If a mask has the wrong shape.
    """
    if embedded_layers(model):
        msg = "`model` has embedded blocks already; `unload` or `merge` it first."
        raise TargetError(msg)
    modules = dict(model.named_modules())
    layers = {}
    for name, mask in masks.items():
        if name not in modules:
            msg = f"`masks` names a layer `{name}` that the model does not have."
            raise TargetError(msg)
        if len(mask):
            check_tied(model, name, modules[name])
            layer = SparseEmbeddedLinear(modules[name])
            layer.add("default", mask)
            layer.embedded = "default"
            layers[name] = layer
    # Nothing is changed before every layer was found good.
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(modules[name].training)
        layer.sylva_values.requires_grad_(True)
        replace_module(model, name, layer)
    for name, module in modules.items():
        if name and matches(name, modules_to_save):
            module.requires_grad_(True)
    return model


def sync(model: nn.Module) -> None:
    """Write every embedded layer's values into its dense weight, changed or not."""
    for layer in embedded_layers(model).values():
        layer.sync(force=True)


def merge(model: nn.Module) -> nn.Module:
    """Keep the trained values in the dense weights and take the layers' wrapping away."""
    sync(model)
    for name, layer in embedded_layers(model).items():
        replace_module(model, name, layer.base_layer)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Put the base weights back, bit for bit, and take the layers' wrapping away."""
    for name, layer in embedded_layers(model).items():
        layer.restore_()
        replace_module(model, name, layer.base_layer)
    return model
