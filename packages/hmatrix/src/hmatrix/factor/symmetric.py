"""Factors W of Hermitian positive definite matrices ``W Wᴴ``, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    cholesky,
    conjugate,
    inverse_lower,
    namespace,
    to_numpy,
    wants_gradient,
)
from hmatrix._checks import NotPositiveDefiniteError
from hmatrix.tree import ClusterTree

__all__ = ["SymmetricFactor", "checked_cholesky", "logdet_of_cholesky"]

#: From level, number of the first node and columns of some nodes (rows, r) to Q, X and Y
#: of these nodes' terms.
Core = Callable[[int, int, Array], tuple[Array, Array, Array]]
#: From numbers of rows or leaves to what belongs to them.
Part = Callable[[slice], Array]
#: From Q, X and x to ``x + Q X Qᴴ x``.
Update = Callable[[Array, Array, Array], Array]
#: Bytes of the columns that a subtree works on, on the host.
CACHE = 2**21


@dataclass(frozen=True, eq=False)
class SymmetricFactor:
    """``W = blkdiag(L) · T_{K−1} ⋯ T_0`` with ``T_k = I + Q_k X_k Q_kᴴ``.

    Parameters
    ----------
    leaves, inverse_leaves : array (2**K, m, m)
        ``L``, lower triangular, and its inverse.
    bases : tuple of array (2**k or 2**(k+1), rows, r)
        ``Q_k``: one block for each node of level k, or one for each half of it.
    cores, inverse_cores : tuple of array (2**k, s, s)
        ``X_k``, and ``Y_k`` of ``T_k⁻¹ = I + Q_k Y_k Q_kᴴ``.
    """

    leaves: Array
    inverse_leaves: Array
    bases: tuple[Array, ...]
    cores: tuple[Array, ...]
    inverse_cores: tuple[Array, ...]

    @classmethod
    def build(
        cls,
        tree: ClusterTree,
        space: Space,
        widths: Sequence[int],
        leaf: Part,
        columns: Part,
        core: Core,
    ) -> SymmetricFactor:
        """Factor from the leaves to the root.

        Parameters
        ----------
        tree, space
            The halving; library, dtype and device.
        widths
            Columns r of each level.
        leaf
            Makes the Cholesky factors ``L`` of some leaves.
        columns
            Gives some padded rows (rows, Σ r) of what the off-diagonal parts of all
            levels are made of.
        core
            Makes the term of a level from its columns, everything below divided out.
        """
        xp, m = space.xp, tree.leaf_size
        leaves: list[tuple[Array, Array]] = []
        terms: list[list[tuple[Array, ...]]] = [[] for _ in widths]

        def climb(x: Array, start: int, levels: range, update: Update) -> Array:
            """Take the terms of some levels out of rows x that begin at ``start``."""
            for level in reversed(levels):
                rest = x.shape[1] - widths[level]
                Q, X, Y = core(level, start // tree.size(level), x[:, rest:])
                terms[level].append((Q, X, Y))
                x = update(Q, Y, x[:, :rest])
            return x

        # subtree by subtree, each of a size that stays in the cache, then the rest
        top = subtrees(tree, sum(widths), space)
        size = tree.size(top)
        x = space.zeros(tree.padded, sum(widths[:top]))
        for start in range(0, tree.padded, size):
            L = leaf(slice(start // m, (start + size) // m))
            leaves.append((L, inverse_lower(L)))
            # the columns of all levels above go along: one product a level
            rows = slice(start, start + size)
            part = _blocks_times(leaves[-1][1], columns(rows))
            part = climb(part, start, range(top, tree.levels), _update)
            if top:
                x[rows, :] = part
        climb(x, 0, range(top), _update_in_pieces)

        def joined(parts: list[tuple[Array, ...]]) -> tuple[Array, ...]:
            if len(parts) == 1:
                return parts[0]
            return tuple(xp.concat(list(p), axis=0) for p in zip(*parts, strict=True))

        levels = [joined(parts) for parts in terms]
        bases, cores, inverses = zip(*levels, strict=True) if levels else ((), (), ())
        diagonal, halves = joined(leaves)
        return cls(diagonal, halves, bases, cores, inverses)

    def apply(self, x: Array) -> Array:
        """Return ``W x`` of a padded block."""
        for Q, X in zip(self.bases, self.cores, strict=True):
            x = _update(Q, X, x)
        return _blocks_times(self.leaves, x)

    def solve(self, x: Array) -> Array:
        """Return ``W⁻¹ x``."""
        x = _blocks_times(self.inverse_leaves, x)
        for Q, Y in zip(self.bases[::-1], self.inverse_cores[::-1], strict=True):
            x = _update(Q, Y, x)
        return x

    def solve_adjoint(self, x: Array) -> Array:
        """Return ``W⁻ᴴ x``."""
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            x = _update(Q, adjoint(Y), x)
        return _blocks_times(adjoint(self.inverse_leaves), x)

    def inverse_terms(self) -> Iterator[tuple[Array, Array]]:
        """Return Z and M of each level: the inverse is that of the leaves and Z M Zᴴ.

        Of bases of halves: Z (2**(k+1), rows, r), M (2**k, 2r, 2r).
        """
        space = Space.of(self.leaves)
        xp = space.xp
        x = space.zeros(self.leaves.shape[0] * self.leaves.shape[1], 0)
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            x = _update(Q, adjoint(Y), x)
            x = xp.concat([x, xp.reshape(Q, (x.shape[0], Q.shape[-1]))], axis=-1)
        # x is now W⁻ᴴ Q of the nodes' children, for all levels
        x = _blocks_times(adjoint(self.inverse_leaves), x)
        done = 0
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            r = Q.shape[-1]
            Z = xp.reshape(x[:, done : done + r], Q.shape)
            done += r
            # the node's inverse is the children's plus Z M Zᴴ, M = (I + Y)ᴴ (I + Y) − I
            yield Z, adjoint(Y) @ Y + Y + adjoint(Y)

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of ``(W Wᴴ)⁻¹`` (padded,), of bases of halves."""
        space = Space.of(self.leaves)
        xp = space.xp
        diagonal = xp.sum(xp.abs(self.inverse_leaves) ** 2, axis=-2)
        diagonal = xp.astype(xp.reshape(diagonal, (-1,)), space.dtype, copy=False)
        for Z, M in self.inverse_terms():
            r = Z.shape[-1]
            if not r:
                continue
            own = xp.stack([M[:, :r, :r], M[:, r:, r:]], axis=1)
            part = xp.sum((Z @ xp.reshape(own, (-1, r, r))) * conjugate(Z), axis=-1)
            diagonal = diagonal + xp.reshape(part, (-1,))
        return diagonal


