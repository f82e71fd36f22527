"""MLR: multilevel low rank, a sum of block-diagonal low-rank refinements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hmatrix._backend import (
    Array,
    add_product,
    adjoint,
    block_diagonal_times,
    block_matrix,
    conjugate,
    squares,
    to_numpy,
)
from hmatrix._checks import ShapeError, check_operand
from hmatrix._operator import StoredOperator, unpad_rows
from hmatrix.tree import ClusterTree

__all__ = ["MLR"]


@dataclass(frozen=True, eq=False, repr=False)
class MLR(StoredOperator):
    """Hermitian (symmetric, if real) multilevel low-rank matrix.

    ``A = blkdiag(L_j) + sign · Σ_k blkdiag_j(F_kj F_kjᴴ)``. With ``sign=1`` and
    positive semidefinite leaves it is positive semidefinite whatever the factors are;
    its inverse has the same shape with ``sign=-1`` (Parshakova, Hastie, Darve & Boyd,
    "Factor fitting, rank allocation, and partitioning in multilevel low rank
    matrices", 2023).

    Parameters
    ----------
    tree : ClusterTree
        The halving.
    leaves : array (2**K, m, m)
        Hermitian diagonal blocks ``L``. That they are is not checked: factorizations take
        their lower triangles for both.
    factors : tuple of array (2**k, padded / 2**k, r)
        ``F_k`` for each level k < K. Padded rows are zero.
    sign : {1, -1}
        Sign of the low-rank terms.

    Raises
    ------
    ShapeError
        If the parts do not fit the tree.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> stream = hm.StreamingMLR(100, levels=2, rank=5)
    >>> X = np.random.default_rng(0).standard_normal((30, 100))
    >>> stream.update(X)
    >>> A = stream.result()
    >>> bool(np.allclose(A.diagonal(), (X * X).mean(axis=0)))
    True
    """

    tree: ClusterTree
    leaves: Array
    factors: tuple[Array, ...]
    sign: int = 1

    def __post_init__(self) -> None:
        self._check_leaves()
        tree, shapes = self.tree, [tuple(F.shape) for F in self.factors]
        wanted = [(tree.nodes(k), tree.size(k)) for k in range(tree.levels)]
        if [shape[:-1] for shape in shapes] != wanted:
            msg = f"`factors` must have shapes {wanted} with (…, r), got {shapes}."
            raise ShapeError(msg)
        for F in self.factors:
            check_operand("factors", F, self.space)
        if self.sign not in (1, -1):
            msg = f"`sign` must be 1 or -1, got {self.sign!r}."
            raise ValueError(msg)

    @property
    def H(self) -> MLR:
        """The adjoint: the matrix itself."""
        return self

    @property
    def T(self) -> MLR:
        """The transpose: the matrix itself, or its complex conjugate."""
        return self.map(conjugate) if self.space.is_complex else self

    @property
    def ranks(self) -> tuple[int, ...]:
        """Largest number of non-zero columns of a factor, for each level."""
        return tuple(
            int(self.block_ranks(k).max(initial=0)) for k in range(self.tree.levels)
        )

    @property
    def _widths(self) -> list[int]:
        """Smaller side of each stored array: leaf size and ranks."""
        return [self.tree.leaf_size, *(int(F.shape[-1]) for F in self.factors)]

    def _arrays(self) -> dict[str, Array]:
        factors = {f"factors.{level}": F for level, F in enumerate(self.factors)}
        return {"leaves": self.leaves} | factors

    def block_ranks(self, level: int) -> np.ndarray:
        """Return the number of non-zero columns of each factor, int64 (2**level,)."""
        used = self.space.xp.any(self.factors[level] != 0, axis=-2)
        return np.asarray(np.count_nonzero(to_numpy(used), axis=-1))

    def diagonal(self) -> Array:
        """Return the diagonal (n,)."""
        xp = self.space.xp
        diagonal = xp.reshape(xp.linalg.diagonal(self.leaves), (-1,))
        for F in self.factors:
            part = xp.reshape(xp.sum(squares(F), axis=-1), (-1,))
            diagonal = diagonal + self.sign * part
        return unpad_rows(diagonal, self.tree)

    def trace(self) -> float:
        """Return the sum of the diagonal, which is real."""
        return complex(super().trace()).real

    def _nodes(self, level: int, B11: Array, B22: Array) -> Array:
        F, zero = self.factors[level], self.space.xp.zeros_like(B11)
        own = self.sign * (F @ adjoint(F))
        return block_matrix(B11, zero, zero, B22) + own

    def map(
        self,
        change: Callable[[Array], Array],
        scales: Callable[[Array], Array] | None = None,  # noqa: ARG002
    ) -> MLR:
        """Return a copy with ``change`` applied to each stored array."""
        factors = tuple(change(F) for F in self.factors)
        return MLR(self.tree, change(self.leaves), factors, self.sign)

    def _apply(self, x: Array) -> Array:
        xp, y = self.space.xp, block_diagonal_times(self.leaves, x)
        for F in self.factors:
            nodes = (*F.shape[:2], x.shape[1])
            part = adjoint(F) @ xp.reshape(x, nodes)
            y = add_product(xp.reshape(y, nodes), F, part, self.sign)
        return xp.reshape(y, x.shape)

    def _apply_adjoint(self, x: Array) -> Array:
        return self._apply(x)

    def _row(self, row: int) -> Array:
        return self._block(np.asarray([row]), np.arange(self.tree.padded))[0, :]

    def _entries(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        return self._gather(
            rows, columns, lambda F, G: self.space.xp.sum(F * conjugate(G), axis=-1)
        )

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        return self._gather(
            rows[:, None],
            columns[None, :],
            lambda F, G: F[:, 0, :] @ adjoint(G[0, ...]),
        )

    def _gather(
        self,
        rows: np.ndarray,
        columns: np.ndarray,
        multiply: Callable[[Array, Array], Array],
    ) -> Array:
        """Entries at padded rows and columns, which broadcast."""
        xp, m, take = self.space.xp, self.tree.leaf_size, self._take

        def where_one_node(level: int, x: Array) -> Array:
            size = self.tree.size(level)
            same = self.space.integers(rows // size == columns // size)
            return xp.where(same, x, 0.0)

        leaves = take(xp.reshape(self.leaves, (-1,)), rows * m + columns % m)
        total = where_one_node(self.tree.levels, leaves)
        for level, factor in enumerate(self.factors):
            F = xp.reshape(factor, (self.tree.padded, factor.shape[-1]))
            part = multiply(take(F, rows), take(F, columns))
            total = total + self.sign * where_one_node(level, part)
        return total

    def __repr__(self) -> str:
        words = (f"ranks={self.ranks}", *(("sign=-1",) if self.sign < 0 else ()))
        return self._describe(*words)
