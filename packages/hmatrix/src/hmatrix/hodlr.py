"""HODLR: dense diagonal leaves, low-rank off-diagonal blocks at every level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hmatrix._backend import (
    Array,
    add_product,
    adjoint,
    block_diagonal_times,
    block_matrix,
    conjugate,
    namespace,
    safe_norms,
)
from hmatrix._checks import OverwrittenError, ShapeError, check_operand
from hmatrix._operator import StoredOperator, real_rows, unpad_rows
from hmatrix.lowrank import LowRank, core
from hmatrix.tree import ClusterTree

__all__ = [
    "HODLR",
    "apply_blocks",
    "clear_padding",
    "frobenius_norm",
    "from_sides",
]


@dataclass(frozen=True, eq=False, repr=False)
class HODLR(StoredOperator):
    """Hierarchically off-diagonal low-rank matrix.

    At every level each node's diagonal block is halved into ``[[B11, B12], [B21,
    B22]]``; ``B12`` and ``B21`` are low rank, the diagonal blocks at the deepest level
    are dense. All blocks of a level are one batch (Ambikasaran & Darve, "An O(N log N)
    fast direct solver for partial hierarchically semi-separable matrices", 2013).

    Parameters
    ----------
    tree : ClusterTree
        The halving.
    leaves : array (2**K, m, m)
        Diagonal blocks of the deepest level. Padded rows and columns, here and in the
        factors, are zero.
    upper : tuple of LowRank
        Blocks ``B12`` of level k as one batch (2**k, padded / 2**(k+1), same).
    lower : tuple of LowRank, optional
        Blocks ``B21`` alike. Without them the matrix is Hermitian (symmetric, if real),
        ``B21 = B12ᴴ``, and so must its leaves be. That is not checked: "cholesky" takes
        their lower triangles for both, products take them as they are.
    error : float, optional
        Relative Frobenius error ``‖A − H‖ / ‖A‖`` of the compression that made it, where
        known: exact or an estimate, as the constructor says. Arithmetic makes an upper
        bound of those of its operands, leaving rounding aside.

    Raises
    ------
    ShapeError
        If the parts do not fit the tree.
    DTypeError, BackendError
        If they do not have one dtype, library and device.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 100)
    >>> A = np.exp(-abs(t[:, None] - t))
    >>> H = hm.from_dense(A, levels=3, rtol=1e-10)
    >>> H
    HODLR(n=100, levels=3, ranks=(1, 1, 1), symmetric, float64, numpy, 13.4 kB, 0.17 of dense)
    >>> bool(np.allclose(H @ t, A @ t)), H.error < 1e-10
    (True, True)
    """

    tree: ClusterTree
    leaves: Array
    upper: tuple[LowRank, ...]
    lower: tuple[LowRank, ...] | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        self._check_leaves()
        tree = self.tree
        wanted = [
            (tree.nodes(k), tree.size(k + 1), tree.size(k + 1))
            for k in range(tree.levels)
        ]
        for name, blocks in self._sides.items():
            shapes = [block.shape for block in blocks]
            if shapes != wanted:
                msg = f"`{name}` must hold blocks of shapes {wanted}, got {shapes}."
                raise ShapeError(msg)
            for block in blocks:
                check_operand(name, block.U, self.space)

    @property
    def symmetric(self) -> bool:
        """Whether one of the two off-diagonal blocks stands for both (Hermitian)."""
        return self.lower is None

    @property
    def H(self) -> HODLR:
        """The adjoint (views): the matrix itself, if it is symmetric."""
        if self.lower is None:
            return self
        return HODLR(
            self.tree,
            adjoint(self.leaves),
            tuple(block.H for block in self.lower),
            tuple(block.H for block in self.upper),
            self.error,
        )

    @property
    def T(self) -> HODLR:
        """The transpose."""
        return self.H.map(conjugate) if self.space.is_complex else self.H

    @property
    def ranks(self) -> tuple[int, ...]:
        """Largest rank that a block of each level uses."""
        return tuple(
            max(up.largest_rank, low.largest_rank)
            for up, low in (self.blocks(k) for k in range(self.tree.levels))
        )

    @property
    def _widths(self) -> list[int]:
        """Smaller side of each stored array: leaf size and ranks."""
        return [self.tree.leaf_size, *(block.rank for block in self._blocks)]

    @property
    def _sides(self) -> dict[str, tuple[LowRank, ...]]:
        """Stored blocks of each level, above the diagonal and, if general, below."""
        upper = {"upper": self.upper}
        return upper if self.lower is None else upper | {"lower": self.lower}

    @property
    def _blocks(self) -> tuple[LowRank, ...]:
        """All stored blocks."""
        return (*self.upper, *(self.lower or ()))

    def _arrays(self) -> dict[str, Array]:
        return {"leaves": self.leaves} | {
            f"{side}.{level}.{name}": getattr(block, name)
            for side, blocks in self._sides.items()
            for level, block in enumerate(blocks)
            for name in "USV"
        }

    def blocks(self, level: int) -> tuple[LowRank, LowRank]:
        """Return ``B12`` and ``B21`` of a level, also of a symmetric matrix.

        Parameters
        ----------
        level : int
            From 0, the root, to ``tree.levels - 1``.

        Returns
        -------
        tuple of LowRank
            Each (2**level, padded / 2**(level+1), same).
        """
        upper = self.upper[level]
        return upper, upper.H if self.lower is None else self.lower[level]

    def diagonal(self) -> Array:
        """Return the diagonal (n,)."""
        diagonal = self.space.xp.linalg.diagonal(self.leaves)
        return unpad_rows(self.space.xp.reshape(diagonal, (-1,)), self.tree)

    def _nodes(self, level: int, B11: Array, B22: Array) -> Array:
        B12, B21 = (block.to_dense() for block in self.blocks(level))
        return block_matrix(B11, B12, B21, B22)

    def map(
        self,
        change: Callable[[Array], Array],
        scales: Callable[[Array], Array] | None = None,
    ) -> HODLR:
        """Return a copy with ``change`` applied to each array, ``scales`` to each S."""
        scales = change if scales is None else scales

        def mapped(blocks: tuple[LowRank, ...]) -> tuple[LowRank, ...]:
            return tuple(LowRank(change(b.U), scales(b.S), change(b.V)) for b in blocks)

        sides = map(mapped, self._sides.values())
        return from_sides(self.tree, change(self.leaves), sides, self.error)

    def _release(self) -> None:
        """Drop the arrays, whose memory a factorization takes over."""
        for name in ("leaves", "upper", "lower"):
            object.__delattr__(self, name)

    def __getattr__(self, name: str) -> Any:
        if name in ("leaves", "upper") and "tree" in vars(self):
            msg = (
                "This matrix was overwritten by its factorization. Keep it with "
                "factorize(H, overwrite=False)."
            )
            raise OverwrittenError(msg)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    def _apply(self, x: Array, top: int = 0) -> Array:
        """Product with a padded block; with ``top``, of the part at and below a level."""
        pairs = (self.blocks(level) for level in range(top, self.tree.levels))
        return apply_blocks(pairs, x, block_diagonal_times(self.leaves, x))

    def _apply_adjoint(self, x: Array) -> Array:
        return self.H._apply(x)

    def _row(self, row: int) -> Array:
        xp, m = self.space.xp, self.tree.leaf_size
        found = self.leaves[row // m, row % m, :]
        for level in reversed(range(self.tree.levels)):
            half = self.tree.size(level + 1)
            node, side = divmod(row // half, 2)
            block = self.blocks(level)[side]
            u = block.U[node, row % half, :] * block.S[node, :]
            other = xp.reshape(conjugate(block.V[node, ...]) @ u[:, None], (half,))
            found = xp.concat([other, found] if side else [found, other])
        return found

    def _entries(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        xp, tree, m = self.space.xp, self.tree, self.tree.leaf_size
        # the level of the node whose halves part row and column: frexp counts the bits
        parted = tree.levels - np.frexp((rows // m) ^ (columns // m))[1]
        found = [np.nonzero(parted == tree.levels)[0]]
        places = rows[found[0]] * m + columns[found[0]] % m
        values = [self._take(xp.reshape(self.leaves, (-1,)), places)]
        for level in range(tree.levels):
            half = tree.size(level + 1)
            for side, block in enumerate(self.blocks(level)):
                here = np.nonzero((parted == level) & (rows // half % 2 == side))[0]
                if not len(here):
                    continue
                U, V = self._factor_rows(block, level, rows[here], columns[here])
                found.append(here)
                values.append(xp.sum(U * conjugate(V), axis=-1))
        back = np.argsort(np.concatenate(found))
        return self._take(xp.concat(values), back)

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        xp, tree, m = self.space.xp, self.tree, self.tree.leaf_size
        i, j = rows[:, None], columns[None, :]
        total = self._take(xp.reshape(self.leaves, (-1,)), i * m + j % m)
        same = self.space.integers(i // m == j // m)
        total = xp.where(same, total, 0.0)
        for level in range(tree.levels):
            half = tree.size(level + 1)
            for side, block in enumerate(self.blocks(level)):
                # row and column in the two halves of a node
                parted = (i // half % 2 == side) & (i // half ^ 1 == j // half)
                if parted.any():
                    U, V = self._factor_rows(block, level, rows, columns)
                    met = self.space.integers(parted)
                    total = xp.where(met, U @ adjoint(V), total)
        return total

    def _factor_rows(
        self, block: LowRank, level: int, rows: np.ndarray, columns: np.ndarray
    ) -> tuple[Array, Array]:
        """Rows of ``U diag(S)`` and of ``V`` at padded rows and columns, (e, r)."""
        xp, half = self.space.xp, self.tree.size(level + 1)
        nodes = rows // (2 * half)
        shape = (self.tree.padded // 2, block.rank)
        U, V = (xp.reshape(x, shape) for x in (block.U, block.V))
        U = self._take(U, nodes * half + rows % half)
        V = self._take(V, columns // (2 * half) * half + columns % half)
        return U * self._take(block.S, nodes), V

    def __repr__(self) -> str:
        if "leaves" not in vars(self):
            return f"HODLR(n={self.tree.n}, levels={self.tree.levels}, overwritten)"
        kind = "symmetric" if self.symmetric else "general"
        return self._describe(f"ranks={self.ranks}", kind)


def from_sides(
    tree: ClusterTree,
    leaves: Array,
    sides: Iterable[Iterable[LowRank]],
    error: float | None = None,
) -> HODLR:
    """Return a matrix of one side's blocks, if symmetric, or of those of both."""
    upper, *lower = map(tuple, sides)
    return HODLR(tree, leaves, upper, lower[0] if lower else None, error)


