"""Factors W of Hermitian positive definite matrices ``W Wᴴ``, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    block_diagonal_times,
    cholesky,
    conjugate,
    detach,
    inverse_lower,
    namespace,
    plus_product,
    squares,
    to_numpy,
    try_cholesky,
)
from hmatrix._checks import NonFiniteError, NotPositiveDefiniteError

__all__ = [
    "SymmetricFactor",
    "apply_term",
    "checked_cholesky",
    "factored",
    "inner",
    "logdet_of_cholesky",
]

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class SymmetricFactor:
    """``W = blkdiag(L) · T_{K−1} ⋯ T_0`` with ``T_k = I + Q_k X_k Q_kᴴ``.

    Parameters
    ----------
    inverse_leaves : array (2**K, m, m)
        ``L⁻¹``, lower triangular.
    bases : tuple of array (2**k or 2**(k+1), rows, r)
        ``Q_k``: one block for each node of level k, or one for each half of it.
    cores, inverse_cores : tuple of array (2**k, s, s)
        ``X_k``, and ``Y_k`` of ``T_k⁻¹ = I + Q_k Y_k Q_kᴴ``.
    again : callable, optional
        Makes ``L`` once more. Without it the inverse is inverted, which loses digits.
    """

    inverse_leaves: Array
    bases: tuple[Array, ...]
    cores: tuple[Array, ...]
    inverse_cores: tuple[Array, ...]
    again: Callable[[], Array] | None = None

    @cached_property
    def leaves(self) -> Array:
        """``L``, lower triangular, which only `apply` needs."""
        return (
            inverse_lower(self.inverse_leaves) if self.again is None else self.again()
        )

    def apply(self, x: Array) -> Array:
        """Return ``W x`` of a padded block."""
        given = x
        for Q, X in zip(self.bases, self.cores, strict=True):
            x = apply_term(Q, X, x, own=x is not given)
        return block_diagonal_times(self.leaves, x)

    def solve(self, x: Array) -> Array:
        """Return ``W⁻¹ x``."""
        x = block_diagonal_times(self.inverse_leaves, x)
        for Q, Y in zip(self.bases[::-1], self.inverse_cores[::-1], strict=True):
            x = apply_term(Q, Y, x, own=True)
        return x

    def solve_adjoint(self, x: Array) -> Array:
        """Return ``W⁻ᴴ x``."""
        given = x
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            x = apply_term(Q, adjoint(Y), x, own=x is not given)
        return block_diagonal_times(adjoint(self.inverse_leaves), x)

    def inverse_terms(self) -> Iterator[tuple[Array, Array]]:
        """Return Z and M of each level: the inverse is that of the leaves and Z M Zᴴ.

        Of bases of halves: Z (2**(k+1), rows, r), M (2**k, 2r, 2r).
        """
        space = Space.of(self.inverse_leaves)
        xp = space.xp
        x = space.zeros(math.prod(self.inverse_leaves.shape[:2]), 0)
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            x = apply_term(Q, adjoint(Y), x)
            x = xp.concat([x, xp.reshape(Q, (x.shape[0], Q.shape[-1]))], axis=-1)
        # x is now W⁻ᴴ Q of the nodes' children, for all levels
        x = block_diagonal_times(adjoint(self.inverse_leaves), x)
        done = 0
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            r = Q.shape[-1]
            Z = xp.reshape(x[:, done : done + r], Q.shape)
            done += r
            # the node's inverse is the children's plus Z M Zᴴ, M = (I + Y)ᴴ (I + Y) − I
            yield Z, adjoint(Y) @ Y + Y + adjoint(Y)

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of ``(W Wᴴ)⁻¹`` (padded,), of bases of halves."""
        space = Space.of(self.inverse_leaves)
        xp = space.xp
        diagonal = xp.sum(squares(self.inverse_leaves), axis=-2)
        diagonal = xp.astype(xp.reshape(diagonal, (-1,)), space.dtype, copy=False)
        for Z, M in self.inverse_terms():
            r = Z.shape[-1]
            if not r:
                continue
            own = xp.stack([M[:, :r, :r], M[:, r:, r:]], axis=1)
            part = xp.sum((Z @ xp.reshape(own, (-1, r, r))) * conjugate(Z), axis=-1)
            diagonal = diagonal + xp.reshape(part, (-1,))
        return diagonal


