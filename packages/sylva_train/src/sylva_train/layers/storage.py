"""Where a layer's values and indices are kept, and how their changes are noticed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sylva_train._checks import TargetError
from sylva_train._identity import ByIdentity
from sylva_train._torch import is_in_backward
from sylva_train.targets import is_sharded

from .shown import Shown

if TYPE_CHECKING:
    from .linear import SparseEmbeddedLinear

__all__ = [
    "Masters",
    "Tables",
    "check_in_memory",
    "check_shown",
    "is_hooked",
    "layer_showing",
    "own_weight",
    "watch",
    "watch_optimizers",
]


class Masters(nn.ParameterDict):
    """Parameters that keep their precision when the model is cast.

    ``model.to(torch.bfloat16)`` moves and casts every floating-point tensor; steps of a
    fine-tuning would vanish in bfloat16 values. Cast as integers, they only move.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse sharded values, which FSDP puts here: dense weights would stay behind."""
        if is_sharded(value):
            msg = (
                "embedded blocks cannot be sharded (FSDP): their values are written into"
                " dense weights of another layout. Use `sylva_train.train` under"
                " torchrun, or DistributedDataParallel."
            )
            raise TargetError(msg)
        super().__setattr__(name, value)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        def moved(values: torch.Tensor) -> torch.Tensor:
            wide = values.dtype == torch.float64
            bits = values.detach().view(torch.int64 if wide else torch.int32)
            return fn(bits).view(values.dtype)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class Tables(nn.Module):
    """Named buffers: the block indices of each adapter."""

    def __getitem__(self, name: str) -> torch.Tensor:
        table = self._buffers[name]
        assert table is not None
        return table

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
        """Return the adapters' names, as PEFT asks for them."""
        return iter(self._buffers)


def check_in_memory(layer: nn.Module) -> None:
    """Raise `TargetError` unless a layer's weight is here, whole, all the time.

    accelerate may bring it only while the layer runs, and it may be sharded.
    """
    weight = getattr(layer, "weight", None)
    if is_sharded(weight):
        msg = (
            "a layer's weight is sharded (FSDP, tensor parallelism), but blocks are written"
            " into dense weights. Embed them in the whole model, and use"
            " `sylva_train.train` under torchrun, or DistributedDataParallel."
        )
        raise TargetError(msg)
    offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
    if offloads and isinstance(weight, torch.Tensor) and weight.is_meta:
        msg = (
            "a layer's weight is offloaded (`device_map`, `cpu_offload`): it can be scored,"
            " but blocks are written into weights that stay in memory. Load the model"
            " without offloading, or train on a machine that holds it."
        )
        raise TargetError(msg)


def own_weight(layer: nn.Module) -> torch.Tensor:
    """Return a base layer's weight, which values are written into.

    Raises
    ------
    TargetError
        If it is no matrix of the layer's own any more: written values would be lost.
    """
    weight = layer._parameters.get("weight")
    is_own = weight is not None and weight.dim() == 2 and weight.grad_fn is None
    if weight is None or not is_own or hasattr(weight, "__tensor_flatten__"):
        msg = (
            f"the `base_layer` of embedded blocks, a {type(layer).__name__}, has no weight"
            " of its own any more: it was wrapped (LoRA), pruned, parametrized (weight"
            " norm), quantized or sharded (FSDP, DeepSpeed ZeRO-3) after blocks were"
            " embedded. Call `sylva_train.merge` or `sylva_train.unload` before that."
        )
        raise TargetError(msg)
    return weight


# Layer of each parameter of values that a dense weight shows, held weakly: parameters
# are copied and pickled.
_shown: ByIdentity[weakref.ref[SparseEmbeddedLinear]] = ByIdentity()
# Hooks of those that were trainable when they were written.
_checked: ByIdentity[RemovableHandle] = ByIdentity()


def watch(values: torch.Tensor, layer: SparseEmbeddedLinear) -> None:
    """Remember which layer shows values, and check in backward that it did."""
    if layer_showing(values) is not layer:
        _shown[values] = weakref.ref(layer)
    if values.requires_grad and values.is_leaf and _checked.get(values) is None:
        _checked[values] = values.register_post_accumulate_grad_hook(check_shown)


def layer_showing(parameter: torch.Tensor) -> SparseEmbeddedLinear | None:
    """Return the layer whose weight shows a parameter, if there is one."""
    found = _shown.get(parameter)
    return None if found is None else found()


def is_hooked(values: torch.Tensor) -> bool:
    """Whether hooks of others look at a parameter's gradient."""
    own, after = _checked.get(values), values._post_accumulate_grad_hooks or ()
    return bool(values._backward_hooks) or any(
        own is None or n != own.id for n in after
    )


# A compiled step would trace the hook, and go through all entries, of which some may go.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_shown(values: torch.Tensor) -> None:
    """Let the layer check that its forward pass used these values."""
    layer = layer_showing(values)
    if layer is not None:
        layer.check_shown(values)


@functools.cache
def watch_optimizers() -> None:
    """See that steps of every optimizer reach the dense weights.

    Fused optimizers, Trainer's default among them, write parameters without counting up
    their version, and the dense weights would stay as they were for good.
    """

    # Compiled, a layer would not look whether its values changed.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        Shown.steps += 1
        if getattr(optimizer, "writes_through", False):
            return
        # A step inside a backward pass must leave the weights alone, which are still
        # needed there; the next forward pass sees the change.
        inside = is_in_backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                layer = layer_showing(parameter)
                if layer is not None:
                    torch.autograd.graph.increment_version(parameter)
                    if not inside:
                        layer.sync()

    register_optimizer_step_post_hook(count)
