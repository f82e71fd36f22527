"""Factors W of Hermitian positive definite matrices ``W Wᴴ``, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    cholesky,
    conjugate,
    default_workers,
    detach,
    in_threads,
    inverse_lower,
    multiply_into,
    namespace,
    one_blas_thread,
    plus_product,
    to_numpy,
    wants_gradient,
)
from hmatrix._checks import NonFiniteError, NotPositiveDefiniteError
from hmatrix.tree import ClusterTree

__all__ = ["SymmetricFactor", "checked_cholesky", "logdet_of_cholesky"]

#: From level, number of the first node, columns of some blocks (blocks, rows, r) and an
#: array that is to hold Q to Q, X and Y of their nodes.
Core = Callable[[int, int, Array, Array], tuple[Array, Array, Array]]
#: From numbers of rows or leaves to what belongs to them.
Part = Callable[[slice], Array]
#: Bytes of columns, on the host, that stay in the cache, and that are worth a thread.
CACHE, SMALL = 2**23, 2**20
#: Bytes of columns that are updated, or made of leaves, at once.
PIECE, LEAVES = 2**20, 2**22


@dataclass(frozen=True, eq=False)
class SymmetricFactor:
    """``W = blkdiag(L) · T_{K−1} ⋯ T_0`` with ``T_k = I + Q_k X_k Q_kᴴ``.

    Parameters
    ----------
    inverse_leaves : array (2**K, m, m)
        ``L⁻¹``, lower triangular.
    bases : tuple of array (2**k or 2**(k+1), rows, r)
        ``Q_k``: one block for each node of level k, or one for each half of it.
    cores, inverse_cores : tuple of array (2**k, s, s)
        ``X_k``, and ``Y_k`` of ``T_k⁻¹ = I + Q_k Y_k Q_kᴴ``.
    again : callable, optional
        Makes ``L`` once more. Without it the inverse is inverted, which loses digits.
    """

    inverse_leaves: Array
    bases: tuple[Array, ...]
    cores: tuple[Array, ...]
    inverse_cores: tuple[Array, ...]
    again: Callable[[], Array] | None = None

    @classmethod
    def build(
        cls,
        tree: ClusterTree,
        inverse_leaves: Array,
        bases: Sequence[Array],
        columns: Part,
        leaf: Part,
        core: Core,
        *,
        again: Callable[[], Array] | None = None,
        sparing: bool = False,
    ) -> SymmetricFactor:
        """Factor from the leaves to the root.

        Parameters
        ----------
        tree
            The halving.
        inverse_leaves : array (2**K, m, m)
            Memory for ``L⁻¹``. What ``leaf`` is made of may lie in it.
        bases : sequence of array (2**k or 2**(k+1), rows, r)
            Memory for ``Q_k``. What ``columns`` is made of may lie in it.
        columns
            Gives some padded rows (rows, Σ r) of what the off-diagonal parts of all
            levels are made of.
        leaf
            Makes the Cholesky factors ``L`` of some leaves.
        core
            Makes the term of a level from its columns, everything below divided out.
        again
            As of the class.
        sparing
            Work on half as many rows at once, which takes a little longer.
        """
        m, levels, space = tree.leaf_size, tree.levels, Space.of(inverse_leaves)
        xp, widths = space.xp, [int(Q.shape[-1]) for Q in bases]
        sizes = [Q.shape[0] // tree.nodes(k) * widths[k] for k, Q in enumerate(bases)]
        cores, inverse_cores = (
            [space.zeros(tree.nodes(k), s, s) for k, s in enumerate(sizes)]
            for _ in range(2)
        )
        workers, share = default_workers(space), 2 if sparing else 1
        recorded = any(map(wants_gradient, (inverse_leaves, *bases)))
        # what is recorded is not worked on piece by piece
        whole = recorded or not space.on_host
        top, low = (
            (0, 0) if whole else subtrees(tree, sum(widths), space, workers, share)
        )
        flat = [
            xp.reshape(Q, (tree.padded, r)) for Q, r in zip(bases, widths, strict=True)
        ]

        def piece() -> Array:
            """Memory for a thread's products, which is used again and again."""
            return space.zeros(max(PIECE // space.itemsize, sum(widths)))

        def term(level: int, start: int, stop: int, columns: Array | None) -> Any:
            """Find the terms of a level in some rows, and return Q and Y."""
            size = tree.size(level)
            nodes = slice(start // size, stop // size)
            halves = bases[level].shape[0] // tree.nodes(level)
            Q = bases[level][nodes.start * halves : nodes.stop * halves, ...]
            columns = Q if columns is None else xp.reshape(columns, Q.shape)
            Q, X, Y = core(level, nodes.start, columns, Q)
            cores[level][nodes, ...] = X
            inverse_cores[level][nodes, ...] = Y
            return Q, Y

        def climb(start: int, stop: int, some: range, memory: Array) -> None:
            """Take the terms of some levels out of rows whose columns lie in ``bases``."""
            for level in reversed(some):
                Q, Y = term(level, start, stop, None)
                for x in flat[:level]:
                    _add_update(Q, Y, x[start:stop, :], x.shape[1], memory)

        def bottom(start: int, x: Array, memory: Array) -> None:
            """Factor the levels of rows that stay in the cache; x is memory for them."""
            step, width = x.shape[0] // m, x.shape[1]
            if not whole:
                most = max(1, LEAVES // (share * m * max(m, width) * space.itemsize))
                step = min(step, 1 << most.bit_length() - 1)
            for first in range(0, x.shape[0] // m, step):
                stop = first + step
                which = slice(start // m + first, start // m + stop)
                half = inverse_lower(leaf(which))
                inverse_leaves[which, ...] = half
                if width:
                    # the columns of all levels above go along: one product a level
                    shape, rows = (stop - first, m, width), slice(first * m, stop * m)
                    some = columns(slice(start + rows.start, start + rows.stop))
                    out = xp.reshape(x[rows, :], shape)
                    multiply_into(out, half, xp.reshape(some, shape))
            for level in reversed(range(low, levels)):
                done = sum(widths[:level])
                own = x[:, done : done + widths[level]]
                Q, Y = term(level, start, start + x.shape[0], own)
                if whole:
                    x = _update(Q, Y, x[:, :done])
                else:
                    _add_update(Q, Y, x, done, memory)
            done = 0
            for F in flat[:low]:
                F[start : start + x.shape[0], :] = x[:, done : done + F.shape[1]]
                done += F.shape[1]

        def subtree(which: int) -> None:
            """Factor the levels of one worker's rows."""
            size, step = tree.size(top), tree.size(low)
            x, memory = space.zeros(step, sum(widths)), piece()
            for start in range(which * size, (which + 1) * size, step):
                bottom(start, x, memory)
            climb(which * size, (which + 1) * size, range(top, low), memory)

        with one_blas_thread() if workers > 1 else nullcontext():
            in_threads(workers, subtree, range(tree.nodes(top)))
            climb(0, tree.padded, range(top), piece())
        cored = tuple(cores), tuple(inverse_cores)
        return cls(inverse_leaves, tuple(bases), *cored, again)

    @cached_property
    def leaves(self) -> Array:
        """``L``, lower triangular, which only `apply` needs."""
        return (
            inverse_lower(self.inverse_leaves) if self.again is None else self.again()
        )

    def apply(self, x: Array) -> Array:
        """Return ``W x`` of a padded block."""
        given = x
        for Q, X in zip(self.bases, self.cores, strict=True):
            x = _update(Q, X, x, own=x is not given)
        return _blocks_times(self.leaves, x)

    def solve(self, x: Array) -> Array:
        """Return ``W⁻¹ x``."""
        x = _blocks_times(self.inverse_leaves, x)
        for Q, Y in zip(self.bases[::-1], self.inverse_cores[::-1], strict=True):
            x = _update(Q, Y, x, own=True)
        return x

    def solve_adjoint(self, x: Array) -> Array:
        """Return ``W⁻ᴴ x``."""
        given = x
        for Q, Y in zip(self.bases, self.inverse_cores, strict=True):
            x = _update(Q, adjoint(Y), x, own=x is not given)
        return _blocks_times(adjoint(self.inverse_leaves), x)

    def inverse_terms(self) -> Iterator[tuple[Array, Array]]:
        """Return Z and M of each level: the inverse is that of the leaves and Z M Zᴴ.

        Of bases of halves: Z (2**(k+1), rows, r), M (2**k, 2r, 2r).
        """
        space = Space.of(self.inverse_leaves)
        xp = space.xp
        x = space.zeros(math.prod(self.inverse_leaves.shape[:2]), 0)
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
        space = Space.of(self.inverse_leaves)
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
    tree: ClusterTree, width: int, space: Space, workers: int, share: int
) -> tuple[int, int]:
    """Return two levels: whose nodes are a worker's each, and whose fit into the cache.

    ``width`` is that of the rows which are worked on; one in ``share`` of those that fit.
    """
    bytes_ = tree.padded * max(width, 1) * space.itemsize

    def level(pieces: int) -> int:
        return min(tree.levels, max(pieces - 1, 0).bit_length())

    top = level(min(workers, bytes_ // SMALL))
    return top, max(top, level(-(-bytes_ * share // CACHE)))


def _update(Q: Array, X: Array, x: Array, *, own: bool = False) -> Array:
    """Return ``x + Q X Qᴴ x`` of each node, x (rows, q), which may be the caller's own."""
    if not Q.shape[-1] or not x.shape[1]:
        return x
    xp = namespace(x)
    y = xp.reshape(x, (*Q.shape[:2], x.shape[1]))
    return xp.reshape(plus_product(y, Q, _inner(Q, X, y), own=own), x.shape)


def _add_update(Q: Array, X: Array, x: Array, q: int, memory: Array) -> None:
    """Add ``Q X Qᴴ x`` of each node to the first q columns of x (rows, width), in place.

    What is in the other columns afterwards is of no use. Piece by piece, in ``memory``,
    since a product as large as ``x`` would not stay in the cache; and in rows of full
    width, which are one vector.
    """
    (blocks, rows, r), width = Q.shape, x.shape[1]
    if not r or not q:
        return
    xp, halves = namespace(x), blocks // X.shape[0]
    y = xp.reshape(x[:, :q], (blocks, rows, q))
    piece = int(memory.shape[0]) // width
    memory = xp.reshape(memory[: piece * width], (piece, width))
    if rows * halves <= piece:
        step = piece // (rows * halves)
        for node in range(0, X.shape[0], step):
            some = slice(node, min(node + step, X.shape[0]))
            which = slice(some.start * halves, some.stop * halves)
            part = slice(which.start * rows, which.stop * rows)
            out = memory[: part.stop - part.start, :]
            shape = (which.stop - which.start, rows, q)
            small = _inner(Q[which, ...], X[some, ...], y[which, ...])
            multiply_into(xp.reshape(out[:, :q], shape), Q[which, ...], small)
            x[part, :] += out
        return
    small = _inner(Q, X, y)
    for block in range(blocks):
        for start in range(0, rows, piece):
            stop = min(start + piece, rows)
            out = memory[: stop - start, :]
            multiply_into(out[:, :q], Q[block, start:stop, :], small[block, ...])
            x[block * rows + start : block * rows + stop, :] += out


def _inner(Q: Array, X: Array, y: Array) -> Array:
    """Return ``X Qᴴ y`` of nodes, as rows for their blocks (blocks, r, q)."""
    xp, (r, q) = namespace(y), (Q.shape[-1], y.shape[-1])
    small = X @ xp.reshape(adjoint(Q) @ y, (-1, X.shape[1], q))
    return xp.reshape(small, (-1, r, q))


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
    pivots, entries = (xp.abs(xp.linalg.diagonal(detach(x))) for x in (L, blocks))
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
    first of them is number ``first`` of its level. Of several the one is named whose
    smallest eigenvalue is lowest beside its entries.
    """
    L = cholesky(blocks)
    # NaN is found here: LAPACK may let it pass
    if L is None or not _smallest_pivot(L, blocks) > pivot:
        double = to_numpy(blocks)
        double = double.astype(np.result_type(double.dtype, np.float64))
        finite = np.isfinite(double).all(axis=(1, 2))
        if not finite.all():
            node = first + int(np.argmin(finite))
            msg = f"NaN or infinite values at level {level}, {what} {node}."
            raise NonFiniteError(msg)
        smallest = np.linalg.eigvalsh(double)[:, 0]
        scales = abs(double).max(axis=(1, 2))
        node = int(np.argmin(smallest / np.where(scales > 0, scales, 1)))
        msg = (
            f"Not positive definite at level {level}, {what} {first + node}: smallest eigenvalue "
            f"{smallest[node]:.3g} with `shift` = {shift:.3g}; use a larger shift."
        )
        raise NotPositiveDefiniteError(msg, level, first + node)
    return L
