"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cost import choose_way, product_dtype, speeds_of, wide
from .places import (
    find_panels,
    find_places,
    find_runs,
    find_stretches,
    group_by_row,
)

__all__ = ["block_sddmm", "gather_blocks", "scatter_blocks_"]


def is_ragged(shape: torch.Size, block_size: int) -> bool:
    """Whether the last row or column of blocks is cut off."""
    return any(n % block_size for n in shape)


def interior(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """View the whole blocks of a weight as (rows, block, columns, block)."""
    rows, columns = (n // block_size for n in weight.shape)
    whole = weight[: rows * block_size, : columns * block_size]
    return whole.view(rows, block_size, columns, block_size)


def elements(
    shape: torch.Size, indices: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row (k, b, 1) and column (k, 1, b) of each element, and which ones exist."""
    offset = torch.arange(block_size, device=indices.device)
    rows = (indices[:, 0, None] * block_size + offset)[:, :, None]
    columns = (indices[:, 1, None] * block_size + offset)[:, None, :]
    return rows, columns, (rows < shape[0]) & (columns < shape[1])


def lines_of(weight: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """Return a weight as contiguous lines, and whether these are its columns.

    None where it has gaps; on a GPU, where a kernel writes the weights and what is kept
    of a mask would take memory; and for a compiler, which cannot look that up.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return None, False
    if weight.is_contiguous():
        return weight, False
    lines = weight.T
    return (lines, True) if lines.is_contiguous() else (None, False)


def gather_lines(
    lines: torch.Tensor, indices: torch.Tensor, block_size: int, is_turned: bool = False
) -> torch.Tensor:
    """Copy blocks out of contiguous lines, whose transpose is meant if ``is_turned``."""
    parts = find_stretches(indices, lines, block_size, is_turned)
    shape = len(indices), block_size, block_size
    if len(parts) == 1 and parts[0].sources is None:
        windows = parts[0].windows(lines)
        return windows.index_select(0, parts[0].places).view(shape)
    blocks = lines.new_zeros(shape)
    for part in parts:
        runs = part.windows(lines).index_select(0, part.places)
        assert part.sources is not None  # there is another part, or runs are shorter
        blocks.view(-1, block_size)[:, : part.length].index_copy_(0, part.sources, runs)
    return blocks


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

    Notes
    -----
    On a CPU, pass the same ``indices`` each time, as to `block_sddmm`.
    """
    lines, is_turned = lines_of(weight)
    if lines is not None:
        blocks = gather_lines(lines, indices, block_size, is_turned)
        return blocks.mT.contiguous() if is_turned else blocks
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
    """Write blocks (k, b, b) into a weight (out, in), in place, rounded to its dtype.

    On a CPU, pass the same ``indices`` each time, as to `block_sddmm`.
    """
    block_size, blocks = blocks.shape[-1], blocks.to(weight.dtype)
    lines, is_turned = lines_of(weight)
    if lines is not None:
        runs = (blocks.mT if is_turned else blocks).reshape(-1, block_size)
        for part in find_stretches(indices, lines, block_size, is_turned):
            some = runs if part.sources is None else runs.index_select(0, part.sources)
            if part.length < block_size:
                some = some[:, : part.length]
            part.windows(lines).index_copy_(0, part.places, some)
    elif not is_ragged(weight.shape, block_size):
        interior(weight, block_size)[indices[:, 0], :, indices[:, 1], :] = blocks
    else:
        rows, columns, _ = elements(weight.shape, indices, block_size)
        # What is outside goes, as often as it may, where the nearest element inside does,
        # and has its number: to leave it out by a mask, the host would wait for a device.
        rows = rows.clamp(max=weight.shape[0] - 1)
        columns = columns.clamp(max=weight.shape[1] - 1)
        block = torch.arange(len(blocks), device=blocks.device)[:, None, None]
        weight[rows, columns] = blocks[block, rows % block_size, columns % block_size]


# Elements of gathered activations at a time: pieces that stay in the cache, in memory
# that is used again. Larger ones cost several times as much, in page faults alone.
_PIECE_ELEMENTS, _STACK_ELEMENTS = 1 << 20, 1 << 17
# Elements of a dense product at a time: they are copied while they are in the cache. But
# with many tokens copies matter less than that flat products are slower.
_PANEL_ELEMENTS = 1 << 19


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
        Zero outside the (out, in) weight. Sums of bfloat16 products are rounded once on a
        CPU, as those of PyTorch's own gradient are.

    Notes
    -----
    Four ways, chosen by a measured cost model (`cost.choose_way`): for each active block row
    one product with the columns of its blocks; one product of the active rows with the
    active columns, from which the blocks are taken (masks of a rank-one score are nearly
    cartesian); the dense product, of which no more than a panel is there at a time; with
    few tokens a stack of products, one for each block.
    """
    count, tokens = indices.shape[0], dy.shape[0]
    if count == 0 or tokens == 0:
        shape = (count, block_size, block_size)
        return dy.new_zeros(shape, dtype=wide(dy.dtype)) if out is None else out
    way = find_way(dy, x, indices, block_size)
    blocks = WAYS[way](dy, x, indices, block_size)
    return blocks if out is None else out.add_(blocks)


def find_way(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> str:
    """Choose the way to the blocks of a product by `cost.choose_way`."""
    tokens, (speed, copying, stacked) = len(dy), speeds_of(dy)
    if dy.device.type != "cpu" or tokens == 1:
        stacked = 0.0  # PyTorch is slow at the outer products of a single token
    return choose_way(
        len(indices),
        find_places(indices).active,
        (-(-dy.shape[1] // block_size), -(-x.shape[1] // block_size)),
        block_size,
        tokens,
        torch.get_num_threads(),
        speed,
        copying,
        stacked,
    )


def wide_product(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``a @ b`` in `product_dtype`; on a CPU also write it there."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = product_dtype(a.dtype, a.device.type)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


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
    tokens, out = dy.shape
    is_small = out * x.shape[1] <= _PANEL_ELEMENTS or out <= 2 * tokens
    if is_small and not dy.is_cuda:
        blocks = gather_lines(wide_product(dy.T, x), indices, block_size)
        return blocks.to(wide(dy.dtype))
    return from_panels(dy, x, indices, block_size, "dense")


def from_rectangle(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Take blocks from the product of active block rows and columns."""
    found = find_places(indices)
    left = in_blocks(dy, block_size).index_select(1, found.rows).flatten(1)
    right = in_blocks(x, block_size).index_select(1, found.columns).flatten(1)
    return from_panels(left, right, indices, block_size, "cartesian")


def from_panels(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int, way: str
) -> torch.Tensor:
    """Take blocks from a product (`find_runs`), on a CPU panel by panel of its rows.

    Panels use one piece of memory in turn, and blocks are copied while they are in the
    cache: a large product is never there as a whole.
    """
    b, tokens = block_size, dy.shape[0]
    height, width = (-(-side.shape[1] // b) for side in (dy, x))
    rows = max(1, max(_PANEL_ELEMENTS // (width * b), 2 * tokens) // b)
    runs = find_runs(indices, way, width, b)
    missing = height * b - dy.shape[1], width * b - x.shape[1]
    if dy.is_cuda or rows >= height:
        product = wide_product(dy.T, x)
        if any(missing):
            product = F.pad(product, (0, missing[1], 0, missing[0]))
        blocks = product.view(-1, b).index_select(0, runs)
        return blocks.view(-1, b, b).to(wide(dy.dtype))
    found = find_places(indices)
    dtype = product_dtype(dy.dtype, dy.device.type)
    dy, x = dy.to(dtype), x.to(dtype)  # once for all panels
    if found.order is not None:
        runs = runs.view(-1, b)[found.order].flatten()
    rows = -(-height // -(-height // rows))  # of about equal height
    panel = dy.new_empty((rows * b, width * b))
    if missing[1]:
        panel[:, x.shape[1] :] = 0
    blocks = panel.new_empty((len(runs), b))
    for first, last, start, stop in find_panels(found, way, rows):
        part = dy[:, first * b : last * b].T
        wide_product(part, x, panel[: len(part), : x.shape[1]])
        if len(part) < (last - first) * b:
            panel[len(part) :] = 0
        places = runs[start * b : stop * b]
        if first:
            places = places - first * b * width
        torch.index_select(
            panel.view(-1, b), 0, places, out=blocks[start * b : stop * b]
        )
    blocks = blocks.view(-1, b, b)
    if found.order is not None:
        blocks = blocks[found.order.argsort()]
    return blocks.to(wide(dy.dtype))


def from_rows(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Compute each row's blocks by one product with the columns that they need.

    One stack of products for all blocks would copy both operands of each; a row's share
    of ``dy`` is used where it is.
    """
    size = max(1, _PIECE_ELEMENTS // (len(dy) * block_size))
    dy, x = in_blocks(dy, block_size), in_blocks(x, block_size)
    places = find_places(indices)
    products = [
        wide_product(x.index_select(1, some).flatten(1).T, dy[:, row])
        for row, columns in group_by_row(indices, places)
        for some in columns.split(size)
    ]
    # Faster this way round, (in, out), and turned all at once.
    blocks = torch.cat(products).view(-1, block_size, block_size).transpose(1, 2)
    if places.order is not None:
        blocks = blocks[places.order.argsort()]
    return blocks.to(wide(dy.dtype), memory_format=torch.contiguous_format)


def from_stack(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Compute the blocks as a stack of products, for which both sides are copied.

    With few tokens these copies are small beside the blocks, which are written once and
    where they belong.
    """
    b, dtype = block_size, wide(dy.dtype)
    size = max(1, _STACK_ELEMENTS // (len(dy) * b))
    blocks = dy.new_empty((len(indices), b, b), dtype=dtype)
    dy, x = in_blocks(dy, b), in_blocks(x, b)
    parts = (part.split(size) for part in (*indices.unbind(1), blocks))
    for rows, columns, out in zip(*parts, strict=True):
        left = dy.index_select(1, rows).to(dtype).permute(1, 2, 0)
        right = x.index_select(1, columns).to(dtype).transpose(0, 1)
        torch.bmm(left, right, out=out)
    return blocks


WAYS = {
    "dense": from_dense,
    "cartesian": from_rectangle,
    "rows": from_rows,
    "stack": from_stack,
}