def apply_blocks(pairs: Iterable[tuple[LowRank, LowRank]], x: Array, y: Array) -> Array:
    """Return ``y`` plus the product of ``x`` (padded, q) with off-diagonal blocks.

    Computed in the memory of ``y``: large sums of their own cost more than the products.
    ``pairs`` are ``B12`` and ``B21`` of a level each, any number of levels.
    """
    xp, q = namespace(x), x.shape[1]
    for B12, B21 in pairs:
        nodes, _, half = B12.shape
        halves = xp.reshape(x, (nodes, 2, half, q))
        sums = xp.reshape(y, halves.shape)
        add_product(sums[:, 0, :, :], B12.U, B12._inner(halves[:, 1, :, :]))
        add_product(sums[:, 1, :, :], B21.U, B21._inner(halves[:, 0, :, :]))
        y = xp.reshape(sums, x.shape)
    return y


def frobenius_norm(leaves: Array, sides: Iterable[Iterable[LowRank]]) -> float:
    """Return the Frobenius norm of a matrix of one side's blocks, if symmetric, or both."""
    both = [[core(block) for block in side] for side in sides]
    own, *off = safe_norms([leaves, *itertools.chain(*both)])
    return math.hypot(own, math.hypot(*off) * (math.sqrt(2) if len(both) == 1 else 1))


def clear_padding(H: HODLR) -> HODLR:
    """Return ``H`` with zeros in all padded rows and columns.

    Where factors lack rank, QR and singular value decompositions complete them by
    orthonormal columns that need not be zero there.
    """
    tree, xp = H.tree, H.space.xp
    if tree.padded == tree.n:
        return H
    real = real_rows(tree, H.space)

    def cleared(x: Array, which: Array) -> Array:
        return xp.where(which, x, 0.0)

    def blocks(first: int, side: tuple[LowRank, ...]) -> Iterator[LowRank]:
        for level, block in enumerate(side):
            halves = xp.reshape(real, (tree.nodes(level), 2, -1, 1))
            U = cleared(block.U, halves[:, first, :, :])
            V = cleared(block.V, halves[:, 1 - first, :, :])
            yield LowRank(U, block.S, V)

    rows = xp.reshape(real, H.leaves.shape[:2])
    leaves = cleared(H.leaves, rows[:, :, None] & rows[:, None, :])
    sides = itertools.starmap(blocks, enumerate(H._sides.values()))
    return from_sides(tree, leaves, sides, H.error)
