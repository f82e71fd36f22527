"""Single entries, rows and dense blocks out of a stored matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    conjugate,
    in_own_precision,
    is_array,
    to_numpy,
)
from hmatrix._checks import EntryError, ShapeError
from hmatrix.tree import ClusterTree

__all__ = ["Entries"]


class Entries(ABC):
    """What can be read out of a matrix without forming it.

    Rows and columns are counted in the order of the matrix, from the end if negative.
    They are given as integers, sequences or arrays of any library. Subclasses supply
    ``tree``, ``space`` and the entries at padded rows.
    """

    tree: ClusterTree

    @property
    @abstractmethod
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""

    @property
    @abstractmethod
    def H(self) -> Entries:
        """The adjoint."""

    @abstractmethod
    def _row(self, row: int) -> Array:
        """All entries (padded,) of a padded row."""

    @abstractmethod
    def _entries(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """Entries (e,) at pairs of padded rows and columns, int64 (e,) each."""

    @abstractmethod
    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """Block (a, b) of padded rows (a,) and columns (b,)."""

    def entries(self, rows: Any, columns: Any) -> Array:
        """Return the entries at pairs of rows and columns.

        Parameters
        ----------
        rows, columns : int or integer array
            Indices that broadcast against each other, as ``A[rows, columns]`` of a dense
            array.

        Returns
        -------
        array
            Of the broadcast shape. Cost of each: that of an inner product of length r
            (for an `MLR`, one for each level).

        Raises
        ------
        EntryError
            If an index is no integer or out of range.
        ShapeError
            If the two do not broadcast.

        Examples
        --------
        >>> import numpy as np
        >>> import hmatrix as hm
        >>> H = hm.from_dense(np.add.outer(np.arange(9.0), np.arange(9.0)), levels=2)
        >>> H.entries([0, 3, 8], [1, 7, 0]).round(9)
        array([ 1., 10.,  8.])
        """
        n = self.tree.n
        pairs = _positions("rows", rows, n), _positions("columns", columns, n)
        try:
            i, j = np.broadcast_arrays(*pairs)
        except ValueError:
            shapes = " and ".join(str(x.shape) for x in pairs)
            msg = f"`rows` and `columns` must broadcast, got shapes {shapes}."
            raise ShapeError(msg) from None
        slots = self.tree.slots
        values = self._entries(slots[i.ravel()], slots[j.ravel()])
        return self.space.xp.reshape(values, i.shape)

    @in_own_precision
    def block(self, rows: Any, columns: Any) -> Array:
        """Return the dense block of some rows and columns.

        Parameters
        ----------
        rows : int array (a,)
            Rows, in any order and also repeated.
        columns : int array (b,)
            Columns alike.

        Returns
        -------
        array (a, b)
            ``A[rows][:, columns]``, by one matrix product of width r for each level.

        Raises
        ------
        EntryError
            If an index is no integer or out of range.
        ShapeError
            If the indices are not vectors.
        """
        n = self.tree.n
        i, j = _positions("rows", rows, n), _positions("columns", columns, n)
        if i.ndim != 1 or j.ndim != 1:
            msg = f"`rows` and `columns` must be vectors, got {i.shape} and {j.shape}."
            raise ShapeError(msg)
        return self._block(self.tree.slots[i], self.tree.slots[j])

    @in_own_precision
    def row(self, i: int) -> Array:
        """Return row ``i`` (n,), at the cost ``O(n r)``; ``i`` as in `entries`."""
        if np.ndim(i):
            msg = f"`i` must be one integer, got shape {np.shape(i)}; use `block`."
            raise EntryError(msg)
        slots = self.tree.slots
        row = self._row(int(slots[_positions("i", i, self.tree.n)]))
        return self._take(row, slots)

    def column(self, i: int) -> Array:
        """Return column ``i`` (n,), the conjugate row of the adjoint; see `row`."""
        return conjugate(self.H.row(i))

    def _take(self, x: Array, places: np.ndarray) -> Array:
        """Return ``x[places]`` along the first axis."""
        xp = self.space.xp
        taken = xp.take(x, self.space.integers(places.ravel()), axis=0)
        return xp.reshape(taken, (*places.shape, *x.shape[1:]))

    def __getitem__(self, key: Any) -> Array:
        """Return what a dense array would: entries, or a block where there is a slice."""
        indices = key if isinstance(key, tuple) else (key,)
        if len(indices) > 2:
            msg = f"A matrix takes two indices at most, got {len(indices)}."
            raise EntryError(msg)
        rows, columns = (*indices, slice(None), slice(None))[:2]
        if not (isinstance(rows, slice) or isinstance(columns, slice)):
            return self.entries(rows, columns)
        rows, columns = (
            range(self.tree.n)[x] if isinstance(x, slice) else x
            for x in (rows, columns)
        )
        if np.ndim(rows) == 0 or np.ndim(columns) == 0:
            return self.entries(rows, columns)
        return self.block(rows, columns)


def _positions(name: str, values: Any, n: int) -> np.ndarray:
    """Return indices as int64 of 0 … n − 1."""
    array = to_numpy(values) if is_array(values) else np.asarray(values)
    if array.dtype.kind not in "iu" and (array.size or is_array(values)):
        hint = "; use numpy.nonzero" if array.dtype.kind == "b" else ""
        hint = "; use range" if isinstance(values, slice) else hint
        msg = f"`{name}` must be integers, got {array.dtype}{hint}."
        raise EntryError(msg)
    if array.size and not -n <= array.min() <= array.max() < n:
        msg = f"`{name}` must be from {-n} to {n - 1}, got {array.min()} to {array.max()}."
        raise EntryError(msg)
    return array.astype(np.int64) % n
