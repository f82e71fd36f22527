"""Hierarchical matrices from Toeplitz ones: one block of a level stands for all."""

from __future__ import annotations

import math

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    conjugate,
    contiguous,
    detach,
    frobenius,
    in_own_precision,
    is_real,
    namespace,
)
from hmatrix._checks import (
    ShapeError,
    check_array,
    check_finite,
    check_int,
    check_norm,
    check_operand,
    check_shape,
    check_space,
)
from hmatrix._operator import real_rows
from hmatrix.construct.budget import block_tolerance, check_tolerances, make_tree
from hmatrix.construct.probes import ROUNDING, Probes, find_range
from hmatrix.hodlr import HODLR, from_sides
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["from_toeplitz"]

#: Columns by which the sketch of a block grows.
STEP = 8
_SKETCH = 4  # first word of the keys of random numbers


@in_own_precision
def from_toeplitz(
    column: Array,
    row: Array | None = None,
    *,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
    seed: int = 0,
) -> HODLR:
    """Compress a Toeplitz matrix, constant along its diagonals.

    Parameters
    ----------
    column : array (n,)
        First column, real or complex.
    row : array (n,), optional
        First row; its first number is not used, as with ``scipy.linalg.toeplitz``.
        Default: the conjugate of ``column``.
    levels, leaf_size, tree
        The halving, as of `from_dense`; a tree must keep the order of the rows and
        have its padding at the end.
    rtol, atol, max_rank
        As of `from_matvec`, random vectors checking the promise at the end.
    seed : int
        Of the random numbers: the same seed gives the same matrix.

    Returns
    -------
    HODLR
        In the library, dtype and device of ``column``; symmetric if ``row`` is the
        conjugate of ``column``.

    Raises
    ------
    ToleranceError
        If rounding of the FFT spoils the promise.
    ShapeError, DTypeError, BackendError, NonFiniteError
        If column and row do not fit each other or are not finite, or the tree has
        another order.

    Notes
    -----
    All blocks of a level are one block, but for rows and columns that are padding. A
    randomized range finder compresses that one by products of the FFT, so that this
    takes O(r n log n) operations.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> H = hm.from_toeplitz(1 / (1.0 + np.arange(100_000)), rtol=1e-6)
    >>> max(H.ranks) < 20, H.error <= 1e-6
    (True, True)
    """
    column = detach(check_array("column", column, ndim=1))
    space = check_space(Space.of(column), NUMBERS)
    row = conjugate(column) if row is None else detach(check_operand("row", row, space))
    xp, n = space.xp, int(column.shape[0])
    check_shape("row", row, (n,), " as `column` has")
    check_finite("column", column)
    check_finite("row", row)
    tree = make_tree(n, levels, leaf_size, tree)
    if not tree.plain:
        msg = (
            f"`tree` must keep the order of the rows and pad at the end, got {tree}; use "
            "`levels` or `leaf_size`, or `from_matvec` with products by FFT."
        )
        raise ShapeError(msg)
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    seed = check_int("seed", seed, 0)
    symmetric = is_real(column[:1]) and bool(xp.all(row[1:] == conjugate(column[1:])))
    # by offsets i − j from 1 − padded to padded − 1
    padding = space.zeros(tree.padded - n)
    offsets = xp.concat([padding, xp.flip(row[1:]), column, padding])
    norm = check_norm(_norm(offsets, n), space)
    allowed = max(rtol * norm, atol, ROUNDING * space.eps * norm)

    sides = 1 if symmetric else 2
    found = [
        _toeplitz_level(offsets, tree, level, allowed / 2, max_rank, seed, sides)
        for level in range(tree.levels)
    ]
    real = xp.astype(real_rows(tree, space), space.dtype)
    both = ([level[side] for level in found] for side in range(sides))
    H = from_sides(tree, _leaves(offsets, tree, real), both)
    probes = Probes.of(
        lambda x: real[:, None] * _convolve(offsets, x), tree, space, seed
    )
    advice = "The FFT rounds more than that; raise `rtol`"
    return probes.judge(H, norm, math.inf if max_rank is not None else allowed, advice)


