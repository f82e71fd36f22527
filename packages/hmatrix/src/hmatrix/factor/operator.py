"""The inverse of a factorized matrix as an operator."""

from __future__ import annotations

from hmatrix._backend import Array, Space, conjugate
from hmatrix._checks import DTypeError, ToleranceError
from hmatrix._operator import Operator, cleared
from hmatrix.construct import from_matvec
from hmatrix.factor._base import Factorization
from hmatrix.hodlr import HODLR

__all__ = ["HODLRInverse", "stored_inverse"]


class HODLRInverse(Operator):
    """Inverse of a `HODLR` matrix as an operator.

    Its off-diagonal blocks have growing ranks, so it is applied from the factorization
    instead of being stored. Where that has lost digits, products have a step of refinement,
    as solutions do.
    """

    def __init__(
        self,
        factorization: Factorization,
        *,
        adjoint: bool = False,
        refined: bool = False,
    ) -> None:
        self.tree = factorization.tree
        self._factorization = factorization
        self._adjoint, self._refined = adjoint, refined

    @property
    def space(self) -> Space:
        """Library, dtype and device of the numbers."""
        return self._factorization.space

    @property
    def H(self) -> HODLRInverse:
        """The adjoint inverse."""
        return HODLRInverse(
            self._factorization, adjoint=not self._adjoint, refined=self._refined
        )

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
        inverse, product = factor._products(self._adjoint)
        y = inverse(x)
        if not self._refined:
            return y
        y = cleared(y, self.tree)
        return y + inverse(factor._residual(x, y, product))

    def _apply_adjoint(self, x: Array) -> Array:
        return self.H._apply(x)

    def __repr__(self) -> str:
        return "HODLRInverse(" + repr(self._factorization).partition("(")[2]


def stored_inverse(
    F: Factorization, rtol: float | None = None, max_rank: int | None = None
) -> HODLR:
    """Return the inverse as a matrix, found from solutions; see `from_matvec`."""
    assert isinstance(F.matrix, HODLR)
    symmetric = F.matrix.symmetric
    try:
        return from_matvec(
            F.inverse(), tree=F.tree, rtol=rtol, max_rank=max_rank, symmetric=symmetric
        )
    except ToleranceError as reason:
        msg = (
            f"A relative error of {reason.asked:.3g} was asked for, and {reason.reached:.3g} "
            f"reached: solutions in {F.space.name} have no more digits at this condition "
            "number. Allow more by `rtol` (gradients have none), or use a `shift`."
        )
        raise ToleranceError(msg, reason.asked, reason.reached) from None
