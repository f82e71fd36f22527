"""The blocks' gradient, computed beside the base layer's own backward pass."""

from __future__ import annotations

from typing import Any

import torch

from sylva_train.kernels import block_sddmm

__all__ = ["BlockGradient"]


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
        # Not saved: they are there anyway, and hooks on saved tensors need not see them.
        ctx.indices = indices
        ctx.block_size, ctx.dtype = values.shape[-1], values.dtype
        # An alias, not `y` itself: autograd would make that a view, and refuse an
        # activation in place after it.
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return ``dy`` for ``y``, and the blocks of ``dyᵀ x`` for the values."""
        (x,) = ctx.saved_tensors
        gradient = block_sddmm(
            dy.flatten(0, -2) if dy.dim() > 1 else dy[None],
            (x.flatten(0, -2) if x.dim() > 1 else x[None]).to(dy.dtype),
            ctx.indices,
            ctx.block_size,
        )
        return dy, None, gradient.to(ctx.dtype), None
