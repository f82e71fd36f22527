"""What everything that acts like a square matrix has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from hmatrix._backend import (
    NUMBERS,
    Array,
    Space,
    conjugate,
    detach,
    in_own_precision,
    nbytes,
    one_blas_thread_if_narrow,
    to_numpy,
    transpose,
)
from hmatrix._checks import (
    DTypeError,
    ShapeError,
    check_operand,
    check_shape,
    check_space,
    space_like,
)
from hmatrix._entries import Entries
from hmatrix.lowrank import LowRank
from hmatrix.tree import ClusterTree

__all__ = [
    "Operator",
    "StoredOperator",
    "apply_padded",
    "cleared",
    "operation",
    "pad_rows",
    "places",
    "real_rows",
    "unpad_rows",
]


def pad_rows(x: Array, tree: ClusterTree) -> Array:
    """Bring rows (n, ...) into the order of the leaves, zeros between: (padded, ...)."""
    space = Space.of(x)
    missing = tree.padded - tree.n
    if tree.plain and not missing:
        return x
    x = space.xp.concat([x, space.zeros(max(missing, 1), *x.shape[1:])], axis=0)
    if tree.plain:
        return x
    return space.xp.take(x, places("rows", tree, space), axis=0)


def unpad_rows(y: Array, tree: ClusterTree) -> Array:
    """Bring padded rows back into the order of the matrix: (n, ...)."""
    if tree.plain:
        return y[: tree.n, ...]
    space = Space.of(y)
    return space.xp.take(y, places("slots", tree, space), axis=0)


def places(name: str, tree: ClusterTree, space: Space) -> Array:
    """Return ``tree.rows`` or ``tree.slots`` as indices, brought to a device once."""
    if space.on_host:
        return space.integers(getattr(tree, name))
    key = (name, space.library, str(space.device))
    if key not in tree._moved:
        tree._moved[key] = space.integers(getattr(tree, name))
    return tree._moved[key]


def real_rows(tree: ClusterTree, space: Space) -> Array:
    """Which padded rows are rows of the matrix, bool (padded,)."""
    return places("rows", tree, space) < tree.n


def cleared(x: Array, tree: ClusterTree, rows: slice = slice(None)) -> Array:
    """Return ``rows`` of a padded block (rows, r) with zeros where they are padding.

    Singular vectors of rounding errors need not be zero in padding, and factorizations put
    ones on its diagonal, beside which all else may be tiny.
    """
    if tree.padded == tree.n:
        return x
    space = Space.of(x)
    real = places("rows", tree, space)[rows] < tree.n  # of these rows alone
    return space.xp.where(real[:, None], x, 0.0)


@in_own_precision
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
    if not block.shape[1]:
        return block  # of empty arrays `reshape` cannot infer sizes
    # a product with one vector gains from several threads where BLAS uses them
    several = block.shape[1] > 1
    with one_blas_thread_if_narrow(space, block.shape[1]) if several else nullcontext():
        y = unpad_rows(apply(pad_rows(block, tree)), tree)
    return y[:, 0] if len(shape) == 1 else y


class Operator(ABC):
    """A square matrix that acts on vectors and blocks of vectors from both sides.

    Subclasses supply ``tree``, ``space`` and the products with padded blocks.
    """

    # NumPy must leave ``array @ H`` to ``H.__rmatmul__``.
    __array_ufunc__: ClassVar[None] = None
    # What SciPy's sparse matrices ask of their factor, beside `__array__`.
    ndim: ClassVar[int] = 2

    tree: ClusterTree

    @property
    @abstractmethod
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""

    @abstractmethod
    def _apply(self, x: Array) -> Array:
        """Product with a padded block, (padded, q) to (padded, q)."""

    @abstractmethod
    def _apply_adjoint(self, x: Array) -> Array:
        """Product of the adjoint with a padded block."""

    @abstractmethod
    def diagonal(self) -> Array:
        """Return the diagonal (n,)."""

    def trace(self) -> float | complex:
        """Return the sum of the diagonal; `diagonal` is what has gradients."""
        total = detach(self.space.xp.sum(self.diagonal()))
        return complex(total) if self.space.is_complex else float(total)

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
        """Multiply the adjoint with a vector ``x`` (n,)."""
        return self._product(x, self._apply_adjoint, 1)

    def rmatmat(self, x: Array) -> Array:
        """Multiply the adjoint with a block ``x`` (n, q)."""
        return self._product(x, self._apply_adjoint, 2)

    @in_own_precision
    def to_dense(self) -> Array:
        """Return the matrix as one array (n, n). For tests and small n."""
        eye = pad_rows(self.space.eye(self.tree.n), self.tree)
        return unpad_rows(self._apply(eye), self.tree)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the matrix as a dense NumPy array, as `numpy.asarray` asks for it."""
        if copy is False:
            msg = "A dense array of a hierarchical matrix is always a new one."
            raise ValueError(msg)
        return np.asarray(to_numpy(self.to_dense()), dtype=dtype)

    def _product(self, x: Array, apply: Callable[[Array], Array], *ndims: int) -> Array:
        return apply_padded("x", x, self.tree, self.space, apply, ndims or (1, 2))

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, LowRank):
            return LowRank(self.matmat(x.U), x.S, x.V)
        return self._product(x, self._apply)

    def __rmatmul__(self, x: Any) -> Any:
        if isinstance(x, LowRank):
            return LowRank(x.U, x.S, self.rmatmat(x.V))
        # x A = conj(Aᴴ conj(xᵀ))ᵀ
        x = conjugate(check_operand("x", x, self.space))
        if len(x.shape) == 2:
            y = transpose(self._product(transpose(x), self._apply_adjoint))
        else:
            y = self._product(x, self._apply_adjoint)
        return conjugate(y)


