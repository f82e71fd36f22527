"""Symmetric factorization of Hermitian positive definite HODLR matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    contiguous,
    detach,
    inverse_lower,
    known_gradients,
)
from hmatrix._operator import unpad_rows
from hmatrix.factor._base import (
    Factorization,
    cleared,
    has_gradients,
    shifted_leaves,
    take_array,
)
from hmatrix.factor.gradients import logdet_with_gradients
from hmatrix.factor.hodlr import HODLRFactorization, HODLRInverse
from hmatrix.factor.symmetric import (
    SymmetricFactor,
    checked_cholesky,
    logdet_of_cholesky,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import orthonormal

__all__ = ["HODLRCholesky", "has_cholesky"]


class HODLRCholesky(Factorization):
    """``H + shift·I = W Wᴴ`` of a Hermitian `HODLR` matrix; see `factorize`."""

    matrix: HODLR
    _refinements: ClassVar[int] = 0

    def __init__(self, H: HODLR, shift: float = 0.0) -> None:
        super().__init__(H, shift)
        _check(H)
        differentiable = has_gradients(H)
        H = H.map(detach) if differentiable else H
        # what is singular to working precision is left to other methods
        pivot = 10 * self.space.eps
        xp, tree = self.space.xp, self.tree
        eye = self.space.eye
        logs: dict[tuple[int, int], Array] = {}  # by level and first node

        def leaf(which: slice) -> Array:
            leaves = shifted_leaves(tree, H.leaves, self.shift, which)
            what, first = (tree.levels, "leaf"), which.start
            L = checked_cholesky(leaves, *what, self.shift, pivot=pivot, first=first)
            logs[tree.levels, first] = logdet_of_cholesky(L)
            return L

        def columns(rows: slice) -> Array:
            """Rows of U in the first half of each node, of V in the second."""
            parts = [rows_of_pair(block.U, block.V, rows) for block in H.upper]
            if not parts:
                return self.space.zeros(tree.padded, 0)
            return cleared(xp.concat(parts, axis=-1), tree, rows)

        def core(level: int, first: int, columns: Array) -> tuple[Array, Array, Array]:
            """Factor ``[[I, B], [Bᴴ, I]]``, ``B = Q₁ K Q₂ᴴ``."""
            half, r = tree.size(level + 1), columns.shape[-1]
            nodes = columns.shape[0] // (2 * half)
            halves = xp.reshape(contiguous(columns), (2 * nodes, half, r))
            if not r:
                none = self.space.zeros(nodes, 0, 0)
                return halves, none, none
            # Orthonormal bases keep the core as well conditioned as the node, whatever
            # the scales of U and V
            Q, R = orthonormal(halves)
            R = xp.reshape(R, (nodes, 2, *R.shape[1:]))
            S = H.upper[level].S[first : first + nodes, None, :]
            K = (R[:, 0, :, :] * xp.astype(S, R.dtype, copy=False)) @ adjoint(
                R[:, 1, :, :]
            )
            one = xp.zeros_like(K) + eye(K.shape[-1])
            top = xp.concat([one, K], axis=-1)
            bottom = xp.concat([adjoint(K), one], axis=-1)
            small = xp.concat([top, bottom], axis=-2)
            M = checked_cholesky(
                small, level, "node", self.shift, pivot=pivot, first=first
            )
            logs[level, first] = logdet_of_cholesky(M)
            return Q, M - eye(M.shape[-1]), inverse_lower(M) - eye(M.shape[-1])

        widths = [block.rank for block in H.upper]
        self._factor = SymmetricFactor.build(
            tree, self.space, widths, leaf, columns, core
        )
        # in an order of its own, whichever thread was first
        self._logdet = sum(logs[key] for key in sorted(logs))
        if differentiable:
            self._logdet = logdet_with_gradients(
                self._logdet, self._factor, self.matrix
            )

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed."""
        return HODLRInverse(self)

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,), in ``O(n r² K²)``."""
        if has_gradients(self.matrix):
            # which has gradients of its own
            return HODLRFactorization(self.matrix, self.shift).inverse_diagonal()
        return unpad_rows(self._factor.inverse_diagonal(), self.tree)

    def _apply(self, x: Array) -> Array:
        factor = self._factor  # and not `self`, which would be held in a cycle

        def solve(x: Array) -> Array:
            return factor.solve_adjoint(factor.solve(x))

        if not has_gradients(self.matrix):
            return solve(x)
        # a step of refinement: dy = A⁻¹ (dx − dA y)
        y = solve(detach(x))
        residual = cleared(x - self.matrix._apply(y) - self.shift * y, self.tree)
        step = solve(detach(residual))
        return y + known_gradients(step, lambda g: [solve(g)], [residual])

    def _symmetric_factor(self) -> SymmetricFactor:
        if has_gradients(self.matrix):
            msg = (
                "The symmetric factor W has gradients to vectors alone, not to the matrix; "
                "factorize detached tensors (‖W⁻¹x‖² is xᴴ solve(x), which has both)."
            )
            raise ValueError(msg)
        return self._factor

    def _arrays(self) -> dict[str, Array]:
        factor = self._factor
        arrays = {
            "logdet": self._logdet,
            "leaves": factor.leaves,
            "inverse_leaves": factor.inverse_leaves,
        }
        for name in ("bases", "cores", "inverse_cores"):
            arrays |= {f"{name}.{k}": x for k, x in enumerate(getattr(factor, name))}
        return arrays

    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        tree, m, levels = self.tree, self.tree.leaf_size, range(self.tree.levels)
        leaf = (tree.nodes(tree.levels), m, m)
        bases = tuple(
            take_array(
                arrays, f"bases.{k}", (tree.nodes(k + 1), tree.size(k + 1), None)
            )
            for k in levels
        )
        sizes = [2 * int(Q.shape[-1]) for Q in bases]
        cores, inverse_cores = (
            tuple(
                take_array(arrays, f"{name}.{k}", (tree.nodes(k), sizes[k], sizes[k]))
                for k in levels
            )
            for name in ("cores", "inverse_cores")
        )
        self._factor = SymmetricFactor(
            take_array(arrays, "leaves", leaf),
            take_array(arrays, "inverse_leaves", leaf),
            bases,
            cores,
            inverse_cores,
        )


def has_cholesky(H: HODLR) -> bool:
    """Tell whether the method is made for ``H``, if it is definite."""
    return H.symmetric


def _check(H: HODLR) -> None:
    if not H.symmetric:
        msg = (
            '`H` must be Hermitian for method="cholesky", and stored so (from_dense(A, '
            'symmetric=True)); use method="inversion".'
        )
        raise ValueError(msg)


def rows_of_pair(U: Array, V: Array, rows: slice) -> Array:
    """Return padded rows (rows, r) of a level's blocks, U and V (2**k, half, r).

    The rows are some whole nodes, or lie in one half of a node.
    """
    half, size = int(U.shape[1]), rows.stop - rows.start
    node, begin = divmod(rows.start, 2 * half)
    if size < 2 * half:
        side, begin = divmod(begin, half)
        return (V if side else U)[node, begin : begin + size, :]
    nodes = slice(node, node + size // (2 * half))
    pair = Space.of(U).xp.stack([U[nodes, ...], V[nodes, ...]], axis=1)
    return Space.of(U).xp.reshape(pair, (size, U.shape[-1]))
