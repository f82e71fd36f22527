"""A pruned linear layer that multiplies with its blocks alone, as the paper's pruner.

`prune` is what the pruner does to quality; this is what it costs: products of a
block-sparse weight (torch's BSR layout: MKL on a CPU, Triton or cuSPARSE on a GPU), and
no dense weight at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.kernels import block_sddmm, gather_blocks
from sylva_train.layers import check_masks
from sylva_train.masks import LayerMask
from sylva_train.targets import weight_view

__all__ = ["BlockSparseLinear", "make_block_sparse"]


def bsr(
    starts: torch.Tensor,
    columns: torch.Tensor,
    blocks: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Return a block-sparse matrix that shares its blocks (k, b, b)."""
    return torch.sparse_bsr_tensor(
        starts, columns, blocks, shape, check_invariants=False
    )


def row_starts(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return where each of ``count`` block rows begins among sorted ones, and the end."""
    return torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))


class BlockProduct(torch.autograd.Function):
    """``x Wᵀ`` of a block-sparse ``W``, and its gradients at the blocks alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, blocks: torch.Tensor, layer: BlockSparseLinear
    ) -> torch.Tensor:
        """Map (tokens, in) to (tokens, out)."""
        ctx.save_for_backward(x, blocks)
        ctx.layer = layer
        weight = bsr(layer.starts, layer.columns, blocks, layer.shape)
        return (weight @ x.T).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the blocks."""
        x, blocks = ctx.saved_tensors
        layer: BlockSparseLinear = ctx.layer
        dx = gradient = None
        if ctx.needs_input_grad[0]:
            turned = blocks[layer.turn].transpose(1, 2).contiguous()
            out, inputs = layer.shape
            weight = bsr(layer.turned_starts, layer.turned_rows, turned, (inputs, out))
            dx = (weight @ dy.T).T
        if ctx.needs_input_grad[1]:
            gradient = block_sddmm(dy, x, layer.indices, layer.block_size)
            gradient = gradient.to(blocks.dtype)
        return dx, gradient, None


class BlockSparseLinear(nn.Module):
    """A linear layer whose weight is zero, and not stored, outside some blocks.

    Parameters
    ----------
    base : torch.nn.Linear or Conv1D
        The layer whose blocks and bias are kept; the bias is frozen.
    mask : LayerMask
        Its blocks: whole ones.

    Attributes
    ----------
    blocks : torch.nn.Parameter, shape (k, b, b)
        In the dtype of the layer's weight.

    Raises
    ------
    ConfigError
        If the layer's sizes are not multiples of the block size.
    """

    indices: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    turn: torch.Tensor
    turned_starts: torch.Tensor
    turned_rows: torch.Tensor

    def __init__(self, base: nn.Module, mask: LayerMask) -> None:
        super().__init__()
        weight = weight_view(base)
        self.shape, self.block_size = mask.shape, mask.block_size
        if any(size % mask.block_size for size in mask.shape):
            msg = (
                f"`block_size` must divide both sides of a pruned layer; got"
                f" {mask.block_size} for a {mask.shape} weight."
            )
            raise ConfigError(msg)
        indices = mask.indices.to(weight.device)
        self.blocks = nn.Parameter(gather_blocks(weight, indices, mask.block_size))
        bias = base.bias
        self.bias: nn.Parameter | None = None
        if isinstance(bias, torch.Tensor):
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        rows, columns = indices.unbind(1)
        turn = columns.argsort(stable=True)
        tables = {
            "indices": indices.to(torch.int32),
            "starts": row_starts(rows.contiguous(), mask.grid_shape[0]),
            "columns": columns.contiguous(),
            "turn": turn,
            "turned_starts": row_starts(columns[turn], mask.grid_shape[1]),
            "turned_rows": rows[turn],
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=name == "indices")
        with warnings.catch_warnings():  # torch says once that its layout is in beta
            warnings.simplefilter("ignore", UserWarning)
            bsr(self.starts, self.columns, self.blocks.detach(), self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = BlockProduct.apply(flat, self.blocks, self)  # type: ignore[no-untyped-call]
        y = y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Say how much of the weight there is."""
        return f"{self.shape}, {len(self.blocks)} blocks of {self.block_size}"


def make_block_sparse(model: nn.Module, masks: Mapping[str, LayerMask]) -> nn.Module:
    """Replace masked layers by `BlockSparseLinear` and freeze everything else, in place.

    Raises
    ------
    ConfigError, TargetError
        As `BlockSparseLinear`, and where a mask has no layer.
    """
    layers = check_masks(model, masks, None)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, BlockSparseLinear(layer, masks[name]))
    return model