class StoredOperator(Entries, Operator):
    """An operator that is the arrays it holds."""

    leaves: Array

    @property
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""
        return Space.of(self.leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        return nbytes(*self._arrays().values())

    @abstractmethod
    def _arrays(self) -> dict[str, Array]:
        """Return the stored arrays, by the names that files give them."""

    @abstractmethod
    def map(
        self,
        change: Callable[[Array], Array],
        scales: Callable[[Array], Array] | None = None,
    ) -> Self:
        """Return a copy with ``change`` applied to each stored array.

        ``scales`` is for those that are real in a complex matrix, if given.
        """

    @abstractmethod
    def _nodes(self, level: int, B11: Array, B22: Array) -> Array:
        """Return the nodes of a level (b, 2m, 2m), from their halves' ones (b, m, m)."""

    @in_own_precision
    def to_dense(self) -> Array:
        """Return the matrix as one array (n, n). For tests and small n."""
        dense = self.leaves
        for level in reversed(range(self.tree.levels)):
            m = self.tree.size(level + 1)
            halves = self.space.xp.reshape(dense, (-1, 2, m, m))
            dense = self._nodes(level, halves[:, 0, ...], halves[:, 1, ...])
        rows = transpose(unpad_rows(dense[0, ...], self.tree))
        return transpose(unpad_rows(rows, self.tree))

    def to(self, *, like: Array | None = None, dtype: object = None) -> Self:
        """Return the matrix in the library and device of ``like`` and in ``dtype``.

        Nothing is copied where the two can share memory (one device, the same dtype);
        arrays of NumPy or CuPy lose a torch tensor's gradients.

        Parameters
        ----------
        like : array, optional
            Array whose library and device, and dtype if ``dtype`` is not given,
            to take; default: this matrix's own.
        dtype : str or dtype, optional
            ``"float32"``, ``"float64"``, ``"complex64"`` or ``"complex128"``.

        Raises
        ------
        DTypeError
            If it is another dtype, or a real one for a complex matrix.
        BackendError
            If ``like`` is not an array.
        """
        like = self.leaves if like is None else like
        space = space_like(like, dtype)
        if self.space.is_complex and not space.is_complex:
            msg = f"`dtype` {space.name} cannot hold the imaginary parts of {self.space.name}."
            raise DTypeError(msg)
        return self.map(space.asarray, space.real.asarray)

    def copy(self) -> Self:
        """Return a copy that shares no memory, to overwrite one of the two for example."""
        return self.map(lambda x: Space.of(x).asarray(x, copy=True))

    def conj(self) -> Self:
        """Return the complex conjugate: a real matrix itself, with the same arrays."""
        return self.map(conjugate)

    def _check_leaves(self) -> None:
        """Raise unless the leaves fit the tree."""
        check_space(self.space, NUMBERS)
        tree, m = self.tree, self.tree.leaf_size
        check_shape("leaves", self.leaves, (tree.nodes(tree.levels), m, m))

    def _describe(self, *words: str) -> str:
        """Text of ``repr``: sizes, what the subclass adds, and where it lives."""
        size, unit = float(self.nbytes), "B"
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
            f"{self.nbytes / (self.space.itemsize * self.tree.n**2):.2g} of dense",
        )
        return f"{type(self).__name__}({', '.join(facts)})"

    # Functions that make new matrices are in modules that import this one, and enter
    # themselves by `operation`.

    def __add__(self, other: object) -> Any:
        return _operations["add"](self, other)

    def __radd__(self, other: object) -> Any:
        if isinstance(other, int) and other == 0:
            return self  # what `sum` begins with
        return self + other  # an array's own `+` says nothing of use

    def __sub__(self, other: object) -> Any:
        return _operations["subtract"](self, other)

    def __rsub__(self, other: object) -> Any:
        return -(self - other)

    def __neg__(self) -> Any:
        return _operations["scale"](self, -1.0)

    def __mul__(self, factor: object) -> Any:
        return _operations["scale"](self, factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return _operations["scale"](self, 1 / factor)

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, StoredOperator):
            return _operations["matmul"](self, x)
        return super().__matmul__(x)


_operations: dict[str, Callable[..., Any]] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def operation(function: Function) -> Function:
    """Make a function the one that an arithmetic operator of `StoredOperator` calls."""
    _operations[function.__name__] = function
    return function
