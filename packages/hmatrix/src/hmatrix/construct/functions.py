"""Users' functions of entries, made to broadcast and checked."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np

from hmatrix._backend import (
    HALVES,
    NUMBERS,
    Array,
    Space,
    contiguous,
    detach,
    is_array,
    namespace,
    to_numpy,
)
from hmatrix._checks import BackendError, DTypeError, NonFiniteError, ShapeError
from hmatrix.construct.blocks import Function

__all__ = ["broadcasting", "checked"]

#: Pairs of labels that a function of two lists evaluates at once, as a matrix's diagonal.
TILE = 64


def broadcasting(function: Function, labels: Array, dims: int) -> tuple[Function, Any]:
    """Return a function of labels that broadcast, and entries that the given one computed.

    A function of two lists is known by its result for one label and two: a matrix (1, 2).
    """
    few = labels[: min(2, int(labels.shape[0])), ...]
    probe = function(labels[:1, ...], few)
    if is_array(probe) and tuple(probe.shape) == (1, few.shape[0]):
        function = of_lists(function, dims)
    return function, probe


def checked(
    function: Function, space: Space, dims: int = 0, rtol: float = 0.0
) -> Function:
    """Return the function with its results checked and cast.

    ``dims`` is the number of axes of a label: 0 for a number, 1 for a point. Entries of a
    lower precision than the matrix's are refused if ``rtol`` is below their epsilon.

    Raises
    ------
    BackendError, ShapeError, DTypeError, NonFiniteError
        By the function returned, if results are no finite arrays of the right shape,
        library, device and dtype.
    """
    xp, turned = space.xp, dims and space.on_host

    def entries(a: Array, b: Array) -> Array:
        if turned:
            a, b = map(_by_coordinates, (a, b))
        x = function(a, b)
        found = check_place(x, a)
        if found.is_complex and not space.is_complex:
            msg = (
                f"The function gave {found.name} entries for a matrix of "
                f"{space.name}; give `dtype`, or take the real part."
            )
            raise DTypeError(msg)
        # their rounding would be compressed as if it were part of the matrix
        coarse = found.name in (*HALVES, *NUMBERS) and found.eps > space.eps
        if coarse and found.eps > rtol:
            msg = (
                f"The function gave {found.name} entries for a matrix of {space.name}; "
                "give `dtype`, or compute in that precision (torch divides integers in "
                f"float32: convert them first), or give an `rtol` above {found.eps:.1g}."
            )
            raise DTypeError(msg)
        shapes = (s[: len(s) - dims] for s in (tuple(a.shape), tuple(b.shape)))
        # both have the same number of axes, none of size 0
        expected = tuple(map(max, *shapes))
        if tuple(x.shape) != expected:
            msg = (
                f"The function must give an array of shape {expected} for arguments of "
                f"shapes {tuple(a.shape)} and {tuple(b.shape)}, got {tuple(x.shape)}."
            )
            if dims and tuple(x.shape[:-1]) == expected:
                msg = f"{msg[:-1]}; sum over the last axis, the coordinates."
            raise ShapeError(msg)
        x = detach(x)
        # a sum is faster, and finite if all entries are, unless it overflows
        total = complex(xp.sum(x))
        if not cmath.isfinite(total) and not bool(xp.all(xp.isfinite(x))):
            raise NonFiniteError(_not_finite(x, a, b, dims))
        return xp.astype(x, space.dtype, copy=False)

    return entries


def _not_finite(x: Array, a: Array, b: Array, dims: int) -> str:
    """Message about the first of some entries, of labels a and b, that is not finite."""
    shape = tuple(x.shape)
    finite = to_numpy(namespace(x).isfinite(x))
    place = np.unravel_index(int(np.argmin(finite)), shape)
    i, j = (
        np.broadcast_to(to_numpy(y), (*shape, *y.shape[y.ndim - dims :]))[place]
        for y in (a, b)
    )
    return (
        f"The function gave NaN or infinity for {i} and {j}; it must be finite "
        "everywhere, on the diagonal too."
    )


def check_place(x: Any, labels: Array) -> Space:
    """Return the space of ``x``; raise unless it is an array where the labels are."""
    expected, found = Space.of(labels), Space.of(x) if is_array(x) else None
    if found and found.xp is expected.xp and found.device == expected.device:
        return found
    got = found.place if found else type(x).__name__
    msg = (
        f"The function must give a {expected.place} array, got {got}; "
        "build it from its arguments."
    )
    raise BackendError(msg)


def _by_coordinates(points: Array) -> Array:
    """Return points (..., d) whose first coordinates come first in memory, and so on.

    So does what is made of them, and its sum over the last axis adds up whole arrays: up
    to five times as fast as many sums of two or three numbers.
    """
    xp, last = namespace(points), points.ndim - 1
    first = xp.permute_dims(points, (last, *range(last)))
    return xp.permute_dims(contiguous(first), (*range(1, last + 1), 0))


def of_lists(function: Function, dims: int) -> Function:
    """Return a function that broadcasts from one of two lists.

    Parameters
    ----------
    function : callable
        From labels (m, ...) and (q, ...) to entries (m, q), for any m and q.
    dims : int
        Axes of one label: 0 for a number, 1 for a point.

    Returns
    -------
    callable
        From labels that broadcast against each other to their entries. It is a call for each
        index of the axes that both have, or for each ``TILE`` of pairs, where none is
        that of rows or of columns alone.
    """

    def matrix(a: Array, b: Array) -> Array:
        x, expected = function(a, b), (int(a.shape[0]), int(b.shape[0]))
        check_place(x, a)
        if tuple(x.shape) != expected:
            msg = (
                f"The function of two lists must give an array of shape {expected}, "
                f"got {tuple(x.shape)}."
            )
            raise ShapeError(msg)
        return x

    def entries(a: Array, b: Array) -> Array:
        xp, ndim = namespace(a), max(a.ndim, b.ndim) - dims
        a, b = (
            xp.reshape(x, (*[1] * (ndim + dims - x.ndim), *x.shape)) for x in (a, b)
        )
        sizes = list(zip(a.shape[:ndim], b.shape[:ndim], strict=True))
        rows = [k for k, (m, q) in enumerate(sizes) if q == 1 < m]
        columns = [k for k, (m, q) in enumerate(sizes) if m == 1 < q]
        shared = [k for k in range(ndim) if k not in {*rows, *columns}]
        order = [*shared, *rows, *columns]
        count = math.prod(sizes[k][0] for k in shared)

        def listed(x: Array) -> Array:
            """Return the labels of each index of the shared axes in one list."""
            moved = xp.permute_dims(x, (*order, *range(ndim, x.ndim)))
            return xp.reshape(moved, (count, -1, *x.shape[ndim:]))

        a, b = listed(a), listed(b)
        if rows or columns:
            found = xp.stack([matrix(a[k, ...], b[k, ...]) for k in range(count)])
        else:
            tiles = (slice(k, min(k + TILE, count)) for k in range(0, count, TILE))
            tiled = (matrix(a[some, 0, ...], b[some, 0, ...]) for some in tiles)
            found = xp.concat([xp.linalg.diagonal(x) for x in tiled])
        found = xp.reshape(found, tuple(max(sizes[k]) for k in order))
        return xp.permute_dims(found, tuple(order.index(k) for k in range(ndim)))

    return entries
