"""The last step of constructors that first find more than the tolerance needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hmatrix._backend import Array, Space, frobenius
from hmatrix._operator import real_rows
from hmatrix.construct.budget import block_tolerance
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["assemble"]


def assemble(
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
    for first, blocks in enumerate((upper, lower or ())):
        for level, block in enumerate(blocks):
            tolerance = block_tolerance(tree, level, total)
            cut, lost = recompress(block, tolerance=tolerance, max_rank=max_rank)
            sides[first].append(_real(cut, tree, level, first))
            losses.append(
                float(frobenius(lost)) * (math.sqrt(2) if lower is None else 1)
            )
    error = math.hypot(*losses) / norm if norm else 0.0
    return HODLR(
        tree, leaves, tuple(sides[0]), None if lower is None else tuple(sides[1]), error
    )


def _real(block: LowRank, tree: ClusterTree, level: int, first: int) -> LowRank:
    """Return a block, rows in half ``first``, with zeros in the rows of padding.

    Columns of a QR that a block has no need of may point there.
    """
    if tree.padded == tree.n:
        return block
    space = Space.of(block.U)
    real = space.xp.astype(real_rows(tree, space), space.dtype)
    halves = space.xp.reshape(real, (tree.nodes(level), 2, -1, 1))
    rows, columns = halves[:, first, :, :], halves[:, 1 - first, :, :]
    return LowRank(block.U * rows, block.S, block.V * columns)