def apply_term(Q: Array, X: Array, x: Array, *, own: bool = False) -> Array:
    """Return ``x + Q X Qᴴ x`` of each node, x (rows, q), which may be the caller's own."""
    if not Q.shape[-1] or not x.shape[1]:
        return x
    xp = namespace(x)
    y = xp.reshape(x, (*Q.shape[:2], x.shape[1]))
    return xp.reshape(plus_product(y, Q, inner(Q, X, y), own=own), x.shape)


def inner(Q: Array, X: Array, y: Array) -> Array:
    """Return ``X Qᴴ y`` of nodes, as rows for their blocks (blocks, r, q)."""
    xp, (r, q) = namespace(y), (Q.shape[-1], y.shape[-1])
    small = X @ xp.reshape(adjoint(Q) @ y, (-1, X.shape[1], q))
    return xp.reshape(small, (-1, r, q))


def logdet_of_cholesky(L: Array) -> Array:
    """Sum of the log-determinants of ``L Lᴴ``, L (..., m, m), as float64 ()."""
    xp = namespace(L)
    # the diagonal is real, whatever the dtype
    logs = xp.log(xp.abs(xp.linalg.diagonal(L)))
    return 2 * xp.sum(xp.astype(logs, xp.float64))


def _smallest_pivot(L: Array, blocks: Array) -> Array:
    """Smallest square of L's diagonal relative to the diagonal of the blocks: ()."""
    xp = namespace(L)
    if not L.shape[-1]:
        return Space.of(L).real.ones()
    pivots, entries = (xp.abs(xp.linalg.diagonal(detach(x))) for x in (L, blocks))
    return xp.min(pivots**2 / entries)


def factored(
    make: Callable[[list[Array] | None], Made], space: Space, *, again: bool = True
) -> Made:
    """Return ``make(late)``; on a device the checks of all its steps are made together.

    ``make`` appends to the list ``late`` whether each step succeeded, as arrays (), so that
    the host waits for a device once, at the end. If a step failed, or if ``make``
    overwrites its input and so cannot be called ``again``, it is called with None instead:
    then it checks each step at once, and raises or goes on in another way.
    """
    late: list[Array] = []
    if again and not space.on_host:
        made = make(late)
        if not late or bool(space.xp.all(space.xp.stack(late))):
            return made
        del made
    return make(None)


def checked_cholesky(
    blocks: Array,
    level: int,
    what: str,
    shift: float,
    *,
    pivot: float = 0.0,
    first: int = 0,
    late: list[Array] | None = None,
) -> Array:
    """Return the Cholesky factors of the blocks (b, m, m) of a level.

    ``first`` is the number of the first block in its level, for messages. With ``late``
    nothing is raised; see `factored`.

    Raises
    ------
    NonFiniteError
        If a block has NaN or infinite values.
    NotPositiveDefiniteError
        If a block has no factor, or one with a pivot of no more than ``pivot`` times the
        diagonal entry. Of several, the block is named whose smallest eigenvalue is lowest
        relative to its entries.
    """
    if late is not None:
        L, exist = try_cholesky(blocks)
        late.append(exist & (_smallest_pivot(L, blocks) > pivot))
        return L
    L = cholesky(blocks)
    # NaN is found here: LAPACK may let it pass
    if L is None or not float(_smallest_pivot(L, blocks)) > pivot:
        double = to_numpy(blocks)
        double = double.astype(np.result_type(double.dtype, np.float64))
        finite = np.isfinite(double).all(axis=(1, 2))
        if not finite.all():
            node = first + int(np.argmin(finite))
            msg = f"NaN or infinite values at level {level}, {what} {node}."
            raise NonFiniteError(msg)
        smallest = np.linalg.eigvalsh(double)[:, 0]
        scales = abs(double).max(axis=(1, 2))
        node = int(np.argmin(smallest / np.where(scales > 0, scales, 1)))
        msg = (
            f"Not positive definite at level {level}, {what} {first + node}: smallest eigenvalue "
            f"{smallest[node]:.3g} with `shift` = {shift:.3g}; use a larger shift."
        )
        raise NotPositiveDefiniteError(msg, level, first + node)
    return L
