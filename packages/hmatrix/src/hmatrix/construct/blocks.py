"""All off-diagonal blocks of a level, known by a function of their rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hmatrix._backend import Array, Space, conjugate

__all__ = ["Blocks", "masked", "pick", "pieces"]

#: Entries evaluated at once on the host: their temporaries stay in the cache.
CHUNK = 2**17


@dataclass(frozen=True)
class Blocks:
    """Blocks ``function(rows[b, :, None], columns[b, None, :])`` of one size.

    Parameters
    ----------
    function : callable
        Gives entries for broadcast labels of rows and columns.
    rows, columns : array (b, m) or (b, m, d)
        Labels: row numbers, or points.
    real_rows, real_columns : array (b, m) or None
        Whether it is a row of the matrix, or padding; None without padding.
    space : Space
        Of the entries.
    """

    function: Callable[[Array, Array], Array]
    rows: Array
    columns: Array
    real_rows: Array | None
    real_columns: Array | None
    space: Space

    @property
    def count(self) -> int:
        """Number of blocks."""
        return int(self.rows.shape[0])

    @property
    def size(self) -> int:
        """Rows of a block."""
        return int(self.rows.shape[1])

    @property
    def xp(self) -> Any:
        """Array namespace."""
        return self.space.xp

    @property
    def lower(self) -> Blocks:
        """The blocks on the other side of the diagonal."""
        return Blocks(
            self.function,
            self.columns,
            self.rows,
            self.real_columns,
            self.real_rows,
            self.space,
        )

    @property
    def adjoint(self) -> Blocks:
        """The adjoint blocks."""

        def swapped(a: Array, b: Array) -> Array:
            return conjugate(self.function(b, a))

        return Blocks(
            swapped,
            self.columns,
            self.rows,
            self.real_columns,
            self.real_rows,
            self.space,
        )

    def taken(self, index: Array, axis: int) -> Blocks:
        """Return some blocks (axis 0), or the same rows and columns of all (axis 1)."""

        def take(x: Array | None) -> Array | None:
            return None if x is None else self.xp.take(x, index, axis=axis)

        return replace(
            self,
            rows=take(self.rows),
            columns=take(self.columns),
            real_rows=take(self.real_rows),
            real_columns=take(self.real_columns),
        )

    def group(self, start: int, count: int) -> Blocks:
        """Return some of the blocks that follow each other."""
        stop = min(start + count, self.count)

        def take(x: Array | None) -> Array | None:
            return None if x is None else x[start:stop, ...]

        return replace(
            self,
            rows=take(self.rows),
            columns=take(self.columns),
            real_rows=take(self.real_rows),
            real_columns=take(self.real_columns),
        )

    def at(self, i: Array, j: Array) -> Array:
        """Return entries at places i, j (b, q): (b, q)."""
        x = self.function(pick(self.rows, i), pick(self.columns, j))
        if self.real_rows is None:
            return x
        return masked(x, pick(self.real_rows, i), pick(self.real_columns, j))

    def at_columns(self, j: Array) -> Array:
        """Return columns at places j (b, q): (b, q, m), each of them contiguous."""
        x = self._evaluate(
            self.rows[:, None, ...], pick(self.columns, j)[:, :, None, ...]
        )
        if self.real_rows is None:
            return x
        real = pick(self.real_columns, j)
        return masked(x, self.real_rows[:, None, :], real[:, :, None])

    def _evaluate(self, a: Array, b: Array) -> Array:
        """Evaluate columns (b, q, m), a piece of the rows a (b, 1, m) at a time."""
        count, q, m = int(b.shape[0]), int(b.shape[1]), int(a.shape[2])
        step = pieces(self.space, count * q, m)
        if step >= m:
            return self.function(a, b)
        x = self.space.zeros(count, q, m)
        for start in range(0, m, step):
            stop = min(start + step, m)
            x[:, :, start:stop] = self.function(a[:, :, start:stop, ...], b)
        return x

    def dense(self) -> Array:
        """Return the blocks as arrays (b, m, m)."""
        x = self.function(self.rows[:, :, None, ...], self.columns[:, None, ...])
        if self.real_rows is None or self.real_columns is None:
            return x
        return masked(x, self.real_rows[:, :, None], self.real_columns[:, None, :])


def masked(x: Array, rows: Array, columns: Array) -> Array:
    """Return entries with zeros where row or column is padding."""
    xp = Space.of(x).xp
    return xp.where(rows & columns, x, xp.zeros_like(x))


def pieces(space: Space, width: int, count: int) -> int:
    """Return how many of ``count`` rows of ``width`` entries to evaluate at once.

    On the host the temporaries of a piece should stay in the cache.
    """
    return max(1, CHUNK // width) if space.on_host else count


def pick(x: Array, places: Array) -> Array:
    """Take rows ``x[b, places[b, q], ...]`` of x (b, m, ...): (b, q, ...)."""
    space = Space.of(x)
    xp, (b, m) = space.xp, x.shape[:2]
    flat = xp.reshape(x, (b * m, *x.shape[2:]))
    first = m * xp.arange(b, device=space.device)
    chosen = xp.take(flat, xp.reshape(places + first[:, None], (-1,)), axis=0)
    return xp.reshape(chosen, (b, places.shape[1], *x.shape[2:]))
