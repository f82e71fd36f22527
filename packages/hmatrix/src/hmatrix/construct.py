"""Hierarchical matrices from other descriptions of a matrix."""

from __future__ import annotations

import math

from hmatrix._backend import (
    Array,
    Space,
    contiguous,
    detach,
    frobenius,
    namespace,
    transpose,
)
from hmatrix._checks import (
    ShapeError,
    check_array,
    check_finite,
    check_float,
    check_int,
    check_space,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, compress
from hmatrix.tree import ClusterTree

__all__ = ["block_tolerance", "from_dense"]

#: Rows of a leaf where neither ``levels`` nor ``leaf_size`` is given.
LEAF_SIZE = 64


def from_dense(
    A: Array,
    *,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    max_rank: int | None = None,
    symmetric: bool | None = None,
) -> HODLR:
    """Compress a dense matrix, each off-diagonal block by its SVD.

    Parameters
    ----------
    A : array (n, n)
        The matrix, float32 or float64, on any device. torch tensors are detached.
    levels, leaf_size, tree
        The halving, by one of: number of halvings, rows of a leaf at most, or a tree.
        Default: ``leaf_size=64``.
    rtol : float, optional
        Promise ``‖A − H‖_F ≤ rtol · ‖A‖_F`` (to rounding), kept by giving every
        block its share of the error. Default: square root of the dtype's epsilon.
    max_rank : int, optional
        Cap on the rank of every block. It wins over ``rtol``; ``H.error`` tells the
        relative Frobenius error reached.
    symmetric : bool, optional
        Store one of the two off-diagonal blocks. Default: whether ``A`` equals its
        transpose.

    Returns
    -------
    HODLR
        In the library, dtype and device of ``A``.

    Raises
    ------
    ShapeError
        If ``A`` is not square, or the halving is given twice or goes too deep.
    DTypeError, BackendError, NonFiniteError
        If ``A`` is not a finite float array of a supported library.
    ValueError
        If ``symmetric=True`` and ``A`` differs from its transpose beyond rounding.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 300)
    >>> H = hm.from_dense(1 / (1 + abs(t[:, None] - t)), leaf_size=40, rtol=1e-6)
    >>> H.tree.levels, H.error <= 1e-6, max(H.ranks) < 10
    (3, True, True)
    """
    A = detach(check_array("A", A, ndim=2))
    space = check_space(Space.of(A))
    xp, n = space.xp, int(A.shape[0])
    if A.shape[1] != n:
        msg = f"`A` must be square, got shape {tuple(A.shape)}."
        raise ShapeError(msg)
    norm = check_finite("A", A)
    tree = _tree(n, levels, leaf_size, tree)
    rtol = (
        math.sqrt(space.eps) if rtol is None else check_float("rtol", rtol, minimum=0)
    )
    if max_rank is not None:
        max_rank = check_int("max_rank", max_rank, 0)
    A, symmetric = _symmetrize(A, symmetric, norm)
    missing = tree.padded - n
    if missing:
        A = xp.concat([A, space.zeros(missing, n)], axis=0)
        A = xp.concat([A, space.zeros(tree.padded, missing)], axis=1)

    upper: list[LowRank] = []
    lower: list[LowRank] = []
    squares = 0.0
    for level in range(tree.levels):
        nodes, half = _diagonal_blocks(A, tree, level), tree.size(level + 1)
        tolerance = block_tolerance(tree, level, rtol * norm)
        sides = [(upper, nodes[:, :half, half:])]
        if not symmetric:
            sides.append((lower, nodes[:, half:, :half]))
        for side, blocks in sides:
            block, lost = compress(blocks, tolerance=tolerance, max_rank=max_rank)
            side.append(block)
            squares += float(xp.sum(lost**2)) * (2 if symmetric else 1)
    leaves = contiguous(_diagonal_blocks(A, tree, tree.levels))
    error = math.sqrt(squares) / norm if norm else 0.0
    return HODLR(tree, leaves, tuple(upper), None if symmetric else tuple(lower), error)


def block_tolerance(tree: ClusterTree, level: int, total: float) -> float:
    """Return what each off-diagonal block of ``level`` may lose in Frobenius norm.

    Levels share the square of ``total`` equally, and so do the blocks of a level; the
    errors of all blocks together are then at most ``total``.
    """
    return total / math.sqrt(tree.levels * 2 * tree.nodes(level))


def _tree(
    n: int, levels: int | None, leaf_size: int | None, tree: ClusterTree | None
) -> ClusterTree:
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


def _symmetrize(A: Array, symmetric: bool | None, norm: float) -> tuple[Array, bool]:
    xp = namespace(A)
    if symmetric is None:
        return A, bool(xp.all(transpose(A) == A))
    if symmetric:
        difference = float(frobenius(A - transpose(A)))
        if difference > 100 * Space.of(A).eps * norm:
            msg = (
                "`symmetric` is true, but `A` differs from its transpose by "
                f"{difference / norm:.3g} of its norm; pass (A + A.T) / 2."
            )
            raise ValueError(msg)
        A = (A + transpose(A)) / 2
    return A, symmetric


def _diagonal_blocks(A: Array, tree: ClusterTree, level: int) -> Array:
    """Diagonal blocks of the nodes of a level: (2**level, size, size), a view."""
    xp, nodes, size = namespace(A), tree.nodes(level), tree.size(level)
    grid = xp.permute_dims(xp.reshape(A, (nodes, size, nodes, size)), (1, 3, 0, 2))
    return xp.permute_dims(xp.linalg.diagonal(grid), (2, 0, 1))
