"""Dense blocks, cut by a randomized singular value decomposition.

The SVD of a whole block takes up to a hundred times as long as the products with random
vectors that find the range of a block of low rank.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    namespace,
    one_blas_thread_if_narrow,
    qr,
    squares,
    svd,
    to_numpy,
)
from hmatrix.construct.blocks import tiles
from hmatrix.lowrank import LowRank, cut_triplets, widened

__all__ = ["cut_dense", "replaced"]

#: What is cut, and the Frobenius and spectral norms lost.
Cut = tuple[LowRank, Array, Array]
Some = TypeVar("Some", bound=tuple[Any, ...])

#: Columns of a sample beyond the rank that is expected; each next one has twice as many.
MORE = 2
#: The rank that is expected where nothing is known, and the size of blocks up to which their
#: SVD is taken then.
RANK, SMALL = 6, 64
#: Part of what a block may lose that a sample may miss: small, so that the rank is that of
#: the SVD.
SLACK = 1 / 8
#: Where a cap on the ranks cuts blocks of at least LARGE rows, samples of WIDER times the
#: cap and STEP more columns have subspace iteration: until what they hold of the square of
#: the norm grows by no more than CLOSE of the square of what is lost, or for TURNS turns.
LARGE, WIDER, STEP, CLOSE, TURNS = 256, 2, 8, 1e-4, 12
_SKETCH = 5  # first word of the keys of random numbers


def cut_dense(
    blocks: Array,
    tolerance: float,
    max_rank: int | None,
    spectral: float = math.inf,
    expected: int | None = None,
) -> Cut:
    """Cut dense blocks as their singular value decomposition would.

    By products with random vectors (Halko, Martinsson & Tropp, "Finding structure with
    randomness", 2011), after which every entry is compared. Blocks whose range no narrow
    sample spans well enough have an SVD of all entries. Where a cap on the ranks is what
    cuts them, subspace iteration improves the sample instead.

    Parameters
    ----------
    blocks : array (b, m, n)
        The blocks.
    tolerance : float
        Frobenius norm that each block may lose.
    max_rank : int or None
        Cap on the rank; it wins over the norms.
    spectral : float
        Spectral norm that each block may lose.
    expected : int
        Rank that the first sample is made for. Default: a small one, and an SVD of all
        entries of blocks of up to 64 rows.

    Returns
    -------
    LowRank
        As `recompress` gives it.
    lost, largest : array (b,)
        Frobenius norm that each block does lose, and a bound of the spectral norm.
    """
    space, rows = Space.of(blocks), min(blocks.shape[1:])
    limit, most = _widths(rows, max_rank, spectral)
    slack = SLACK * min(tolerance, spectral)
    if slack < space.smallest_norm:  # squares of what is missed might underflow
        slack, limit = -1.0, limit if most < math.inf else 0
    if expected is None:
        expected, limit = RANK, limit if rows > SMALL else 0
    where, width, found = np.arange(blocks.shape[0]), expected + MORE, None
    while True:
        bad = np.zeros(len(where), dtype=bool)
        if width <= limit:
            Q, W, missed = _sampled(blocks, width)
            bad = ~(to_numpy(missed) <= slack)
            if bad.any() and width >= most:
                Q, W, missed, bad = _improved(blocks, W, missed, max_rank or 0)
            if bad.any():
                width = _next_width(width, most, limit, W, missed, slack)
            if bad.all():
                continue
            left, R = qr(W)
            small, *norms = _cut(svd(adjoint(R)), missed, tolerance, max_rank, spectral)
            # what is cut away never has as many rows as the blocks
            cut = LowRank(Q @ small.U, small.S, left @ small.V), *norms
        else:
            cut = cut_triplets(*svd(blocks), tolerance, max_rank, spectral)
        found = cut if found is None else replaced(found, cut, where)
        if not bad.any():
            return found
        where = where[bad]
        blocks = space.xp.take(blocks, space.integers(np.flatnonzero(bad)), axis=0)


def _widths(rows: int, max_rank: int | None, spectral: float) -> tuple[int, float]:
    """Return the widest sample of blocks, and the width that is improved under a cap."""
    limit, most = rows // 4, math.inf
    # not where a diagonal gets a bound of the spectral norm, which would be too large
    if max_rank is not None and rows >= LARGE and spectral == math.inf:
        most = WIDER * max_rank + STEP
    return limit, most if most <= limit else math.inf


def _next_width(
    width: int, most: float, limit: int, W: Array, missed: Array, slack: float
) -> int:
    """Return twice the width, at most ``most``; beyond the limit if no sample will do."""
    if most < math.inf:
        return min(2 * width, int(most)) if width < most else limit + 1
    xp = namespace(missed)
    holds, rest = float(xp.sum(squares(W))), float(xp.sum(missed**2))
    part = rest / (holds + rest)
    if part > 0.1:
        # if singular values are all alike, a sample holds as large a part as of the columns
        will_do = width <= limit * (1 - part)
    else:
        # if they decay exponentially, twice the width misses the square; most decay slower
        target = missed.shape[0] * slack**2 / (holds + rest)
        will_do = 2 * width * math.log(target) / math.log(part) <= limit
    return 2 * width if will_do else limit + 1


def _sampled(blocks: Array, width: int) -> tuple[Array, Array, Array]:
    """Return Q and W, blocks ≈ ``Q Wᴴ``, and the norms (b,) of what that misses."""
    space, n = Space.of(blocks), int(blocks.shape[2])
    with (
        one_blas_thread_if_narrow(space, width),
        np.errstate(over="ignore", invalid="ignore"),  # the norm missed is then NaN
    ):
        Q, _ = qr(blocks @ space.normal((n, width), _SKETCH, n, width))
        W = adjoint(blocks) @ Q
        return Q, W, _missed(blocks, Q, W)


def _improved(
    blocks: Array, W: Array, missed: Array, rank: int
) -> tuple[Array, Array, Array, np.ndarray]:
    """Return Q, W and norms as `_sampled` does, after subspace iteration.

    Also returns for which blocks (b,) it does not converge to what ``rank`` columns can
    hold: their SVD is needed.
    """
    space = Space.of(blocks)
    xp, width = space.xp, int(W.shape[-1])

    def held(R: Array) -> Array:
        return xp.sum(svd(R)[1][:, :rank] ** 2, axis=-1)

    with one_blas_thread_if_narrow(space, width):
        total = xp.sum(squares(W), axis=(-2, -1)) + missed**2
        W, R = qr(W)
        holds = held(R)
        for _ in range(TURNS):
            Q, _ = qr(blocks @ W)
            W, R = qr(adjoint(blocks) @ Q)
            before, holds = holds, held(R)
            close = holds - before <= CLOSE * (total - holds)
            if bool(xp.all(close)):
                break
        W = W @ R
        # where the difference is much smaller than both, it is rounding
        close = close & (total - holds > math.sqrt(space.eps) * total)
        close = close & (total > space.smallest_norm**2)
        return Q, W, _missed(blocks, Q, W), ~to_numpy(close)


def _missed(blocks: Array, Q: Array, W: Array) -> Array:
    """Return the norms (b,) of blocks less ``Q Wᴴ``."""
    space, right = Space.of(blocks), adjoint(W)
    xp, sums = space.xp, space.real.zeros(blocks.shape[0])
    for batch, rows in tiles(space, *blocks.shape):
        rest = Q[batch, rows, :] @ right[batch, ...]
        rest -= blocks[batch, rows, :]
        rest = xp.reshape(rest, (rest.shape[0], -1))
        sums[batch] = sums[batch] + xp.abs(xp.vecdot(rest, rest))
    return xp.sqrt(sums)


def _cut(
    triplets: tuple[Array, Array, Array],
    missed: Array,
    tolerance: float,
    max_rank: int | None,
    spectral: float,
) -> Cut:
    """Cut singular triplets, where norms ``missed`` (b,), orthogonal to them, are lost."""
    xp = namespace(missed)

    def left(total: float) -> Array:
        part = 1 - (missed / total) ** 2
        return total * xp.sqrt(xp.where(part > 0, part, 0.0))[:, None]

    frobenius = left(tolerance) if tolerance else tolerance
    spectral = left(spectral) if math.isfinite(spectral) and spectral else spectral
    block, lost, largest = cut_triplets(*triplets, frobenius, max_rank, spectral)
    return block, xp.hypot(lost, missed), xp.hypot(largest, missed)


def replaced(every: Some, part: Some, which: np.ndarray) -> Some:
    """Return blocks, and norms (b,) of each, with some of them replaced."""
    space, count = Space.of(every[1]), every[1].shape[0]
    order = np.arange(count)
    order[which] = count + np.arange(len(which))
    places = space.integers(order)

    def scatter(x: Array, y: Array) -> Array:
        return space.xp.take(space.xp.concat([x, y], axis=0), places, axis=0)

    (a, *norms), (b, *others) = every, part
    width = max(a.rank, b.rank)
    blocks = LowRank(
        *(
            scatter(widened(x, width), widened(y, width))
            for x, y in ((a.U, b.U), (a.S, b.S), (a.V, b.V))
        )
    )
    return blocks, *map(scatter, norms, others)  # type: ignore[return-value]
