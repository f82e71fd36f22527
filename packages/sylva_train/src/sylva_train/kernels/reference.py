"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

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


# Cost model of the ways on a CPU, in multiply-adds of the dense product
# (benchmarks/bench_layer.py): copying an active row or column of blocks costs so much for
# each element; products of a block and of a rectangle are slower by these factors; and
# another way must be cheaper than the dense product by this margin to be taken.
COPY_COST, BLOCK_COST, RECTANGLE_COST, MARGIN = 40.0, 2.0, 1.15, 0.92
# Elements of gathered activations at a time: pieces that stay in the cache, in memory
# that is used again. Larger ones cost several times as much, in page faults alone.
_PIECE_ELEMENTS = 1 << 18


@dataclass
class Active:
    """A mask's active rows and columns, and its blocks' places among them."""

    version: int | None
    rows: torch.Tensor
    columns: torch.Tensor
    row_of: torch.Tensor
    column_of: torch.Tensor


# By the identity of the indices, which a layer keeps: worked out once.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def find_active(indices: torch.Tensor) -> Active:
    """Find a mask's active rows and columns, or look them up."""
    version = None if indices.is_inference() else indices._version
    active: Active | None = _known.get(indices)
    if active is None or version is None or active.version != version:
        rows, row_of = indices[:, 0].unique(return_inverse=True)
        columns, column_of = indices[:, 1].unique(return_inverse=True)
        active = Active(version, rows, columns, row_of, column_of)
        _known[indices] = active
    return active


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
    Three ways, chosen by a measured cost model (`choose_way`): a stack of ``(b, tokens) @
    (tokens, b)`` products, some at a time; one product of the active rows with the active
    columns, from which the blocks are taken (masks of a rank-one score are nearly
    cartesian); the dense product.
    """
    out, inputs = dy.shape[1], x.shape[1]
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if len(indices) == 0 or len(dy) == 0:
        return dy.new_zeros((len(indices), block_size, block_size), dtype=wide)
    # A CPU has no half-precision matrix product that accumulates in float32.
    compute = wide if dy.device.type == "cpu" else dy.dtype
    active = find_active(indices)
    way = choose_way(
        len(indices),
        (len(active.rows), len(active.columns)),
        (-(-out // block_size), -(-inputs // block_size)),
        block_size,
    )
    ragged = is_ragged((out, inputs), block_size)
    if way == "dense":
        product = dy.to(compute).T @ x.to(compute)
        if ragged:
            return gather_blocks(product, indices, block_size).to(wide)
        rows, columns = indices.unbind(1)
        return take_blocks(product, rows, columns, block_size).to(wide)
    if ragged:
        dy = F.pad(dy, (0, -out % block_size))
        x = F.pad(x, (0, -inputs % block_size))
    dy = dy.unflatten(1, (-1, block_size))
    x = x.unflatten(1, (-1, block_size))
    if way == "cartesian":
        left, right = (
            t.index_select(1, some).flatten(1).to(compute)
            for t, some in ((dy, active.rows), (x, active.columns))
        )
        return take_blocks(
            left.T @ right, active.row_of, active.column_of, block_size
        ).to(wide)
    size = max(1, _PIECE_ELEMENTS // (len(dy) * block_size))
    pieces = [
        torch.bmm(
            dy.index_select(1, some[:, 0]).to(compute).permute(1, 2, 0),
            x.index_select(1, some[:, 1]).to(compute).transpose(0, 1),
        ).to(wide)
        for some in indices.split(size)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