def subtrees(tree: ClusterTree, width: int, space: Space) -> int:
    """Return the level whose nodes' rows (of ``width`` numbers) fit into the cache."""
    if not space.on_host:
        return 0
    bytes_ = tree.padded * max(width, 1) * space.itemsize
    return min(tree.levels, max(0, (-(-bytes_ // CACHE) - 1).bit_length()))


def _update(Q: Array, X: Array, x: Array) -> Array:
    """Return ``x + Q X Qᴴ x`` of each node."""
    if not Q.shape[-1] or not x.shape[1]:
        return x
    xp, q = namespace(x), x.shape[1]
    small = adjoint(Q) @ xp.reshape(x, (*Q.shape[:2], q))
    small = X @ xp.reshape(small, (*X.shape[:2], q))
    small = xp.reshape(small, (Q.shape[0], Q.shape[2], q))
    return x + xp.reshape(Q @ small, x.shape)


def _update_in_pieces(Q: Array, X: Array, x: Array) -> Array:
    """Do `_update` in the memory of ``x``, the rows of large nodes piece by piece.

    A product as large as ``x`` would not stay in the cache, and new memory for it costs
    as much again.
    """
    if wants_gradient(x) or not Q.shape[-1] or not x.shape[1]:
        return _update(Q, X, x)
    xp, q, (blocks, rows, r) = namespace(x), x.shape[1], Q.shape
    small = adjoint(Q) @ xp.reshape(x, (blocks, rows, q))
    small = xp.reshape(X @ xp.reshape(small, (*X.shape[:2], q)), (blocks, r, q))
    step = max(1, CACHE // (q * Space.of(x).itemsize))
    for block in range(blocks):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            piece = slice(block * rows + start, block * rows + stop)
            x[piece, :] += Q[block, start:stop, :] @ small[block, ...]
    return x


def _blocks_times(blocks: Array, x: Array) -> Array:
    """Multiply rows (padded, q) with diagonal blocks."""
    xp = namespace(x)
    y = blocks @ xp.reshape(x, (*blocks.shape[:2], x.shape[1]))
    return xp.reshape(y, x.shape)


def logdet_of_cholesky(L: Array) -> Array:
    """Sum of the log-determinants of ``L Lᴴ``, L (..., m, m), as float64 ()."""
    xp = namespace(L)
    # the diagonal is real, whatever the dtype
    logs = xp.log(xp.abs(xp.linalg.diagonal(L)))
    return 2 * xp.sum(xp.astype(logs, xp.float64))


def _smallest_pivot(L: Array, blocks: Array) -> float:
    """Smallest square of L's diagonal relative to the diagonal of the blocks."""
    xp = namespace(L)
    if not L.shape[-1]:
        return 1.0
    pivots, entries = (xp.abs(xp.linalg.diagonal(x)) for x in (L, blocks))
    return float(xp.min(pivots**2 / entries))


def checked_cholesky(
    blocks: Array,
    level: int,
    what: str,
    shift: float,
    *,
    pivot: float = 0.0,
    first: int = 0,
) -> Array:
    """Cholesky factors of the blocks of a level, or say which has none.

    A block has none either if it leaves no more than ``pivot`` of a diagonal entry. The
    first of them is number ``first`` of its level.
    """
    L = cholesky(blocks)
    if L is None or (pivot and _smallest_pivot(L, blocks) <= pivot):
        double = to_numpy(blocks)
        double = double.astype(np.result_type(double.dtype, np.float64))
        smallest = np.linalg.eigvalsh(double)[:, 0]
        node = int(np.argmin(smallest))
        msg = (
            f"Not positive definite at level {level}, {what} {first + node}: smallest eigenvalue "
            f"{smallest[node]:.3g} with `shift` = {shift:.3g}; use a larger shift."
        )
        raise NotPositiveDefiniteError(msg, level, first + node)
    return L
