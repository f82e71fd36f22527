"""Low-rank blocks, one or a batch of them, and their truncation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    conjugate,
    in_own_precision,
    is_array,
    known_gradients,
    namespace,
    one_blas_thread_if_narrow,
    positive_or_one,
    qr,
    real_part,
    svd,
    to_numpy,
    triangle,
    wants_gradient,
    without_gradients,
)
from hmatrix._checks import ShapeError, check_array, check_operand

__all__ = [
    "GRADIENTS_LOST",
    "LowRank",
    "beside",
    "core",
    "cut_triplets",
    "differentiated",
    "gradients_of_parts",
    "kept",
    "pair",
    "recompress",
    "stack",
    "widened",
]

GRADIENTS_LOST = (
    "What wants gradients is truncated, and those of what is cut off would be lost. Leave "
    "out `rtol` and `max_rank` of a sum, apply the factors of a product to vectors, solve "
    "instead of storing an inverse, or pass detached tensors."
)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Blocks ``U diag(S) Vᴴ`` (``Vᵀ`` for real numbers).

    Parameters
    ----------
    U : array (..., m, r)
        Left factors.
    S : array (..., r)
        Scales, real; unused columns have scale zero.
    V : array (..., n, r)
        Right factors.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> block = hm.LowRank(np.ones((3, 1)), np.array([2.0]), np.ones((4, 1)))
    >>> block.shape, block.rank, float(block.to_dense()[0, 0])
    ((3, 4), 1, 2.0)
    """

    U: Array
    S: Array
    V: Array

    def __post_init__(self) -> None:
        U = check_array("U", self.U)
        space = Space.of(U)
        V = check_operand("V", self.V, space)
        S = check_operand("S", self.S, space.real)
        scales = tuple(S.shape)
        if not scales == (*U.shape[:-2], U.shape[-1]) == (*V.shape[:-2], V.shape[-1]):
            msg = (
                "`U`, `S` and `V` must have shapes (..., m, r), (..., r) and "
                f"(..., n, r), got {tuple(U.shape)}, {tuple(S.shape)}, {tuple(V.shape)}."
            )
            raise ShapeError(msg)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., m, n)``."""
        return (*self.U.shape[:-1], self.V.shape[-2])

    @property
    def rank(self) -> int:
        """Stored rank r, the width of the factors."""
        return int(self.U.shape[-1])

    @property
    def ranks(self) -> np.ndarray:
        """Number of non-zero scales of each block, int64 (...)."""
        return np.asarray(np.count_nonzero(to_numpy(self.S), axis=-1))

    @property
    def largest_rank(self) -> int:
        """Largest of the blocks' ranks."""
        return int(self.ranks.max(initial=0))

    @property
    def H(self) -> LowRank:
        """The adjoint blocks (views)."""
        # not checked again: every product with a symmetric matrix makes one
        swapped = object.__new__(LowRank)
        vars(swapped).update(U=self.V, S=self.S, V=self.U)
        return swapped

    @property
    def T(self) -> LowRank:
        """The transposed blocks."""
        return LowRank(conjugate(self.V), self.S, conjugate(self.U))

    @property
    def scaled(self) -> Array:
        """Left factors times scales, ``U diag(S)``."""
        return self.U * self.S[..., None, :]

    @in_own_precision
    def to_dense(self) -> Array:
        """Return the blocks as an array (..., m, n)."""
        return self.scaled @ adjoint(self.V)

    # NumPy must leave ``array @ block`` to ``block.__rmatmul__``.
    __array_ufunc__: ClassVar[None] = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the blocks as a NumPy array, as `numpy.asarray` asks for it."""
        if copy is False:
            msg = "A dense array of low-rank blocks is always a new one."
            raise ValueError(msg)
        return np.asarray(to_numpy(self.to_dense()), dtype=dtype)

    @in_own_precision
    def __matmul__(self, x: Any) -> Any:
        """Multiply with ``x`` (n,) or (..., n, q), or with blocks: `LowRank` again.

        Products with a `HODLR` or an `MLR` matrix, from both sides, are `LowRank` too.
        """
        n = self.V.shape[-2]
        if isinstance(x, LowRank):
            self._operand(x.U, n)
            # as wide as the narrower of the two
            if self.rank <= x.rank:
                return LowRank(self.U, self.S, x.V @ (adjoint(x.scaled) @ self.V))
            return LowRank(self.scaled @ (adjoint(self.V) @ x.U), x.S, x.V)
        if not is_array(x):
            return NotImplemented  # a matrix knows what to do
        x = self._operand(x, n)
        if len(x.shape) == 1:
            return (self @ x[:, None])[..., 0]
        return self.U @ self._inner(x)

    @in_own_precision
    def __rmatmul__(self, x: Any) -> Any:
        """Multiply from the right: ``x`` (m,) or (..., q, m)."""
        if not is_array(x):
            return NotImplemented
        x = self._operand(x, self.U.shape[-2], axis=-1)
        if len(x.shape) == 1:
            return self.__rmatmul__(x[None, :])[..., 0, :]
        return (x @ self.U * self.S[..., None, :]) @ adjoint(self.V)

    def _operand(self, x: Array, size: int, axis: int = -2) -> Array:
        """Return ``x``, a vector (size,) or with so many rows or columns."""
        x = check_operand("x", x, Space.of(self.U))
        shape = tuple(x.shape)
        if not shape or shape[axis if len(shape) > 1 else 0] != size:
            expected = f"(..., {size}, q)" if axis == -2 else f"(..., q, {size})"
            msg = f"`x` must have shape ({size},) or {expected}, got {shape}."
            raise ShapeError(msg)
        return x

    def _inner(self, x: Array) -> Array:
        """Return ``diag(S) Vᴴ x``."""
        return adjoint(self.V) @ x * self.S[..., None]


def recompress(
    block: LowRank,
    tolerance: float = 0.0,
    max_rank: int | None = None,
    spectral: float = math.inf,
    *,
    sides: Callable[[], np.ndarray] | None = None,
) -> tuple[LowRank, Array, Array]:
    """Cut low-rank blocks: QR of both factors, then the SVD of the small core.

    Parameters
    ----------
    block : LowRank
        The blocks; their factors need not be orthonormal.
    tolerance, spectral : float
        Frobenius norm and spectral norm that each block may lose.
    max_rank : int, optional
        Cap on the rank; it wins over both norms.
    sides : callable, optional
        As of `differentiated`, whose gradients the result has.

    Returns
    -------
    LowRank
        Orthonormal factors, as wide as the largest rank of the batch; the columns
        that a block does not need are zero.
    lost, largest : array (...)
        What each block loses in the Frobenius and in the spectral norm.
    """
    limits = tolerance, max_rank, spectral
    if not block.rank:
        return cut_triplets(block.U, block.S, block.V, *limits)
    space = Space.of(block.U)
    with one_blas_thread_if_narrow(space, block.rank), without_gradients(space.xp):
        Qu, Ru = qr(block.U)
        Qv, Rv = qr(block.V)
        small = (Ru * block.S[..., None, :]) @ adjoint(Rv)
        # the small factors are cut, before there are large ones
        cut, lost, largest = cut_triplets(*svd(small), *limits)
        cut = LowRank(Qu @ cut.U, cut.S, Qv @ cut.V)
    return differentiated(cut, block, sides), lost, largest


def differentiated(
    cut: LowRank, block: LowRank, sides: Callable[[], np.ndarray] | None = None
) -> LowRank:
    """Give ``cut`` the gradients of the blocks B that it was cut from.

    A singular value decomposition has none where singular values are equal or zero. The
    product of the factors has: with the projections P and Q on the orthonormal columns of
    ``cut`` its differential is ``P dB + dB Q - P dB Q``, if no singular value was cut off,
    or if P or Q is the identity. ``sides`` returns the smaller side of each padded block
    without its padding, which no rank exceeds.

    Raises
    ------
    ValueError
        If singular values were cut off: a change of B that changes the rank would be lost.
    """
    inputs = [block.U, block.S, block.V]
    if not any(map(wants_gradient, inputs)):
        return cut
    xp, (U, S, V) = namespace(block.S), (cut.U, cut.S, cut.V)
    least = min(block.shape[-2:]) if sides is None else sides()
    if np.any(cut.ranks < np.minimum(block.ranks, least)):
        raise ValueError(GRADIENTS_LOST)
    with without_gradients(xp):
        over_S = xp.where(S > 0, 1 / positive_or_one(S), 0 * S)
        over_S = over_S[..., None, :]

    def of_block(left: Array, right: Array) -> list[Array]:
        """Return gradients, that of the block being ``left rightᴴ``."""
        times_V = left @ (adjoint(right) @ block.V)
        return gradients_of_parts(block, times_V, right @ (adjoint(left) @ block.U))

    # (I - P) dB V / S in U, and Bᴴ U / S in V, which holds what moves the scales too
    new_U = known_gradients(
        U, lambda g: of_block((g - U @ (adjoint(U) @ g)) * over_S, V), inputs
    )
    new_V = known_gradients(V, lambda g: of_block(U * over_S, g), inputs)
    return LowRank(new_U, S, new_V)


def gradients_of_parts(block: LowRank, times_V: Array, times_U: Array) -> list[Array]:
    """Return those to U, S and V of blocks, from the blocks' own ones ``G V``, ``Gᴴ U``."""
    S = block.S[..., None, :]
    along = namespace(times_V).sum(conjugate(block.U) * times_V, axis=-2)
    return [times_V * S, real_part(along), times_U * S]


