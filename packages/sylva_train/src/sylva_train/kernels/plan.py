"""How the blocks of a mask are computed: which share a tile, in which order, which way.

A lone block of 64 reads 32 FLOP's worth of each byte, a tenth of what a GPU can do with
a byte from memory. So blocks share tiles: a *program* computes ``rows`` block rows times
``columns`` active block columns at once, wherever in the weight these are, and keeps
those blocks that the mask has. Rows with blocks in the same columns go together.
Everything here is arithmetic on the table of indices, done once for a mask.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from sylva_train._identity import ByIdentity

from .capture import check_not_capturing

__all__ = ["Plan", "find_plan", "make_plan"]

# What the cost model rests on. These are data-sheet figures of one H100 (SXM), by bytes
# of an element; none of them, and no choice that follows, was measured on a GPU yet.
#: Matrix products, FLOP a second.
FLOPS = {2: 990e12, 4: 60e12}
#: What tiles without a fixed library's care reach of that, and such a library itself.
EFFICIENCY, LIBRARY_EFFICIENCY = 0.6, 0.7
#: Products with fewer rows than a warp group has lose this factor.
SMALL_TILE, SMALL_TILE_FACTOR = 64, 0.5
#: Bytes a second from the cache that all programs share, and from memory. Of the former
#: no data sheet tells; 5120 bytes a clock, as the card before it has, would be 9e12.
CACHE, MEMORY = 8e12, 3.35e12

#: Largest sides of a program's tile, and its largest area by bytes of an element: sums are
#: in registers, and products without tensor cores need others beside them.
TILE_ROWS, TILE_COLUMNS = 128, 256
TILE_AREA = {2: 128 * 256, 4: 128 * 128}
#: Super-rows whose programs run side by side, and so share activations in the cache.
BAND = 8


@dataclass(frozen=True)
class Plan:
    """How to compute the blocks of one mask.

    Attributes
    ----------
    rows, columns : int
        Block rows and block columns of one program's tile.
    members : torch.Tensor, shape (super-rows, rows), int32
        Block rows of each super-row; the last is filled up with one of them again.
    groups : torch.Tensor, shape (programs, 3), int32
        Super-row, first pair and end of the pairs of a program.
    pairs : torch.Tensor, shape (pairs,), int32
        Block column of each pair of a super-row and a column that is active in it.
    slots : torch.Tensor, shape (pairs, rows), int32
        Which block each row of a pair is; −1 where the mask has none.
    seconds : dict of str to (float, float)
        What each way costs by the model: a constant, and a part for each token.
    """

    rows: int
    columns: int
    members: torch.Tensor
    groups: torch.Tensor
    pairs: torch.Tensor
    slots: torch.Tensor
    seconds: dict[str, tuple[float, float]] = field(compare=False)

    def way(self, tokens: int) -> str:
        """Return the cheapest way: ``"blocks"``, ``"rectangle"`` or ``"dense"``."""
        return min(
            self.seconds,
            key=lambda way: self.seconds[way][0] + tokens * self.seconds[way][1],
        )


def tiles(block: int, itemsize: int) -> list[tuple[int, int]]:
    """Return the tiles that fit, as block rows and block columns."""
    powers = [2**n for n in range(5)]
    return [
        (rows, columns)
        for rows, columns in itertools.product(powers, powers)
        if rows * block <= max(TILE_ROWS, block)
        and columns * block <= max(TILE_COLUMNS, block)
        and rows * columns * block**2 <= max(TILE_AREA[itemsize], block**2)
    ]


def tile_seconds(rows: int, columns: int, block: int, itemsize: int) -> float:
    """Seconds for each token of a tile: its products, or reading its operands."""
    speed = FLOPS[itemsize] * EFFICIENCY
    if rows * block < SMALL_TILE:
        speed *= SMALL_TILE_FACTOR
    products = 2 * rows * columns * block**2 / speed
    return max(products, (rows + columns) * block * itemsize / CACHE)


def library_seconds(
    shape: tuple[int, int], gathered: bool, itemsize: int
) -> tuple[float, float]:
    """Seconds of one dense product of a shape: a constant, and for each token.

    The product is written and read again, in float32; operands that have to be gathered
    first are read and written.
    """
    out, inputs = shape
    token = 2 * out * inputs / (FLOPS[itemsize] * LIBRARY_EFFICIENCY)
    if gathered:
        token += 2 * (out + inputs) * itemsize / MEMORY
    return 2 * 4 * out * inputs / MEMORY, token


def arrange(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put active rows next to each other that have blocks in the same columns.

    Scores of (nearly) rank one choose, of a row with fewer blocks, some of the columns
    of one with more: such rows fill a tile, wherever they are in the weight.

    Returns
    -------
    rows, columns : torch.Tensor, shape (active,)
        The active block rows in their new order: as words in a dictionary, whose letters
        are the columns, the ones with most blocks first. The columns in that order.
    places : torch.Tensor, shape (k, 2)
        The blocks' places among these rows and columns.
    """
    rows, row_of = indices[:, 0].unique(return_inverse=True)
    columns, column_of = indices[:, 1].unique(return_inverse=True)
    by_count = column_of.bincount().argsort(descending=True, stable=True)
    column_of = by_count.argsort()[column_of]
    lacks = torch.ones((len(rows), len(columns)), dtype=torch.bool)
    lacks[row_of, column_of] = False
    _, word = lacks.unique(dim=0, return_inverse=True)
    by_word = word.argsort(stable=True)
    places = torch.stack([by_word.argsort()[row_of], column_of], 1)
    return rows[by_word], columns[by_count], places


