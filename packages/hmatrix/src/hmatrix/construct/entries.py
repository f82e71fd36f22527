"""Hierarchical matrices from a function of entries, by cross approximation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    adjoint,
    conjugate,
    dtype_name,
    frobenius,
    is_array,
    namespace,
    to_numpy,
)
from hmatrix._checks import (
    BackendError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    ToleranceError,
    check_array,
    check_finite,
    check_float,
    check_int,
    check_norm,
    check_operand,
    check_space,
)
from hmatrix._operator import pad_rows, real_rows
from hmatrix.construct.blocks import Blocks, masked, pieces
from hmatrix.construct.budget import (
    LEAF_SIZE,
    block_tolerance,
    check_tolerances,
    make_tree,
)
from hmatrix.construct.cross import Found, approximate, widened
from hmatrix.construct.near import Near, near_pairs
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, kept
from hmatrix.tree import ClusterTree

__all__ = ["from_entries", "from_kernel"]

Function = Callable[[Array, Array], Array]


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
        broadcast against each other, all entries of a block in one call.
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
        each block is checked on entries that its approximation has not seen.
        ``H.error`` is the estimate of the relative error.
    symmetric : bool, optional
        Store one of the two off-diagonal blocks. Default: whether the leaves, and eight
        other entries of each row and column, are Hermitian.
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
        matrix.

    Notes
    -----
    About ``n (m + 2 Σ r)`` entries are evaluated, m being the rows of a leaf and r the
    rank of each level, and some 200 n for the check. Cross approximation with pivots
    from a sample of each block (Bebendorf 2000); where the check fails, from a larger
    sample, in the end from the whole block, and then by the SVD.

    Blocks of up to 128 rows are checked whole. Of larger ones it is 128 other rows and
    columns, those at the corners among them, and two entries of each row and column. What
    is wrong in a whole row or column shows, and so does what decays from a corner. A few
    entries or a small patch that stand out inside a block which is smooth otherwise (of a
    sparse matrix, or of points in an order that has nothing to do with their distances)
    do so only by chance, and with them the promise and ``H.error`` fail without a sign.
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
    space = check_space(Space.like(like, dtype), NUMBERS)
    tree = make_tree(check_int("n", n, 1), levels, leaf_size, tree)
    # a padded row has the number of some row; what it gives is masked
    labels = space.integers(np.minimum(tree.rows, tree.n - 1))
    return build(
        checked(function, space),
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
        other: arrays (...) of numbers for points (n,), arrays (..., d) for points (n, d).
    points : array (n,) or (n, d)
        The points, of any library and device; the matrix has theirs. Points that are
        not sorted numbers are ordered by a k-d tree; vectors keep the order of
        ``points``.
    nugget : float or array (n,)
        Added to the diagonal.
    levels, leaf_size, tree, rtol, atol, max_rank, symmetric, seed
        As of `from_entries`.

    Returns
    -------
    HODLR

    Raises
    ------
    ToleranceError, ShapeError, BackendError, DTypeError, NonFiniteError
        As `from_entries`.

    Notes
    -----
    As `from_entries`. Where points are not sorted numbers, pivots and check also have up
    to 512 entries of each block that belong to the closest pairs of points in different
    clusters, out of the 8 nearest neighbours of each. A kernel that peaks elsewhere than
    where points meet, at a fixed distance say, has no more than what is said there.

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
    """
    points = check_array("points", points)
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
    probe = kernel(points[:1, ...], points[:1, ...])
    if is_array(probe):  # a kernel may be complex where points are real
        space = check_space(Space.of(probe), NUMBERS)
    labels = xp.take(points, space.integers(np.minimum(tree.rows, n - 1)), axis=0)
    function = checked(kernel, space, dims=len(points.shape) - 1)
    near = None
    if not (sorted_ and tree.permutation is None):
        near = near_pairs(to_numpy(points).reshape(n, -1), tree, space)
    H = build(
        function, labels, tree, space, rtol, atol, max_rank, symmetric, seed, near
    )
    return with_diagonal(H, nugget)


