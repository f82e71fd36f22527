"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["block_sddmm", "gather_blocks", "scatter_blocks_"]


def interior(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """View the whole blocks of a weight as (rows, block, columns, block)."""
    rows, columns = (n // block_size for n in weight.shape)
    whole = weight[: rows * block_size, : columns * block_size]
    return whole.view(rows, block_size, columns, block_size)


def is_ragged(shape: torch.Size | tuple[int, int], block_size: int) -> bool:
    """Whether the last row or column of blocks is cut off."""
    return bool(shape[0] % block_size or shape[1] % block_size)


def elements(
    shape: torch.Size, indices: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row (k, b, 1) and column (k, 1, b) of each element, and which ones exist."""
    offset = torch.arange(block_size, device=indices.device)
    rows = (indices[:, 0, None] * block_size + offset)[:, :, None]
    columns = (indices[:, 1, None] * block_size + offset)[:, None, :]
    return rows, columns, (rows < shape[0]) & (columns < shape[1])


def gather_blocks(
    weight: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Copy blocks out of a weight.

    Parameters
    ----------
    weight : torch.Tensor, shape (out, in)
        Any strides and dtype.
    indices : torch.Tensor, shape (k, 2), int64
        Block rows and block columns.
    block_size : int
        Side ``b`` of a block.

    Returns
    -------
    torch.Tensor, shape (k, b, b)
        In the weight's dtype; zero outside the weight.
    """
    if not is_ragged(weight.shape, block_size):
        return interior(weight, block_size)[indices[:, 0], :, indices[:, 1], :]
    rows, columns, inside = elements(weight.shape, indices, block_size)
    last_row, last_column = weight.shape[0] - 1, weight.shape[1] - 1
    blocks = weight[rows.clamp(max=last_row), columns.clamp(max=last_column)]
    return blocks.masked_fill(~inside, 0)


def scatter_blocks_(
    weight: torch.Tensor, indices: torch.Tensor, blocks: torch.Tensor
) -> None:
    """Write blocks (k, b, b) into a weight (out, in), in place, rounded to its dtype."""
    block_size = blocks.shape[-1]
    blocks = blocks.to(weight.dtype)
    if not is_ragged(weight.shape, block_size):
        interior(weight, block_size)[indices[:, 0], :, indices[:, 1], :] = blocks
        return
    rows, columns, inside = elements(weight.shape, indices, block_size)
    weight[rows.expand_as(inside)[inside], columns.expand_as(inside)[inside]] = blocks[
        inside
    ]


# Seconds per block of each way to take blocks of a product, relative to the dense
# product, on a CPU (benchmarks/bench_layer.py): gathering and narrow products cost more.
STACK_COST, CARTESIAN_COST = 11.0, 1.5
# Largest copy of gathered activations, in elements: longer stacks go in pieces.
_STACK_ELEMENTS = 1 << 24


def block_sddmm(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``: a sampled dense-dense matrix product.

    Parameters
    ----------
    dy : torch.Tensor, shape (tokens, out)
        Output gradients.
    x : torch.Tensor, shape (tokens, in)
        Inputs, in the dtype of ``dy``.
    indices : torch.Tensor, shape (k, 2), int64
        Block rows and block columns.
    block_size : int
        Side ``b`` of a block.

    Returns
    -------
    torch.Tensor, shape (k, b, b), float32 (float64 for float64 inputs)
        Zero outside the (out, in) weight.

    Notes
    -----
    Three ways, chosen by measured cost: a stack of ``(b, tokens) @ (tokens, b)``
    products; one product of the active rows with the active columns, from which the
    blocks are taken (masks of a rank-one score are nearly cartesian); the dense product.
    """
    out, inputs = dy.shape[1], x.shape[1]
    accumulate = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if len(indices) == 0 or len(dy) == 0:
        return dy.new_zeros((len(indices), block_size, block_size), dtype=accumulate)
    if is_ragged((out, inputs), block_size):
        dy = F.pad(dy, (0, -out % block_size))
        x = F.pad(x, (0, -inputs % block_size))
    if dy.device.type == "cpu":
        # A CPU has no half-precision matrix product that accumulates in float32.
        dy, x = dy.to(accumulate), x.to(accumulate)
    dy = dy.unflatten(1, (-1, block_size))
    x = x.unflatten(1, (-1, block_size))
    rows, row_of = indices[:, 0].unique(return_inverse=True)
    columns, column_of = indices[:, 1].unique(return_inverse=True)
    stack = STACK_COST * len(indices)
    cartesian = CARTESIAN_COST * len(rows) * len(columns)
    dense = dy.shape[1] * x.shape[1]
    if dense <= min(stack, cartesian):
        product = dy.flatten(1).T @ x.flatten(1)
        row_of, column_of = indices.unbind(1)
    elif cartesian <= stack:
        product = dy[:, rows].flatten(1).T @ x[:, columns].flatten(1)
    if min(dense, cartesian) <= stack:
        return interior(product, block_size)[row_of, :, column_of, :].to(accumulate)
    size = max(1, _STACK_ELEMENTS // (len(dy) * block_size))
    pieces = [
        torch.bmm(
            dy[:, some[:, 0]].permute(1, 2, 0), x[:, some[:, 1]].transpose(0, 1)
        ).to(accumulate)
        for some in indices.split(size)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