def pair_up(
    places: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join blocks of one column in neighbouring rows.

    Returns
    -------
    super_row, column : torch.Tensor, shape (pairs,)
        Sorted by super-row, then column.
    slots : torch.Tensor, shape (pairs, rows)
        Which block each row of a pair is, or −1.
    """
    width = int(places[:, 1].max()) + 1
    key, pair = (places[:, 0] // rows * width + places[:, 1]).unique(
        return_inverse=True
    )
    slots = places.new_full((len(key), rows), -1)
    slots[pair, places[:, 0] % rows] = torch.arange(len(places))
    return key // width, key % width, slots


def chunk(super_row: torch.Tensor, columns: int) -> torch.Tensor:
    """Cut the pairs of each super-row into programs: (programs, 3), see `Plan.groups`."""
    rows, counts = super_row.unique_consecutive(return_counts=True)
    programs = (counts + columns - 1) // columns
    starts, ends = counts.cumsum(0) - counts, counts.cumsum(0)
    owner = torch.arange(len(rows)).repeat_interleave(programs)
    nth = torch.arange(len(owner)) - (programs.cumsum(0) - programs)[owner]
    first = starts[owner] + nth * columns
    last = torch.minimum(first + columns, ends[owner])
    return torch.stack([rows[owner], first, last], 1)


def order(groups: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Sort programs so that those that run side by side read the same activations.

    Bands of super-rows, and in each the columns with most blocks first: the programs of
    a band share the columns of ``x`` that they read at one time, and one row's share its
    columns of ``dy``.
    """
    band, left = groups[:, 0] // BAND, column[groups[:, 1]]
    width, height = int(column.max()) + 1, int(groups[:, 0].max()) + 1
    return groups[((band * width + left) * height + groups[:, 0]).argsort()]


def make_plan(
    indices: torch.Tensor, shape: tuple[int, int], block: int, itemsize: int = 2
) -> Plan:
    """Plan the computation of a mask's blocks.

    Parameters
    ----------
    indices : torch.Tensor, shape (k, 2), integers
        Block rows and block columns, in any order; at least one.
    shape : (int, int)
        ``(out, in)`` of the product, ragged or not.
    block : int
        Side of a block.
    itemsize : int
        Bytes of an element of the operands, 2 or 4.

    Returns
    -------
    Plan
        Its tensors are on the device of ``indices``.

    Notes
    -----
    The model counts, for each token, the tiles of all programs (whether the mask fills
    them or not) at the speed of the products or of the cache, whichever is slower; the
    rectangle of active rows and columns, and the dense product, at the speed of a
    library's products, with the gathering of operands and the product's own bytes.
    """
    device = indices.device
    indices = indices.detach().to("cpu", torch.int64)
    choices = tiles(block, itemsize)
    block_rows, block_columns, places = arrange(indices)
    paired = {rows: pair_up(places, rows) for rows in {rows for rows, _ in choices}}
    programs = {
        (rows, columns): chunk(paired[rows][0], columns) for rows, columns in choices
    }
    each = {t: len(g) * tile_seconds(*t, block, itemsize) for t, g in programs.items()}
    rows, columns = min(each, key=lambda t: each[t])
    _, column, slots = paired[rows]
    groups = order(programs[rows, columns], column)
    fill = block_rows[-1:].expand(-len(block_rows) % rows)
    members = torch.cat([block_rows, fill]).view(-1, rows)

    height, width = len(block_rows) * block, len(block_columns) * block
    seconds = {
        # The result is written once; what splitting adds is little beside the rest.
        "blocks": (4 * len(indices) * block**2 / MEMORY, each[rows, columns]),
        "rectangle": library_seconds((height, width), gathered=True, itemsize=itemsize),
        "dense": library_seconds(shape, gathered=False, itemsize=itemsize),
    }
    return Plan(
        rows=rows,
        columns=columns,
        members=members.to(device, torch.int32),
        groups=groups.to(device, torch.int32),
        pairs=block_columns[column].to(device, torch.int32),
        slots=slots.to(device, torch.int32),
        seconds=seconds,
    )


# By the identity of the indices, for one version of them: shape, block and bytes to plan.
_plans: ByIdentity[tuple[int, dict[tuple[Any, ...], Plan]]] = ByIdentity()


def find_plan(
    indices: torch.Tensor, shape: tuple[int, int], block: int, itemsize: int
) -> Plan:
    """Return a mask's plan, made at its first use.

    It is kept for as long as the table of indices lives, and made again if that is
    changed. Making it waits for the device.

    Raises
    ------
    ConfigError
        If it would have to be made while a CUDA graph is captured.
    """
    version = 0 if indices.is_inference() else indices._version
    seen, plans = _plans.get(indices) or (None, {})
    if seen != version:
        plans = {}
        _plans[indices] = version, plans
    key = (shape, block, itemsize)
    if key not in plans:
        check_not_capturing(indices.device, "a mask's plan is made")
        plans[key] = make_plan(indices, shape, block, itemsize)
    return plans[key]
