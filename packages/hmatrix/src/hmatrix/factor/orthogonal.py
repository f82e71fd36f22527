"""Backward stable factorization of any HODLR matrix, by orthogonal elimination."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    block_matrix,
    complete_qr,
    contiguous,
    detach,
    in_own_precision,
    inverse_lower,
    positive_or_one,
    slogdet,
    solve,
)
from hmatrix._checks import SingularBlockError, take_array
from hmatrix._operator import cleared, unpad_rows
from hmatrix.factor._base import Factorization, has_gradients, narrow
from hmatrix.factor.gradients import (
    diagonal_with_gradients_of,
    logdet_with_gradients_of,
)
from hmatrix.factor.leaves import shifted_leaves
from hmatrix.factor.operator import HODLRInverse, stored_inverse
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, pair

__all__ = ["HOPELESS", "HODLROrthogonal"]

#: Error of the inverse that only a matrix singular to working precision leaves.
HOPELESS = 0.1


@dataclass(frozen=True, eq=False)
class _Step:
    """Elimination of what only concerns one node, in all nodes (b,) of a level.

    A node with equations ``D x + U g = f``, g what reaches it from outside, and with
    ``Vᴴ x`` what it sends there, becomes one of ``k`` unknowns ``z``::

        Qᴴ D P = [[L, 0], [M, D']],   Qᴴ U = [[0], [U']],   x = P [[y], [z]]

    Parameters
    ----------
    Q, P : array (b, m, m)
        Unitary; (b, 0, 0) where nothing is eliminated.
    L, LH : array (b, m − k, m − k)
        The inverses of L and of its adjoint, which differ by what rounding does: of one
        inverse only the product from the right, or that from the left, is the identity
        to as many digits as there can be.
    M : array (b, k, m − k)
        What remains of D below L.
    V : array (b, m − k, c)
        ``V`` of y, of all levels above.
    G : array (b, k, r)
        Part of ``U'`` that belongs to the sibling.
    """

    Q: Array
    P: Array
    L: Array
    LH: Array
    M: Array
    V: Array
    G: Array

    def eliminate(self, f: Array, w: Array) -> tuple[Array, Array, Array]:
        """Return y, what is left of right-hand sides, and ``Vᴴ x`` with that of y."""
        if self.L.shape[-1]:
            f = adjoint(self.Q) @ f
        e = self.L.shape[-1]
        y = self.L @ f[:, :e, :]
        return y, f[:, e:, :] - self.M @ y, w + adjoint(self.V) @ y

    def up(self, f: Array, w: Array) -> tuple[Array, Array, Array]:
        """Return y, the parents' right-hand sides, and what they get to send."""
        xp, r = Space.of(f).xp, self.G.shape[-1]
        y, f, w = self.eliminate(f, w)
        c = w.shape[1] - r
        f = f - self.G @ _siblings(w[:, c:, :])
        w = xp.reshape(w[:, :c, :], (w.shape[0] // 2, 2, c, w.shape[2]))
        return y, _merged(f), w[:, 0, ...] + w[:, 1, ...]

    def up_own(self, f: Array, w: Array) -> tuple[Array, Array, Array]:
        """Do `up` for columns that begin in one node each, those of halves in turn."""
        xp, r = Space.of(f).xp, self.G.shape[-1]
        y, f, w = self.eliminate(f, w)
        c = w.shape[1] - r
        across = -(_siblings(self.G) @ w[:, c:, :])
        f = block_matrix(f[::2, ...], across[1::2, ...], across[::2, ...], f[1::2, ...])
        return y, f, xp.concat([w[::2, :c, :], w[1::2, :c, :]], axis=-1)

    def down_own(self, y: Array, x: Array) -> Array:
        """Return what is in the columns' own halves."""
        xp, (b, k, q) = Space.of(x).xp, x.shape
        x = xp.reshape(x, (b, 2, k // 2, 2, q // 2))
        x = xp.stack([x[:, 0, :, 0, :], x[:, 1, :, 1, :]], axis=1)
        x = xp.concat([y, xp.reshape(x, (2 * b, k // 2, q // 2))], axis=1)
        return self.P @ x if y.shape[1] else x

    def down(self, y: Array, x: Array) -> Array:
        """Return the nodes' solutions from y and the parents' solutions."""
        xp = Space.of(x).xp
        x = xp.concat([y, _parted(x)], axis=1)
        return self.P @ x if y.shape[1] else x

    def up_adjoint(self, x: Array) -> tuple[Array, Array]:
        """Adjoint of `down`."""
        e = self.L.shape[-1]
        if e:
            x = adjoint(self.P) @ x
        return x[:, :e, :], _merged(x[:, e:, :])

    def down_adjoint(self, y: Array, f: Array, w: Array) -> tuple[Array, Array]:
        """Adjoint of `up`."""
        xp = Space.of(f).xp
        f = _parted(f)
        w = xp.concat(
            [xp.repeat(w, 2, axis=0), -_siblings(adjoint(self.G) @ f)], axis=1
        )
        if not y.shape[1]:
            return f, w
        y = self.LH @ (y + self.V @ w - adjoint(self.M) @ f)
        return self.Q @ xp.concat([y, f], axis=1), w


class HODLROrthogonal(Factorization):
    """Orthogonal elimination of a `HODLR` matrix; see `factorize`."""

    matrix: HODLR
    _plain: HODLROrthogonal | None = None  # of the detached matrix, for gradients

    def __init__(self, H: HODLR, shift: float) -> None:
        super().__init__(H, shift)
        if has_gradients(H):
            self._differentiate(HODLROrthogonal(H.map(detach), shift))
            return
        xp, tree = self.space.xp, self.tree
        U, V, widths = self._columns()
        # scaled to about 1, the diagonal of padding
        parts = (x for x in (H.leaves, U) if x.shape[-1])
        largest = max(abs(self.shift), *(float(xp.max(xp.abs(x))) for x in parts))
        self._scale = 2.0 ** (math.frexp(largest)[1] - 1) if largest else 1.0
        D = shifted_leaves(tree, H.leaves / self._scale, self.shift / self._scale)
        U, V = (
            xp.reshape(x, (*D.shape[:2], x.shape[-1])) for x in (U / self._scale, V)
        )
        self._sign = self.space.ones()
        self._logdet = xp.full(
            (),
            tree.n * math.log(self._scale),
            dtype=xp.float64,
            device=self.space.device,
        )
        self._steps: list[_Step] = []
        for level in reversed(range(tree.levels)):
            step, D, U, V = self._eliminate(level, D, U, V, widths[level])
            self._steps.append(step)
        self._root = contiguous(D)
        self._count(D, 0)
        advice = self.space.or_wider(" or")
        self._lost = self._check_precision(HOPELESS, advice, stable=True)

    def _differentiate(self, plain: HODLROrthogonal) -> None:
        """Take the factors of the detached matrix, and give results its gradients."""
        self._plain, self._steps, self._root = plain, plain._steps, plain._root
        self._scale, self._sign = plain._scale, plain._sign
        self._lost = plain._lost
        self._logdet = logdet_with_gradients_of(
            plain._logdet, partial(stored_inverse, plain), self.matrix
        )

    def _columns(self) -> tuple[Array, Array, list[int]]:
        """Return U and V of all levels, each (padded, Σ r), and the widths of levels.

        Columns of V have norm 1 or 0, those of U the scales of their terms.
        """
        xp, tree = self.space.xp, self.tree
        left, right = ([self.space.zeros(tree.padded, 0)] for _ in range(2))
        for B12, B21 in map(self.matrix.blocks, range(tree.levels)):
            (U12, V12), (U21, V21) = map(_balanced, (B12, B21))
            for side, both in ((left, pair(U12, U21)), (right, pair(V21, V12))):
                side.append(cleared(xp.reshape(both, (tree.padded, -1)), tree))
        widths = [int(U.shape[-1]) for U in left[1:]]
        return xp.concat(left, axis=-1), xp.concat(right, axis=-1), widths

    def _eliminate(
        self, level: int, D: Array, U: Array, V: Array, width: int
    ) -> tuple[_Step, Array, Array, Array]:
        """Eliminate in the halves of a level's nodes; return D, U and V of the nodes."""
        xp, space = self.space.xp, self.space
        b, m, c = U.shape
        e, Q = _outer_space(U, level)
        if e:
            D, U = adjoint(Q) @ D, (adjoint(Q) @ U)[:, e:, :]
            P, R = complete_qr(adjoint(D[:, :e, :]))
            L = adjoint(R[:, :e, :])
            self._count(L, level + 1)
            self._sign = self._sign * _signs(Q) * xp.conj(_signs(P))
            D, V = D[:, e:, :] @ P, adjoint(P) @ V
        else:
            Q, L = space.zeros(b, 0, 0), space.zeros(b, 0, 0)
            P = Q
        G = U[..., c - width :]
        parts = (
            Q,
            P,
            inverse_lower(L),
            _inverse_upper(adjoint(L)),
            D[..., :e],
            V[:, :e, :],
            G,
        )
        step = _Step(*map(contiguous, parts))
        D, V = D[..., e:], V[:, e:, :]
        B = xp.reshape(
            G @ _siblings(adjoint(V[..., c - width :])), (-1, 2, m - e, m - e)
        )
        D = xp.reshape(D, B.shape)
        D = block_matrix(D[:, 0, ...], B[:, 0, ...], B[:, 1, ...], D[:, 1, ...])
        U, V = (_merged(x[..., : c - width]) for x in (U, V))
        return step, D, U, V

    def _count(self, blocks: Array, level: int) -> None:
        """Multiply the determinants of a level's blocks into that of the matrix."""
        xp = self.space.xp
        signs, logs = slogdet(blocks)
        if bool(xp.any(signs == 0)):
            node = int(xp.argmin(xp.abs(signs)))
            msg = (
                f"Singular at node {node} of level {level}: an exact zero where "
                f"{self.space.name} needs a pivot. Use a `shift`."
            )
            raise SingularBlockError(msg, level, node)
        self._sign = self._sign * xp.prod(signs)
        self._logdet = self._logdet + xp.sum(xp.astype(logs, xp.float64))

    def _apply(self, x: Array) -> Array:
        plain = self._plain
        if plain is None:
            return self._solve(x)
        parts = (self._multiply, plain._solve, plain._solve_adjoint)
        return self._with_gradients(x, *parts)

    def _apply_adjoint(self, x: Array) -> Array:
        plain = self._plain
        if plain is None:
            return self._solve_adjoint(x)
        parts = (self._multiply_adjoint, plain._solve_adjoint, plain._solve)
        return self._with_gradients(x, *parts)

    def _solve(self, x: Array) -> Array:
        xp, leaves = self.space.xp, self.matrix.leaves
        f = xp.reshape(x / self._scale, (*leaves.shape[:2], x.shape[1]))
        w = self.space.zeros(leaves.shape[0], self._width, x.shape[1])
        ys = []
        for step in self._steps:
            y, f, w = step.up(f, w)
            ys.append(y)
        f = solve(self._root, f)
        for step, y in zip(self._steps[::-1], ys[::-1], strict=True):
            f = step.down(y, f)
        return xp.reshape(f, x.shape)

    def _solve_adjoint(self, x: Array) -> Array:
        xp, leaves = self.space.xp, self.matrix.leaves
        f = xp.reshape(x / self._scale, (*leaves.shape[:2], x.shape[1]))
        ys = []
        for step in self._steps:
            y, f = step.up_adjoint(f)
            ys.append(y)
        f = solve(adjoint(self._root), f)
        w = self.space.zeros(1, 0, x.shape[1])
        for step, y in zip(self._steps[::-1], ys[::-1], strict=True):
            f, w = step.down_adjoint(y, f, w)
        return xp.reshape(f, x.shape)

    @property
    def _width(self) -> int:
        """Columns of U and V of all levels."""
        return sum(int(step.G.shape[-1]) for step in self._steps)

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed."""
        return HODLRInverse(self)

    @narrow
    @in_own_precision
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,), in ``O(n r² K³)``.

        Columns of the identity, each along the path from its leaf to the root and back.
        """
        if self._plain is not None:
            return diagonal_with_gradients_of(
                self._plain.inverse_diagonal(),
                partial(stored_inverse, self._plain),
                self.matrix,
            )
        xp, (leaves, m) = self.space.xp, self.matrix.leaves.shape[:2]
        x = xp.broadcast_to(self.space.eye(m), (leaves, m, m))
        w, ys = self.space.zeros(leaves, self._width, m), []
        for step in self._steps:
            y, x, w = step.up_own(x, w)
            ys.append(y)
        x = solve(self._root, x)
        for step, y in zip(self._steps[::-1], ys[::-1], strict=True):
            x = step.down_own(y, x)
        diagonal = xp.reshape(xp.linalg.diagonal(x), (-1,))
        return unpad_rows(diagonal / self._scale, self.tree)

    def _arrays(self) -> dict[str, Array]:
        arrays = {"sign": self._sign, "logdet": self._logdet, "root": self._root}
        arrays["scale"] = self.space.real.ones(1) * self._scale
        for k, step in enumerate(self._steps):
            arrays |= {
                f"{part.name}.{k}": getattr(step, part.name) for part in fields(step)
            }
        return arrays

    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        self._sign = take_array(arrays, "sign", ())
        self._root = take_array(arrays, "root", (1, None, None))
        self._scale = float(take_array(arrays, "scale", (1,))[0])
        names = [part.name for part in fields(_Step)]
        self._steps = []
        for k in range(self.tree.levels):
            shape = (self.tree.nodes(self.tree.levels - k), None, None)
            parts = (take_array(arrays, f"{name}.{k}", shape) for name in names)
            self._steps.append(_Step(*parts))


def _balanced(block: LowRank) -> tuple[Array, Array]:
    """Return U and V of ``U Vᴴ`` with columns of V of norm 1 or 0."""
    xp = Space.of(block.U).xp
    norms = xp.linalg.vector_norm(block.V, axis=-2, keepdims=True)
    return block.U * (norms * block.S[..., None, :]), block.V / positive_or_one(norms)


def _outer_space(U: Array, level: int) -> tuple[int, Array]:
    """Return unitary Q (b, m, m), and how many of its columns are orthogonal to U.

    Columns of U are rotated at random first, so that QR reveals the rank (Demmel, Dumitriu
    & Holtz, "Fast linear algebra is stable", 2007). Of U no more is cut off than
    rounding has changed: a Gaussian matrix in place of the rotation would multiply that by
    its condition number.
    """
    space = Space.of(U)
    xp, (_, m, c) = space.xp, U.shape
    rotation, _ = complete_qr(space.normal((c, c), c, level))
    Q, _ = complete_qr(U @ rotation)
    rows = xp.linalg.vector_norm(adjoint(Q) @ U, axis=-1)
    tails = xp.sqrt(
        xp.flip(xp.cumulative_sum(xp.flip(rows**2, axis=-1), axis=-1), axis=-1)
    )
    used = xp.astype(tails > space.eps * tails[:, :1], xp.int64)
    # No more rows than columns, whose count rounding may exceed in the rows below; and one
    # row at least, so that nothing is empty
    k = max(1, min(c, int(xp.max(xp.sum(used, axis=-1)))))
    return m - k, xp.concat([Q[..., k:], Q[..., :k]], axis=-1)


def _inverse_upper(a: Array) -> Array:
    """Inverse of upper triangular ``a`` (..., m, m)."""
    axes, flip = (-2, -1), Space.of(a).xp.flip
    return flip(inverse_lower(flip(a, axis=axes)), axis=axes)


def _signs(Q: Array) -> Array:
    """Product of the determinants of unitary matrices."""
    signs, _ = slogdet(Q)
    return Space.of(Q).xp.prod(signs)


def _siblings(x: Array) -> Array:
    """Swap the two halves of each node (b, ...)."""
    xp = Space.of(x).xp
    pairs = xp.reshape(x, (x.shape[0] // 2, 2, *x.shape[1:]))
    return xp.reshape(xp.flip(pairs, axis=1), x.shape)


def _merged(x: Array) -> Array:
    """Put the rows of two halves below each other: (b, k, q) to (b / 2, 2k, q)."""
    b, k, q = x.shape
    return Space.of(x).xp.reshape(x, (b // 2, 2 * k, q))


def _parted(x: Array) -> Array:
    """Undo `_merged`."""
    b, k, q = x.shape
    return Space.of(x).xp.reshape(x, (2 * b, k // 2, q))