def with_diagonal(H: HODLR, nugget: float | Array) -> HODLR:
    """Add a number or a vector to the diagonal of a matrix just built."""
    space, tree = H.space, H.tree
    if is_array(nugget):
        added = check_operand("nugget", nugget, space)
        if tuple(added.shape) != (tree.n,):
            msg = f"`nugget` must have shape ({tree.n},), got {tuple(added.shape)}."
            raise ShapeError(msg)
        added = pad_rows(added, tree)
    elif check_float("nugget", nugget) == 0:
        return H
    else:
        added = space.xp.astype(real_rows(tree, space), space.dtype) * nugget
    # nobody else has these leaves yet: their diagonals change in place
    count, m = H.leaves.shape[:2]
    flat = space.xp.reshape(H.leaves, (count, m * m))
    flat[:, :: m + 1] += space.xp.reshape(added, (count, m))
    leaves = space.xp.reshape(flat, (count, m, m))
    return HODLR(tree, leaves, H.upper, H.lower, H.error)


def checked(function: Function, space: Space, dims: int = 0) -> Function:
    """Return the function with its results checked and cast.

    ``dims`` trailing axes of a label are those of a point.
    """
    xp = space.xp

    def entries(a: Array, b: Array) -> Array:
        x = function(a, b)
        if not is_array(x) or namespace(x) is not xp:
            msg = (
                f"The function must give a {space.library} array, got "
                f"{type(x).__name__}; build it from its arguments."
            )
            raise BackendError(msg)
        if Space.of(x).is_complex and not space.is_complex:
            msg = (
                f"The function gave {dtype_name(x.dtype)} entries for a matrix of "
                f"{space.name}; give `dtype`, or take the real part."
            )
            raise DTypeError(msg)
        shapes = (s[: len(s) - dims] for s in (tuple(a.shape), tuple(b.shape)))
        expected = np.broadcast_shapes(*shapes)
        if tuple(x.shape) != expected:
            msg = (
                f"The function must give an array of shape {expected} for arguments of "
                f"shapes {tuple(a.shape)} and {tuple(b.shape)}, got {tuple(x.shape)}."
            )
            raise ShapeError(msg)
        # a sum is faster, and finite if all entries are, unless it overflows
        if not bool(xp.isfinite(xp.sum(x))) and not bool(xp.all(xp.isfinite(x))):
            msg = "The function gave NaN or infinite entries; it must be finite everywhere."
            raise NonFiniteError(msg)
        return xp.astype(x, space.dtype, copy=False)

    return entries


def build(
    function: Function,
    labels: Array,
    tree: ClusterTree,
    space: Space,
    rtol: float | None,
    atol: float,
    max_rank: int | None,
    symmetric: bool | None,
    seed: int,
    near: list[Near] | None = None,
) -> HODLR:
    """Build the matrix of a function of labels, which are in the order of the leaves."""
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    xp, trailing = space.xp, labels.shape[1:]
    real = None
    if tree.padded > tree.n:
        real = real_rows(tree, space)
    leaves = diagonal_blocks(function, labels, real, tree, space)
    squares = check_norm(float(frobenius(leaves)), space) ** 2
    if symmetric is None:
        symmetric = looks_hermitian(function, labels, leaves, seed)
    # of each side of the diagonal, for each level, batches of blocks with their errors
    sides: list[list[list[Found]]] = [[] for _ in range(1 if symmetric else 2)]
    for level in reversed(range(tree.levels)):
        shape = (tree.nodes(level), 2, tree.size(level + 1))
        halves = xp.reshape(labels, (*shape, *trailing))
        masks = None if real is None else xp.reshape(real, shape)
        blocks = Blocks(
            function,
            halves[:, 0, ...],
            halves[:, 1, ...],
            None if masks is None else masks[:, 0, :],
            None if masks is None else masks[:, 1, :],
            space,
            None if near is None else near[level],
        )
        # by what is known of the norm so far: too strict at first, and mended at the end
        tolerance = block_tolerance(tree, level, max(rtol * math.sqrt(squares), atol))
        for side, which in zip(sides, (blocks, blocks.lower), strict=False):
            parts = approximate(which, tolerance, max_rank, seed)
            side.insert(0, parts)
            for block, _ in parts:
                squares += float(frobenius(block.S)) ** 2 * (2 if symmetric else 1)
        check_norm(math.sqrt(squares), space)
    norm = math.sqrt(squares)
    total = max(rtol * norm, atol)
    square, trimmed = 0.0, []
    for side in sides:
        out = []
        for level, parts in enumerate(side):
            block, lost = joined(parts, block_tolerance(tree, level, total), max_rank)
            parts.clear()
            out.append(block)
            square += lost * (2 if symmetric else 1)
        trimmed.append(tuple(out))
    reached = math.sqrt(square)
    if max_rank is None and not reached <= total:
        msg = (
            f"The error is {reached / norm:.3g} of the norm by the estimate, "
            f"{total / norm:.3g} was asked for: entries may be too rough or too noisy for "
            "low rank. Use a larger `rtol`, another order of the rows, or a `max_rank`."
        )
        raise ToleranceError(msg, total / norm, reached / norm)
    lower = None if symmetric else trimmed[1]
    return HODLR(tree, leaves, trimmed[0], lower, reached / norm if norm else 0.0)


