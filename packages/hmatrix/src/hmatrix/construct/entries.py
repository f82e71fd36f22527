"""Hierarchical matrices from a function of entries, by cross approximation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    detach,
    dtype_name,
    is_array,
    to_numpy,
)
from hmatrix._checks import (
    ShapeError,
    check_array,
    check_finite,
    check_float,
    check_int,
    check_operand,
    check_shape,
    check_space,
    space_like,
)
from hmatrix._operator import pad_rows, real_rows
from hmatrix.construct.blocks import Function
from hmatrix.construct.budget import LEAF_SIZE, check_rtol, make_tree
from hmatrix.construct.functions import broadcasting, checked
from hmatrix.construct.levels import build
from hmatrix.construct.near import near_parts
from hmatrix.hodlr import HODLR
from hmatrix.tree import ClusterTree

__all__ = ["from_entries", "from_kernel"]


def from_entries(
    function: Function,
    n: int,
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
    seed: int = 0,
) -> HODLR:
    """Compress a matrix that is given by a function of its entries.

    Parameters
    ----------
    function : callable
        ``function(i, j)`` gives entries for integer arrays of rows and columns that
        broadcast against each other, all entries of a block in one call. Or a matrix
        (m, q) for lists of m rows and q columns, as ``A[numpy.ix_(i, j)]`` is: that takes
        a call for each block. Entries are integers, or numbers whose precision ``rtol``
        leaves room for; torch divides integers in float32, ``i.double()`` does not. torch
        tensors are detached.
    n : int
        Rows and columns.
    like : array, optional
        Array whose library and device the indices have; default NumPy.
    dtype : str or dtype, optional
        Of the matrix; default that of ``like``, else float64.
    levels, leaf_size, tree
        The halving, as of `from_dense`.
    rtol, atol, max_rank
        As of `from_dense`: ``‖A − H‖_F ≤ max(rtol · ‖A‖_F, atol)``, here by an estimate:
        each block is checked on entries that its approximation has not seen. ``H.error``
        is the estimate of the relative error.
    symmetric : bool, optional
        Store one of the two off-diagonal blocks. Default: whether the leaves, and eight
        other entries of each row and column (all entries of up to 256 rows), are
        Hermitian. If true, it is believed of all but the leaves. A few entries elsewhere
        that differ from their mirror images are missed, and are then lost or doubled
        without a sign; with false, those in blocks of up to 128 rows are seen.
    seed : int
        Of the checks.

    Returns
    -------
    HODLR

    Raises
    ------
    ToleranceError
        If the tolerance is not reached and no ``max_rank`` excuses it.
    ShapeError, BackendError, DTypeError, NonFiniteError
        If the function gives no finite array of the shape of its arguments, or one so
        large or small that squares overflow or underflow; or complex entries of a real
        matrix, or entries of a lower precision than its own and than ``rtol``.
    ValueError
        If ``symmetric=True`` and the leaves differ from their adjoints beyond the
        tolerance.

    Notes
    -----
    About ``n (m + 2 Σ r)`` entries are evaluated, m being the rows of a leaf and r the
    rank of each level of blocks that have more than 128 rows, and some 200 n for smaller
    blocks and the check. Those of up to 128 rows are evaluated whole and cut as by
    `from_dense`. Larger ones have cross approximation with pivots
    from a sample of each block (Bebendorf 2000); where the check fails, from a larger
    sample, in the end from the whole block, and up to 2048 rows from all entries.

    Blocks of up to 128 rows are checked whole. Of larger ones it is 128 other rows and
    columns, those at the corners among them, and two entries of each row and column. What
    is wrong in a whole row or column shows, and so does what decays from a corner. A few
    entries or a small patch that stand out inside a block which is smooth otherwise (of a
    sparse matrix, or of points in an order that has nothing to do with their distances)
    do so only by chance, and with them the promise and ``H.error`` fail without a sign.
    The error of what is seen in part is seldom estimated a few times too low.
    `from_kernel`, which knows the points, also looks at pairs of close ones; `from_sparse`
    and `from_dense` see all entries.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> H = hm.from_entries(lambda i, j: 1.0 / (1 + abs(i - j)), 5000, rtol=1e-8)
    >>> H.error < 1e-8, H.symmetric, H.nbytes < 0.05 * 8 * 5000**2
    (True, True, True)
    """
    space = space_like(like, dtype)
    tree = make_tree(check_int("n", n, 1), levels, leaf_size, tree)
    # a padded row has the number of some row; what it gives is masked
    labels = space.integers(np.minimum(tree.rows, tree.n - 1))
    function, _ = broadcasting(function, labels, dims=0)
    rtol = check_rtol(space, rtol, math.sqrt(space.eps))
    return build(
        checked(function, space, rtol=rtol),
        labels,
        tree,
        space,
        rtol,
        atol,
        max_rank,
        symmetric,
        seed,
    )


def from_kernel(
    kernel: Function,
    points: Array,
    *,
    nugget: float | Array = 0.0,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
    symmetric: bool | None = None,
    seed: int = 0,
) -> HODLR:
    """Compress the matrix of a kernel on points, ``kernel(x_i, x_j)``.

    Parameters
    ----------
    kernel : callable
        ``kernel(x, y)`` gives entries for points x and y that broadcast against each
        other: arrays (...) of numbers for points (n,), arrays (..., d) for points (n, d),
        whose last axis it sums over, as in ``((x - y) ** 2).sum(axis=-1)``. Or a matrix
        (m, q) for two lists of m and q points, as ``scipy.spatial.distance.cdist`` and
        scikit-learn's kernels do: that takes a call for each block, and more entries for
        the check. If such a matrix is symmetric to rounding alone, say
        ``symmetric=True``. torch tensors are detached.
    points : array (n,) or (n, d)
        The points, of any library and device; the matrix has theirs. Points that are
        not sorted numbers are ordered by a k-d tree; vectors keep the order of
        ``points``.
    nugget : float or array (n,)
        Added to the diagonal, before norms are taken, without gradients (`shift` has
        them).
    levels, leaf_size, tree, rtol, atol, max_rank, symmetric, seed
        As of `from_entries`.

    Returns
    -------
    HODLR

    Raises
    ------
    ToleranceError, ShapeError, BackendError, DTypeError, NonFiniteError, ValueError
        As `from_entries`.

    Notes
    -----
    As `from_entries`. A function of two lists is known by ``kernel(points[:1],
    points[:2])``, a matrix (1, 2). Where points are not sorted numbers, samples are of
    points close to the other cluster, more than of others, and pivots and check also have
    the entries of the closest pairs of points in different clusters, out of the 8 nearest
    neighbours of each; blocks of up to 512 rows are checked whole. In larger ones a kernel
    that peaks elsewhere than where points meet, at a fixed distance say, has no more than
    what is said there.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> x = np.random.default_rng(0).random((2000, 2))
    >>> def gaussian(x, y):
    ...     return np.exp(-((x - y) ** 2).sum(axis=-1))
    >>> H = hm.from_kernel(gaussian, x, nugget=0.1, rtol=1e-6)
    >>> H
    HODLR(n=2000, levels=5, ranks=(14, 10, 9, 6, 6), symmetric, float64, numpy, 1.74 MB, 0.054 of dense)
    >>> from scipy.spatial.distance import cdist
    >>> def of_lists(X, Y):
    ...     return np.exp(-cdist(X, Y, "sqeuclidean"))
    >>> G = hm.from_kernel(of_lists, x, nugget=0.1, rtol=1e-6)
    >>> hm.norm(H - G) <= 1e-6 * hm.norm(H)
    True
    """
    points = detach(check_array("points", points))
    if len(points.shape) not in (1, 2) or not math.prod(points.shape):
        msg = f"`points` must have shape (n,) or (n, d), got {tuple(points.shape)}."
        raise ShapeError(msg)
    space = check_space(Space.of(points))
    xp, n = space.xp, int(points.shape[0])
    check_finite("points", points)
    sorted_ = len(points.shape) == 1 and bool(xp.all(points[1:] >= points[:-1]))
    if tree is None and levels is None and not sorted_:
        tree = ClusterTree.from_points(
            points, LEAF_SIZE if leaf_size is None else leaf_size
        )
        leaf_size = None
    tree = make_tree(n, levels, leaf_size, tree)
    dims = len(points.shape) - 1
    kernel, probe = broadcasting(kernel, points, dims)
    # a kernel may be complex where points are real; it may also be one of integers
    if is_array(probe) and dtype_name(probe.dtype) in NUMBERS:
        space = space_like(points, probe.dtype)
    labels = xp.take(points, space.integers(np.minimum(tree.rows, n - 1)), axis=0)
    function = checked(kernel, space, dims)
    near = near_parts(to_numpy(points).reshape(n, -1), tree, space)
    added = padded_nugget(nugget, tree, space)
    return build(
        function,
        labels,
        tree,
        space,
        rtol,
        atol,
        max_rank,
        symmetric,
        seed,
        near,
        added,
    )


def padded_nugget(nugget: Any, tree: ClusterTree, space: Space) -> Array | None:
    """Return a number or a vector (n,) as padded rows, None if it is zero."""
    if is_array(nugget) and len(nugget.shape):
        added = detach(check_operand("nugget", nugget, space))
        check_shape("nugget", added, (tree.n,))
        check_finite("nugget", added)
        return pad_rows(added, tree)
    number = check_float("nugget", nugget)
    if number == 0:
        return None
    return space.xp.astype(real_rows(tree, space), space.dtype) * number
