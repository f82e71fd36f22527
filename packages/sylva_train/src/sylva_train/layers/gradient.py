"""The blocks' gradient, computed beside the base layer's own backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from sylva_train.kernels import block_sddmm, gather_blocks
from sylva_train.targets import is_patched, is_plain

from .storage import check_shown, is_hooked

__all__ = ["BlockGradient", "WeightGradient", "accumulating", "is_product"]

_accumulating: ContextVar[bool] = ContextVar("accumulating", default=False)


@contextlib.contextmanager
def accumulating() -> Iterator[None]:
    """Let backward passes add the blocks of their products to the gradient that is there.

    Autograd would compute a gradient of its own and then add it. Autograd cannot be told
    from within a backward pass what it is going to do with a gradient, so this is for
    forward passes in the context that are followed by a plain ``loss.backward()``: not
    for `torch.autograd.grad`, ``create_graph=True`` or ``inputs=``. Values whose gradient
    a hook looks at, sharded ones, and compiled passes are left to autograd.
    """
    token = _accumulating.set(True)
    try:
        yield
    finally:
        _accumulating.reset(token)


def gradient_of(values: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the gradient to add blocks to, whose sums are of a dtype, or None."""
    out = None if values is None else values.grad
    if values is None or type(out) is not torch.Tensor or is_hooked(values):
        return None
    return out if out.dtype == dtype and out.is_contiguous() else None


def is_product(layer: nn.Module) -> bool:
    """Whether a layer's output is its product with the input it is called with.

    A subclass may compute something else, and hooks may change what goes in, what comes
    out or the gradient that comes back.
    """
    return (
        is_plain(layer)
        and not is_patched(layer)
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and not layer._backward_pre_hooks
    )


class WeightGradient(torch.autograd.Function):
    """Pass a dense weight through, and give its blocks their part of its gradient.

    For whatever else than a plain product is made of a weight: its gradient is computed
    as a whole, by autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        is_turned: bool,
    ) -> torch.Tensor:
        """Return ``weight``, which is stored as (in, out) if ``is_turned``."""
        ctx.indices, ctx.is_turned = indices, is_turned
        ctx.block_size, ctx.dtype = values.shape[-1], values.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, dw: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the blocks (k, b, b) of ``dw`` for the values."""
        matrix = dw.t() if ctx.is_turned else dw
        blocks = gather_blocks(matrix, ctx.indices, ctx.block_size)
        return None, blocks.to(ctx.dtype), None, None


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View (..., n) as (tokens, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class BlockGradient(torch.autograd.Function):
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
        """Return ``y``, and keep what the gradient of the (k, b, b) values needs.

        ``x`` may be some columns of the input, with ``indices`` that count among them.
        """
        ctx.save_for_backward(x)
        in_place = not torch.compiler.is_compiling() and _accumulating.get()
        # Not saved: they are there anyway, and hooks on saved tensors need not see them.
        ctx.use = indices, values.shape[-1], values.dtype, values if in_place else None
        # An alias, not `y` itself: autograd would make that a view, and refuse an
        # activation in place after it.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return ``dy`` for ``y``, and the blocks of ``dyᵀ x`` for the values."""
        # At once: `torch.autograd.grad` goes through no node that its `inputs` do not lie
        # behind, so a node that raised would be passed by, and the result be wrong.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            msg = (
                "second derivatives through embedded blocks are not computed"
                " (`create_graph=True`, gradient penalties): the weight that the input"
                " gradient is a product with is frozen, and they would come out wrong."
            )
            raise RuntimeError(msg)
        (x,) = ctx.saved_tensors
        indices, block_size, dtype, values = ctx.use
        out = None
        if values is not None:
            out = gradient_of(values, torch.promote_types(dy.dtype, torch.float32))
        left, right = as_rows(dy), as_rows(x).to(dy.dtype)
        gradient = block_sddmm(left, right, indices, block_size, out=out)
        if out is not None:
            # Autograd has nothing to add, and does not call the hook after that.
            check_shown(values)
            return dy, None, None, None
        return dy, None, gradient.to(dtype), None
