"""Factors W of Hermitian positive definite matrices ``W Wᴴ``, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    cholesky,
    conjugate,
    default_workers,
    in_threads,
    inverse_lower,
    namespace,
    one_blas_thread,
    to_numpy,
    wants_gradient,
)
from hmatrix._checks import NotPositiveDefiniteError
from hmatrix.tree import ClusterTree

__all__ = ["SymmetricFactor", "checked_cholesky", "logdet_of_cholesky"]

#: Q, X and Y of some nodes of a level.
Term = tuple[Array, Array, Array]
#: From level, number of the first node and columns of some nodes (rows, r) to their terms.
Core = Callable[[int, int, Array], Term]
#: From numbers of rows or leaves to what belongs to them.
Part = Callable[[slice], Array]
#: Bytes of columns, on the host, that stay in the cache, and that are worth a thread.
CACHE, SMALL = 2**24, 2**20
#: Bytes of columns that are updated at once.
PIECE = 2**20


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
        m, levels = tree.leaf_size, tree.levels
        workers = default_workers(space)
        top, low = subtrees(tree, sum(widths), space, workers)
        found = Joined(space)

        def climb(x: Array, start: int, some: range, piece: int, pieces: int) -> Array:
            """Take the terms of some levels out of rows x that begin at ``start``."""
            for level in reversed(some):
                rest = x.shape[1] - widths[level]
                term = core(level, start // tree.size(level), x[:, rest:])
                found.put(level, term, piece, pieces)
                x = _update(term[0], term[2], x[:, :rest], owned=True)
            return x

        def bottom(piece: int) -> Array:
            """Factor the levels of one piece that stays in the cache."""
            size, pieces = tree.size(low), tree.nodes(low)
            rows = slice(piece * size, (piece + 1) * size)
            L = leaf(slice(rows.start // m, rows.stop // m))
            half = inverse_lower(L)
            found.put(levels, (L, half), piece, pieces)
            # the columns of all levels above go along: one product a level
            x = _blocks_times(half, columns(rows))
            return climb(x, rows.start, range(low, levels), piece, pieces)

        def subtree(which: int) -> Array:
            """Factor the levels of one worker's rows."""
            first, stop = (
                k * tree.nodes(low) // tree.nodes(top) for k in (which, which + 1)
            )
            x = joined_rows([bottom(piece) for piece in range(first, stop)])
            start = which * tree.size(top)
            return climb(x, start, range(top, low), which, tree.nodes(top))

        with one_blas_thread() if workers > 1 else nullcontext():
            x = joined_rows(in_threads(workers, subtree, range(tree.nodes(top))))
            climb(x, 0, range(top), 0, 1)
        terms = [found[level] for level in range(levels)]
        bases, cores, inverses = zip(*terms, strict=True) if terms else ((), (), ())
        diagonal, halves = found[levels]
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


def subtrees(
    tree: ClusterTree, width: int, space: Space, workers: int
) -> tuple[int, int]:
    """Return two levels: whose nodes are a worker's each, and whose fit into the cache.

    ``width`` is that of the rows which are worked on.
    """
    bytes_ = tree.padded * max(width, 1) * space.itemsize

    def level(pieces: int) -> int:
        return min(tree.levels, max(pieces - 1, 0).bit_length())

    if not space.on_host:
        return 0, 0
    top = level(min(workers, bytes_ // SMALL))
    return top, max(top, level(-(-bytes_ // CACHE)))


def joined_rows(parts: Sequence[Array]) -> Array:
    """Join rows (rows, q) that follow each other."""
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concat(parts, axis=0)


class Joined(dict[int, tuple[Array, ...]]):
    """Arrays of all nodes of each level, from those of pieces that have equally many."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self._space, self._lock = space, Lock()

    def put(
        self, level: int, parts: tuple[Array, ...], piece: int, pieces: int
    ) -> None:
        """Keep arrays of the nodes of one piece."""
        if pieces == 1:
            self[level] = parts
            return
        with self._lock:
            if level not in self:
                self[level] = tuple(
                    self._space.zeros(pieces * x.shape[0], *x.shape[1:]) for x in parts
                )
        for whole, x in zip(self[level], parts, strict=True):
            whole[piece * x.shape[0] : (piece + 1) * x.shape[0], ...] = x


def _update(Q: Array, X: Array, x: Array, *, owned: bool = False) -> Array:
    """Return ``x + Q X Qᴴ x`` of each node.

    In the memory of ``x`` if that is ``owned``, on the host piece by piece: a product as
    large as ``x`` would not stay in the cache, and new memory for it costs as much again.
    """
    (blocks, rows, r), q = Q.shape, x.shape[1]
    if not r or not q:
        return x
    space = Space.of(x)
    xp, nodes = space.xp, X.shape[0]
    halves = blocks // nodes

    def inner(some: slice) -> Array:
        """Return ``X Qᴴ x`` of some nodes."""
        which = slice(some.start * halves, some.stop * halves)
        y = xp.reshape(x, (blocks, rows, q))[which, ...]
        small = adjoint(Q[which, ...]) @ y
        small = X[some, ...] @ xp.reshape(small, (-1, X.shape[1], q))
        return xp.reshape(small, (-1, r, q))

    if not owned or not space.on_host or wants_gradient(x):
        return x + xp.reshape(Q @ inner(slice(0, nodes)), x.shape)
    piece = max(1, PIECE // (q * space.itemsize))
    if rows < piece:
        step = max(1, piece // (rows * halves))
        for start in range(0, nodes, step):
            some = slice(start, min(start + step, nodes))
            which = slice(some.start * halves, some.stop * halves)
            y = Q[which, ...] @ inner(some)
            x[which.start * rows : which.stop * rows, :] += xp.reshape(y, (-1, q))
        return x
    small = inner(slice(0, nodes))
    for block in range(blocks):
        for start in range(0, rows, piece):
            stop = min(start + piece, rows)
            part = slice(block * rows + start, block * rows + stop)
            x[part, :] += Q[block, start:stop, :] @ small[block, ...]
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
