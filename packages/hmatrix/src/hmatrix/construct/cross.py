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
    orthonormal_parts,
    svd,
    to_numpy,
    transpose,
)
from hmatrix.construct.blocks import Blocks, chunks, pick
from hmatrix.construct.pivots import GROUP, SAMPLE, Pivots, gather, search
from hmatrix.construct.residual import large, residual, strays
from hmatrix.construct.sampled import cut_dense, replaced
from hmatrix.lowrank import LowRank, cut_triplets

__all__ = ["Found", "approximate"]

Found = tuple[LowRank, Array]

#: Entries of small blocks that are evaluated at once on the host: ENTRIES for each row, so
#: that they are small beside the matrix, but at least LEAST and at most MOST.
ENTRIES, LEAST, MOST = 16, 2**17, 2**18
#: Blocks up to this size are cut from all entries if cross approximation fails.
DENSE = 2048


def approximate(
    blocks: Blocks,
    tolerance: float,
    max_rank: int | None,
    seed: int,
    pivots: Pivots | None,
    expected: int,
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
        Seed of the check.
    pivots : Pivots or None
        Of a first sample, if they have been found.
    expected : int
        Expected rank of blocks whose entries are all evaluated, as of `cut_dense`.

    Returns
    -------
    list of (LowRank, array (b,))
        The blocks in batches, in order: singular triplets, and estimates of the Frobenius
        norms lost, by the cut and by cross approximation.
    """
    if blocks.size <= SAMPLE:
        # all of their entries would be looked at in any case
        size = min(max(LEAST, ENTRIES * blocks.count * blocks.size), MOST)
        return [
            whole(blocks.group(some), tolerance, max_rank, expected)
            for some in chunks(blocks.space, blocks.count, blocks.size**2, size)
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
    found = attempt(blocks, pivots, sample, tolerance, max_rank, seed)
    while max_rank is None and sample < blocks.size:
        bad = np.flatnonzero(~(to_numpy(found[1]) <= tolerance))
        if not len(bad):
            break
        # where singular values decay slowly, what follows a small step is not small
        sample, tail, seed = 4 * sample, tail / 4, seed + 1
        if sample >= blocks.size:
            tail = tolerance / 8  # `search` looks at what is left of whole blocks
        rest = blocks.taken(space.integers(bad))
        (pivots,) = search([rest], [tail], None, seed, sample)
        again = attempt(rest, pivots, sample, tolerance, None, seed)
        found = replaced(found, again, bad)
    bad = np.flatnonzero(~(to_numpy(found[1]) <= tolerance))
    if len(bad) and blocks.size <= DENSE:
        rest = blocks.taken(space.integers(bad))
        exact = whole(rest, tolerance, max_rank, found[0].rank)
        found = replaced(found, exact, bad)
    return found


def whole(
    blocks: Blocks, tolerance: float, max_rank: int | None, expected: int
) -> Found:
    """Approximate blocks by all of their entries."""
    xp, dense = blocks.xp, blocks.dense()
    found, lost, _ = cut_dense(dense, tolerance, max_rank, expected=expected)
    if blocks.real is not None:
        # singular vectors of rounding point to padding too
        U, V = (
            xp.where(real[:, :, None], x, 0.0)
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
    D = xp.linalg.diagonal(V if m > sample else gather(V, j))
    D = conjugate(xp.where(valid, D, 1.0))
    V = V / conjugate(D)[:, :, None]
    if m > sample:
        places = (pick(pivots.rows, i), pick(pivots.columns, j))
        U, V = extend(blocks, places, U, V, D, valid)
    D = xp.where(valid, D, 0.0)
    outliers = [large(x) for x in (U, V)] if m > sample else []
    # partial pivoting leaves rows of very different norms; scaled to norm 1 they are
    # conditioned well enough for Cholesky QR. Each factor is replaced before the next is
    # made, to save memory
    U, Tu, Ru = orthonormal_parts(transpose(U))
    V, Tv, Rv = orthonormal_parts(transpose(V))
    core = (Ru * D[:, None, :]) @ adjoint(Rv)
    left = U @ (Tu @ core @ adjoint(Tv))
    estimate, *_ = residual(blocks, left, V, sample, seed)
    if outliers:
        estimate = xp.maximum(estimate, strays(blocks, left, V, *outliers))
    del left
    small, lost, _ = cut_triplets(*svd(core), tolerance * 0.8, max_rank)
    U = U @ (Tu @ small.U)  # which goes before there is another V
    V = V @ (Tv @ small.V)
    return LowRank(U, small.S, V), xp.sqrt(lost**2 + estimate**2)


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
