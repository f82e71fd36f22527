"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

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


# Cost model of the ways on a CPU, in multiply-adds of the dense product
# (benchmarks/bench_layer.py): copying an active row or column of blocks costs so much for
# each element; products of a block and of a rectangle are slower by these factors; and
# another way must be cheaper than the dense product by this margin to be taken.
COPY_COST, BLOCK_COST, RECTANGLE_COST, MARGIN = 40.0, 2.0, 1.15, 0.92
# Elements of gathered activations at a time: pieces that stay in the cache, in memory
# that is used again. Larger ones cost several times as much, in page faults alone.
_PIECE_ELEMENTS = 1 << 18


@dataclass
class Rectangle:
    """A mask's active rows and columns, and its blocks' places among them."""

    version: int | None
    rows: torch.Tensor
    columns: torch.Tensor
    row_of: torch.Tensor
    column_of: torch.Tensor


# By the identity of the indices, which a layer keeps: worked out once.
_rectangles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def find_rectangle(indices: torch.Tensor) -> Rectangle:
    """Work out a mask's active rows and columns, or look them up."""
    version = None if indices.is_inference() else indices._version
    found: Rectangle | None = _rectangles.get(indices)
    if found is None or version is None or found.version != version:
        rows, row_of = indices[:, 0].unique(return_inverse=True)
        columns, column_of = indices[:, 1].unique(return_inverse=True)
        found = Rectangle(version, rows, columns, row_of, column_of)
        _rectangles[indices] = found
    return found


def choose_way(
    blocks: int, active: tuple[int, int], grid: tuple[int, int], block_size: int
) -> str:
    """Choose the cheapest way to blocks of a product, the dense one when in doubt.

    Parameters
    ----------
    blocks : int
        Number of active blocks.
    active, grid : (int, int)
        Active and existing rows and columns of blocks.
    block_size : int
        Side of a block.

    Returns
    -------
    str
        ``"stack"``, ``"cartesian"`` or ``"dense"``.
    """
    area, b = block_size**2, block_size
    costs = {
        "stack": blocks * (BLOCK_COST * area + 2 * COPY_COST * b),
        "cartesian": RECTANGLE_COST * active[0] * active[1] * area
        + sum(active) * COPY_COST * b,
        "dense": MARGIN * grid[0] * grid[1] * area,
    }
    return min(costs, key=lambda way: costs[way])


def take_blocks(
    product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Copy blocks (k, b, b) out of a contiguous matrix of whole blocks."""
    wide = product.shape[1] // block_size
    first = rows[:, None] * block_size + torch.arange(block_size, device=rows.device)
    runs = (first * wide + columns[:, None]).flatten()
    found = product.view(-1, block_size).index_select(0, runs)
    return found.view(-1, block_size, block_size)


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
        Block rows and block columns. Pass the same tensor each time: what is worked out
        about a mask is kept with it.
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
    Three ways, chosen by a measured cost model (`choose_way`): a stack of ``(b, tokens) @
    (tokens, b)`` products, some at a time; one product of the active rows with the active
    columns, from which the blocks are taken (masks of a rank-one score are nearly
    cartesian); the dense product.
    """
    count = len(indices)
    if count == 0 or len(dy) == 0:
        shape = (count, block_size, block_size)
        return dy.new_zeros(shape, dtype=wide(dy.dtype)) if out is None else out
    rectangle = find_rectangle(indices)
    way = choose_way(
        count,
        (len(rectangle.rows), len(rectangle.columns)),
        (-(-dy.shape[1] // block_size), -(-x.shape[1] // block_size)),
        block_size,
    )
    ways = {"dense": from_dense, "cartesian": from_rectangle, "stack": from_stack}
    blocks = ways[way](dy, x, indices, block_size)
    return blocks if out is None else out.add_(blocks)


def wide(dtype: torch.dtype) -> torch.dtype:
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
        # A CPU has no half-precision matrix product that accumulates in float32.
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
    """Take blocks from the whole product."""
    product = wide_product(dy.T, x)
    if is_ragged(product.shape, block_size):
        return gather_blocks(product, indices, block_size)
    rows, columns = indices.unbind(1)
    return take_blocks(product, rows, columns, block_size)


def from_rectangle(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Take blocks from the product of active block rows and columns."""
    found = find_rectangle(indices)
    left = in_blocks(dy, block_size).index_select(1, found.rows).flatten(1)
    right = in_blocks(x, block_size).index_select(1, found.columns).flatten(1)
    product = wide_product(left.T, right)
    return take_blocks(product, found.row_of, found.column_of, block_size)


def from_stack(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Compute each block by a narrow product of its own, some at a time."""
    size = max(1, _PIECE_ELEMENTS // (len(dy) * block_size))
    dy, x = in_blocks(dy, block_size), in_blocks(x, block_size)
    pieces = [
        wide_product(
            dy.index_select(1, some[:, 0]).permute(1, 2, 0),
            x.index_select(1, some[:, 1]).transpose(0, 1),
        )
        for some in indices.split(size)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
