"""Symmetric factorization of Hermitian positive definite HODLR matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import starmap

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    detach,
    in_own_precision,
    inverse_lower,
    is_writeable,
    multiply_into,
    namespace,
    orthonormal_parts,
)
from hmatrix._checks import PrecisionError, SingularBlockError, take_array
from hmatrix._operator import cleared, unpad_rows
from hmatrix.arithmetic import Terms, node_terms
from hmatrix.factor._base import Factorization, has_gradients, narrow
from hmatrix.factor.climb import build
from hmatrix.factor.gradients import logdet_with_gradients
from hmatrix.factor.hodlr import HODLRFactorization
from hmatrix.factor.leaves import leaf_factors, shifted_leaves, without_padding
from hmatrix.factor.operator import HODLRInverse
from hmatrix.factor.orthogonal import HODLROrthogonal
from hmatrix.factor.symmetric import (
    SymmetricFactor,
    checked_cholesky,
    factored,
    logdet_of_cholesky,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank

__all__ = ["HODLRCholesky"]


class HODLRCholesky(Factorization):
    """``H + shift·I = W Wᴴ`` of a Hermitian `HODLR` matrix; see `factorize`."""

    matrix: HODLR
    _overwritten = False

    def __init__(self, H: HODLR, shift: float, *, overwrite: bool = False) -> None:
        super().__init__(H, shift)
        if not H.symmetric:
            msg = (
                '`H` must be Hermitian for method="cholesky", and stored so (from_dense(A, '
                'symmetric=True)); use method="inversion".'
            )
            raise ValueError(msg)
        differentiable = has_gradients(H)
        if differentiable and overwrite:
            msg = "`overwrite` must be False for tensors that want gradients; detach them."
            raise ValueError(msg)
        self._overwritten = overwrite
        plain = H.map(detach) if differentiable else H
        again = None if overwrite else partial(leaf_factors, self.matrix, self.shift)

        def make(late: list[Array] | None) -> tuple[SymmetricFactor, Array]:
            source = _Source(plain, self.shift, overwrite, late)
            made = build(self.tree, source, again=again, sparing=overwrite)
            return made, source.logdet()

        made = factored(make, self.space, again=not overwrite)
        self._factor, self._logdet = made
        self._refinements = self._steps()  # solutions wait for no device
        if differentiable:
            self._logdet = logdet_with_gradients(
                self._logdet, self._factor, self.matrix
            )

    def _steps(self) -> int:
        """Return how many steps refine solutions: 1 if inverted triangles lose digits."""
        if self._overwritten:
            return 0  # there is no matrix to refine with
        xp, factor = self.space.xp, self._factor
        entries = xp.abs(detach(self.matrix.diagonal()) + self.shift)
        inverses = xp.reshape(xp.linalg.diagonal(factor.inverse_leaves), (-1,))
        pivots = [1 / (xp.abs(unpad_rows(inverses, self.tree)) ** 2 * entries)]
        for core in factor.cores:
            pivots += [xp.reshape(xp.abs(1 + xp.linalg.diagonal(core)) ** 2, (-1,))]
        smallest = float(xp.min(xp.concat(pivots)))
        return int(smallest < math.sqrt(self.space.eps))

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed.

        Its products are not refined, as those of `solve` may be: it stays definite.
        """
        return HODLRInverse(self)

    @narrow
    @in_own_precision
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,), in ``O(n r² K²)``."""
        if self._has_gradients():
            # which have gradients of their own
            try:
                return HODLRFactorization(self.matrix, self.shift).inverse_diagonal()
            except (PrecisionError, SingularBlockError):
                return HODLROrthogonal(self.matrix, self.shift).inverse_diagonal()
        return unpad_rows(self._factor.inverse_diagonal(), self.tree)

    def _terms(self) -> tuple[Array, Iterator[Terms]]:
        """Leaves of the inverse, and what each level adds: Z M Zᴴ."""
        L = self._factor.inverse_leaves
        leaves = without_padding(self.tree, adjoint(L) @ L)
        return leaves, starmap(self._level_terms, self._factor.inverse_terms())

    def _level_terms(self, Z: Array, M: Array) -> Terms:
        Z = self.space.xp.reshape(Z, (M.shape[0], 2, *Z.shape[1:]))
        return node_terms(Z, M, Z)

    def _apply(self, x: Array) -> Array:
        factor = self._factor  # and not `self`, which would be held in a cycle

        def solve(x: Array) -> Array:
            return factor.solve_adjoint(factor.solve(x))

        if not self._has_gradients():
            return solve(x)
        return self._with_gradients(x, self._multiply, solve, solve)

    def _has_gradients(self) -> bool:
        return not self._overwritten and has_gradients(self.matrix)

    def _symmetric_factor(self) -> SymmetricFactor:
        if self._has_gradients():
            msg = (
                "The symmetric factor W has gradients to vectors alone, not to the matrix; "
                "factorize detached tensors (‖W⁻¹x‖² is xᴴ solve(x), which has both)."
            )
            raise ValueError(msg)
        return self._factor

    def _arrays(self) -> dict[str, Array]:
        factor = self._factor
        arrays = {"logdet": self._logdet, "inverse_leaves": factor.inverse_leaves}
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
            take_array(arrays, "inverse_leaves", leaf),
            bases,
            cores,
            inverse_cores,
            partial(leaf_factors, self.matrix, self.shift),
        )
        self._refinements = self._steps()


class _Source:
    """What the factor of a Hermitian matrix is made of; see `Source`.

    Its memory is that of the matrix if this is to be overwritten. ``late`` is as of
    `factored`.
    """

    def __init__(
        self, H: HODLR, shift: float, overwrite: bool, late: list[Array] | None
    ) -> None:
        self.tree, self.space, self.shift, self.late = H.tree, H.space, shift, late
        # what is singular to working precision is left to other methods
        self.pivot = 10 * self.space.eps
        self.logs: dict[tuple[int, int], Array] = {}  # by level and first node
        self.given, self.upper = H.leaves, [_narrow(block) for block in H.upper]
        self.width = sum(block.rank for block in self.upper)
        self.leaves, self.bases = self.given, []
        if not overwrite or not is_writeable(self.given):
            self.leaves = self.space.empty(*self.given.shape)
        if overwrite:
            H._release()
        for level, block in enumerate(self.upper):
            nodes, half, r = block.U.shape
            pairs = self.space.empty(nodes, 2, half, r)
            if overwrite:  # each level goes before the next is copied
                U, V = pairs[:, 0, ...], pairs[:, 1, ...]
                U[...], V[...] = block.U, block.V
                self.upper[level] = LowRank(U, block.S, V)
            self.bases.append(self.space.xp.reshape(pairs, (2 * nodes, half, r)))

    def columns(self, rows: slice) -> Array:
        """Rows of U in the first half of each node, of V in the second."""
        x, done = self.space.empty(rows.stop - rows.start, self.width), 0
        for block in self.upper:
            _put_rows(x[:, done : done + block.rank], block, rows)
            done += block.rank
        return cleared(x, self.tree, rows)

    def leaf(self, which: slice) -> Array:
        blocks = shifted_leaves(self.tree, self.given, self.shift, which)
        return self.cholesky(blocks, self.tree.levels, "leaf", which.start)

    def core(
        self, level: int, first: int, columns: Array, out: Array
    ) -> tuple[Array, Array, Array]:
        """Factor ``[[I, B], [Bᴴ, I]]``, ``B = Q₁ K Q₂ᴴ``."""
        nodes, r = columns.shape[0] // 2, columns.shape[-1]
        if not r:
            none = self.space.zeros(nodes, 0, 0)
            return out, none, none
        # Orthonormal bases keep the core as well conditioned as the node, whatever the
        # scales of U and V
        Q, T, R = orthonormal_parts(columns, self.late)
        multiply_into(out, Q, T)
        R = self.space.xp.reshape(R, (nodes, 2, r, r))
        S = self.upper[level].S[first : first + nodes, None, :]
        K = (R[:, 0, :, :] * S) @ adjoint(R[:, 1, :, :])
        eye = self.space.eye(2 * r)
        small = self.space.zeros(nodes, 2 * r, 2 * r) + eye
        small[:, :r, r:] = K
        small[:, r:, :r] = adjoint(K)
        M = self.cholesky(small, level, "node", first)
        return out, M - eye, inverse_lower(M) - eye

    def cholesky(self, blocks: Array, level: int, what: str, first: int) -> Array:
        """Return the Cholesky factors of blocks, whose determinants count."""
        L = checked_cholesky(
            blocks,
            level,
            what,
            self.shift,
            pivot=self.pivot,
            first=first,
            late=self.late,
        )
        self.logs[level, first] = logdet_of_cholesky(L)
        return L

    def logdet(self) -> Array:
        """Return the log-determinant of all that was factored."""
        # in a fixed order, whichever thread was first
        return sum(self.logs[key] for key in sorted(self.logs))


def _narrow(block: LowRank) -> LowRank:
    """Return blocks whose factors have no more columns than rows."""
    half = int(block.U.shape[1])
    if block.rank <= half:
        return block
    xp, eye = Space.of(block.U).xp, Space.of(block.U).eye(half)
    S = xp.ones_like(block.S[:, :half])
    return LowRank(block.to_dense(), S, xp.broadcast_to(eye, block.shape))


def _put_rows(x: Array, block: LowRank, rows: slice) -> None:
    """Write padded rows of a level's blocks into x (rows, r).

    The rows are some whole nodes, or lie in one half of a node.
    """
    half, size = int(block.U.shape[1]), rows.stop - rows.start
    node, begin = divmod(rows.start, 2 * half)
    if size < 2 * half:
        side, begin = divmod(begin, half)
        x[...] = (block.V if side else block.U)[node, begin : begin + size, :]
    else:
        nodes = slice(node, node + size // (2 * half))
        pairs = namespace(x).reshape(x, (size // (2 * half), 2, half, block.rank))
        pairs[:, 0, ...] = block.U[nodes, ...]
        pairs[:, 1, ...] = block.V[nodes, ...]
