"""Where a mask's blocks lie: worked out once, and kept with its table of indices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sylva_train._identity import ByIdentity

from .capture import check_not_capturing

__all__ = [
    "Places",
    "Stretch",
    "find_panels",
    "find_places",
    "find_runs",
    "find_stretches",
    "group_by_row",
]


class Stretch(NamedTuple):
    """Runs of equal length that blocks have in the memory of a contiguous matrix.

    Attributes
    ----------
    length, step : int
        Elements of a run; each begins at a multiple of ``step``.
    places : torch.Tensor, shape (n,), int64
        Which multiples.
    sources : torch.Tensor, shape (n,), int64, or None
        The runs' rows of the blocks as a (k · b, b) matrix; None for all, in order.
    """

    length: int
    step: int
    places: torch.Tensor
    sources: torch.Tensor | None

    def windows(self, lines: torch.Tensor) -> torch.Tensor:
        """View a contiguous matrix as every run that there could be, overlapping ones too."""
        step, length = self.step, self.length
        if step == length:
            return lines.view(-1, length)
        count = (lines.numel() - length) // step + 1
        return lines.as_strided((count, length), (step, 1))


@dataclass
class Places:
    """A mask's active rows and columns (``active`` many), and its blocks' places there.

    ``order`` sorts blocks by row, and is None where they are. Filled where they are
    needed: ``by_row``, see `group_by_row`; ``panels``, see `find_panels`; ``runs``, see
    `find_runs`; ``stretches``, see `find_stretches`.
    """

    version: int | None
    rows: torch.Tensor
    columns: torch.Tensor
    row_of: torch.Tensor
    column_of: torch.Tensor
    order: torch.Tensor | None
    active: tuple[int, int]
    by_row: list[tuple[int, torch.Tensor]] | None = None
    panels: dict[tuple[str, int], list[tuple[int, int, int, int]]] = field(
        default_factory=dict
    )
    runs: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    stretches: dict[tuple[int, int, int, bool], list[Stretch]] = field(
        default_factory=dict
    )


# By the identity of the indices, which a layer keeps: worked out once.
_places: ByIdentity[Places] = ByIdentity()


def find_places(indices: torch.Tensor) -> Places:
    """Work out where a mask's blocks lie, or look it up."""
    version = None if indices.is_inference() else indices._version
    found = _places.get(indices)
    if found is None or version is None or found.version != version:
        check_not_capturing(indices.device, "a mask's rows and columns are found")
        rows, row_of = indices[:, 0].unique(return_inverse=True)
        columns, column_of = indices[:, 1].unique(return_inverse=True)
        is_sorted = bool((row_of.diff() >= 0).all())
        order = None if is_sorted else row_of.argsort(stable=True)
        active = len(rows), len(columns)
        found = Places(version, rows, columns, row_of, column_of, order, active)
        _places[indices] = found
    return found


def group_by_row(
    indices: torch.Tensor, places: Places
) -> list[tuple[int, torch.Tensor]]:
    """Return each active row with the columns of its blocks."""
    if places.by_row is None:
        # A view would keep the indices, and what is known of them, alive for ever.
        columns = indices[:, 1].clone()
        if places.order is not None:
            columns = columns[places.order]
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
        What the matrix is: ``"dense"``, the (out, in) matrix; or ``"cartesian"``, its
        active rows and columns of blocks.
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
    key = way, wide, block_size
    if key not in found.runs:
        is_dense = way == "dense"
        rows, columns = indices.T if is_dense else (found.row_of, found.column_of)
        offset = torch.arange(block_size, device=indices.device)
        first = (rows[:, None] * block_size + offset) * wide
        found.runs[key] = (first + columns[:, None]).flatten()
    return found.runs[key]


def find_stretches(
    indices: torch.Tensor, lines: torch.Tensor, block_size: int, is_turned: bool
) -> list[Stretch]:
    """Return which stretches of a contiguous matrix a mask's blocks are.

    Parameters
    ----------
    indices : torch.Tensor, shape (k, 2)
        The mask's; the result is kept with it.
    lines : torch.Tensor
        The matrix, of any shape.
    block_size : int
        Side ``b`` of a block.
    is_turned : bool
        Whether it is the transpose of what the indices count in.

    Returns
    -------
    list of Stretch
        One of whole runs and, where the last column of blocks is cut off, one of shorter
        ones; what lies outside the matrix is in neither.
    """
    found = find_places(indices)
    shape = lines.shape[0], lines.shape[1]
    key = (*shape, block_size, is_turned)
    if key not in found.stretches:
        found.stretches[key] = cut_stretches(indices, shape, block_size, is_turned)
    return found.stretches[key]


def cut_stretches(
    indices: torch.Tensor, shape: tuple[int, int], block_size: int, is_turned: bool
) -> list[Stretch]:
    """Work out the stretches of a matrix."""
    rows, columns = (indices.flip(1) if is_turned else indices).long().unbind(1)
    height, width = shape
    rest = width % block_size
    step = math.gcd(width, block_size)
    lines = rows[:, None] * block_size + torch.arange(block_size, device=rows.device)
    first = lines * width + columns[:, None] * block_size
    is_cut = (columns == width // block_size)[:, None]
    stretches = []
    for length, of_length in ((block_size, ~is_cut), (rest, is_cut)):
        sources = ((lines < height) & of_length).flatten().nonzero()[:, 0]
        if length and len(sources):
            places = first.flatten()[sources] // step
            is_all = len(sources) == first.numel()
            some = None if is_all and length == block_size else sources
            stretches.append(Stretch(length, step, places, some))
    return stretches
