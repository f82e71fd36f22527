"""Adaptive cross approximation of all off-diagonal blocks of a level at once.

Two steps. Pivots are found by cross approximation with partial pivoting (Bebendorf,
"Approximation of boundary element matrices", 2000) on a sample of each block's rows and
columns; then the pivots' rows and columns are evaluated in full, which is all products.
A check on all entries of the sample and on others by chance decides whether that was
right: blocks that fail are done again with a larger sample, in the end with all rows and
columns.
"""

from __future__ import annotations

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    conjugate,
    inverse_lower,
    namespace,
    svd,
    to_numpy,
    transpose,
)
from hmatrix.construct.blocks import Blocks, pick
from hmatrix.lowrank import LowRank, compress, cut_triplets, orthonormal_parts

__all__ = ["Found", "approximate", "widened"]

Found = tuple[LowRank, Array]

#: Rows and columns of the first sample.
SAMPLE = 128
#: The part of a sample that lies next to each other at either end.
ENDS = 1 / 8
#: Rows and columns of near pairs that a sample has in addition.
PEAKS = 64
#: Entries of each row and column that check a block larger than a sample.
PASSES = 2
#: Columns by which factors grow.
STEP = 16
#: Small steps in a row, and rows without a residual in a row, that end the search.
QUIET, NULLS = 2, 3
#: Entries of a column that make its pivot too small, and turns to find a larger one.
GROWTH, TURNS = 8.0, 4
#: Rows of a group of blocks on the host: their factors stay in the cache.
GROUP = 2**15
#: Blocks up to this size are compressed by the SVD if cross approximation fails.
DENSE = 2048


def approximate(
    blocks: Blocks,
    tolerance: float,
    max_rank: int | None,
    seed: int,
) -> list[Found]:
    """Approximate blocks by low rank.

    Parameters
    ----------
    blocks : Blocks
        The blocks.
    tolerance : float
        Frobenius norm that each block may lose.
    max_rank : int or None
        Cap on the ranks.
    seed : int
        Of the check.

    Returns
    -------
    list of (LowRank, array (b,))
        Blocks that follow each other, some at a time: orthonormal factors with the
        singular values between them, and the Frobenius norms lost: what was cut, and what
        the check estimates.
    """
    parts = enumerate(blocks.parts(blocks.count, blocks.size, GROUP))
    return [
        approximated(blocks.group(some), tolerance, max_rank, seed + k)
        for k, some in parts
    ]


def approximated(
    blocks: Blocks, tolerance: float, max_rank: int | None, seed: int
) -> Found:
    """Approximate blocks with pivots from a sample, from a larger one where that fails."""
    space = blocks.space
    sample, tail = SAMPLE, tolerance / 4
    found, lost = attempt(blocks, sample, tail, tolerance, max_rank, seed)
    while max_rank is None and sample < blocks.size:
        bad = np.flatnonzero(~(to_numpy(lost) <= tolerance))
        if not len(bad):
            break
        # where singular values decay slowly, what follows a small step is not small
        sample, tail, seed = 4 * sample, tail / 4, seed + 1
        rest = blocks.taken(space.integers(bad))
        again = attempt(rest, sample, tail, tolerance, None, seed)
        found = replace_blocks(found, again[0], bad)
        lost = scatter(lost, again[1], bad)
    bad = np.flatnonzero(~(to_numpy(lost) <= tolerance))
    if len(bad) and blocks.size <= DENSE:
        dense = blocks.taken(space.integers(bad)).dense()
        exact = compress(dense, tolerance=tolerance, max_rank=max_rank)
        found = replace_blocks(found, exact[0], bad)
        lost = scatter(lost, exact[1], bad)
    return found, lost


