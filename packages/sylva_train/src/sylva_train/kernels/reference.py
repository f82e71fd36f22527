"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

import math
from typing import Any

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
        In the weight's dtype, contiguous; zero outside the weight.
    """
    if not is_ragged(weight.shape, block_size):
        blocks = interior(weight, block_size)[indices[:, 0], :, indices[:, 1], :]
        return blocks.contiguous()  # a transposed weight's are not
    rows, columns, inside = elements(weight.shape, indices, block_size)
    last_row, last_column = weight.shape[0] - 1, weight.shape[1] - 1
    blocks = weight[rows.clamp(max=last_row), columns.clamp(max=last_column)]
    return blocks.masked_fill(~inside, 0).contiguous()


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
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``: a sampled dense-dense matrix product.

    Parameters
    ----------
    dy : torch.Tensor, shape (tokens, out)
        Output gradients.
    x : torch.Tensor, shape (tokens, in)
        Inputs, in the dtype of ``dy``.
    indices : torch.Tensor, shape (k, 2), int32 or int64
        Block rows and block columns. On a GPU, pass the same tensor each time: the plan
        of a mask is kept with it.
    block_size : int
        Side ``b`` of a block.
    out : torch.Tensor, shape (k, b, b), optional
        Add to this gradient, and return it, instead of making a new one.

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
    count, wide = len(indices), accumulator(dy.dtype)
    if count == 0 or len(dy) == 0:
        shape = (count, block_size, block_size)
        return dy.new_zeros(shape, dtype=wide) if out is None else out
    indices = indices.long()
    if dy.device.type == "cpu":
        # Once, rather than each piece: its products do not accumulate in float32.
        dy, x = dy.to(wide), x.to(wide)
    rows, row_of = indices[:, 0].unique(return_inverse=True)
    columns, column_of = indices[:, 1].unique(return_inverse=True)
    stack = STACK_COST * count
    cartesian = CARTESIAN_COST * len(rows) * len(columns)
    dense = math.ceil(dy.shape[1] / block_size) * math.ceil(x.shape[1] / block_size)
    if dense <= min(stack, cartesian):
        blocks = from_dense(dy, x, indices, block_size)
    elif cartesian <= stack:
        blocks = from_rectangle(dy, x, (rows, columns, row_of, column_of), block_size)
    else:
        blocks = from_stack(dy, x, indices, block_size)
    return blocks if out is None else out.add_(blocks)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of a dtype are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b`` of matrices or stacks of them, not rounded to half precision."""
    multiply: Any = torch.mm if a.dim() == 2 else torch.bmm
    product: torch.Tensor
    if a.dtype.itemsize >= 4:
        product = multiply(a, b)
    elif a.is_cuda:
        product = multiply(a, b, out_dtype=torch.float32)
    else:
        product = multiply(a.float(), b.float())
    return product


def in_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """View columns (tokens, n) as blocks (tokens, blocks, b), padded where it has to."""
    if x.shape[1] % block_size:
        x = F.pad(x, (0, -x.shape[1] % block_size))
    blocks: torch.Tensor = x.unflatten(1, (-1, block_size))
    return blocks


def from_dense(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Take blocks from the whole ``dyᵀ x``."""
    return gather_blocks(wide_product(dy.T, x), indices, block_size)


def from_rectangle(
    dy: torch.Tensor,
    x: torch.Tensor,
    rectangle: tuple[torch.Tensor, ...],
    block_size: int,
) -> torch.Tensor:
    """Take blocks from the product of active block rows and columns.

    ``rectangle`` has those rows and columns, and the place of each block among them.
    """
    rows, columns, row_of, column_of = rectangle
    dy, x = in_blocks(dy, block_size), in_blocks(x, block_size)
    product = wide_product(dy[:, rows].flatten(1).T, x[:, columns].flatten(1))
    return interior(product, block_size)[row_of, :, column_of, :]


def from_stack(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Compute each block by a narrow product of its own."""
    size = max(1, _STACK_ELEMENTS // (len(dy) * block_size))
    dy, x = in_blocks(dy, block_size), in_blocks(x, block_size)
    pieces = [
        wide_product(
            dy[:, some[:, 0]].permute(1, 2, 0), x[:, some[:, 1]].transpose(0, 1)
        )
        for some in indices.split(size)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
