"""Adaptive cross approximation of all off-diagonal blocks of a level at once.

Two steps. Pivots are found by cross approximation with partial pivoting (Bebendorf,
"Approximation of boundary element matrices", 2000) on a sample of each block's rows and
columns; then the pivots' rows and columns are evaluated in full, which is all products.
A check on all entries of the sample and on others by chance decides whether that was
right: blocks that fail are done again with a larger sample, in the end with all rows and
columns. Blocks no larger than a sample are cut from all of their entries.
"""

from __future__ import annotations

import numpy as np

from hmatrix._backend import (
    Array,
    adjoint,
    conjugate,
    inverse_lower,
    namespace,
    svd,
    to_numpy,
    transpose,
)
from hmatrix.construct.blocks import Blocks, chunks, pick
from hmatrix.construct.pivots import (
    GROUP,
    SAMPLE,
    Pivots,
    dense_at_ends,
    gather,
    search,
)
from hmatrix.construct.sampled import cut_dense, replace_blocks, scatter
from hmatrix.lowrank import LowRank, cut_triplets, orthonormal_parts

__all__ = ["Found", "approximate"]

Found = tuple[LowRank, Array]

#: Entries of each row and column that check a block larger than a sample.
PASSES = 2
#: Blocks of points up to this size are checked whole: a few of their pairs may be close,
#: and what ranks there are costs more than that.
WHOLE = 512
#: Entries of smaller blocks that are evaluated at once on the host.
ENTRIES = 2**18
#: Blocks up to this size are cut from all entries if cross approximation fails.
DENSE = 2048


def approximate(
    blocks: Blocks,
    tolerance: float,
    max_rank: int | None,
    seed: int,
    pivots: Pivots | None = None,
    expected: int = 2,
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
    pivots : Pivots, optional
        Of a first sample, if they have been found.
    expected : int
        Rank of blocks that the first sample of all entries is made for.

    Returns
    -------
    list of (LowRank, array (b,))
        Blocks that follow each other, some at a time: orthonormal factors with the
        singular values between them, and the Frobenius norms lost: what was cut, and what
        the check estimates.
    """
    if blocks.size <= SAMPLE:
        # all of their entries would be looked at in any case
        return [
            whole(blocks.group(some), tolerance, max_rank, expected)
            for some in chunks(blocks.space, blocks.count, blocks.size**2, ENTRIES)
        ]
    parts = enumerate(chunks(blocks.space, blocks.count, blocks.size, GROUP))
    return [
        approximated(
            blocks.group(some),
            tolerance,
            max_rank,
            seed + k,
            None if pivots is None else pivots.group(some),
        )
        for k, some in parts
    ]


def approximated(
    blocks: Blocks,
    tolerance: float,
    max_rank: int | None,
    seed: int,
    pivots: Pivots | None,
) -> Found:
    """Approximate blocks with pivots from a sample, from a larger one where that fails."""
    space = blocks.space
    sample, tail = SAMPLE, tolerance / 4
    if pivots is None:
        (pivots,) = search([blocks], [tail], max_rank, seed)
    found, lost = attempt(blocks, pivots, sample, tolerance, max_rank, seed)
    while max_rank is None and sample < blocks.size:
        bad = np.flatnonzero(~(to_numpy(lost) <= tolerance))
        if not len(bad):
            break
        # where singular values decay slowly, what follows a small step is not small
        sample, tail, seed = 4 * sample, tail / 4, seed + 1
        rest = blocks.taken(space.integers(bad))
        (pivots,) = search([rest], [tail], None, seed, sample)
        again = attempt(rest, pivots, sample, tolerance, None, seed)
        found = replace_blocks(found, again[0], bad)
        lost = scatter(lost, again[1], bad)
    bad = np.flatnonzero(~(to_numpy(lost) <= tolerance))
    if len(bad) and blocks.size <= DENSE:
        rest = blocks.taken(space.integers(bad))
        exact = whole(rest, tolerance, max_rank, found.rank)
        found = replace_blocks(found, exact[0], bad)
        lost = scatter(lost, exact[1], bad)
    return found, lost


def whole(
    blocks: Blocks, tolerance: float, max_rank: int | None, expected: int
) -> Found:
    """Approximate blocks by all of their entries."""
    xp, dense = blocks.xp, blocks.dense()
    found, lost, _ = cut_dense(dense, tolerance, max_rank, expected=expected)
    if blocks.real is not None:
        # singular vectors of rounding point to padding too
        U, V = (
            xp.where(real[:, :, None], x, xp.zeros_like(x))
            for x, real in zip((found.U, found.V), blocks.real, strict=True)
        )
        found = LowRank(U, found.S, V)
    return found, lost


def attempt(
    blocks: Blocks,
    pivots: Pivots,
    sample: int,
    tolerance: float,
    max_rank: int | None,
    seed: int,
) -> Found:
    """Approximate with pivots from a sample of each block, and estimate the error."""
    xp, m, valid = blocks.xp, blocks.size, pivots.valid
    i, j, U, V = pivots.i, pivots.j, pivots.U, pivots.V
    # the pivots D are taken out of V, so that both factors have entries of order 1
    D = xp.linalg.diagonal(gather(V, j))
    D = conjugate(xp.where(valid, D, xp.ones_like(D)))
    V = V / conjugate(D)[:, :, None]
    if m > sample:
        places = (pick(pivots.rows, i), pick(pivots.columns, j))
        U, V = extend(blocks, places, gather(U, i), gather(V, j), D, valid)
    D = xp.where(valid, D, xp.zeros_like(D))
    # rows of very different norms, which is how partial pivoting leaves them, are
    # brought to norm 1, and conditioned well enough for Cholesky QR
    (U, Tu, Ru), (V, Tv, Rv) = (orthonormal_parts(transpose(x)) for x in (U, V))
    core = (Ru * D[:, None, :]) @ adjoint(Rv)
    estimate = residual(blocks, U, Tu @ core @ adjoint(Tv), V, sample, seed)
    small, lost, _ = cut_triplets(*svd(core), tolerance * 0.8, max_rank)
    found = LowRank(U @ (Tu @ small.U), small.S, V @ (Tv @ small.V))
    return found, xp.sqrt(lost**2 + estimate**2)


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

    A block no larger than the sample, or of at most ``WHOLE`` points in a plane or in
    space, is compared whole. Of others, as many rows and
    columns as the sample has, others than it has but also dense at the corners, where a
    narrow band or a sharp peak would be; the near pairs; and ``PASSES`` times an entry of
    each row and each column, by chance: a wrong row or column shows every time. The
    largest of the estimates counts.
    """
    space, xp, m, b = blocks.space, blocks.xp, blocks.size, blocks.count
    if m <= (sample if blocks.near is None else max(sample, WHOLE)):
        return error_norm(blocks, U, core, V)
    chance = np.random.default_rng((seed, m, b))
    i, j = (
        space.integers(np.unique(dense_at_ends(m, sample, chance))) for _ in range(2)
    )
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
    for part in chunks(blocks.space, m, b * U.shape[-1]):
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
    for part in chunks(blocks.space, blocks.count, entries):
        error = left[part, ...] @ right[part, ...]
        error -= blocks.group(part).dense()
        squares.append(squared_norm(xp.reshape(error, (-1, entries))))
    return xp.sqrt(xp.concat(squares))


def squared_norm(x: Array) -> Array:
    """Return the squares of the norms of rows x (b, q), real."""
    xp = namespace(x)
    return xp.abs(xp.vecdot(x, x))