def core(block: LowRank) -> Array:
    """Return blocks (..., s, s) that have the singular values of low-rank blocks.

    They are the product of both triangles of QR decompositions: unlike in ``UᴴU`` and
    ``VᴴV``, dependent columns do not cancel. s is r at most.
    """
    return LowRank(triangle(block.U), block.S, triangle(block.V)).to_dense()


def beside(*blocks: LowRank) -> LowRank:
    """Return the sum of blocks of one shape, their factors side by side."""
    xp = namespace(blocks[0].S)
    parts = zip(*((block.U, block.S, block.V) for block in blocks), strict=True)
    return LowRank(*(xp.concat(part, axis=-1) for part in parts))


def widened(x: Array, width: int) -> Array:
    """Return x (..., r) with zeros up to a width."""
    space = Space.of(x)
    more = space.zeros(*x.shape[:-1], width - x.shape[-1])
    return space.xp.concat([x, more], axis=-1)


def pair(first: Array, second: Array) -> Array:
    """Stack (b, ..., r) and (b, ..., s) to (b, 2, ..., max(r, s)), zeros at the end."""
    width = max(first.shape[-1], second.shape[-1])
    both = [widened(x, width) for x in (first, second)]
    return namespace(first).stack(both, axis=1)


def stack(first: LowRank, second: LowRank) -> LowRank:
    """Return two batches (b, m, n) as one (2b, m, n), taking turns."""
    xp = namespace(first.S)
    parts = ((first.U, second.U), (first.S, second.S), (first.V, second.V))
    paired = (pair(*part) for part in parts)
    return LowRank(*(xp.reshape(x, (2 * x.shape[0], *x.shape[2:])) for x in paired))


