"""Recursive block inversion of HODLR matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    block_diagonal_times,
    block_matrix,
    conjugate,
    contiguous,
    detach,
    floats,
    in_own_precision,
    inverse,
    plus_product,
    slogdet,
    to_numpy,
    without_gradients,
)
from hmatrix._checks import SingularBlockError, SingularLeafError, take_array
from hmatrix._operator import cleared, real_rows, unpad_rows
from hmatrix.arithmetic import Terms, estimate_norm, node_terms
from hmatrix.factor._base import PROBES, Factorization, narrow
from hmatrix.factor.leaves import shifted_leaves, without_padding
from hmatrix.factor.operator import HODLRInverse
from hmatrix.factor.orthogonal import HODLROrthogonal
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import pair

__all__ = ["HODLRFactorization"]


class HODLRFactorization(Factorization):
    """Recursive block inversion of a `HODLR` matrix; see `factorize`."""

    matrix: HODLR

    def __init__(self, H: HODLR, shift: float) -> None:
        super().__init__(H, shift)
        self._take_bases()
        xp, tree = self.space.xp, self.tree
        leaves = shifted_leaves(tree, H.leaves, self.shift)
        signs, logs = slogdet(leaves)
        real = xp.reshape(real_rows(tree, self.space), leaves.shape[:2])
        self._conditions: list[tuple[int, bool, Array]] = []
        self._inverse_leaves = self._invert(leaves, signs, tree.levels, real)
        self._sign = xp.prod(detach(signs))
        self._logdet = xp.sum(xp.astype(logs, xp.float64))
        self._Y: list[Array] = [None] * tree.levels  # D P
        self._E: list[Array] = [None] * tree.levels  # (I + C QᴴD P)⁻¹ C
        if tree.levels:
            self._climb()
        self._check_conditions()
        limit = self.space.eps**0.25
        advice = ', or method="orthogonal"'
        self._lost = self._check_precision(limit, advice, stable=False)

    def _climb(self) -> None:
        """Find the terms of all levels, from the leaves to the root."""
        H, xp, tree = self.matrix, self.space.xp, self.tree
        # P of all levels, each (padded, r): the halves' factors below each other
        pairs = (pair(B12.U, B21.U) for B12, B21 in map(H.blocks, range(tree.levels)))
        P = [xp.reshape(both, (tree.padded, -1)) for both in pairs]
        X = block_diagonal_times(self._inverse_leaves, xp.concat(P, axis=-1))
        for level in reversed(range(tree.levels)):
            width = self._widths[level]
            self._Y[level] = contiguous(X[:, X.shape[1] - width :])
            X = X[:, : X.shape[1] - width]
            B12, B21 = H.blocks(level)
            self._E[level] = self._core(level, pair(B12.S, B21.S))
            X = self._step(level, X)

    def _take_bases(self) -> None:
        """Store Q of each level, (padded, r), without the scales C."""
        H, tree = self.matrix, self.tree
        pairs = (pair(B21.V, B12.V) for B12, B21 in map(H.blocks, range(tree.levels)))
        bases = (self.space.xp.reshape(both, (tree.padded, -1)) for both in pairs)
        self._Q = [cleared(basis, tree) for basis in bases]
        self._widths = [int(q.shape[-1]) for q in self._Q]

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed."""
        return HODLRInverse(self, refined=self._lost > math.sqrt(self.space.eps))

    @narrow
    @in_own_precision
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,), in ``O(n r² K)`` if symmetric.

        Otherwise the adjoint halves are carried along at ``O(n r² K²)``. Where it differs
        from solutions, it is that of `HODLROrthogonal`.
        """
        xp = self.space.xp
        diagonal = xp.reshape(xp.linalg.diagonal(self._inverse_leaves), (-1,))
        sizes = xp.abs(detach(diagonal))
        for level, width in enumerate(self._widths):
            if not width:
                continue
            # rows of a half meet the columns of Dᴴ Q that come from the other block
            Y, Z = self._term_bases(level)
            E = self._E[level]
            off = xp.stack([E[:, :width, width:], E[:, width:, :width]], axis=1)
            part = xp.reshape(xp.sum((Y @ off) * conjugate(Z), axis=-1), (-1,))
            diagonal = diagonal - part
            sizes = sizes + xp.abs(detach(part))
        diagonal = unpad_rows(diagonal, self.tree)
        with without_gradients(xp):
            is_off = self._is_off(detach(diagonal), unpad_rows(sizes, self.tree))
        if is_off:
            return HODLROrthogonal(self.matrix, self.shift).inverse_diagonal()
        return diagonal

    def _is_off(self, diagonal: Array, sizes: Array) -> bool:
        """Tell whether the diagonal differs from solutions by more than it may.

        Solutions are refined and the terms of the diagonal are not: where inverses of
        halves are large beside that of the whole, terms cancel. The few entries whose terms
        have the largest ``sizes`` are compared.
        """
        xp, space = self.space.xp, self.space
        worst = xp.argsort(-sizes)[: min(PROBES, self.tree.n)]
        rows = xp.arange(self.tree.n, device=space.device)
        units = xp.astype(rows[:, None] == worst[None, :], space.dtype)
        x = self.solve(units)
        norms = xp.linalg.vector_norm(x, axis=0)
        off = xp.abs(xp.take(diagonal, worst) - xp.sum(units * x, axis=0))
        if bool(xp.all(off <= 2 * math.sqrt(space.eps) * norms)):
            return False
        # a larger difference may be due to the condition number, which takes products to know
        size = estimate_norm(self._multiply, self.tree, space)
        rounding = 10 * space.eps * float(xp.max(norms)) * size
        return not bool(xp.all(off <= 2 * rounding * norms))

    def _terms(self) -> tuple[Array, Iterator[Terms]]:
        """Leaves of the inverse, and what each level adds: −D P E Qᴴ D."""
        leaves = without_padding(self.tree, self._inverse_leaves)
        return leaves, map(self._level_terms, range(self.tree.levels))

    def _level_terms(self, level: int) -> Terms:
        Y, Z = self._term_bases(level)
        # Qᴴ D sees the second half of a block first
        core = self.space.xp.roll(self._E[level], self._widths[level], axis=-1)
        return node_terms(Y, -core, Z)

    def _term_bases(self, level: int) -> tuple[Array, Array]:
        """Return D P and Dᴴ Q of a level, each (2**level, 2, half, r)."""
        Y = self._halves(level, self._Y[level])
        if self.matrix.symmetric:
            return Y, Y
        return Y, self._halves(level, self._solve_adjoint(self._Q[level], level + 1))

    def _apply(self, x: Array) -> Array:
        x = block_diagonal_times(self._inverse_leaves, x)
        for level in reversed(range(self.tree.levels)):
            x = self._step(level, x, own=True)
        return x

    def _apply_adjoint(self, x: Array) -> Array:
        return self._solve_adjoint(x, 0)

    def _solve_adjoint(self, x: Array, top: int) -> Array:
        """Apply the adjoint inverses of the nodes at level ``top``."""
        xp, given = self.space.xp, x
        for level in range(top, self.tree.levels):
            if not self._widths[level] or not x.shape[1]:
                continue
            halves = self._halves(level, x)
            Y = self._halves(level, self._Y[level])
            small = xp.reshape(adjoint(Y) @ halves, (Y.shape[0], -1, x.shape[1]))
            small = adjoint(self._E[level]) @ small
            small = xp.flip(xp.reshape(small, (*Y.shape[:2], -1, x.shape[1])), axis=1)
            Q = self._halves(level, self._Q[level])
            x = _less(x, Q, small, own=x is not given)
        return block_diagonal_times(adjoint(self._inverse_leaves), x)

    def _step(self, level: int, x: Array, *, own: bool = False) -> Array:
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
        return _less(x, Y, small, own=own)

    def _core(self, level: int, scales: Array) -> Array:
        """Return ``(I + C QᴴD P)⁻¹ C`` of each node and count its determinant."""
        xp, width = self.space.xp, self._widths[level]
        nodes = self.tree.nodes(level)
        if not width:
            return self.space.zeros(nodes, 0, 0)
        Y, Q = self._halves(level, self._Y[level]), self._halves(level, self._Q[level])
        QY = adjoint(Q) @ Y  # V21ᴴ Y1 and V12ᴴ Y2
        CQY = scales[..., None] * xp.flip(QY, axis=1)
        eye = xp.broadcast_to(self.space.eye(width), (nodes, width, width))
        K = block_matrix(eye, CQY[:, 0, ...], CQY[:, 1, ...], eye)
        signs, logs = slogdet(K)
        self._sign = self._sign * xp.prod(detach(signs))
        self._logdet = self._logdet + xp.sum(xp.astype(logs, xp.float64))
        C = xp.reshape(scales, (nodes, 1, 2 * width))
        return self._invert(K, signs, level) * C

    def _invert(
        self, blocks: Array, signs: Array, level: int, real: Array | None = None
    ) -> Array:
        """Invert blocks (b, m, m) with these determinant signs.

        Leaves come with ``real`` (b, m), which tells padding from other rows. On the host
        singular blocks are found at once, on a device after the last level.
        """
        xp, singular, on_host = self.space.xp, signs == 0, self.space.on_host
        inverses, condition = blocks, 0 * xp.abs(signs)
        if not (on_host and bool(xp.any(singular))):
            inverses = inverse(blocks)
            condition = _one_norm(blocks, real) * _one_norm(inverses, real)
        condition = xp.where(singular, math.inf, condition)
        self._conditions.append((level, real is not None, condition))
        if on_host:
            self._check_conditions()
        return inverses

    def _check_conditions(self) -> None:
        """Raise if a block that was inverted is singular, and say which."""
        space = self.space
        largest = floats([space.xp.max(found) for *_, found in self._conditions])
        for (level, leaf, found), worst in zip(self._conditions, largest, strict=True):
            if worst < 1 / space.eps:  # and not NaN
                continue
            condition = to_numpy(found)
            # argmax finds NaN before infinity
            node = int(np.argmax(condition))
            where = f"leaf {node}" if leaf else f"node {node} of level {level}"
            msg = (
                f"Singular at {where}: condition number {condition[node]:.3g} in "
                f"{space.name}. Use a `shift` or fewer levels{space.or_wider(', or')}."
            )
            error = SingularLeafError if leaf else SingularBlockError
            raise error(msg, level, node)
        self._conditions.clear()

    def _arrays(self) -> dict[str, Array]:
        arrays = {"sign": self._sign, "logdet": self._logdet}
        arrays["lost"] = self.space.xp.full_like(detach(self._logdet), self._lost)
        arrays["inverse_leaves"] = self._inverse_leaves
        for name, series in (("Y", self._Y), ("E", self._E)):
            arrays |= {f"{name}.{k}": x for k, x in enumerate(series)}
        return arrays

    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        self._take_bases()
        self._lost = float(take_array(arrays, "lost", ()))
        tree, widths = self.tree, self._widths
        self._sign = take_array(arrays, "sign", ())
        leaf = tuple(self.matrix.leaves.shape)
        self._inverse_leaves = take_array(arrays, "inverse_leaves", leaf)
        self._Y = [
            take_array(arrays, f"Y.{k}", (tree.padded, width))
            for k, width in enumerate(widths)
        ]
        self._E = [
            take_array(arrays, f"E.{k}", (tree.nodes(k), 2 * width, 2 * width))
            for k, width in enumerate(widths)
        ]

    def _halves(self, level: int, x: Array) -> Array:
        """View (padded, q) as (2**level, 2, half, q)."""
        nodes, half = self.tree.nodes(level), self.tree.size(level + 1)
        return self.space.xp.reshape(x, (nodes, 2, half, int(x.shape[-1])))


def _less(x: Array, Y: Array, small: Array, *, own: bool) -> Array:
    """Return x (padded, q) less ``Y small`` of halves, (nodes, 2, half, r) and (…, r, q).

    With ``own`` the memory of x may be overwritten.
    """
    xp, (half, r), q = Space.of(x).xp, Y.shape[2:], x.shape[1]
    rows, small = xp.reshape(x, (-1, half, q)), xp.reshape(small, (-1, r, q))
    Y = xp.reshape(Y, (-1, half, r))
    return xp.reshape(plus_product(rows, Y, -small, own=own), x.shape)


def _one_norm(blocks: Array, real: Array | None) -> Array:
    """Return the 1-norms of blocks (b, m, m), of the columns that are ``real``."""
    xp = Space.of(blocks).xp
    sums = xp.sum(xp.abs(blocks), axis=-2)
    if real is not None:
        # NaN stays
        sums = xp.where(real, sums, 0 * sums)
    return xp.max(sums, axis=-1)
