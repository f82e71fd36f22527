"""The inverse of a factorized matrix as an operator."""

from __future__ import annotations

from hmatrix._backend import Array, Space, conjugate
from hmatrix._checks import DTypeError
from hmatrix._operator import Operator
from hmatrix.factor._base import Factorization

__all__ = ["HODLRInverse"]


class HODLRInverse(Operator):
    """Inverse of a `HODLR` matrix as an operator.

    Its off-diagonal blocks have growing ranks, so it is applied from the factorization
    instead of being stored.
    """

    def __init__(self, factorization: Factorization, *, adjoint: bool = False) -> None:
        self.tree = factorization.tree
        self._factorization = factorization
        self._adjoint = adjoint

    @property
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""
        return self._factorization.space

    @property
    def H(self) -> HODLRInverse:
        """The adjoint inverse."""
        return HODLRInverse(self._factorization, adjoint=not self._adjoint)

    @property
    def T(self) -> HODLRInverse:
        """The transposed inverse, of a real matrix; a complex one has ``H``."""
        if self.space.is_complex:
            msg = "The inverse of a complex matrix is not transposed, use its adjoint `H`."
            raise DTypeError(msg)
        return self.H

    def diagonal(self) -> Array:
        """Return the diagonal (n,)."""
        diagonal = self._factorization.inverse_diagonal()
        return conjugate(diagonal) if self._adjoint else diagonal

    def _apply(self, x: Array) -> Array:
        factor = self._factorization
        return (factor._apply_adjoint if self._adjoint else factor._apply)(x)

    def _apply_adjoint(self, x: Array) -> Array:
        return self.H._apply(x)

    def __repr__(self) -> str:
        return "HODLRInverse(" + repr(self._factorization).partition("(")[2]
