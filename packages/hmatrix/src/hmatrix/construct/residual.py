"""Residuals of low-rank approximations of blocks, from all or some of their entries."""

from __future__ import annotations

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    conjugate,
    contiguous,
    namespace,
    squares,
    transpose,
)
from hmatrix.construct.blocks import Blocks, again, chunks, pick, tiles
from hmatrix.construct.places import grid

__all__ = ["Left", "compare", "large", "residual", "strays"]

#: Frobenius norms (b,) of residuals, the rows (b,) that have most of them, and squares
#: (b, m) of the norms of rows, all of which may be estimates.
Left = tuple[Array, Array, Array]

#: Entries of each row and column that are looked at by chance.
PASSES = 2
#: Blocks of points up to this size are compared whole: a few of their pairs may be close,
#: and at their ranks this costs little beside the rest.
WHOLE = 512
#: Rows and columns of larger ones, where the points are close.
MEETING = 256
#: If coefficients exceed LARGE, the STRAYS rows and columns with the largest are evaluated.
STRAYS, LARGE = 8, 10.0


def residual(blocks: Blocks, U: Array, V: Array, sample: int, *seed: int) -> Left:
    """Estimate what is left of blocks less ``U Vᴴ``, U and V (b, m, r).

    A block no larger than the sample, or of at most ``WHOLE`` points in a plane or in
    space, is compared whole. Of others there are three estimates, the largest of which
    counts: from the entries where as many rows and columns meet as the sample has, drawn
    anew and like those dense where clusters meet; from the close pairs; and from ``PASSES``
    entries of each row and each column by chance, so that a wrong row or column is seen.
    """
    space, xp, m, b = blocks.space, blocks.xp, blocks.size, blocks.count
    if m <= (sample if blocks.near is None else max(sample, WHOLE)):
        return compare(blocks, U, V)
    # taking rows out of a transposed array would copy all of it each time
    U, V = contiguous(U), contiguous(V)
    chance = np.random.default_rng((*seed, m, b))
    count = sample if blocks.near is None else max(sample, MEETING)
    i, j, weights = grid(blocks, min(count, m), chance)
    norms, rows, _ = compare(blocks.within(i, j), pick(U, i), pick(V, j), weights)
    rows = pick(i, rows[:, None])[:, 0]
    found = [(norms, rows)]
    if blocks.near is not None and blocks.near.count:
        near = blocks.near
        squares = near.used * _squares(blocks, near.rows, near.columns, U, V)
        found.append(_most(squares, near.rows))
    order, numbers = chance.permutation(m), np.arange(m)
    shifts = chance.integers(0, m, (PASSES, b, 1))
    # padding, which may be nearly all of a block, is left out
    (own, count_rows), (others, count_columns) = blocks.places
    share = xp.astype(count_rows * count_columns, space.real.dtype)[:, None]
    share = share / (m * PASSES)
    squares = space.real.zeros(b, m)
    for part in chunks(space, m, PASSES * b * U.shape[-1]):
        # all passes at once, next to each other
        j = space.integers(np.concatenate(order[(numbers[part] + shifts) % m], axis=1))
        j = j if others is None else xp.take_along_axis(others, j, axis=1)
        i = part if own is None else xp.concat([own[:, part]] * PASSES, axis=1)
        each = _squares(blocks, i, j, U, V)
        each = xp.reshape(each, (b, PASSES, part.stop - part.start))
        squares[:, part] = share * xp.sum(each, axis=1)
    each_row = xp.broadcast_to(space.integers(numbers), (b, m))
    found.append(_most(squares, each_row if own is None else own))
    if own is not None:
        squares = _in_their_places(squares, blocks.real[0])  # type: ignore[index]
    norms, rows = found[0]
    for more, others in found[1:]:
        rows = xp.where(more > norms, others, rows)
        norms = xp.maximum(norms, more)
    return norms, rows, squares


def compare(
    blocks: Blocks, U: Array, V: Array, weights: tuple[Array, Array] | None = None
) -> Left:
    """Return what is left of blocks less ``U Vᴴ``, from all entries.

    Rows and columns count as often as the squares of ``weights`` (b, m) each say.
    """
    space, xp, right = blocks.space, blocks.xp, adjoint(V)
    b, m, _ = U.shape
    squares = space.real.zeros(b, m)
    for part, some in tiles(space, b, m, V.shape[1]):
        error = U[part, some, :] @ right[part, ...]
        error -= blocks.group(part).dense(some)
        if weights is not None:
            error *= weights[0][part, some][:, :, None]
            error *= weights[1][part, None, :]
        squares[part, some] = xp.abs(xp.vecdot(error, error))
    return xp.sqrt(xp.sum(squares, axis=-1)), xp.argmax(squares, axis=-1), squares


def large(coefficients: Array) -> Array | None:
    """Return the largest coefficient (b, m) of (b, r, m), or None if none is ``LARGE``."""
    xp = namespace(coefficients)
    if not Space.of(coefficients).is_complex:
        # two numbers, which take no memory, are enough for most
        ends = xp.stack([xp.max(coefficients), -xp.min(coefficients)])
        if bool(xp.all(ends <= LARGE)):
            return None
    largest = xp.max(xp.abs(coefficients), axis=1)
    return None if bool(xp.all(largest <= LARGE)) else largest


def strays(
    blocks: Blocks, U: Array, V: Array, rows: Array | None, columns: Array | None
) -> Array:
    """Return the norms (b,) of what is left of the rows and columns least like pivots.

    A row of the block is a combination of the pivots' rows. Where the largest coefficient,
    ``rows`` (b, m), is far above 1, it is like none of them: an outlying point, say, that no
    sample has. Columns are treated alike. Both are as of `large`.
    """
    xp, norms = blocks.xp, blocks.space.real.zeros(blocks.count)
    sides = ((blocks.adjoint, V, U, rows), (blocks, U, V, columns))
    for part, left, right, largest in sides:
        if largest is None:
            continue
        places = xp.argsort(-largest, axis=-1)[:, :STRAYS]
        error = part.at_columns(places)
        error = error - conjugate(pick(right, places)) @ transpose(left)
        norms = xp.maximum(norms, xp.sqrt(xp.sum(squares(error), axis=(1, 2))))
    return norms


def _squares(blocks: Blocks, i: Array | slice, j: Array, U: Array, V: Array) -> Array:
    """Return squares of what is left at places i, j (b, q), as of `Blocks.at`."""
    left = blocks.xp.vecdot(pick(V, j), again(U, i, j))
    return squares(left - blocks.at(i, j))


def _in_their_places(x: Array, real: Array) -> Array:
    """Return the first numbers of x (b, m) where ``real`` (b, m) is true, else zeros."""
    xp = namespace(x)
    order = xp.cumulative_sum(xp.astype(real, xp.int64), axis=1)
    moved = xp.take_along_axis(x, xp.maximum(order - 1, xp.zeros_like(order)), axis=1)
    return xp.where(real, moved, xp.zeros_like(x))


def _most(squares: Array, rows: Array) -> tuple[Array, Array]:
    """Return norms, and of ``rows`` (b, q) those of the largest squares (b, q)."""
    xp = namespace(squares)
    row = pick(rows, xp.argmax(squares, axis=-1)[:, None])[:, 0]
    return xp.sqrt(xp.sum(squares, axis=-1)), row