def joined(
    parts: list[Found], tolerance: float, max_rank: int | None
) -> tuple[LowRank, float]:
    """Join batches of a level's blocks, cut again now that the norm is known.

    Returns the blocks, and the squares of the errors of all of them.
    """
    xp = namespace(parts[0][1])
    error = xp.concat([lost for _, lost in parts], axis=0)
    width = max(block.rank for block, _ in parts)
    S = xp.concat([widened(block.S, width) for block, _ in parts], axis=0)
    rest = tolerance**2 - error**2
    rest = 0.9 * xp.sqrt(xp.where(rest > 0, rest, xp.zeros_like(rest)))
    keep, more, _ = kept(S, rest[:, None], max_rank)
    square = float(xp.sum(error**2 + more**2))
    rank = int(keep.shape[-1])
    if len(parts) == 1 and rank == width and bool(xp.all(keep | (S == 0))):
        return parts[0][0], square

    def all_of(name: str) -> Array:
        first = getattr(parts[0][0], name)
        x = Space.of(first).zeros(error.shape[0], *first.shape[1:-1], rank)
        start = 0
        for block, lost in parts:
            stop = start + lost.shape[0]
            part = getattr(block, name)[..., :rank]
            mask = keep[start:stop, ..., : part.shape[-1]]
            mask = xp.reshape(mask, (stop - start, *[1] * (x.ndim - 2), -1))
            x[start:stop, ..., : part.shape[-1]] = xp.where(
                mask, part, xp.zeros_like(part)
            )
            start = stop
        return x

    return LowRank(*map(all_of, ("U", "S", "V"))), square


def diagonal_blocks(
    function: Function,
    labels: Array,
    real: Array | None,
    tree: ClusterTree,
    space: Space,
) -> Array:
    """Evaluate the leaves, some at a time: (2**K, m, m)."""
    xp, m, count = space.xp, tree.leaf_size, tree.nodes(tree.levels)
    labels = xp.reshape(labels, (count, m, *labels.shape[1:]))
    leaves = space.zeros(count, m, m)
    step = pieces(space, m * m, count)
    for start in range(0, count, step):
        stop = min(start + step, count)
        some = labels[start:stop, ...]
        leaves[start:stop, :, :] = function(some[:, :, None, ...], some[:, None, ...])
    if real is None:
        return leaves
    masks = xp.reshape(real, (count, m))
    return masked(leaves, masks[:, :, None], masks[:, None, :])


def looks_hermitian(
    function: Function, labels: Array, leaves: Array, seed: int
) -> bool:
    """Whether the leaves and some other entries are those of a Hermitian matrix.

    Each row and each column has some of them, so that no single one is missed.
    """
    xp, space, n = namespace(leaves), Space.of(leaves), int(labels.shape[0])
    if not bool(xp.all(leaves == adjoint(leaves))):
        return False
    chance = np.random.default_rng(seed)
    for _ in range(8 + 256 // n):
        other = xp.take(labels, space.integers(chance.permutation(n)), axis=0)
        mirrored = conjugate(function(other, labels))
        if not bool(xp.all(function(labels, other) == mirrored)):
            return False
    return True