def cut_triplets(
    U: Array,
    S: Array,
    V: Array,
    tolerance: float | Array,
    max_rank: int | None,
    spectral: float = math.inf,
) -> tuple[LowRank, Array, Array]:
    """Cut singular triplets, S descending, as `kept` decides.

    Returns the blocks, and what each loses in the Frobenius and in the spectral norm.
    """
    xp = namespace(S)
    keep, lost, largest = kept(S, tolerance, max_rank, spectral)
    rank, columns = int(keep.shape[-1]), keep[..., None, :]
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank]
    cut = LowRank(
        xp.where(columns, U, 0.0),
        xp.where(keep, S, 0.0),
        xp.where(columns, V, 0.0),
    )
    return cut, lost, largest


def kept(
    S: Array, tolerance: float | Array, max_rank: int | None, spectral: float = math.inf
) -> tuple[Array, Array, Array]:
    """Decide which singular values S (..., r), descending, blocks need.

    Each block may lose ``tolerance`` in the Frobenius norm and ``spectral`` in the
    spectral one (``tolerance`` may be an array (..., 1)).

    Returns
    -------
    keep : array (..., s), bool
        Which of the first s values, s being the most that any block keeps.
    lost, largest : array (...)
        What each block loses in the Frobenius and in the spectral norm.
    """
    xp = namespace(S)
    width = int(S.shape[-1])
    if not width:
        none = xp.sum(S, axis=-1)
        return S != 0, none, none
    # tails[..., i]: norm of the singular values from i on. Summed from the small end
    # and relative to the largest, so that tiny ones neither vanish nor underflow.
    top = xp.max(S, axis=-1, keepdims=True)
    scale = positive_or_one(top)
    squares = xp.flip((S / scale) ** 2, axis=-1)
    tails = scale * xp.sqrt(xp.flip(xp.cumulative_sum(squares, axis=-1), axis=-1))
    keep = (tails > tolerance) | (spectral < S)
    if max_rank is not None:
        allowed = xp.arange(width, device=Space.of(S).device) < max_rank
        keep = keep & allowed
    lost, largest = (xp.max(xp.where(keep, 0.0, x), axis=-1) for x in (tails, S))
    rank = int(xp.max(xp.sum(xp.astype(keep, xp.int64), axis=-1)))
    return keep[..., :rank], lost, largest
