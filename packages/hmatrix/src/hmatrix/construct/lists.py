"""Functions of two lists, as many libraries have kernels, made to broadcast."""

from __future__ import annotations

import math

from hmatrix._backend import Array, is_array, namespace
from hmatrix._checks import ShapeError
from hmatrix.construct.blocks import Function

__all__ = ["of_lists"]

#: Pairs of labels that are looked up in one matrix of two lists, on its diagonal.
TILE = 64


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
        if not is_array(x) or tuple(x.shape) != expected:
            got = tuple(x.shape) if is_array(x) else type(x).__name__
            msg = f"The function of two lists must give an array of shape {expected}, got {got}."
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
