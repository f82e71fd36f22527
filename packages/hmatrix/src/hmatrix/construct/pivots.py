"""Pivots of cross approximation, in samples of blocks of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from hmatrix._backend import Array, Space, conjugate, contiguous, to_numpy, transpose
from hmatrix.construct.blocks import Blocks, chunks
from hmatrix.construct.places import grid
from hmatrix.construct.residual import Left, compare, residual

__all__ = ["GROUP", "SAMPLE", "Pivots", "gather", "search", "together"]

#: Rows and columns of the first sample.
SAMPLE = 128
#: Rows and columns of close pairs that the first sample has in addition.
PEAKS = 64
#: Rows of samples, or of blocks on the host, worked on at once: factors stay in the cache.
GROUP = 2**15
#: Columns by which factors grow.
STEP = 16
#: After one step for every WIDE rows of the samples all of their entries are evaluated at
#: once, if they are TABLE at most: a call for a row takes longer than its entries.
WIDE, TABLE = 8, 2**20
#: Small steps in a row, and rows without a residual in a row, that end the search.
QUIET, NULLS = 2, 3
#: What may be left of the entries looked at, in units of what a small step has at most.
LEFT = 2
#: A pivot is too small if an entry of its column is GROWTH times as large; TURNS rows are
#: tried at most to find a larger one.
GROWTH, TURNS = 8.0, 4


@dataclass(frozen=True)
class Pivots:
    """What `cross` finds in samples of blocks (b).

    Parameters
    ----------
    rows, columns : array (b, s)
        Numbers of the samples' rows and columns.
    i, j, U, V, valid : array (b, r) or (b, r, s)
        Results of `cross`. Of samples that are not whole blocks, U[I] and V[J] (b, r, r)
        alone: the samples of all levels would be large beside a matrix of a few of them.
    """

    rows: Array
    columns: Array
    i: Array
    j: Array
    U: Array
    V: Array
    valid: Array

    def group(self, some: slice, steps: int | None = None) -> Pivots:
        """Return the pivots of some of the blocks, or only the first ``steps`` of them."""
        samples = (x[some, :] for x in (self.rows, self.columns))
        found = (self.i, self.j, self.U, self.V, self.valid)
        return Pivots(*samples, *(x[some, :steps, ...] for x in found))

    def alone(self) -> Pivots:
        """Return the pivots with U[I] and V[J] in place of U and V."""
        return replace(self, U=gather(self.U, self.i), V=gather(self.V, self.j))


def together(levels: Sequence[Blocks]) -> int:
    """Return of how many levels, from the root, `search` finds the pivots at once.

    Samples have one size, however large the blocks are. Blocks no larger than a sample
    need no search.
    """
    total = 0
    for level, blocks in enumerate(levels):
        if blocks.size <= SAMPLE:
            return level
        total += blocks.count * sampled_rows(blocks)
        if total > GROUP or sampled_rows(blocks) != sampled_rows(levels[0]):
            return level
    return len(levels)


def sampled_rows(blocks: Blocks) -> int:
    """Return the rows of a first sample."""
    near = 0 if blocks.near is None else min(blocks.near.count, PEAKS)
    return SAMPLE + near


def search(
    parts: Sequence[Blocks],
    tails: Sequence[float],
    max_rank: int | None,
    seed: int,
    sample: int = SAMPLE,
) -> list[Pivots]:
    """Find pivots of blocks of several sizes in samples of one size.

    The search of a block ends when its steps are no larger than the ``tail`` of its part.
    That may be too soon for a kernel of short range, which is zero in most rows: samples with
    close pairs, and all but first samples, go on until what is left is not much larger.
    """
    space, xp = parts[0].space, parts[0].xp
    inners, rows, columns, least = [], [], [], []
    whole = sample >= parts[0].size
    for blocks, tail in zip(parts, tails, strict=True):
        # numbers of the rows and columns, some of them twice
        i, j, _ = grid(blocks, min(sample, blocks.size))
        share = tail * i.shape[1] / blocks.size
        if blocks.near is not None and not whole:
            peaks = slice(PEAKS * sample // SAMPLE)
            pairs = blocks.near.rows[:, peaks], blocks.near.columns[:, peaks]
            i, j = (xp.concat(both, axis=1) for both in zip((i, j), pairs, strict=True))
        inners.append(blocks if whole else blocks.within(i, j))
        rows.append(i)
        columns.append(j)
        least.append(share * space.real.ones(blocks.count))
    inner = Blocks.joined(inners)
    i, j, tolerances = (xp.concat(x, axis=0) for x in (rows, columns, least))
    limit = inner.size if max_rank is None else min(inner.size, max_rank + 8)
    looks = count()

    def left(U: Array, V: Array) -> Left:
        if whole:
            found = residual(inner, U, V, SAMPLE, seed, next(looks))
            if bool(xp.any(found[0] > LEFT * tolerances)):
                return found
        # of a sample, or where all that was looked at is small: a few entries may not be
        return compare(inner, U, V)

    known = left if sample > SAMPLE or parts[0].near is not None else None
    found = Pivots(i, j, *cross(inner, i, j, tolerances, limit, seed, known))
    if len(parts) == 1:
        return [found if whole else found.alone()]
    valid, start, each = to_numpy(found.valid), 0, []
    for blocks in parts:
        some = slice(start, start + blocks.count)
        steps = np.flatnonzero(valid[some].any(axis=0)).max(initial=0) + 1
        each.append(found.group(some, int(steps)).alone())
        start = some.stop
    return each


def cross(
    blocks: Blocks,
    rows: Array,
    columns: Array,
    tolerance: Array,
    limit: int,
    seed: int,
    left: Callable[[Array, Array], Left] | None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Cross approximation with partial pivoting: blocks ≈ Uᵀ conj(V).

    It goes on until the steps of a block are no larger than its ``tolerance`` (b,). Small
    steps and rows of zeros say little where a few rows hold nearly all, as those of a narrow
    kernel do: if ``left`` is given, it tells what ``U Vᴴ``, U and V (b, m, r), leaves, and
    the search goes on in the rows that have most of that. ``rows`` and ``columns`` (b, m)
    number those of the blocks: ones of the same number are the same, and no pivot twice.

    Returns
    -------
    i, j : array (b, r)
        Pivots' rows and columns.
    U, V : array (b, r, m)
        Rows of U are 1 at their pivots.
    valid : array (b, r)
        Whether a step found a pivot; its rows are zero where not.
    """
    space, xp, b, m = blocks.space, blocks.xp, blocks.count, blocks.size
    likely = xp.abs(space.real.normal((m,), seed, m))[None, :]
    U, V = space.zeros(b, STEP, m), space.zeros(b, STEP, m)
    steps: list[tuple[Array, Array, Array]] = []
    used_rows, used_columns = (
        xp.zeros((b, m), dtype=xp.bool, device=space.device),
    ) * 2
    alive = xp.ones((b,), dtype=xp.bool, device=space.device)
    quiet, nulls = (xp.zeros((b,), dtype=xp.int64, device=space.device),) * 2
    # no pivot is as small as the rounding of an entry, nor so small that u overflows
    least = space.eps * tolerance
    row = xp.zeros((b,), dtype=xp.int64, device=space.device) + m // 2
    # small problems take as long as their calls: what all steps use is made once
    row_at, column_at = blocks.adjoint.column_by_column(), blocks.column_by_column()
    zero, real_zero, no_steps = space.zeros(1), space.real.zeros(1), quiet[:1]
    first = m * xp.arange(b, device=space.device)

    def chosen(x: Array, places: Array) -> Array:
        """Return ``x[b, p, ...]`` of x (b, m, ...) at ``places`` (b,), ``b m + p``."""
        return xp.take(xp.reshape(x, (b * m, *x.shape[2:])), places, axis=0)

    for taken in range(m):
        k = len(steps)
        if k == limit:
            break
        if taken == m // WIDE and b * m * m <= TABLE:
            # a good part of all entries has been evaluated, and more is to come
            x = evaluated(blocks)
            row_at = partial(chosen, conjugate(x))
            column_at = partial(chosen, contiguous(transpose(x)))
        if k == U.shape[1]:
            more = space.zeros(b, min(k, m - k), m)
            U, V = xp.concat([U, more], axis=1), xp.concat([V, more], axis=1)
        for turn in range(TURNS):
            # residual row, conjugated: a column of the adjoint blocks
            i = first + row
            v = row_at(i)
            most = xp.max(xp.abs(v), axis=-1)
            least = xp.maximum(least, 8 * space.eps * most)
            v = v - _combined(U, V, k, row) if k else v
            size = xp.where(used_columns, real_zero, xp.abs(v))
            column = xp.argmax(size, axis=-1)
            j = first + column
            pivot = chosen(size, j)
            u = column_at(j)
            u = u - _combined(V, U, k, column) if k else u
            # a row that is small everywhere (far from a narrow kernel's diagonal, say)
            # has no pivot to divide the column by: go where the column is large
            size = xp.where(used_rows, real_zero, xp.abs(u))
            top = xp.argmax(size, axis=-1)
            high = chosen(size, first + top)
            turned = alive & (high > xp.maximum(GROWTH * pivot, least))
            if turn + 1 == TURNS or not bool(xp.any(turned)):
                break
            row = xp.where(turned, top, row)
        good = alive & (pivot > least)
        same = rows == chosen(rows, i)[:, None]
        used_rows = used_rows | (alive[:, None] & same)
        same = columns == chosen(columns, j)[:, None]
        used_columns = used_columns | (good[:, None] & same)
        u = u / xp.where(good, conjugate(chosen(v, j)), zero + 1)[:, None]
        u = xp.where(good[:, None], u, zero)
        v = xp.where(good[:, None], v, zero)
        norm = xp.linalg.vector_norm(u, axis=-1) * xp.linalg.vector_norm(v, axis=-1)
        small = norm <= tolerance
        if not taken or bool(xp.any(good)):
            U[:, k, :], V[:, k, :] = u, v
            steps.append((row, column, good))
        quiet = xp.where(good & small, quiet + 1, no_steps)
        nulls = xp.where(good, no_steps, nulls + 1)
        alive = alive & (quiet < QUIET) & (nulls < NULLS)
        if not bool(xp.any(alive)):
            if left is None:
                break
            norms, row, likely = left(
                *(transpose(x[:, : len(steps), :]) for x in (U, V))
            )
            # more than rounding, and than what steps of this size may leave
            limits = xp.maximum(LEFT * tolerance, m * least)
            alive = (norms > limits) & ~chosen(used_rows, first + row)
            if not bool(xp.any(alive)):
                break
            quiet, nulls = (xp.zeros_like(x) for x in (quiet, nulls))
            continue
        # after a small step the next row is drawn by chance, or is one of which much was
        # left when ``left`` last looked, which costs as much as many steps
        score = xp.where(small[:, None], likely, xp.abs(u))
        row = xp.argmax(xp.where(used_rows, -1.0, score), axis=-1)
    i, j, valid = (xp.stack(parts, axis=-1) for parts in zip(*steps, strict=True))
    return i, j, U[:, : len(steps), :], V[:, : len(steps), :], valid


def evaluated(blocks: Blocks) -> Array:
    """Return all entries of blocks (b, m, m), some blocks at a time."""
    x = blocks.space.zeros(blocks.count, blocks.size, blocks.size)
    for some in chunks(blocks.space, blocks.count, blocks.size**2):
        x[some, ...] = blocks.group(some).dense()
    return x


def _combined(U: Array, V: Array, k: int, places: Array) -> Array:
    """Return ``conj(U[b, :k, places[b]]) V[b, :k]`` of U and V (b, r, m): (b, m)."""
    coefficients = transpose(gather(U[:, :k, :], places[:, None]))
    return (conjugate(coefficients) @ V[:, :k, :])[:, 0, :]


def gather(U: Array, places: Array) -> Array:
    """Return ``U[b, :, places[b, q]]`` of U (b, r, m): (b, r, q)."""
    xp = Space.of(U).xp
    return xp.take_along_axis(U, places[:, None, :], axis=-1)
