"""The cluster tree: how the index range is halved. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from hmatrix._checks import ShapeError, check_int

__all__ = ["ClusterTree"]


@dataclass(frozen=True)
class ClusterTree:
    """Recursive halving of ``range(n)``, ``levels`` times.

    The range is padded at its end to a multiple of ``2**levels``, so that all nodes
    of a level have one size and a level is one batch. Padded rows hold zeros and are
    never seen from outside.

    Parameters
    ----------
    n : int
        Number of rows and columns, at least 1.
    levels : int
        Number of halvings; ``levels=0`` is one dense leaf. ``2**levels <= n``.

    Raises
    ------
    ShapeError
        If ``n`` or ``levels`` is not an integer or out of range.

    Examples
    --------
    >>> import hmatrix as hm
    >>> tree = hm.ClusterTree(100, levels=3)
    >>> tree.leaf_size, tree.padded, tree.nodes(3), tree.size(1)
    (13, 104, 8, 52)
    """

    n: int
    levels: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_int("n", self.n, 1))
        object.__setattr__(self, "levels", check_int("levels", self.levels, 0))
        if self.levels > self.n.bit_length() - 1:
            msg = (
                f"`levels` = {self.levels} makes {2**self.levels} leaves of a matrix "
                f"with n = {self.n} rows; use at most {self.n.bit_length() - 1}."
            )
            raise ShapeError(msg)

    @classmethod
    def from_leaf_size(cls, n: int, leaf_size: int) -> ClusterTree:
        """Return the shallowest tree whose leaves have at most ``leaf_size`` rows.

        Examples
        --------
        >>> import hmatrix as hm
        >>> hm.ClusterTree.from_leaf_size(1000, 64)
        ClusterTree(n=1000, levels=4)
        """
        n = check_int("n", n, 1)
        leaf_size = check_int("leaf_size", leaf_size, 1)
        levels = (-(-n // leaf_size) - 1).bit_length()
        # leaf_size=1 of an n that is no power of two would need empty leaves
        return cls(n, min(levels, n.bit_length() - 1))

    @property
    def leaf_size(self) -> int:
        """Rows of a leaf, padding included."""
        return -(-self.n >> self.levels)

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
