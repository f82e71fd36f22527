"""Inversion of MLR matrices, from the leaves to the root."""

from __future__ import annotations

import numpy as np

from hmatrix._backend import Array, Space, cholesky, inverse_lower, to_numpy, transpose
from hmatrix._checks import NotPositiveDefiniteError
from hmatrix._operator import real_rows
from hmatrix.factor._base import Factorization, shifted_leaves
from hmatrix.mlr import MLR

__all__ = ["MLRFactorization"]


class MLRFactorization(Factorization):
    """Inverse of an `MLR` matrix, in the same form with the other sign."""

    def __init__(self, H: MLR, shift: float = 0.0) -> None:
        super().__init__(H, shift)
        xp, tree = self.space.xp, self.tree
        leaves = shifted_leaves(tree, H.leaves, self.shift)
        L = _cholesky(leaves, tree.levels, "leaf", self.shift)
        self._logdet = _logdet(L)
        half = inverse_lower(L)
        W: list[Array] = [None] * tree.levels
        if tree.levels:
            columns = xp.concat(
                [xp.reshape(F, (tree.padded, F.shape[-1])) for F in H.factors], axis=-1
            )
            X = xp.reshape(columns, (*leaves.shape[:2], columns.shape[-1]))
            X = xp.reshape(transpose(half) @ (half @ X), columns.shape)
            for level in reversed(range(tree.levels)):
                F = H.factors[level]
                rest = columns.shape[-1] - F.shape[-1]
                Y = xp.reshape(X[:, rest:], F.shape)
                columns, X = columns[:, :rest], X[:, :rest]
                core = self.space.eye(F.shape[-1]) + H.sign * (transpose(F) @ Y)
                R = _cholesky(core, level, "node", self.shift)
                self._logdet += _logdet(R)
                W[level] = Y @ transpose(inverse_lower(R))
                above = xp.reshape(columns, (*F.shape[:2], rest))
                update = W[level] @ (transpose(W[level]) @ above)
                X = X - H.sign * xp.reshape(update, X.shape)
        inverse_leaves = transpose(half) @ half
        # padded rows of the inverse are identity here, zero outside
        real = xp.astype(real_rows(tree, self.space), self.space.dtype)
        real = xp.reshape(real, leaves.shape[:2])
        self._inverse = MLR(
            tree, inverse_leaves * real[:, :, None], tuple(W), sign=-H.sign
        )

    def inverse(self) -> MLR:
        """Return the inverse, an `MLR` matrix with the other sign."""
        return self._inverse

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,)."""
        return self._inverse.diagonal()

    def slogdet(self) -> tuple[float, float]:
        """Return sign (1) and log of the determinant."""
        return 1.0, self._logdet

    def _apply(self, x: Array) -> Array:
        return self._inverse._apply(x)


def _logdet(L: Array) -> float:
    """Sum of the log-determinants of ``L Lᵀ``, L (..., m, m)."""
    xp = Space.of(L).xp
    logs = xp.astype(xp.log(xp.linalg.diagonal(L)), xp.float64)
    return 2 * float(xp.sum(logs))


def _cholesky(blocks: Array, level: int, what: str, shift: float) -> Array:
    L = cholesky(blocks)
    if L is None:
        smallest = np.linalg.eigvalsh(to_numpy(blocks).astype(np.float64))[:, 0]
        node = int(np.argmin(smallest))
        msg = (
            f"Not positive definite at level {level}, {what} {node}: smallest eigenvalue "
            f"{smallest[node]:.3g} with `shift` = {shift:.3g}; use a larger shift."
        )
        raise NotPositiveDefiniteError(msg, level, node)
    return L
