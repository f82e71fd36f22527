"""What all factorizations can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hmatrix._backend import Array, Space
from hmatrix._checks import check_float, check_int
from hmatrix._operator import Operator, apply_padded, real_rows
from hmatrix.tree import ClusterTree

__all__ = ["Factorization", "shifted_leaves"]


class Factorization(ABC):
    """A factorized matrix ``H + shift·I``.

    Attributes
    ----------
    tree : ClusterTree
        The halving of the matrix.
    space : Space
        Library, dtype and device of the numbers.
    shift : float
        What was added to the diagonal.
    """

    def __init__(self, H: Operator, shift: float) -> None:
        self._matrix = H
        self.tree = H.tree
        self.space = H.space
        self.shift = check_float("shift", shift)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.tree.n, self.tree.n

    def solve(self, b: Array, *, refine: int = 1) -> Array:
        """Solve ``(H + shift·I) x = b``.

        Parameters
        ----------
        b : array (n,) or (n, q)
            Right-hand sides, in the library, dtype and device of the matrix.
        refine : int
            Steps of iterative refinement. One makes up for inverted leaves where LU
            factors would be backward stable; it costs a product and a second solve.

        Returns
        -------
        array
            ``x``, of the shape of ``b``.

        Raises
        ------
        ShapeError, DTypeError, BackendError
            If ``b`` does not fit.
        """
        refine = check_int("refine", refine, 0)

        def solve(b: Array) -> Array:
            x = self._apply(b)
            for _ in range(refine):
                x = x + self._apply(b - self._matrix._apply(x) - self.shift * x)
            return x

        return apply_padded("b", b, self.tree, self.space, solve)

    @abstractmethod
    def _apply(self, x: Array) -> Array:
        """Product of the inverse with a padded block."""

    @abstractmethod
    def inverse(self) -> Operator:
        """Return the inverse as an operator."""

    @abstractmethod
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,)."""

    @abstractmethod
    def slogdet(self) -> tuple[float | complex, float]:
        """Return sign and log of the absolute value of the determinant.

        The sign of a complex matrix that is not Hermitian is a complex number of
        absolute value 1.
        """

    def logdet(self) -> float:
        """Return the log of the determinant.

        Raises
        ------
        ValueError
            If the determinant is negative or complex; `slogdet` gives its sign.
        """
        sign, value = self.slogdet()
        if sign != 1:
            msg = f"The determinant has sign {sign} and no real log; use slogdet()."
            raise ValueError(msg)
        return value

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n={self.tree.n}, levels={self.tree.levels}, "
            f"{self.space.name}, {self.space.place})"
        )


def shifted_leaves(tree: ClusterTree, leaves: Array, shift: float) -> Array:
    """Add ``shift`` to the diagonal, and ones to the padded part of it.

    Identity in the padded rows keeps them apart from the others and out of the
    determinant.
    """
    space = Space.of(leaves)
    xp = space.xp
    added = xp.full((tree.padded,), shift, dtype=space.dtype, device=space.device)
    added = xp.where(real_rows(tree, space), added, xp.ones_like(added))
    added = xp.reshape(added, leaves.shape[:2])
    return leaves + added[:, :, None] * space.eye(tree.leaf_size)
