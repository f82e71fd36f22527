"""The last step of constructors that first find more than the tolerance needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hmatrix._backend import Array, frobenius
from hmatrix.construct.budget import block_tolerance
from hmatrix.hodlr import HODLR, clear_padding
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["cut_blocks"]


def cut_blocks(
    tree: ClusterTree,
    leaves: Array,
    upper: Iterable[LowRank],
    lower: Iterable[LowRank] | None,
    *,
    norm: float,
    total: float,
    max_rank: int | None,
) -> HODLR:
    """Cut the blocks of a matrix to what it may lose.

    Parameters
    ----------
    tree, leaves, upper, lower
        Of the matrix, as `HODLR` takes them. Blocks are taken one by one, so that an
        iterator need not hold them all; their factors need not be orthonormal.
    norm : float
        Frobenius norm of the matrix.
    total : float
        Frobenius norm that all blocks together may lose.
    max_rank : int, optional
        Cap on the ranks.

    Returns
    -------
    HODLR
        Its ``error`` is what the cut lost.
    """
    losses: list[float] = []
    sides: tuple[list[LowRank], list[LowRank]] = ([], [])
    for side, blocks in zip(sides, (upper, lower or ()), strict=True):
        for level, block in enumerate(blocks):
            tolerance = block_tolerance(tree, level, total)
            cut, lost = recompress(block, tolerance=tolerance, max_rank=max_rank)
            side.append(cut)
            losses.append(
                float(frobenius(lost)) * (math.sqrt(2) if lower is None else 1)
            )
    error = math.hypot(*losses) / norm if norm else 0.0
    below = None if lower is None else tuple(sides[1])
    return clear_padding(HODLR(tree, leaves, tuple(sides[0]), below, error))
