"""What everything that acts like a square matrix has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

from hmatrix._backend import Array, Space, transpose
from hmatrix._checks import ShapeError, check_operand, check_space
from hmatrix.tree import ClusterTree

__all__ = ["Operator", "StoredOperator", "apply_padded", "pad_rows"]


def pad_rows(x: Array, rows: int) -> Array:
    """Append zero rows to ``x`` (n, q) until it has ``rows``."""
    space = Space.of(x)
    missing = rows - x.shape[0]
    if not missing:
        return x
    return space.xp.concat([x, space.zeros(missing, *x.shape[1:])], axis=0)


def apply_padded(
    name: str,
    x: Array,
    tree: ClusterTree,
    space: Space,
    apply: Callable[[Array], Array],
    ndims: tuple[int, ...] = (1, 2),
) -> Array:
    """Check ``x`` (n,) or (n, q), pad it, apply, and take the padding off again."""
    x = check_operand(name, x, space)
    shape, n = tuple(x.shape), tree.n
    if len(shape) not in ndims or shape[0] != n:
        expected = " or ".join(("", f"({n},)", f"({n}, q)")[i] for i in ndims)
        msg = f"`{name}` must have shape {expected}, got {shape}."
        raise ShapeError(msg)
    block = x[:, None] if len(shape) == 1 else x
    y = apply(pad_rows(block, tree.padded))[:n, :]
    return y[:, 0] if len(shape) == 1 else y


class Operator(ABC):
    """A square matrix that acts on vectors and blocks of vectors from both sides.

    Subclasses supply ``tree``, ``space`` and the products with padded blocks.
    """

    # NumPy must leave ``array @ H`` to ``H.__rmatmul__``.
    __array_ufunc__: ClassVar[None] = None

    tree: ClusterTree

    @property
    @abstractmethod
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""

    @abstractmethod
    def _apply(self, x: Array) -> Array:
        """Product with a padded block, (padded, q) to (padded, q)."""

    @abstractmethod
    def _apply_transposed(self, x: Array) -> Array:
        """Product of the transpose with a padded block."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.tree.n, self.tree.n

    @property
    def dtype(self) -> Any:
        """Dtype of the numbers, an object of their library."""
        return self.space.dtype

    @property
    def device(self) -> Any:
        """Device of the numbers."""
        return self.space.device

    def matvec(self, x: Array) -> Array:
        """Multiply with a vector ``x`` (n,)."""
        return self._product(x, self._apply, 1)

    def matmat(self, x: Array) -> Array:
        """Multiply with a block ``x`` (n, q)."""
        return self._product(x, self._apply, 2)

    def rmatvec(self, x: Array) -> Array:
        """Multiply the transpose with a vector ``x`` (n,)."""
        return self._product(x, self._apply_transposed, 1)

    def rmatmat(self, x: Array) -> Array:
        """Multiply the transpose with a block ``x`` (n, q)."""
        return self._product(x, self._apply_transposed, 2)

    def to_dense(self) -> Array:
        """Return the matrix as one array (n, n). For tests and small n."""
        return self._apply(pad_rows(self.space.eye(self.tree.n), self.tree.padded))[
            : self.tree.n, :
        ]

    def _describe(self, *words: str, nbytes: int) -> str:
        """Text of ``repr``: sizes, what the subclass adds, and where it lives."""
        size, unit = float(nbytes), "B"
        for larger in ("kB", "MB", "GB", "TB"):
            if size >= 1000:
                size, unit = size / 1000, larger
        facts = (
            f"n={self.tree.n}",
            f"levels={self.tree.levels}",
            *words,
            self.space.name,
            self.space.place,
            f"{size:.3g} {unit}",
        )
        return f"{type(self).__name__}({', '.join(facts)})"

    def _product(self, x: Array, apply: Callable[[Array], Array], *ndims: int) -> Array:
        return apply_padded("x", x, self.tree, self.space, apply, ndims or (1, 2))

    def __matmul__(self, x: Array) -> Array:
        return self._product(x, self._apply)

    def __rmatmul__(self, x: Array) -> Array:
        x = check_operand("x", x, self.space)
        if len(x.shape) == 2:
            return transpose(self._product(transpose(x), self._apply_transposed))
        return self._product(x, self._apply_transposed)


class StoredOperator(Operator):
    """An operator that is the arrays it holds."""

    leaves: Array

    @abstractmethod
    def map(self, change: Callable[[Array], Array]) -> Self:
        """Return a copy with ``change`` applied to each stored array."""

    def to(self, *, like: Array | None = None, dtype: object = None) -> Self:
        """Return a copy in the library and device of ``like`` and in ``dtype``.

        Parameters
        ----------
        like : array, optional
            Array whose library and device, and dtype if ``dtype`` is not given,
            to take; default: this matrix's own.
        dtype : str or dtype, optional
            ``"float32"`` or ``"float64"``.
        """
        space = check_space(Space.like(self.leaves if like is None else like, dtype))
        return self.map(space.asarray)