def attempt(
    blocks: Blocks,
    sample: int,
    tail: float,
    tolerance: float,
    max_rank: int | None,
    seed: int,
) -> Found:
    """Approximate with pivots from a sample of each block, and estimate the error.

    Pivots are sought until steps are no larger than ``tail``.
    """
    space, xp, m = blocks.space, blocks.xp, blocks.size
    limit = m if max_rank is None else min(m, max_rank + 8)
    index = space.integers(dense_at_ends(m, sample))
    scale = m / index.shape[0]
    # numbers of the rows and columns of the sample, some of them twice
    rows = columns = index + xp.zeros(
        (blocks.count, 1), dtype=index.dtype, device=space.device
    )
    inner = blocks
    if m > sample:
        if blocks.near is not None:
            i, j = (x[:, :PEAKS] for x in blocks.near[:2])
            rows, columns = (xp.concat(x, axis=1) for x in ((rows, i), (columns, j)))
        inner = blocks.within(rows, columns)
    i, j, U, V, valid = cross(inner, rows, columns, tail / scale, limit, seed)
    # the pivots D are taken out of V, so that both factors have entries of order 1
    D = xp.linalg.diagonal(gather(V, j))
    D = conjugate(xp.where(valid, D, xp.ones_like(D)))
    V = V / conjugate(D)[:, :, None]
    if m > sample:
        pivots = (pick(rows, i), pick(columns, j))
        U, V = extend(blocks, pivots, gather(U, i), gather(V, j), D, valid)
    D = xp.where(valid, D, xp.zeros_like(D))
    # rows of very different norms, which is how partial pivoting leaves them, are
    # brought to norm 1, and conditioned well enough for Cholesky QR
    (U, Tu, Ru), (V, Tv, Rv) = (orthonormal_parts(transpose(x)) for x in (U, V))
    core = (Ru * D[:, None, :]) @ adjoint(Rv)
    estimate = residual(blocks, U, Tu @ core @ adjoint(Tv), V, sample, seed)
    small, lost, _ = cut_triplets(*svd(core), tolerance * 0.8, max_rank)
    found = LowRank(U @ (Tu @ small.U), small.S, V @ (Tv @ small.V))
    return found, xp.sqrt(lost**2 + estimate**2)


def dense_at_ends(
    m: int, count: int, chance: np.random.Generator | None = None
) -> np.ndarray:
    """Return up to ``count`` of m places, more of them where clusters meet.

    All at either end, which a kernel of short range may be all there is in a block of
    sorted points; then fewer and fewer. With ``chance``, others each time: one by chance
    from each stretch between neighbours.
    """
    if m <= count:
        return np.arange(m)
    edge = np.arange(int(count * ENDS))
    steps = np.arange(count - 2 * len(edge))
    if chance is not None:
        steps = np.clip(
            steps + chance.uniform(-0.5, 0.5, len(steps)), 0, len(steps) - 1
        )
    ends = (1 - np.cos(np.pi * steps / (len(steps) - 1))) / 2
    inner = np.round(ends * (m - 1)).astype(np.int64)
    return np.unique(np.concatenate([edge, inner, m - 1 - edge]))


