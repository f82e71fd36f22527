"""Block operations in plain PyTorch.

A weight is an (out, in) matrix, in any strides; ``indices`` (k, 2) are the rows and
columns of its active blocks in the grid of ``block_size`` squares. Blocks over a ragged
edge are stored full-size with zeros outside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .capture import check_not_capturing
from .cost import choose_way, product_dtype, speed_of, wide

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
    """Write blocks (k, b, b) into a weight (out, in), in place, rounded to its dtype.

    On a CPU, pass the same ``indices`` each time, as to `block_sddmm`.
    """
    block_size = blocks.shape[-1]
    blocks = blocks.to(weight.dtype)
    if not is_ragged(weight.shape, block_size):
        is_turned = not weight.is_contiguous()
        lines = weight.T if is_turned else weight
        # On a GPU a kernel writes the weights, and the places would take its memory.
        if lines.is_contiguous() and lines.device.type == "cpu":
            way = "turned" if is_turned else "dense"
            places = find_runs(indices, way, lines.shape[1] // block_size, block_size)
            runs = (blocks.mT if is_turned else blocks).reshape(-1, block_size)
            lines.view(-1, block_size).index_copy_(0, places, runs)
        else:
            interior(weight, block_size)[indices[:, 0], :, indices[:, 1], :] = blocks
        return
    rows, columns, inside = elements(weight.shape, indices, block_size)
    weight[rows.expand_as(inside)[inside], columns.expand_as(inside)[inside]] = blocks[
        inside
    ]


# Elements of gathered activations at a time: pieces that stay in the cache, in memory
# that is used again. Larger ones cost several times as much, in page faults alone.
_PIECE_ELEMENTS = 1 << 20
# Elements of a dense product at a time: they are copied while they are in the cache. But
# with many tokens copies matter less than that flat products are slower.
_PANEL_ELEMENTS = 1 << 19


@dataclass
class Places:
    """A mask's active rows and columns, and its blocks' places among them.

    ``order`` sorts blocks by row, and is None where they are. Filled where they are
    needed: ``by_row``, see `group_by_row`; ``panels``, see `find_panels`; ``runs``, see
    `find_runs`.
    """

    version: int | None
    rows: torch.Tensor
    columns: torch.Tensor
    row_of: torch.Tensor
    column_of: torch.Tensor
    order: torch.Tensor | None
    by_row: list[tuple[int, torch.Tensor]] | None = None
    panels: dict[tuple[str, int], list[tuple[int, int, int, int]]] = field(
        default_factory=dict
    )
    runs: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


# By the identity of the indices, which a layer keeps: worked out once.
_places: WeakIdKeyDictionary = WeakIdKeyDictionary()


def find_places(indices: torch.Tensor) -> Places:
    """Work out where a mask's blocks lie, or look it up."""
    version = None if indices.is_inference() else indices._version
    found: Places | None = _places.get(indices)
    if found is None or version is None or found.version != version:
        check_not_capturing(indices.device, "a mask's rows and columns are found")
        rows, row_of = indices[:, 0].unique(return_inverse=True)
        columns, column_of = indices[:, 1].unique(return_inverse=True)
        is_sorted = bool((row_of.diff() >= 0).all())
        order = None if is_sorted else row_of.argsort(stable=True)
        found = Places(version, rows, columns, row_of, column_of, order)
        _places[indices] = found
    return found


def group_by_row(
    indices: torch.Tensor, places: Places
) -> list[tuple[int, torch.Tensor]]:
    """Return each active row with the columns of its blocks."""
    if places.by_row is None:
        columns = indices[:, 1] if places.order is None else indices[places.order, 1]
        parts = columns.split(places.row_of.bincount().tolist())
        places.by_row = list(zip(places.rows.tolist(), parts, strict=True))
    return places.by_row


def find_panels(
    places: Places, way: str, height: int
) -> list[tuple[int, int, int, int]]:
    """Cut the rows of blocks of a matrix (`find_runs`) into panels of a height.

    Returns
    -------
    list of (int, int, int, int)
        First row and end of each that has blocks; its first block, by row, and their end.
    """
    key = way, height
    if key not in places.panels:
        is_dense = way == "dense"
        rows = places.rows.tolist() if is_dense else list(range(len(places.rows)))
        ends = places.row_of.bincount().cumsum(0).tolist()
        panels: list[tuple[int, int, int, int]] = []
        for row, end in zip(rows, ends, strict=True):
            if panels and panels[-1][0] // height == row // height:
                first, _, start, _ = panels.pop()
            else:
                first, start = row, panels[-1][3] if panels else 0
            panels.append((first, row + 1, start, end))
        places.panels[key] = panels
    return places.panels[key]


def find_runs(
    indices: torch.Tensor, way: str, wide: int, block_size: int
) -> torch.Tensor:
    """Return which runs of ``b`` elements a mask's blocks are in a contiguous matrix.

    Parameters
    ----------
    indices : torch.Tensor, shape (k, 2)
        The mask's; the result is kept with it, since working it out takes longer than
        copying the runs.
    way : str
        What the matrix is: ``"dense"``, the (out, in) matrix; ``"turned"``, its
        transpose; or ``"cartesian"``, its active rows and columns of blocks.
    wide : int
        Blocks in a row of the matrix.
    block_size : int
        Side ``b`` of a block.

    Returns
    -------
    torch.Tensor, shape (k · b,), int64
        Block by block.
    """
    found = find_places(indices)
    key = way, wide
    if key not in found.runs:
        rows, columns = found.row_of, found.column_of
        if way != "cartesian":
            rows, columns = indices.flip(1).T if way == "turned" else indices.T
        offset = torch.arange(block_size, device=indices.device)
        first = (rows[:, None] * block_size + offset) * wide
        found.runs[key] = (first + columns[:, None]).flatten()
    return found.runs[key]


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
    Three ways, chosen by a measured cost model (`cost.choose_way`): for each active block row
    one product with the columns of its blocks; one product of the active rows with the
    active columns, from which the blocks are taken (masks of a rank-one score are nearly
    cartesian); the dense product, of which no more than a panel is there at a time.
    """
    count = len(indices)
    if count == 0 or len(dy) == 0:
        shape = (count, block_size, block_size)
        return dy.new_zeros(shape, dtype=wide(dy.dtype)) if out is None else out
    places = find_places(indices)
    way = choose_way(
        count,
        (len(places.rows), len(places.columns)),
        (-(-dy.shape[1] // block_size), -(-x.shape[1] // block_size)),
        block_size,
        len(dy),
        torch.get_num_threads(),
        speed_of(dy),
    )
    ways = {"dense": from_dense, "cartesian": from_rectangle, "rows": from_rows}
    blocks = ways[way](dy, x, indices, block_size)
    return blocks if out is None else out.add_(blocks)


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
    b, found = block_size, find_places(indices)
    height, width = (-(-side.shape[1] // b) for side in (dy, x))
    runs = find_runs(indices, way, width, b)
    rows = max(1, max(_PANEL_ELEMENTS // (width * b), 2 * len(dy)) // b)
    missing = height * b - dy.shape[1], width * b - x.shape[1]
    if dy.is_cuda or (rows >= height and not any(missing)):
        product = wide_product(dy.T, x)
        if any(missing):
            product = F.pad(product, (0, missing[1], 0, missing[0]))
        blocks = product.view(-1, b).index_select(0, runs)
        return blocks.view(-1, b, b).to(wide(dy.dtype))
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
