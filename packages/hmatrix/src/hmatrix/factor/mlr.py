"""Inversion of MLR matrices, from the leaves to the root."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

from hmatrix._backend import (
    Array,
    adjoint,
    block_diagonal_times,
    contiguous,
    in_own_precision,
    inverse_lower,
)
from hmatrix._checks import take_array
from hmatrix.factor._base import Factorization
from hmatrix.factor.climb import build
from hmatrix.factor.leaves import leaf_factors, shifted_leaves, without_padding
from hmatrix.factor.symmetric import (
    SymmetricFactor,
    checked_cholesky,
    factored,
    logdet_of_cholesky,
)
from hmatrix.mlr import MLR

__all__ = ["MLRFactorization"]


class MLRFactorization(Factorization):
    """Inverse of an `MLR` matrix, in the same form with the other sign."""

    matrix: MLR

    def __init__(self, H: MLR, shift: float) -> None:
        super().__init__(H, shift)
        self._inverse, self._logdet = factored(self._invert, self.space)

    def _invert(self, late: list[Array] | None) -> tuple[MLR, Array]:
        """Return the inverse and the log-determinant; ``late`` as of `factored`."""
        xp, tree, H = self.space.xp, self.tree, self.matrix
        cholesky = partial(checked_cholesky, shift=self.shift, late=late)
        L = cholesky(shifted_leaves(tree, H.leaves, self.shift), tree.levels, "leaf")
        logdet = logdet_of_cholesky(L)
        half = inverse_lower(L)
        W: list[Array] = [None] * tree.levels
        if tree.levels:
            columns = xp.concat(_columns(H), axis=-1)
            X = block_diagonal_times(half, columns)
            X = block_diagonal_times(adjoint(half), X)
            for level in reversed(range(tree.levels)):
                F = H.factors[level]
                rest = columns.shape[-1] - F.shape[-1]
                Y = xp.reshape(X[:, rest:], F.shape)
                columns, X = columns[:, :rest], X[:, :rest]
                core = self.space.eye(F.shape[-1]) + H.sign * (adjoint(F) @ Y)
                R = cholesky(core, level, "node")
                logdet = logdet + logdet_of_cholesky(R)
                W[level] = Y @ adjoint(inverse_lower(R))
                above = xp.reshape(columns, (*F.shape[:2], rest))
                update = W[level] @ (adjoint(W[level]) @ above)
                X = X - H.sign * xp.reshape(update, X.shape)
        inverse_leaves = without_padding(tree, adjoint(half) @ half)
        return MLR(tree, inverse_leaves, tuple(W), sign=-H.sign), logdet

    def inverse(self) -> MLR:
        """Return the inverse, an `MLR` matrix with the other sign."""
        return self._inverse

    @in_own_precision
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,)."""
        return self._inverse.diagonal()

    def _apply(self, x: Array) -> Array:
        return self._inverse._apply(x)

    @cached_property
    @in_own_precision
    def _factor(self) -> SymmetricFactor:
        # made when first asked for: the inverse does not need it
        again = partial(leaf_factors, self.matrix, self.shift)

        def make(late: list[Array] | None) -> SymmetricFactor:
            source = _Source(self.matrix, self.shift, late)
            return build(self.tree, source, again=again)

        return factored(make, self.space)

    def _symmetric_factor(self) -> SymmetricFactor:
        return self._factor

    def _arrays(self) -> dict[str, Array]:
        factors = {f"factors.{k}": W for k, W in enumerate(self._inverse.factors)}
        return {"logdet": self._logdet, "leaves": self._inverse.leaves, **factors}

    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        factors = tuple(
            take_array(arrays, f"factors.{k}", tuple(F.shape))
            for k, F in enumerate(self.matrix.factors)
        )
        sign = -self.matrix.sign
        self._inverse = MLR(self.tree, arrays["leaves"], factors, sign)


class _Source:
    """What the symmetric factor of a shifted matrix is made of; see `Source`."""

    def __init__(self, H: MLR, shift: float, late: list[Array] | None) -> None:
        self.matrix, self.shift, self.space = H, shift, H.space
        self.cholesky = partial(checked_cholesky, shift=shift, late=late)
        # copies, since they are overwritten; gradients go through them
        self.leaves = self.space.asarray(H.leaves, copy=True)
        self.bases = [contiguous(self.space.asarray(F, copy=True)) for F in H.factors]

    def columns(self, rows: slice) -> Array:
        parts = [part[rows, :] for part in _columns(self.matrix)]
        return self.space.xp.concat(parts, axis=-1)

    def leaf(self, which: slice) -> Array:
        tree, first = self.matrix.tree, which.start
        leaves = shifted_leaves(tree, self.matrix.leaves, self.shift, which)
        return self.cholesky(leaves, tree.levels, "leaf", first=first)

    def core(
        self, level: int, first: int, columns: Array, out: Array
    ) -> tuple[Array, Array, Array]:
        """Factor ``I ± F Fᴴ`` by ``R Rᴴ = I ± Fᴴ F`` without a QR decomposition.

        ``X = ±(I + R)⁻¹`` solves ``X + Xᴴ + X Fᴴ F Xᴴ = ±I``.
        """
        F, sign = contiguous(columns), self.matrix.sign
        out[...] = F
        eye = self.space.eye(F.shape[-1])
        small = eye + sign * (adjoint(F) @ F)
        R = self.cholesky(small, level, "node", first=first)
        X = inverse_lower(eye + R)
        return F, sign * X, -sign * (adjoint(X) @ inverse_lower(R))


def _columns(H: MLR) -> list[Array]:
    """Return the factors of all levels, each (padded, r)."""
    reshape, rows = H.space.xp.reshape, H.tree.padded
    return [reshape(F, (rows, F.shape[-1])) for F in H.factors]