def cross(
    blocks: Blocks,
    rows: Array,
    columns: Array,
    tolerance: float,
    limit: int,
    seed: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Cross approximation with partial pivoting: blocks ≈ Uᵀ conj(V).

    ``rows`` and ``columns`` (b, m) number those of the blocks: what has the same number
    is the same, and no pivot twice.

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
    chance = xp.abs(space.real.normal((m,), seed, m))[None, :]
    U, V = space.zeros(b, STEP, m), space.zeros(b, STEP, m)
    steps: list[tuple[Array, Array, Array]] = []
    used_rows, used_columns = (
        xp.zeros((b, m), dtype=xp.bool, device=space.device),
    ) * 2
    alive = xp.ones((b,), dtype=xp.bool, device=space.device)
    quiet, nulls = (xp.zeros((b,), dtype=xp.int64, device=space.device),) * 2
    largest = space.real.zeros(b)
    row = xp.zeros((b,), dtype=xp.int64, device=space.device) + m // 2
    other = blocks.adjoint
    for k in range(min(m, limit)):
        if k == U.shape[1]:
            more = space.zeros(b, min(k, m - k), m)
            U, V = xp.concat([U, more], axis=1), xp.concat([V, more], axis=1)
        for turn in range(TURNS):
            # residual row, conjugated: a column of the adjoint blocks
            v = other.at_columns(row[:, None])
            largest = xp.maximum(largest, xp.max(xp.abs(v[:, 0, :]), axis=-1))
            v = (v - conjugate(at(U, k, row)) @ V[:, :k, :])[:, 0, :]
            size = xp.where(used_columns, xp.zeros_like(largest)[:, None], xp.abs(v))
            column = xp.argmax(size, axis=-1)
            pivot = pick(v, column[:, None])[:, 0]
            # what rounding leaves of an entry is no pivot, nor is what would overflow u
            least = space.eps * xp.maximum(8 * largest, tolerance + 0 * largest)
            good = alive & (xp.abs(pivot) > least)
            u = blocks.at_columns(column[:, None])
            u = (u - conjugate(at(V, k, column)) @ U[:, :k, :])[:, 0, :]
            # a row that is small everywhere (far from a narrow kernel's diagonal, say)
            # has no pivot to divide the column by: go where the column is large
            size = xp.where(used_rows, xp.zeros_like(largest)[:, None], xp.abs(u))
            top = xp.argmax(size, axis=-1)
            high = pick(size, top[:, None])[:, 0]
            turned = alive & (high > GROWTH * xp.abs(pivot)) & (high > least)
            if turn + 1 == TURNS or not bool(xp.any(turned)):
                break
            row = xp.where(turned, top, row)
        used_rows = used_rows | (rows == pick(rows, row[:, None]))
        same = columns == pick(columns, column[:, None])
        used_columns = used_columns | (good[:, None] & same)
        u = u / xp.where(good, conjugate(pivot), xp.ones_like(pivot))[:, None]
        u = xp.where(good[:, None], u, xp.zeros_like(u))
        v = xp.where(good[:, None], v, xp.zeros_like(v))
        U[:, k, :], V[:, k, :] = u, v
        norm = xp.linalg.vector_norm(u, axis=-1) * xp.linalg.vector_norm(v, axis=-1)
        small = norm <= tolerance
        steps.append((row, column, good))
        quiet = xp.where(good & small, quiet + 1, xp.zeros_like(quiet))
        nulls = xp.where(good, xp.zeros_like(nulls), nulls + 1)
        alive = alive & (quiet < QUIET) & (nulls < NULLS)
        if not bool(xp.any(alive)):
            break
        # once nothing is found where it was expected, rows by chance
        score = xp.where(small[:, None], chance, xp.abs(u))
        row = xp.argmax(xp.where(used_rows, -xp.ones_like(score), score), axis=-1)
    i, j, valid = (xp.stack(parts, axis=-1) for parts in zip(*steps, strict=True))
    return i, j, U[:, : len(steps), :], V[:, : len(steps), :], valid


def at(U: Array, k: int, places: Array) -> Array:
    """Return ``U[b, :k, places[b]]`` of U (b, r, m): (b, 1, k)."""
    return transpose(gather(U[:, :k, :], places[:, None]))


def gather(U: Array, places: Array) -> Array:
    """Return ``U[b, :, places[b, q]]`` of U (b, r, m): (b, r, q)."""
    xp = Space.of(U).xp
    return xp.take_along_axis(U, places[:, None, :], axis=-1)


def extend(
    blocks: Blocks,
    pivots: tuple[Array, Array],
    U: Array,
    V: Array,
    D: Array,
    valid: Array,
) -> tuple[Array, Array]:
    """Evaluate the pivots' rows and columns in full: U, V (b, r, m) of whole blocks.

    ``B[:, J] = Uᵀ D conj(V[J])`` and ``B[I, :] = U[I]ᵀ D conj(V)``, where V[J] (b, r, r)
    and U[I] are the factors at the pivots: triangular, of unit diagonal.
    """
    xp = blocks.xp
    keep = xp.astype(valid, U.dtype)[:, :, None]
    eye = blocks.space.eye(int(valid.shape[-1]))

    def unit_lower(x: Array) -> Array:
        return xp.tril(transpose(x * keep), k=-1) + eye

    rows, columns = pivots
    lower_U, lower_V = unit_lower(U), unit_lower(V)
    D = D[:, :, None]
    U = blocks.at_columns(columns, conjugate(inverse_lower(lower_V)) * keep / D)
    V = blocks.adjoint.at_columns(
        rows, conjugate(inverse_lower(lower_U)) * keep / conjugate(D)
    )
    return U, V


def residual(
    blocks: Blocks, U: Array, core: Array, V: Array, sample: int, seed: int
) -> Array:
    """Estimate the Frobenius norms (b,) of blocks less ``U core Vᴴ``.

    A block no larger than the sample is compared whole. Of others, as many rows and
    columns as the sample has, others than it has but also dense at the corners, where a
    narrow band or a sharp peak would be; the near pairs; and ``PASSES`` times an entry of
    each row and each column, by chance: a wrong row or column shows every time. The
    largest of the estimates counts.
    """
    space, xp, m, b = blocks.space, blocks.xp, blocks.size, blocks.count
    if m <= sample:
        return error_norm(blocks, U, core, V)
    chance = np.random.default_rng((seed, m, b))
    i, j = (space.integers(dense_at_ends(m, sample, chance)) for _ in range(2))
    corners = (xp.take(x, k, axis=1) for x, k in ((U, i), (V, j)))
    largest = error_norm(blocks.within(i, j), next(corners), core, next(corners))
    if blocks.near is not None:
        i, j, used = blocks.near
        error = xp.vecdot(pick(V, j), pick(U, i) @ core) - blocks.at(i, j)
        peaks = squared_norm(error * xp.astype(used, error.dtype, copy=False))
        largest = xp.maximum(largest, xp.sqrt(peaks))
    order, rows = chance.permutation(m), np.arange(m)
    shifts = chance.integers(0, m, (PASSES, b, 1))
    squares = xp.zeros_like(largest)
    for part in blocks.parts(m, b * U.shape[-1]):
        i = xp.broadcast_to(space.integers(rows[part]), (b, part.stop - part.start))
        left = U[:, part, :] @ core
        for shift in shifts:
            j = space.integers(order[(rows[part] + shift) % m])
            error = xp.vecdot(pick(V, j), left) - blocks.at(i, j)
            squares = squares + m / PASSES * squared_norm(error)
    return xp.maximum(largest, xp.sqrt(squares))


def error_norm(blocks: Blocks, U: Array, core: Array, V: Array) -> Array:
    """Return the Frobenius norms (b,) of blocks less ``U core Vᴴ``."""
    xp, entries = blocks.xp, U.shape[1] * V.shape[1]
    left, right = U @ core, adjoint(V)
    squares = []
    for part in blocks.parts(blocks.count, entries):
        error = left[part, ...] @ right[part, ...]
        error -= blocks.group(part).dense()
        squares.append(squared_norm(xp.reshape(error, (-1, entries))))
    return xp.sqrt(xp.concat(squares))


def squared_norm(x: Array) -> Array:
    """Return the squares of the norms of rows x (b, q), real."""
    xp = namespace(x)
    return xp.abs(xp.vecdot(x, x))


def scatter(x: Array, part: Array, which: np.ndarray) -> Array:
    """Return x (b, ...) with some entries replaced."""
    space = Space.of(x)
    order = np.arange(x.shape[0])
    order[which] = x.shape[0] + np.arange(len(which))
    return space.xp.take(
        space.xp.concat([x, part], axis=0), space.integers(order), axis=0
    )


def replace_blocks(all_: LowRank, part: LowRank, which: np.ndarray) -> LowRank:
    """Return blocks with some of them replaced."""
    width = max(all_.rank, part.rank)
    pairs = zip((all_.U, all_.S, all_.V), (part.U, part.S, part.V), strict=True)
    return LowRank(
        *(scatter(widened(x, width), widened(y, width), which) for x, y in pairs)
    )


def widened(x: Array, width: int) -> Array:
    """Return x (..., r) with zeros up to a width."""
    space = Space.of(x)
    more = space.zeros(*x.shape[:-1], width - x.shape[-1])
    return space.xp.concat([x, more], axis=-1)
