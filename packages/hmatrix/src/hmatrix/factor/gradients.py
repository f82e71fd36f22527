"""Gradients through stable factorizations, without those of their steps.

A QR decomposition has no gradient where ranks are deficient; solutions and
log-determinants have, of the matrix alone: ``dx = A⁻¹ (db − dA x)`` and ``d log det A =
tr(A⁻¹ dA)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmatrix._backend import (
    Array,
    adjoint,
    conjugate,
    detach,
    known_gradients,
    real_part,
)
from hmatrix._operator import real_rows
from hmatrix.arithmetic import matmul
from hmatrix.construct import from_diagonal
from hmatrix.factor.symmetric import SymmetricFactor
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import gradients_of_parts

__all__ = [
    "diagonal_with_gradients_of",
    "logdet_with_gradients",
    "logdet_with_gradients_of",
]


def logdet_with_gradients(value: Array, factor: SymmetricFactor, H: HODLR) -> Any:
    """Return ``value``, the log-determinant of ``W Wᴴ = H + shift·I``, differentiable."""
    return _of_number(value, H, lambda fixed: _logdet_gradients(factor, fixed))


def logdet_with_gradients_of(
    value: Array, inverse: Callable[[], HODLR], H: HODLR
) -> Any:
    """Return ``value``, the log-determinant of any ``H + shift·I``, differentiable.

    By its inverse as a stored matrix, which is made when it is asked for.
    """
    return _of_number(value, H, lambda fixed: _trace_gradients(inverse(), fixed))


def _of_number(
    value: Array, H: HODLR, derivatives: Callable[[HODLR], list[Array]]
) -> Any:
    """Return a number, differentiable by what ``derivatives`` of the detached matrix are."""
    fixed = H.map(detach)

    def gradients(upstream: Array) -> list[Array]:
        xp = fixed.space.xp
        return [xp.astype(upstream, x.dtype) * x for x in derivatives(fixed)]

    return known_gradients(value, gradients, list(H._arrays().values()))


def diagonal_with_gradients_of(
    value: Array, inverse: Callable[[], HODLR], H: HODLR
) -> Any:
    """Return ``value``, the diagonal of the inverse ``X``, differentiable alike.

    ``dX = −X dA X``, so that what weights ``g`` make of it is ``−tr(X diag(g) X dA)``.
    """
    fixed = H.map(detach)

    def gradients(upstream: Array) -> list[Array]:
        # those of a Hermitian matrix are real
        weights = real_part(upstream) if fixed.symmetric else conjugate(upstream)
        weights = fixed.space.asarray(weights)
        X = inverse()
        XGX = matmul(X, matmul(from_diagonal(-weights, tree=fixed.tree), X))
        return _trace_gradients(XGX, fixed)

    return known_gradients(value, gradients, list(H._arrays().values()))


def _trace_gradients(X: HODLR, H: HODLR) -> list[Array]:
    """Return the gradients of ``tr(X A)`` to the arrays of H, X Hermitian if H is."""
    found = [adjoint(X.leaves)]  # in the order of H._arrays()
    both = 2 if H.symmetric else 1
    for which, side in enumerate(H._sides.values()):
        for level, block in enumerate(side):
            # a block meets the one across the diagonal
            G = X.blocks(level)[1 - which].H
            times_V, times_U = G @ block.V, G.H @ block.U
            found += gradients_of_parts(block, both * times_V, both * times_U)
    return found


def _logdet_gradients(factor: SymmetricFactor, H: HODLR) -> list[Array]:
    """Return the gradients of ``log det A`` to the arrays of H: ``A⁻¹`` in its blocks."""
    tree, space = H.tree, H.space
    xp = space.xp
    rows = xp.reshape(real_rows(tree, space), H.leaves.shape[:2])
    leaves = adjoint(factor.inverse_leaves) @ factor.inverse_leaves
    left, right = space.zeros(tree.padded, 0), space.zeros(tree.padded, 0)
    found = []
    # the inverse is that of the leaves and Z M Zᴴ of all levels
    for (Z, M), block in zip(factor.inverse_terms(), H.upper, strict=True):
        nodes, half, r = Z.shape[0] // 2, Z.shape[1], Z.shape[2]
        halves = xp.reshape(Z, (nodes, 2, half, r))
        shape = (nodes, 2, half, left.shape[1])
        across = xp.reshape(left, shape)[:, 0, ...], xp.reshape(right, shape)[:, 1, ...]
        A1 = xp.concat([across[0], halves[:, 0, ...] @ M[:, :r, r:]], axis=-1)
        A2 = xp.concat([across[1], halves[:, 1, ...]], axis=-1)
        # both blocks of the matrix are this one: twice A⁻¹₁₂ = A1 A2ᴴ
        times_V, times_U = A1 @ (adjoint(A2) @ block.V), A2 @ (adjoint(A1) @ block.U)
        found += gradients_of_parts(block, 2 * times_V, 2 * times_U)
        own = xp.stack([M[:, :r, :r], M[:, r:, r:]], axis=1)
        ZM = xp.reshape(halves @ own, (tree.padded, r))
        left = xp.concat([left, ZM], axis=-1)
        right = xp.concat([right, xp.reshape(Z, (tree.padded, r))], axis=-1)
        part = (xp.reshape(x, (*leaves.shape[:2], r)) for x in (ZM, Z))
        leaves = leaves + next(part) @ adjoint(next(part))
    both = rows[:, :, None] & rows[:, None, :]
    return [xp.where(both, leaves, 0.0), *found]
