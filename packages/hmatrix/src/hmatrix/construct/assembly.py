"""The last step of constructors that first find more than the tolerance needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hmatrix._backend import Array, Space, namespace
from hmatrix._operator import real_rows
from hmatrix.construct.budget import block_tolerance
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["assemble"]


def assemble(
    tree: ClusterTree,
    leaves: Array,
    upper: Sequence[LowRank],
    lower: Sequence[LowRank] | None,
    *,
    rtol: float,
    atol: float = 0.0,
    max_rank: int | None = None,
    spent: float = 0.0,
) -> tuple[HODLR, float]:
    """Cut the blocks of a matrix to what it may lose.

    Parameters
    ----------
    tree, leaves, upper, lower
        Of the matrix, as `HODLR` takes them. Factors need not be orthonormal.
    rtol, atol, max_rank
        What may be lost in all, ``max(rtol · ‖matrix‖_F, atol)``, and the cap.
    spent : float
        Error that is there already and counts against it.

    Returns
    -------
    HODLR
        Its ``error`` is what the cut lost, without what was spent before.
    float
        Frobenius norm of the matrix before the cut.
    """
    xp = namespace(leaves)
    symmetric = lower is None
    sides = [[recompress(block)[0] for block in side] for side in (upper, lower or ())]
    blocks = [block for side in sides for block in side]
    weight = 2 if symmetric else 1
    squares = sum(float(xp.sum(block.S**2)) for block in blocks) * weight
    norm = math.sqrt(squares + float(xp.sum(xp.abs(leaves) ** 2)))
    total = math.sqrt(max(max(rtol * norm, atol) ** 2 - spent**2, 0.0))
    squares = 0.0
    for first, side in enumerate(sides):
        for level, block in enumerate(side):
            tolerance = block_tolerance(tree, level, total)
            cut, lost = recompress(block, tolerance=tolerance, max_rank=max_rank)
            side[level] = _real(cut, tree, level, first)
            squares += float(xp.sum(lost**2)) * weight
    error = math.sqrt(squares) / norm if norm else 0.0
    cut_lower = None if symmetric else tuple(sides[1])
    return HODLR(tree, leaves, tuple(sides[0]), cut_lower, error), norm


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
