"""Building symmetric factors, from the leaves to the root."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

from hmatrix._backend import (
    Array,
    Space,
    default_workers,
    in_threads,
    inverse_lower,
    multiply_into,
    namespace,
    one_blas_thread,
    wants_gradient,
)
from hmatrix.factor.symmetric import SymmetricFactor, apply_term, inner
from hmatrix.tree import ClusterTree

__all__ = ["Source", "build"]

#: Bytes of columns, on the host, that stay in the cache, and that are worth a thread.
CACHE, SMALL = 2**23, 2**20
#: Bytes of columns that are updated, or made of leaves, at once.
PIECE, LEAVES = 2**20, 2**22


class Source(Protocol):
    """What a symmetric factor is made of, and the memory that it is to lie in.

    Attributes
    ----------
    leaves : array (2**K, m, m)
        Memory for ``L⁻¹``. What `leaf` is made of may lie in it.
    bases : list of array (2**k or 2**(k+1), rows, r)
        Memory for ``Q_k``. What `columns` is made of may lie in it.
    """

    leaves: Array
    bases: list[Array]

    def columns(self, rows: slice) -> Array:
        """Return some padded rows (rows, Σ r) of the off-diagonal columns of all levels."""

    def leaf(self, which: slice) -> Array:
        """Return the Cholesky factors ``L`` of some leaves."""

    def core(
        self, level: int, first: int, columns: Array, out: Array
    ) -> tuple[Array, Array, Array]:
        """Return Q, X and Y of a level's nodes, from number ``first`` on.

        Of their columns (blocks, rows, r), everything below divided out; ``out`` is the
        memory that is to hold Q.
        """


def build(
    tree: ClusterTree,
    source: Source,
    *,
    again: Callable[[], Array] | None = None,
    sparing: bool = False,
) -> SymmetricFactor:
    """Return the symmetric factor of a source.

    ``again`` is as of `SymmetricFactor`. If ``sparing``, half as many rows are worked on at
    once, which takes less memory and a little longer.
    """
    climb = _Climb(tree, source, share=2 if sparing else 1)
    climb.run()
    cores = tuple(climb.cores), tuple(climb.inverse_cores)
    return SymmetricFactor(source.leaves, tuple(source.bases), *cores, again)


class _Climb:
    """The building of a factor: one subtree for each worker, then the levels above them.

    In a subtree, pieces of the rows that fit ``1 / share`` of the cache go through all
    levels from the leaves to ``low`` one after another.
    """

    def __init__(self, tree: ClusterTree, source: Source, share: int) -> None:
        self.tree, self.source, self.share = tree, source, share
        self.space = space = Space.of(source.leaves)
        self.widths = [int(Q.shape[-1]) for Q in source.bases]
        self.flat = [
            space.xp.reshape(Q, (tree.padded, r))
            for Q, r in zip(source.bases, self.widths, strict=True)
        ]
        shapes = [(tree.nodes(k), *Q.shape) for k, Q in enumerate(source.bases)]
        sides = [(nodes, blocks // nodes * r) for nodes, blocks, _, r in shapes]
        self.cores, self.inverse_cores = (
            [space.empty(nodes, side, side) for nodes, side in sides] for _ in range(2)
        )
        self.workers = default_workers(space)
        recorded = any(map(wants_gradient, (source.leaves, *source.bases)))
        # pieces are overwritten, which torch could not record
        self.whole = recorded or not space.on_host
        self.top, self.low = (0, 0) if self.whole else self.levels()

    def levels(self) -> tuple[int, int]:
        """Return the level whose nodes are a worker's each, and that whose fit the cache."""
        columns = self.tree.padded * max(sum(self.widths), 1) * self.space.itemsize

        def level(pieces: int) -> int:
            return min(self.tree.levels, max(pieces - 1, 0).bit_length())

        top = level(min(self.workers, columns // SMALL))
        return top, max(top, level(-(-columns * self.share // CACHE)))

    def run(self) -> None:
        """Factor all levels."""
        with one_blas_thread() if self.workers > 1 else nullcontext():
            in_threads(self.workers, self.subtree, range(self.tree.nodes(self.top)))
            self.climb(0, self.tree.padded, range(self.top), self.piece())

    def piece(self) -> Array:
        """Return memory for a thread's products, to be used many times."""
        return self.space.zeros(max(PIECE // self.space.itemsize, sum(self.widths)))

    def subtree(self, which: int) -> None:
        """Factor the levels of one worker's rows."""
        size, step = self.tree.size(self.top), self.tree.size(self.low)
        x, memory = self.space.empty(step, sum(self.widths)), self.piece()
        begin, end = which * size, (which + 1) * size
        for start in range(begin, end, step):
            self.bottom(start, x, memory)
        del x
        self.climb(begin, end, range(self.top, self.low), memory)

    def bottom(self, start: int, x: Array, memory: Array) -> None:
        """Factor the levels of rows that fit the cache, in the memory x."""
        stop = start + x.shape[0]
        self.invert_leaves(start, x)
        for level in reversed(range(self.low, self.tree.levels)):
            done = sum(self.widths[:level])
            own = x[:, done : done + self.widths[level]]
            Q, Y = self.term(level, start, stop, own)
            if self.whole:
                x = apply_term(Q, Y, x[:, :done])
            else:
                _add_term(Q, Y, x, done, memory)
        done = 0
        for F in self.flat[: self.low]:
            F[start:stop, :] = x[:, done : done + F.shape[1]]
            done += F.shape[1]

    def invert_leaves(self, start: int, x: Array) -> None:
        """Invert the leaves of rows, and write their products with all columns into x."""
        m, source, (rows, width) = self.tree.leaf_size, self.source, x.shape
        step = rows // m
        if not self.whole:
            numbers = self.share * m * max(m, width)
            most = max(1, LEAVES // (numbers * self.space.itemsize))
            step = min(step, 1 << most.bit_length() - 1)
        shape = (step, m, width)
        for first in range(0, rows // m, step):
            which = slice(start // m + first, start // m + first + step)
            half = inverse_lower(source.leaf(which), source.leaves[which, ...])
            if width:
                columns = source.columns(slice(which.start * m, which.stop * m))
                out = x[first * m : (first + step) * m, :]
                out, columns = (self.space.xp.reshape(y, shape) for y in (out, columns))
                multiply_into(out, half, columns)
                del columns  # before the next

    def climb(self, start: int, stop: int, levels: range, memory: Array) -> None:
        """Factor some levels of rows whose columns lie in the bases."""
        for level in reversed(levels):
            Q, Y = self.term(level, start, stop, self.flat[level][start:stop, :])
            for x in self.flat[:level]:
                _add_term(Q, Y, x[start:stop, :], x.shape[1], memory)

    def term(
        self, level: int, start: int, stop: int, columns: Array
    ) -> tuple[Array, Array]:
        """Find the terms of a level from columns (rows, r) of some rows: Q and Y."""
        size, basis = self.tree.size(level), self.source.bases[level]
        nodes = slice(start // size, stop // size)
        halves = basis.shape[0] // self.tree.nodes(level)
        out = basis[nodes.start * halves : nodes.stop * halves, ...]
        columns = self.space.xp.reshape(columns, out.shape)
        Q, X, Y = self.source.core(level, nodes.start, columns, out)
        self.cores[level][nodes, ...] = X
        self.inverse_cores[level][nodes, ...] = Y
        return Q, Y


def _add_term(Q: Array, X: Array, x: Array, q: int, memory: Array) -> None:
    """Add ``Q X Qᴴ x`` of each node to the first q columns of x (rows, width), in place.

    The other columns are overwritten: sums of full rows run over contiguous memory. It goes
    piece by piece, in ``memory``, since a product as large as ``x`` would not stay in the
    cache.
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
            small = inner(Q[which, ...], X[some, ...], y[which, ...])
            multiply_into(xp.reshape(out[:, :q], shape), Q[which, ...], small)
            x[part, :] += out
        return
    small = inner(Q, X, y)
    for block in range(blocks):
        for start in range(0, rows, piece):
            stop = min(start + piece, rows)
            out = memory[: stop - start, :]
            multiply_into(out[:, :q], Q[block, start:stop, :], small[block, ...])
            x[block * rows + start : block * rows + stop, :] += out
