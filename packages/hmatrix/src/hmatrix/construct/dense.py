"""Hierarchical matrices from dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    adjoint,
    contiguous,
    detach,
    frobenius,
    in_own_precision,
    namespace,
    transpose,
)
from hmatrix._checks import ShapeError, check_array, check_finite, check_space
from hmatrix._operator import pad_rows
from hmatrix.construct.blocks import chunks
from hmatrix.construct.budget import (
    Cut,
    check_symmetric,
    check_tolerances,
    cut_blocks,
    make_tree,
)
from hmatrix.construct.sampled import cut_dense
from hmatrix.hodlr import HODLR
from hmatrix.tree import ClusterTree

__all__ = ["from_dense"]

#: Rows and columns that are compared at once on the host.
TILE = 256


@in_own_precision
def from_dense(
    A: Array,
    *,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
    symmetric: bool | None = None,
    definite: bool = False,
) -> HODLR:
    """Compress a dense matrix, each off-diagonal block as its SVD would.

    Parameters
    ----------
    A : array (n, n)
        The matrix, real or complex, on any device. torch tensors are detached.
    levels, leaf_size, tree
        The halving, by one of: number of halvings, rows of a leaf at most, or a tree.
        Default: ``leaf_size=64``.
    rtol : float, optional
        Promise ``‖A − H‖_F ≤ rtol · ‖A‖_F`` (to rounding), kept by giving every
        block its share of the error. Default: square root of the dtype's epsilon. Less
        than 10 epsilon counts as 10 epsilon, but zero, which stores rounding at full rank.
    atol : float
        Promise ``‖A − H‖_F ≤ atol`` instead, where that allows more.
    max_rank : int, optional
        Cap on the rank of every block. It wins over ``rtol``; ``H.error`` tells the
        relative Frobenius error reached.
    symmetric : bool, optional
        Store one of the two off-diagonal blocks. Default: whether ``A`` equals its
        adjoint (transpose, if real).
    definite : bool
        Keep a Hermitian positive semidefinite ``A`` so: ``H − A`` has no negative
        eigenvalue (to rounding). What a cut takes from definiteness is added to the
        diagonal, at the cost of somewhat larger ranks for the same ``rtol``. Implies
        ``symmetric=True``.

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
        If ``symmetric=True`` or ``definite=True`` and ``A`` differs from its adjoint
        beyond rounding.

    Notes
    -----
    Blocks of low rank are found from random combinations of their columns, with a look at
    all entries afterwards, by ``O(n² r)`` operations; the SVD is taken of small ones, and
    of those that no quarter of their columns spans to an eighth of what they may lose.
    Where a ``max_rank`` cuts blocks of at least 256 rows short, products go on until the
    square of what is lost falls by less than 1e-4 of it; with ``definite`` it is the SVD.

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
    space = check_space(Space.of(A), NUMBERS)
    n = int(A.shape[0])
    if A.shape[1] != n:
        msg = f"`A` must be square, got shape {tuple(A.shape)}."
        raise ShapeError(msg)
    norm = check_finite("A", A)
    tree = make_tree(n, levels, leaf_size, tree)
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    A, symmetric = _symmetrize(A, definite or symmetric, norm)
    A = transpose(pad_rows(transpose(pad_rows(A, tree)), tree))

    def side(first: int) -> Iterator[Cut]:
        """Yield the blocks whose rows are in the first (0) or second (1) half of a node."""
        for level in range(tree.levels):
            nodes, half = _diagonal_blocks(A, tree, level), tree.size(level + 1)
            halves = slice(None, half), slice(half, None)
            yield partial(cut_dense, nodes[:, halves[first], halves[1 - first]])

    return cut_blocks(
        tree,
        contiguous(_diagonal_blocks(A, tree, tree.levels)),
        map(side, (0,) if symmetric else (0, 1)),
        norm=norm,
        total=max(rtol * norm, atol),
        max_rank=max_rank,
        definite=definite,
    )


def _symmetrize(A: Array, symmetric: bool | None, norm: float) -> tuple[Array, bool]:
    equal = symmetric is not False and _equals_adjoint(A)
    if symmetric and not equal:
        check_symmetric(float(frobenius(A - adjoint(A))), norm, Space.of(A).eps)
        A, equal = (A + adjoint(A)) / 2, True
    return A, equal


def _equals_adjoint(A: Array) -> bool:
    """Tell whether a matrix is Hermitian, tile by tile: columns of all rows are slow."""
    xp, n = namespace(A), int(A.shape[0])
    tiles = list(chunks(Space.of(A), n, 1, TILE))
    return all(
        bool(xp.all(A[rows, columns] == adjoint(A[columns, rows])))
        for k, rows in enumerate(tiles)
        for columns in tiles[: k + 1]
    )


def _diagonal_blocks(A: Array, tree: ClusterTree, level: int) -> Array:
    """Diagonal blocks of the nodes of a level: (2**level, size, size), a view."""
    xp, nodes, size = namespace(A), tree.nodes(level), tree.size(level)
    grid = xp.permute_dims(xp.reshape(A, (nodes, size, nodes, size)), (1, 3, 0, 2))
    return xp.permute_dims(xp.linalg.diagonal(grid), (2, 0, 1))
