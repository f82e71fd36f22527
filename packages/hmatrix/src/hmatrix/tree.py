"""The cluster tree: how rows are ordered and halved. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hmatrix._backend import dtype_name, to_numpy
from hmatrix._checks import (
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_array,
    check_int,
)

__all__ = ["ClusterTree"]


@dataclass(frozen=True, eq=False, repr=False)
class ClusterTree:
    """Binary tree of index sets, ``levels`` deep, all leaves at one depth.

    Each leaf is padded to the size of the largest, so that all nodes of a level have
    one size and a level is one batch. Padded rows hold zeros and are never seen from
    outside: matrices take and give vectors in the original order.

    Parameters
    ----------
    n : int
        Number of rows and columns, at least 1.
    levels : int
        Number of halvings; ``levels=0`` is one dense leaf. ``2**levels <= n``.
    sizes : sequence of int (2**levels,), optional
        Rows of each leaf, some of which may be 0. Default: equal ones, what is missing
        taken from the end.
    permutation : sequence of int (n,), optional
        Rows in the order of the leaves, ``permutation[position]`` being a row of the
        matrix. Default: as they are.

    Raises
    ------
    ShapeError
        If ``n`` or ``levels`` is not an integer or out of range, or sizes and
        permutation do not fit them.

    Examples
    --------
    >>> from hmatrix import ClusterTree
    >>> tree = ClusterTree(100, levels=3)
    >>> tree.leaf_size, tree.padded, tree.nodes(3), tree.size(1)
    (13, 104, 8, 52)
    """

    n: int
    levels: int
    sizes: Any = None
    permutation: Any = None

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        store("n", check_int("n", self.n, 1))
        store("levels", check_int("levels", self.levels, 0))
        if self.levels > self.n.bit_length() - 1:
            msg = (
                f"`levels` = {self.levels} makes {2**self.levels} leaves of a matrix "
                f"with n = {self.n} rows; use at most {self.n.bit_length() - 1}."
            )
            raise ShapeError(msg)
        if self.sizes is not None:
            sizes = integers("sizes", self.sizes, self.nodes(self.levels))
            if sizes.min() < 0 or sizes.sum() != self.n:
                msg = (
                    f"`sizes` must be rows of leaves that sum to n = {self.n}, got "
                    f"{sizes.min()} at least and {sizes.sum()} in all."
                )
                raise ShapeError(msg)
            store(
                "sizes", None if np.array_equal(sizes, self._equal_sizes()) else sizes
            )
        if self.permutation is not None:
            order = integers("permutation", self.permutation, self.n)
            identity = np.arange(self.n)
            if not np.array_equal(np.sort(order), identity):
                msg = f"`permutation` must have each of 0 … {self.n - 1} once."
                raise ShapeError(msg)
            store("permutation", None if np.array_equal(order, identity) else order)

    @classmethod
    def from_leaf_size(cls, n: int, leaf_size: int) -> ClusterTree:
        """Return the shallowest tree whose leaves have at most ``leaf_size`` rows.

        With ``leaf_size=1`` leaves may have two rows, if ``n`` is no power of two.

        Raises
        ------
        ShapeError
            If an argument is not an integer of at least 1.

        Examples
        --------
        >>> from hmatrix import ClusterTree
        >>> ClusterTree.from_leaf_size(1000, 64)
        ClusterTree(n=1000, levels=4)
        """
        n = check_int("n", n, 1)
        leaf_size = check_int("leaf_size", leaf_size, 1)
        levels = (-(-n // leaf_size) - 1).bit_length()
        # leaf_size=1 of an n that is no power of two would need empty leaves
        return cls(n, min(levels, n.bit_length() - 1))

    @classmethod
    def from_sizes(
        cls,
        sizes: Sequence[int],
        permutation: Sequence[int] | None = None,
        *,
        leaf_size: int | None = None,
    ) -> ClusterTree:
        """Return a tree with leaves of given sizes, a power of two of them.

        All leaves are padded to the largest. With sizes of mean ``s`` and largest ``m``
        the arrays of a matrix have ``padded = n · m / s`` rows, and its leaves ``padded ·
        m`` numbers: cut so that the sizes are alike, or give ``leaf_size``.

        Parameters
        ----------
        sizes, permutation
            As of `ClusterTree`.
        leaf_size : int, optional
            Halve all leaves until none has more rows, or there are as many leaves as rows.
            That makes leaves cheaper, and leaves ``padded`` about as it is.

        Raises
        ------
        ShapeError
            If they are not a power of two of integers, or as `ClusterTree`.

        Examples
        --------
        >>> from hmatrix import ClusterTree
        >>> ClusterTree.from_sizes([3, 5, 2, 4])
        ClusterTree(n=14, levels=2, leaves of 2 to 5 rows)
        >>> tree = ClusterTree.from_sizes([1000, 100, 100, 100], leaf_size=64)
        >>> tree, tree.padded
        (ClusterTree(n=1300, levels=6, leaves of 6 to 63 rows), 4032)
        """
        count = len(sizes)
        if count < 1 or count & (count - 1):
            msg = f"`sizes` must be a power of two of them, got {count}."
            raise ShapeError(msg)
        parts: Any = integers("sizes", sizes, count)
        n, levels = int(parts.sum()), count.bit_length() - 1
        if leaf_size is not None:
            leaf_size = check_int("leaf_size", leaf_size, 1)
            while parts.max() > leaf_size and 2 << levels <= n:
                parts = _halves(parts)
                levels += 1
        return cls(n, levels, parts, permutation)

    @classmethod
    def from_points(cls, points: Any, leaf_size: int = 64) -> ClusterTree:
        """Return the k-d tree of points: halved across the longest side of their box.

        Points that are close together come close in the order, so that a kernel's
        blocks away from the diagonal have low rank.

        Parameters
        ----------
        points : array (n, d) or (n,)
            Coordinates, of any library.
        leaf_size : int
            Rows of a leaf at most.

        Raises
        ------
        ShapeError, BackendError
            If there are no points, or not an array of them.
        DTypeError
            If they are neither integers nor floats that NumPy has.
        NonFiniteError
            If a coordinate is NaN or infinite.

        Examples
        --------
        >>> import numpy as np
        >>> from hmatrix import ClusterTree
        >>> ClusterTree.from_points(np.random.default_rng(0).random((1000, 2)))
        ClusterTree(n=1000, levels=4, permuted, leaves of 62 to 63 rows)
        """
        points = check_array("points", points)
        if not (name := dtype_name(points.dtype)).startswith(("int", "uint", "float")):
            msg = f"`points` must be integers or floats, got {name}; convert them."
            raise DTypeError(msg)
        # where sides of boxes of narrow integers do not overflow
        points = to_numpy(points).astype(np.float64, copy=False)
        points = points[:, None] if points.ndim == 1 else points
        if points.ndim != 2 or not points.size:
            msg = f"`points` must have shape (n, d) or (n,), got {points.shape}."
            raise ShapeError(msg)
        if not np.isfinite(points).all():
            msg = "`points` has NaN or infinite coordinates; drop these rows."
            raise NonFiniteError(msg)
        n = len(points)
        levels = cls.from_leaf_size(n, leaf_size).levels
        order, sizes = np.arange(n), np.array([n])
        for _ in range(levels):
            placed = points[order]
            starts = np.cumsum(sizes) - sizes
            low = np.minimum.reduceat(placed, starts, axis=0)
            side = np.argmax(np.maximum.reduceat(placed, starts, axis=0) - low, axis=1)
            node = np.repeat(np.arange(len(sizes)), sizes)
            order = order[np.lexsort((placed[np.arange(n), side[node]], node))]
            sizes = _halves(sizes)
        return cls(n, levels, sizes, order)

    @property
    def plain(self) -> bool:
        """Whether rows keep their order and all padding is at the end."""
        return self.sizes is None and self.permutation is None

    @property
    def leaf_size(self) -> int:
        """Rows of a leaf, padding included."""
        return (
            -(-self.n >> self.levels) if self.sizes is None else int(self.sizes.max())
        )

    @property
    def padded(self) -> int:
        """Rows with padding, ``2**levels * leaf_size``."""
        return self.leaf_size << self.levels

    def nodes(self, level: int) -> int:
        """Return the number of nodes at ``level``; the root is level 0."""
        return 1 << level

    def size(self, level: int) -> int:
        """Return the rows of a node at ``level``, padding included."""
        return self.padded >> level

    @cached_property
    def slots(self) -> np.ndarray:
        """Where each row of the matrix is among the padded rows, int64 (n,)."""
        sizes = self._equal_sizes() if self.sizes is None else self.sizes
        # the rows of each leaf move to where the leaf begins
        begins = self.leaf_size * np.arange(len(sizes))
        moves = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
        slots: np.ndarray = np.arange(self.n) + moves
        if self.permutation is None:
            return slots
        placed = np.empty_like(slots)
        placed[self.permutation] = slots
        return placed

    @cached_property
    def rows(self) -> np.ndarray:
        """Which row of the matrix each padded row is, int64 (padded,); n: none."""
        rows = np.full(self.padded, self.n)
        rows[self.slots] = np.arange(self.n)
        return rows

    def counts(self, level: int) -> np.ndarray:
        """Return the rows of each node at ``level``, padding left out: int64 (2**level,)."""
        real = (self.rows < self.n).reshape(self.nodes(level), -1)
        counts: np.ndarray = np.count_nonzero(real, axis=1)
        return counts

    @cached_property
    def _moved(self) -> dict[Any, Any]:
        """Integers of this tree that have been brought to a device."""
        return {}

    def _equal_sizes(self) -> np.ndarray:
        m = -(-self.n >> self.levels)
        left = self.n - m * np.arange(self.nodes(self.levels))
        return np.clip(left, 0, m)

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return sizes and permutation, where a plain tree has none, by name."""
        both = {"sizes": self.sizes, "permutation": self.permutation}
        return {name: x for name, x in both.items() if x is not None}

    def _key(self) -> tuple[Any, ...]:
        arrays = ((name, x.tobytes()) for name, x in self._arrays().items())
        return self.n, self.levels, *arrays

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClusterTree):
            return NotImplemented
        return self is other or self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        words = [f"n={self.n}", f"levels={self.levels}"]
        if self.permutation is not None:
            words.append("permuted")
        if self.sizes is not None:
            words.append(f"leaves of {self.sizes.min()} to {self.sizes.max()} rows")
        return f"ClusterTree({', '.join(words)})"


def _halves(sizes: np.ndarray) -> np.ndarray:
    """Sizes of the two halves of each part."""
    return np.stack([(sizes + 1) // 2, sizes // 2], axis=1).ravel()


def integers(name: str, values: Any, count: int) -> np.ndarray:
    """Return ``count`` integers as int64."""
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        msg = (
            f"`{name}` must be {count} integers, got {array.dtype} of shape "
            f"{array.shape}."
        )
        raise ShapeError(msg)
    return array.astype(np.int64)
