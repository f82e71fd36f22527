"""Hierarchical matrices that need no compression, or little."""

from __future__ import annotations

from functools import partial

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    adjoint,
    detach,
    in_own_precision,
    is_real,
    namespace,
)
from hmatrix._checks import (
    check_array,
    check_finite,
    check_int,
    check_norm,
    check_operand,
    check_shape,
    check_space,
    space_like,
)
from hmatrix._operator import pad_rows
from hmatrix.construct.budget import check_tolerances, cut_blocks, make_tree
from hmatrix.hodlr import HODLR, frobenius_norm
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["from_diagonal", "from_low_rank", "identity", "slices"]


def identity(
    n: int,
    *,
    like: Array | None = None,
    dtype: object = None,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
) -> HODLR:
    """Return the identity matrix.

    Parameters
    ----------
    n : int
        Number of rows.
    like, dtype
        Library, device and dtype: those of an array, and a dtype instead of its own.
        Default: NumPy in float64.
    levels, leaf_size, tree
        The halving, as of `from_dense`.

    Returns
    -------
    HODLR
        Symmetric, of ranks 0.

    Raises
    ------
    ShapeError, DTypeError, BackendError
        If ``n`` or the halving is out of range, ``like`` is not an array, or the dtype is
        not a float or complex one.

    Examples
    --------
    >>> import hmatrix as hm
    >>> hm.identity(1000, levels=3)
    HODLR(n=1000, levels=3, ranks=(0, 0, 0), symmetric, float64, numpy, 1 MB, 0.12 of dense)
    """
    space = space_like(like, dtype)
    ones = space.ones(check_int("n", n, 1))
    return from_diagonal(ones, levels=levels, leaf_size=leaf_size, tree=tree)


def from_diagonal(
    diagonal: Array,
    *,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
) -> HODLR:
    """Return a diagonal matrix.

    Parameters
    ----------
    diagonal : array (n,)
        Its diagonal, real or complex.
    levels, leaf_size, tree
        The halving, as of `from_dense`.

    Returns
    -------
    HODLR
        Of ranks 0, in the library, dtype and device of ``diagonal``; symmetric if that is
        real.

    Raises
    ------
    ShapeError, DTypeError, BackendError, NonFiniteError
        If ``diagonal`` is not a finite float vector of a supported library.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> hm.from_diagonal(np.arange(1.0, 100.0), levels=2).trace()
    4950.0
    """
    diagonal = detach(check_array("diagonal", diagonal, ndim=1))
    space = check_space(Space.of(diagonal), NUMBERS)
    check_finite("diagonal", diagonal)
    tree = make_tree(int(diagonal.shape[0]), levels, leaf_size, tree)
    blocks = tuple(
        LowRank(
            space.zeros(tree.nodes(k), tree.size(k + 1), 0),
            space.real.zeros(tree.nodes(k), 0),
            space.zeros(tree.nodes(k), tree.size(k + 1), 0),
        )
        for k in range(tree.levels)
    )
    lower = None if is_real(diagonal) else blocks
    return HODLR(tree, _diagonal_leaves(diagonal, tree), blocks, lower, 0.0)


@in_own_precision
def from_low_rank(
    U: Array,
    V: Array | None = None,
    S: Array | None = None,
    diagonal: Array | None = None,
    *,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
) -> HODLR:
    """Compress ``U diag(S) Vᴴ + diag(diagonal)``.

    Parameters
    ----------
    U : array (n, r)
        Left factor, real or complex.
    V : array (n, r), optional
        Right factor. Default: ``U``, which makes the result symmetric.
    S : array (r,), optional
        Scales, real, of any sign. Default: ones.
    diagonal : array (n,), optional
        What is added to the diagonal. Default: nothing.
    levels, leaf_size, tree, rtol, atol, max_rank
        As of `from_dense`; the promise is kept and ``H.error`` is exact alike. With
        ``rtol=0`` the matrix is exact to rounding.

    Returns
    -------
    HODLR
        In the library, dtype and device of ``U``; its ranks are r at most.

    Raises
    ------
    ShapeError, DTypeError, BackendError, NonFiniteError
        If the parts do not fit each other, or are not finite, or squares of the norm
        overflow or underflow.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> X = np.random.default_rng(0).standard_normal((500, 3))
    >>> H = hm.from_low_rank(X, diagonal=np.full(500, 0.1), levels=3)
    >>> H.ranks, bool(np.allclose(H.to_dense(), X @ X.T + 0.1 * np.eye(500)))
    ((3, 3, 3), True)
    """
    U = detach(check_array("U", U, ndim=2))
    space = check_space(Space.of(U), NUMBERS)
    n, r = U.shape
    symmetric = V is None and (diagonal is None or is_real(diagonal))
    V = U if V is None else check_operand("V", V, space)
    S = space.real.ones(r) if S is None else S
    S = check_operand("S", S, space.real)
    diagonal = space.zeros(n) if diagonal is None else diagonal
    diagonal = check_operand("diagonal", diagonal, space)
    shapes = {"U": (n, r), "V": (n, r), "S": (r,), "diagonal": (n,)}
    for (name, shape), x in zip(shapes.items(), (U, V, S, diagonal), strict=True):
        check_shape(name, x, shape, f" to go with `U` {(n, r)}")
        check_finite(name, x)
    V, S, diagonal = detach(V), detach(S), detach(diagonal)
    tree = make_tree(n, levels, leaf_size, tree)
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    upper, lower, nodes = slices(LowRank(U, S, V), tree)
    leaves = nodes.to_dense() + _diagonal_leaves(diagonal, tree)
    if symmetric:
        leaves = (leaves + adjoint(leaves)) / 2
    sides = (upper,) if symmetric else (upper, lower)
    norm = check_norm(frobenius_norm(leaves, sides), space)
    return cut_blocks(
        tree,
        leaves,
        ((partial(recompress, block) for block in side) for side in sides),
        norm=norm,
        total=max(rtol * norm, atol),
        max_rank=max_rank,
    )


def slices(
    block: LowRank, tree: ClusterTree
) -> tuple[tuple[LowRank, ...], tuple[LowRank, ...], LowRank]:
    """Return B12 and B21 of all levels of a block (n, n), and its leaves.

    They are slices of its factors, not copied.
    """
    xp = namespace(block.U)
    U, V = (pad_rows(x, tree) for x in (block.U, block.V))

    def rows(x: Array, level: int) -> Array:
        return xp.reshape(x, (tree.nodes(level), tree.size(level), block.rank))

    def scales(level: int) -> Array:
        return xp.broadcast_to(block.S, (tree.nodes(level), block.rank))

    def side(first: int) -> tuple[LowRank, ...]:
        return tuple(
            LowRank(
                rows(U, level + 1)[first::2, ...],
                scales(level),
                rows(V, level + 1)[1 - first :: 2, ...],
            )
            for level in range(tree.levels)
        )

    m = tree.levels
    return side(0), side(1), LowRank(rows(U, m), scales(m), rows(V, m))


def _diagonal_leaves(diagonal: Array, tree: ClusterTree) -> Array:
    """Return the leaves (2**K, m, m) of a diagonal matrix."""
    xp = namespace(diagonal)
    rows = xp.reshape(pad_rows(diagonal, tree), (-1, tree.leaf_size))
    return rows[:, :, None] * Space.of(diagonal).eye(tree.leaf_size)
