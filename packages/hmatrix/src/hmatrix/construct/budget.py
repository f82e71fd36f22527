"""What every constructor decides first: the tree, and how much each block may lose."""

from __future__ import annotations

import math

from hmatrix._backend import Space
from hmatrix._checks import ShapeError, check_float, check_int
from hmatrix.tree import ClusterTree

__all__ = [
    "LEAF_SIZE",
    "block_tolerance",
    "check_symmetric",
    "check_tolerances",
    "make_tree",
]

#: Rows of a leaf where neither ``levels`` nor ``leaf_size`` is given.
LEAF_SIZE = 64


def block_tolerance(tree: ClusterTree, level: int, total: float) -> float:
    """Return what each off-diagonal block of ``level`` may lose in Frobenius norm.

    Levels share the square of ``total`` equally, and so do the blocks of a level; the
    errors of all blocks together are then at most ``total``.
    """
    return total / math.sqrt(tree.levels * 2 * tree.nodes(level))


def check_tolerances(
    space: Space, rtol: float | None, atol: float, max_rank: int | None
) -> tuple[float, float, int | None]:
    """Return ``rtol`` (default: square root of epsilon), ``atol`` and ``max_rank``."""
    rtol = (
        math.sqrt(space.eps) if rtol is None else check_float("rtol", rtol, minimum=0)
    )
    atol = check_float("atol", atol, minimum=0)
    return rtol, atol, None if max_rank is None else check_int("max_rank", max_rank, 0)


def check_symmetric(difference: float, norm: float, eps: float) -> None:
    """Raise if a matrix said to be symmetric differs from its adjoint beyond rounding."""
    if difference > 100 * eps * norm:
        msg = (
            "`symmetric` is true, but `A` differs from its adjoint by "
            f"{difference / norm:.3g} of its norm; pass (A + A.T.conj()) / 2."
        )
        raise ValueError(msg)


def make_tree(
    n: int, levels: int | None, leaf_size: int | None, tree: ClusterTree | None
) -> ClusterTree:
    """Return the tree that one of the three arguments, or none, asks for."""
    given = [x is not None for x in (levels, leaf_size, tree)]
    if sum(given) > 1:
        msg = "Give one of `levels`, `leaf_size` and `tree`, not several."
        raise ShapeError(msg)
    if tree is not None:
        if tree.n != n:
            msg = f"`tree` is of {tree.n} rows, the matrix has {n}."
            raise ShapeError(msg)
        return tree
    if levels is not None:
        return ClusterTree(n, levels)
    return ClusterTree.from_leaf_size(n, LEAF_SIZE if leaf_size is None else leaf_size)
