"""Hierarchical matrices from sparse ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hmatrix._backend import Array, Space, frobenius, in_own_precision
from hmatrix._checks import (
    BackendError,
    DTypeError,
    ShapeError,
    check_finite,
    space_like,
)
from hmatrix.construct.budget import (
    Cut,
    check_symmetric,
    check_tolerances,
    cut_blocks,
    make_tree,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["from_sparse"]


@in_own_precision
def from_sparse(
    A: Any,
    *,
    like: Array | None = None,
    dtype: object = None,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
    symmetric: bool | None = None,
) -> HODLR:
    """Compress a SciPy sparse matrix, which is never made dense.

    Parameters
    ----------
    A : SciPy sparse array or matrix (n, n)
        In any format, real or complex. Order its rows so that neighbours are close
        (``scipy.sparse.csgraph.reverse_cuthill_mckee`` say), or give a tree that does:
        ranks are the number of rows that reach across a cut.
    like : array, optional
        Array whose library and device the result gets. Default: NumPy.
    dtype : str or dtype, optional
        Default: that of ``A``; needed for integers.
    levels, leaf_size, tree, rtol, atol, max_rank
        As of `from_dense`; the promise is kept and ``H.error`` is exact alike.
    symmetric : bool, optional
        Store one of the two off-diagonal blocks. Default: whether ``A`` equals its
        adjoint (transpose, if real).

    Returns
    -------
    HODLR

    Raises
    ------
    BackendError
        If ``A`` is not a SciPy sparse matrix.
    ShapeError, DTypeError, NonFiniteError
        If ``A`` is not square, not of a supported dtype, or has NaN.
    ValueError
        If ``symmetric=True`` and ``A`` differs from its adjoint beyond rounding.

    Notes
    -----
    A block's entries, each assigned to its row or its column, are an exact product: a
    row's entries ``e_i aᵀ``, a column's ``a e_jᵀ``. Each block takes the fewest terms
    of three ways: all by rows, all by columns, each by the longer of the two (a dense
    row and a dense column make rank 2). These factors, ``2 n r`` numbers a level and
    side, r being the most terms of a block of the level, are what memory it takes
    beside the result, one level at a time; then they are cut to the tolerance.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> from scipy.sparse import diags_array
    >>> A = diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(10_000, 10_000))
    >>> H = hm.from_sparse(A)
    >>> set(H.ranks), H.symmetric
    ({1}, True)
    >>> b = np.ones(10_000)
    >>> bool(np.allclose(A @ hm.factorize(H).solve(b), b))
    True
    """
    A, space = _as_csr(A, like, dtype)
    norm = check_finite("A", A.data)
    tree = make_tree(A.shape[0], levels, leaf_size, tree)
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    if symmetric is not False:
        adjoint = A.conj().T.tocsr()
        difference = float(frobenius((A - adjoint).data))
        if symmetric:
            check_symmetric(difference, norm, space.eps)
            A = (A + adjoint) / 2
        symmetric = symmetric or difference == 0

    A = A.tocoo()
    rows, columns, values = tree.slots[A.row], tree.slots[A.col], A.data

    def side(reach: int) -> Iterator[Cut]:
        """Factorize the blocks of each level from a half node to the one ``reach`` on."""
        for level in range(tree.levels):
            half = tree.size(level + 1)
            p, q = rows // half, columns // half
            here = (p // 2 == q // 2) & (q - p == reach)
            U, V = _factors(
                p[here] // 2,
                rows[here] % half,
                columns[here] % half,
                values[here],
                (tree.nodes(level), half),
            )
            S = np.ones((U.shape[0], U.shape[2]))
            U, S, V = space.asarray(U), space.real.asarray(S), space.asarray(V)
            yield partial(recompress, LowRank(U, S, V))

    m = tree.leaf_size
    here = rows // m == columns // m
    leaves = np.zeros((tree.nodes(tree.levels), m, m), dtype=space.name)
    leaves[rows[here] // m, rows[here] % m, columns[here] % m] = values[here]
    return cut_blocks(
        tree,
        space.asarray(leaves),
        map(side, (1,) if symmetric else (1, -1)),
        norm=norm,
        total=max(rtol * norm, atol),
        max_rank=max_rank,
    )


def _as_csr(A: Any, like: Array | None, dtype: object) -> tuple[Any, Space]:
    """Return a copy in rows, each entry once, and the space of the result."""
    from scipy import sparse

    if not sparse.issparse(A):
        msg = (
            f"`A` must be a SciPy sparse matrix, got {type(A).__name__}; `from_dense` "
            "takes dense arrays."
        )
        raise BackendError(msg)
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        msg = f"`A` must be square, got shape {A.shape}."
        raise ShapeError(msg)
    space = space_like(like, A.dtype.name if dtype is None else dtype)
    if A.dtype.kind == "c" and not space.is_complex:
        msg = f"`A` is complex, `dtype` must be so too, got {space.name}."
        raise DTypeError(msg)
    rows = sparse.csr_array(A, dtype=space.name, copy=True)
    rows.sum_duplicates()
    return rows, space


def _factors(
    node: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    a: np.ndarray,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact factors U, V (nodes, half, r) of entries ``a`` at (i, j) of blocks."""
    nodes, half = shape
    row, column = node * half + i, node * half + j
    in_row, in_column = (np.bincount(x, minlength=nodes * half) for x in (row, column))
    ways = np.stack(
        [
            np.ones(len(a), dtype=bool),
            np.zeros(len(a), dtype=bool),
            in_row[row] >= in_column[column],
        ]
    )

    def terms(by_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each entry's term in its block, and how many terms each block has."""
        key = node * 2 * half + np.where(by_row, i, half + j)
        used, which = np.unique(key, return_inverse=True)
        counts = np.bincount(used // (2 * half), minlength=nodes)
        return which - (np.cumsum(counts) - counts)[node], counts

    fewest = np.argmin([terms(way)[1] for way in ways], axis=0)
    by_row = ways[fewest[node], np.arange(len(a))]
    term, counts = terms(by_row)
    U, V = (np.zeros((nodes, half, counts.max()), dtype=a.dtype) for _ in range(2))
    U[node, i, term] = np.where(by_row, 1, a)
    V[node, j, term] = np.where(by_row, a.conj(), 1)
    return U, V