def _norm(offsets: Array, n: int) -> float:
    """Return the Frobenius norm of n rows: each offset counts as its diagonal is long."""
    space, middle = Space.of(offsets), offsets.shape[0] // 2
    counts = n - space.xp.abs(space.xp.arange(1 - n, n, device=space.device))
    weights = space.xp.sqrt(space.xp.astype(counts, space.real.dtype))
    diagonals = space.xp.abs(offsets[middle - n + 1 : middle + n])
    return float(frobenius(diagonals * weights))


def _leaves(offsets: Array, tree: ClusterTree, real: Array) -> Array:
    """Return the diagonal blocks, all alike but for padding."""
    xp, m = namespace(offsets), tree.leaf_size
    index = xp.arange(m, device=Space.of(offsets).device)
    index = tree.padded - 1 + index[:, None] - index[None, :]
    leaf = xp.reshape(xp.take(offsets, xp.reshape(index, (-1,))), (m, m))
    mask = xp.reshape(real, (-1, m))
    return leaf * mask[:, :, None] * mask[:, None, :]


def _toeplitz_level(
    offsets: Array,
    tree: ClusterTree,
    level: int,
    total: float,
    max_rank: int | None,
    seed: int,
    sides: int,
) -> list[LowRank]:
    """Compress the first block of a level, on each side, and repeat it for all nodes.

    The first node has padding on the top level only, where it is the only one.
    """
    xp, space, half = namespace(offsets), Space.of(offsets), tree.size(level + 1)
    middle = tree.padded - 1
    kernels = xp.stack(
        [
            offsets[middle - 2 * half + 1 : middle],
            offsets[middle + 1 : middle + 2 * half],
        ][:sides]
    )
    real = xp.astype(real_rows(tree, space), space.dtype)
    halves = xp.reshape(real, (tree.nodes(level), 2, half, 1))
    # side 0 has rows of the first half and columns of the second, side 1 the reverse
    rows, columns = halves[:, :sides, ...], xp.flip(halves, axis=1)[:, :sides, ...]

    def sample(q: int, count: int) -> Array:
        drawn = space.normal((sides, half, count), _SKETCH, level, q, seed)
        return rows[0, ...] * _convolve(kernels, columns[0, ...] * drawn)

    tolerance = block_tolerance(tree, level, total)
    width = half if max_rank is None else min(half, max_rank + STEP)
    Q = find_range(sample, width, STEP, tolerance * math.sqrt(sides))
    Q = rows[0, ...] * Q
    W = columns[0, ...] * _convolve(conjugate(xp.flip(kernels, axis=-1)), Q)
    S = space.real.ones(sides, Q.shape[-1])
    block, *_ = recompress(LowRank(Q, S, W), tolerance, max_rank)
    return [
        LowRank(
            block.U[i, ...] * rows[:, i, ...],
            contiguous(xp.broadcast_to(block.S[i, :], (tree.nodes(level), block.rank))),
            block.V[i, ...] * columns[:, i, ...],
        )
        for i in range(sides)
    ]


def _convolve(kernels: Array, x: Array) -> Array:
    """Multiply Toeplitz matrices, given by offsets (..., 2 m − 1), with x (..., m, q).

    Offsets ``i − j`` go from ``1 − m`` to ``m − 1``.
    """
    fft, m = namespace(x).fft, x.shape[-2]
    forward, backward = (
        (fft.fft, fft.ifft) if Space.of(x).is_complex else (fft.rfft, fft.irfft)
    )
    # wrapping round at 2 m reaches only rows that are not taken
    spectrum = forward(kernels, n=2 * m)[..., None] * forward(x, n=2 * m, axis=-2)
    return backward(spectrum, n=2 * m, axis=-2)[..., m - 1 : 2 * m - 1, :]
