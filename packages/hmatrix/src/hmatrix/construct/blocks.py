"""All off-diagonal blocks of a level, known by a function of their rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hmatrix._backend import Array, Space, conjugate, multiply_into, namespace
from hmatrix.construct.near import Near

__all__ = ["Blocks", "Function", "again", "chunks", "masked", "pick", "tiles"]

#: From labels of rows and columns, broadcast, to entries.
Function = Callable[[Array, Array], Array]
#: Some of the blocks, and some of their rows.
Tile = tuple[slice, slice]

#: Entries evaluated at once on the host: the temporaries of a kernel, several of that size,
#: stay in the cache and are small beside the matrix.
CHUNK = 2**16


@dataclass(frozen=True)
class Blocks:
    """Blocks ``function(rows[b, :, None], columns[b, None, :])`` of one size.

    Parameters
    ----------
    function : callable
        Gives entries for broadcast labels of rows and columns.
    rows, columns : array (b, m) or (b, m, d)
        Labels: row numbers, or points.
    real : tuple of two arrays (b, m), or None
        Whether rows, and columns, are of the matrix or padding; None without padding.
    space : Space
        Of the entries.
    near : Near, optional
        Where entries may stand out, as of `near_parts`.
    """

    function: Function
    rows: Array
    columns: Array
    real: tuple[Array, Array] | None
    space: Space
    near: Near | None = None

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """Return blocks of one function and one size, without their near pairs."""
        if len(parts) == 1:
            return parts[0]

        def join(arrays: Iterable[Array]) -> Array:
            return parts[0].xp.concat(list(arrays), axis=0)

        masks = [x.real for x in parts if x.real is not None]
        return replace(
            parts[0],
            rows=join(x.rows for x in parts),
            columns=join(x.columns for x in parts),
            real=tuple(map(join, zip(*masks, strict=True))) if masks else None,
            near=None,
        )

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
    def places(self) -> tuple[tuple[Array | None, Array], ...]:
        """Rows, and columns, that are no padding, (b, m), and how many there are, (b,).

        In ascending order, repeated to fill m places; None if there is no padding. Samples
        are taken from these: padding may be anywhere, and nearly all of a block.
        """
        xp = self.xp
        numbers = xp.arange(self.size, device=self.space.device)[None, :]
        found: list[tuple[Array | None, Array]] = []
        for real in self.real or (None, None):
            if real is None or bool(xp.all(real)):
                every = xp.broadcast_to(numbers[0, -1:] + 1, (self.count,))
                found.append((None, every))
                continue
            count = xp.sum(xp.astype(real, numbers.dtype), axis=1)
            count = xp.maximum(count, xp.ones_like(count))
            # by their numbers, padding last
            order = xp.sort(xp.where(real, numbers, numbers + self.size), axis=1)
            again = numbers % count[:, None]
            order = xp.take_along_axis(order % self.size, again, axis=1)
            found.append((order, count))
        return tuple(found)

    @property
    def lower(self) -> Blocks:
        """The blocks on the other side of the diagonal."""
        return replace(
            self,
            rows=self.columns,
            columns=self.rows,
            real=None if self.real is None else self.real[::-1],
            near=None if self.near is None else self.near.lower,
        )

    @property
    def adjoint(self) -> Blocks:
        """The adjoint blocks."""

        def swapped(a: Array, b: Array) -> Array:
            return conjugate(self.function(b, a))

        return replace(self.lower, function=swapped)

    def taken(self, index: Array) -> Blocks:
        """Return some of the blocks."""
        return self._each(lambda x: self.xp.take(x, index, axis=0))

    def group(self, some: slice) -> Blocks:
        """Return some of the blocks that follow each other."""
        return self._each(lambda x: x[some, ...])

    def within(self, rows: Array, columns: Array) -> Blocks:
        """Return places ``rows`` and ``columns`` (b, q) of each block."""
        real = self.real
        if real is not None:
            real = pick(real[0], rows), pick(real[1], columns)
        rows, columns = pick(self.rows, rows), pick(self.columns, columns)
        return replace(self, rows=rows, columns=columns, real=real, near=None)

    def _each(self, take: Callable[[Array], Array]) -> Blocks:
        """Apply ``take`` to all arrays."""
        return replace(
            self,
            rows=take(self.rows),
            columns=take(self.columns),
            real=None if self.real is None else tuple(map(take, self.real)),
            near=None if self.near is None else self.near.each(take),
        )

    def at(self, i: Array | slice, j: Array) -> Array:
        """Return entries at places i, j (b, q): (b, q).

        The rows of a slice i are repeated until they are q.
        """
        x = self.function(again(self.rows, i, j), pick(self.columns, j))
        if self.real is None:
            return x
        return masked(x, again(self.real[0], i, j), pick(self.real[1], j))

    def at_columns(self, j: Array, T: Array | None = None) -> Array:
        """Return columns at places j (b, q): (b, q, m), each of them contiguous.

        With T (b, p, q), combinations of them: ``T`` times the columns.
        """
        count, q = j.shape
        m = self.size
        right = pick(self.columns, j)[:, :, None, ...]
        real = None if self.real is None else (self.real[0], pick(self.real[1], j))
        x = None
        for part in chunks(self.space, m, int(count * q)):
            y = self.function(self.rows[:, None, part, ...], right)
            if real is not None:
                y = masked(y, real[0][:, None, part], real[1][:, :, None])
            if part.stop - part.start == m:
                return y if T is None else T @ y
            if x is None:
                x = self.space.zeros(count, q if T is None else T.shape[1], m)
            if T is None:
                x[:, :, part] = y
            else:
                multiply_into(x[:, :, part], T, y)
        return x

    def column_by_column(self) -> Callable[[Array], Array]:
        """Return a function that gives columns j (b, m) from places ``b m + j`` (b,).

        Arrays that all columns are evaluated from are made once.
        """
        xp, (b, m) = self.xp, self.rows.shape[:2]

        def flat(x: Array) -> Array:
            return xp.reshape(x, (b * m, *x.shape[2:]))

        columns = flat(self.columns)
        real = None if self.real is None else (self.real[0], flat(self.real[1]))

        def column(places: Array) -> Array:
            right = xp.take(columns, places, axis=0)[:, None, ...]
            x = self.function(self.rows, right)
            if real is None:
                return x
            return masked(x, real[0], xp.take(real[1], places, axis=0)[:, None])

        return column

    def dense(self, some: slice = slice(None)) -> Array:
        """Return the blocks as arrays (b, m, m), or some of their rows."""
        x = self.function(self.rows[:, some, None, ...], self.columns[:, None, ...])
        if self.real is None:
            return x
        return masked(x, self.real[0][:, some, None], self.real[1][:, None, :])


def masked(x: Array, rows: Array, columns: Array) -> Array:
    """Return entries with zeros where row or column is padding."""
    return namespace(x).where(rows & columns, x, 0.0)


def chunks(space: Space, count: int, width: int, size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of ``count`` rows of ``width`` numbers each, to be taken at once.

    On the host they have about ``size`` numbers, which stay in the cache with what is made
    of them; on a device there is one slice.
    """
    step = max(1, size // max(width, 1)) if space.on_host else count
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def tiles(space: Space, blocks: int, rows: int, width: int) -> Iterator[Tile]:
    """Yield which blocks, and which of their rows, are to be taken at once."""
    for batch in chunks(space, blocks, rows * width):
        for some in chunks(space, rows, width):
            yield batch, some


def again(x: Array, places: Array | slice, like: Array) -> Array:
    """Take rows of x (b, m, ...) as `pick`, or a slice repeated to the width of ``like``."""
    if not isinstance(places, slice):
        return pick(x, places)
    some = x[:, places, ...]
    times = like.shape[1] // some.shape[1]
    return Space.of(x).xp.concat([some] * times, axis=1)


def pick(x: Array, places: Array) -> Array:
    """Take rows ``x[b, places[b, q], ...]`` of x (b, m, ...): (b, q, ...)."""
    space = Space.of(x)
    xp, (b, m) = space.xp, x.shape[:2]
    flat = xp.reshape(x, (b * m, *x.shape[2:]))
    first = m * xp.arange(b, device=space.device)
    chosen = xp.take(flat, xp.reshape(places + first[:, None], (-1,)), axis=0)
    return xp.reshape(chosen, (b, places.shape[1], *x.shape[2:]))
