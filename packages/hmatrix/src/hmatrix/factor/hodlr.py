"""Recursive block inversion of HODLR matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    conjugate,
    contiguous,
    inverse,
    slogdet,
    to_numpy,
)
from hmatrix._checks import DTypeError, SingularBlockError, SingularLeafError
from hmatrix._operator import Operator, real_rows, unpad_rows
from hmatrix.arithmetic.assembly import Terms
from hmatrix.factor._base import Factorization, shifted_leaves
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, pair, stack

__all__ = ["HODLRFactorization", "HODLRInverse"]


class HODLRFactorization(Factorization):
    """Recursive block inversion of a `HODLR` matrix; see `factorize`."""

    def __init__(self, H: HODLR, shift: float = 0.0) -> None:
        super().__init__(H, shift)
        self.symmetric = H.symmetric
        xp, tree = self.space.xp, self.tree
        leaves = shifted_leaves(tree, H.leaves, self.shift)
        signs, logs = slogdet(leaves)
        self._inverse_leaves = _invert(leaves, signs, tree.levels, leaf=True)
        self._sign: float | complex = 1.0
        self._logdet = 0.0
        self._count_determinant(signs, logs)

        # P and Q of all levels, each (padded, r): the halves' factors below each other
        P: list[Array] = []
        self._Q: list[Array] = []
        scales: list[Array] = []  # C, (2**level, 2, r)
        for level in range(tree.levels):
            B12, B21 = H.blocks(level)
            shape = (tree.padded, -1)
            P.append(xp.reshape(pair(B12.U, B21.U), shape))
            self._Q.append(xp.reshape(pair(B21.V, B12.V), shape))
            scales.append(pair(B12.S, B21.S))
        self._widths = [int(p.shape[-1]) for p in P]
        self._Y: list[Array] = [None] * tree.levels  # D P
        self._E: list[Array] = [None] * tree.levels  # (I + C QᴴD P)⁻¹ C
        if not tree.levels:
            return
        X = self._solve_leaves(xp.concat(P, axis=-1))
        for level in reversed(range(tree.levels)):
            width = self._widths[level]
            self._Y[level] = contiguous(X[:, X.shape[1] - width :])
            X = X[:, : X.shape[1] - width]
            self._E[level] = self._core(level, scales[level])
            X = self._step(level, X)

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed."""
        return HODLRInverse(self)

    def slogdet(self) -> tuple[float | complex, float]:
        """Return sign and log of the absolute value of the determinant."""
        return self._sign, self._logdet

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,), in ``O(n r K)`` if symmetric.

        Otherwise the adjoint halves are carried along at ``O(n r² K²)``.
        """
        xp = self.space.xp
        diagonal = xp.reshape(xp.linalg.diagonal(self._inverse_leaves), (-1,))
        for level, width in enumerate(self._widths):
            if not width:
                continue
            # rows of a half meet the columns of Dᴴ Q that come from the other block
            Y = self._halves(level, self._Y[level])
            Z = Y
            if not self.symmetric:
                x = self._solve_adjoint(self._Q[level], level + 1)
                Z = self._halves(level, x)
            E = self._E[level]
            off = xp.stack([E[:, :width, width:], E[:, width:, :width]], axis=1)
            part = xp.sum((Y @ off) * conjugate(Z), axis=-1)
            diagonal = diagonal - xp.reshape(part, (-1,))
        return unpad_rows(diagonal, self.tree)

    def _terms(self) -> tuple[Array, Iterator[Terms]]:
        """Leaves of the inverse, and what each level adds: −D P E Qᴴ D."""
        real = self.space.xp.astype(real_rows(self.tree, self.space), self.space.dtype)
        leaves = self._inverse_leaves
        # padded rows of the inverse are identity here, zero outside
        real = self.space.xp.reshape(real, (*leaves.shape[:2], 1))
        return leaves * real, map(self._level_terms, range(self.tree.levels))

    def _level_terms(self, level: int) -> Terms:
        width = self._widths[level]
        Z = Y = self._halves(level, self._Y[level])
        if not self.symmetric:
            x = self._solve_adjoint(self._Q[level], level + 1)
            Z = self._halves(level, x)
        E, ones = self._E[level], self.space.real.ones(Y.shape[0], width)

        def term(row: int, column: int) -> LowRank:
            # Qᴴ D sees the second half of a block first
            core = E[:, width * row :, width * (1 - column) :][:, :width, :width]
            return LowRank(-Y[:, row, :, :] @ core, ones, Z[:, column, :, :])

        return term(0, 1), term(1, 0), stack(term(0, 0), term(1, 1))

    def _apply(self, x: Array) -> Array:
        x = self._solve_leaves(x)
        for level in reversed(range(self.tree.levels)):
            x = self._step(level, x)
        return x

    def _apply_adjoint(self, x: Array) -> Array:
        return self._solve_adjoint(x, 0)

    def _solve_adjoint(self, x: Array, top: int) -> Array:
        """Apply the adjoint inverses of the nodes at level ``top``."""
        xp = self.space.xp
        for level in range(top, self.tree.levels):
            if not self._widths[level]:
                continue
            halves = self._halves(level, x)
            Y = self._halves(level, self._Y[level])
            small = xp.reshape(adjoint(Y) @ halves, (Y.shape[0], -1, x.shape[1]))
            small = adjoint(self._E[level]) @ small
            small = xp.flip(xp.reshape(small, (*Y.shape[:2], -1, x.shape[1])), axis=1)
            Q = self._halves(level, self._Q[level])
            x = x - xp.reshape(Q @ small, x.shape)
        return self._leaves_times(adjoint(self._inverse_leaves), x)

    def _step(self, level: int, x: Array) -> Array:
        """Turn the children's solutions into the nodes': x − D P E Qᴴ x."""
        xp, width = self.space.xp, self._widths[level]
        if not width or not x.shape[1]:
            return x
        halves = self._halves(level, x)
        Q = self._halves(level, self._Q[level])
        small = xp.flip(adjoint(Q) @ halves, axis=1)
        small = xp.reshape(small, (small.shape[0], 2 * width, x.shape[1]))
        small = xp.reshape(self._E[level] @ small, (-1, 2, width, x.shape[1]))
        Y = self._halves(level, self._Y[level])
        return x - xp.reshape(Y @ small, x.shape)

    def _core(self, level: int, scales: Array) -> Array:
        """Return ``(I + C QᴴD P)⁻¹ C`` of each node and count its determinant."""
        xp, width = self.space.xp, self._widths[level]
        nodes = self.tree.nodes(level)
        if not width:
            return self.space.zeros(nodes, 0, 0)
        Y, Q = self._halves(level, self._Y[level]), self._halves(level, self._Q[level])
        QY = adjoint(Q) @ Y  # V21ᴴ Y1 and V12ᴴ Y2
        scales = xp.astype(scales, QY.dtype, copy=False)
        CQY = scales[..., None] * xp.flip(QY, axis=1)
        eye = xp.zeros_like(QY[:, 0, :, :]) + self.space.eye(width)
        top = xp.concat([eye, CQY[:, 0, :, :]], axis=-1)
        bottom = xp.concat([CQY[:, 1, :, :], eye], axis=-1)
        K = xp.concat([top, bottom], axis=-2)
        signs, logs = slogdet(K)
        self._count_determinant(signs, logs)
        C = xp.reshape(scales, (nodes, 1, 2 * width))
        return _invert(K, signs, level, leaf=False) * C

    def _count_determinant(self, signs: Array, logs: Array) -> None:
        xp = self.space.xp
        sign = complex(xp.prod(signs))
        # that of a Hermitian matrix is real
        self._sign *= (
            sign if self.space.is_complex and not self.symmetric else sign.real
        )
        self._logdet += float(xp.sum(xp.astype(logs, xp.float64)))

    def _halves(self, level: int, x: Array) -> Array:
        """View (padded, q) as (2**level, 2, half, q)."""
        nodes, half = self.tree.nodes(level), self.tree.size(level + 1)
        return self.space.xp.reshape(x, (nodes, 2, half, int(x.shape[-1])))

    def _solve_leaves(self, x: Array) -> Array:
        return self._leaves_times(self._inverse_leaves, x)

    def _leaves_times(self, leaves: Array, x: Array) -> Array:
        y = leaves @ self.space.xp.reshape(x, (*leaves.shape[:2], x.shape[1]))
        return self.space.xp.reshape(y, x.shape)


class HODLRInverse(Operator):
    """Inverse of a `HODLR` matrix as an operator.

    Its off-diagonal blocks have growing ranks, so it is applied from the factorization
    instead of being stored.
    """

    def __init__(
        self, factorization: HODLRFactorization, *, adjoint: bool = False
    ) -> None:
        self.tree = factorization.tree
        self._factorization = factorization
        self._adjoint = adjoint

    @property
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""
        return self._factorization.space

    @property
    def H(self) -> HODLRInverse:
        """The adjoint inverse."""
        return HODLRInverse(self._factorization, adjoint=not self._adjoint)

    @property
    def T(self) -> HODLRInverse:
        """The transposed inverse, of a real matrix; a complex one has ``H``."""
        if self.space.is_complex:
            msg = "The inverse of a complex matrix is not transposed, use its adjoint `H`."
            raise DTypeError(msg)
        return self.H

    def diagonal(self) -> Array:
        """Return the diagonal (n,)."""
        diagonal = self._factorization.inverse_diagonal()
        return conjugate(diagonal) if self._adjoint else diagonal

    def trace(self) -> float | complex:
        """Return the sum of the diagonal."""
        total = self.space.xp.sum(self.diagonal())
        return complex(total) if self.space.is_complex else float(total)

    def _apply(self, x: Array) -> Array:
        factor = self._factorization
        return (factor._apply_adjoint if self._adjoint else factor._apply)(x)

    def _apply_adjoint(self, x: Array) -> Array:
        return self.H._apply(x)

    def __repr__(self) -> str:
        return repr(self._factorization).replace("Factorization", "Inverse", 1)


def _invert(blocks: Array, signs: Array, level: int, *, leaf: bool) -> Array:
    """Invert blocks (b, m, m) with these determinant signs, or say which cannot be."""
    space = Space.of(blocks)
    xp = space.xp
    if not bool(xp.any(signs == 0)):
        inverses = inverse(blocks)
        condition = to_numpy(_one_norm(blocks) * _one_norm(inverses))
        if bool(np.all(condition < 1 / space.eps)):
            return inverses
    else:
        condition = np.where(to_numpy(signs == 0), np.inf, 0)
    # argmax finds NaN before infinity
    node = int(np.argmax(condition))
    where = f"leaf {node}" if leaf else f"node {node} of level {level}"
    msg = (
        f"Singular at {where}: condition number {condition[node]:.3g} in {space.name}. "
        "Use a `shift`, fewer levels"
        + (", or float64." if space.name == "float32" else ".")
    )
    raise (SingularLeafError if leaf else SingularBlockError)(msg, level, node)


def _one_norm(blocks: Array) -> Array:
    xp = Space.of(blocks).xp
    return xp.max(xp.sum(xp.abs(blocks), axis=-2), axis=-1)
