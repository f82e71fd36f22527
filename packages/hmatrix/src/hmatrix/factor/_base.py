"""What all factorizations can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import numpy as np

from hmatrix._backend import (
    Array,
    detach,
    known_gradients,
    nbytes,
    one_blas_thread_if_narrow,
    positive_or_one,
    safe_norm,
    wants_gradient,
    without_gradients,
)
from hmatrix._checks import (
    DTypeError,
    PrecisionError,
    ToleranceError,
    check_float,
    check_int,
    take_array,
)
from hmatrix._operator import Operator, apply_padded, cleared, pad_rows
from hmatrix.factor.symmetric import SymmetricFactor
from hmatrix.hodlr import HODLR
from hmatrix.mlr import MLR

__all__ = ["PROBES", "Factorization", "has_gradients", "narrow"]

Apply = Callable[[Array], Array]
Fact = TypeVar("Fact", bound="Factorization")
Result = TypeVar("Result")

#: Random vectors that an inverse is tried on. Of four, a Frobenius norm of 1 is taken for
#: 0.02 with a probability of 2e-7, for 1e-4 with one of 1e-17.
PROBES = 4

#: Refinement steps after which `Factorization.solve` gives up.
MOST_STEPS = 30


class Factorization(ABC):
    """A factorized matrix ``H + shift·I``.

    Attributes
    ----------
    matrix : HODLR or MLR
        What was factorized, without the shift.
    tree : ClusterTree
        The halving of the matrix.
    space : Space
        Library, dtype and device of the numbers.
    shift : float
        What was added to the diagonal.
    """

    _logdet: Array  # float64 ()
    _sign: Any = 1.0  # of the determinant, a number or an array ()
    _lost: float  # what `_check_precision` returned, where it is called
    _refinements = 1  # that solutions have by default

    def __init__(self, H: HODLR | MLR, shift: float) -> None:
        self.matrix = H
        self.tree = H.tree
        self.space = H.space
        if wants_gradient(shift):
            msg = "`shift` wants a gradient; add it by `hmatrix.shift`, or detach it."
            raise DTypeError(msg)
        try:
            self.shift = check_float("shift", shift)
        except DTypeError as error:
            msg = f"{error} Vectors and complex numbers are added by `hmatrix.shift`."
            raise DTypeError(msg) from None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.tree.n, self.tree.n

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without those of ``matrix``."""
        return nbytes(*self._arrays().values())

    def solve(
        self,
        b: Array,
        *,
        refine: int | None = None,
        rtol: float | None = None,
        adjoint: bool = False,
    ) -> Array:
        """Solve ``(H + shift·I) x = b``.

        Parameters
        ----------
        b : array (n,) or (n, q)
            Right-hand sides, in the library, dtype and device of the matrix.
        refine : int, optional
            Steps of iterative refinement, each a product and another solve. Default: 1
            by "inversion" and "orthogonal", to make up for inverted leaves and triangles
            where triangular solves would be backward stable. By "cholesky", whose
            inverted triangles cost the square root of the condition number at most, 1
            where a pivot is below the square root of epsilon, else 0.
        rtol : float, optional
            Go on until ``‖b − (H + shift·I) x‖ ≤ rtol · ‖b‖`` for every right-hand
            side.
        adjoint : bool
            Solve with the adjoint matrix.

        Returns
        -------
        array
            ``x``, of the shape of ``b``.

        Raises
        ------
        ShapeError, DTypeError, BackendError
            If ``b`` does not fit.
        ToleranceError
            If refinement stalls above ``rtol``.

        Examples
        --------
        >>> import numpy as np
        >>> import hmatrix as hm
        >>> t = np.linspace(0, 1, 200)
        >>> H = hm.from_dense(np.exp(-abs(t[:, None] - t)), levels=3)
        >>> x = hm.factorize(H).solve(t, rtol=1e-12)
        >>> bool(np.linalg.norm(H @ x - t) <= 1e-12 * np.linalg.norm(t))
        True
        """
        refine = self._refinements if refine is None else check_int("refine", refine, 0)
        rtol = None if rtol is None else check_float("rtol", rtol, minimum=0)
        inverse, product = self._products(adjoint)

        def apply(x: Array) -> Array:
            return cleared(inverse(x), self.tree)

        def solve(b: Array) -> Array:
            def residual(x: Array) -> Array:
                return self._residual(b, x, product)

            x = apply(b)
            for _ in range(refine):
                x = x + apply(residual(x))
            return x if rtol is None else self._refine(b, x, residual, apply, rtol)

        return apply_padded("b", b, self.tree, self.space, solve)

    def _multiply(self, x: Array) -> Array:
        """Product of ``H + shift·I`` with a padded block."""
        return self.matrix._apply(x) + self.shift * x

    def _multiply_adjoint(self, x: Array) -> Array:
        """Product of the adjoint with a padded block."""
        return self.matrix._apply_adjoint(x) + self.shift * x

    def _products(self, adjoint: bool) -> tuple[Apply, Apply]:
        """Return products with the inverse and with ``H + shift·I``, or with adjoints."""
        if adjoint:
            return self._apply_adjoint, self._multiply_adjoint
        return self._apply, self._multiply

    def _residual(self, b: Array, x: Array, product: Apply) -> Array:
        """Return ``b`` less the product with ``x``, both padded blocks."""
        return cleared(b - product(x), self.tree)

    def _with_gradients(
        self, b: Array, product: Apply, solve: Apply, solve_adjoint: Apply
    ) -> Array:
        """Solve with a step of refinement, which has gradients: dx = A⁻¹ (db − dA x)."""
        x = solve(detach(b))
        residual = self._residual(b, x, product)
        step = solve(detach(residual))
        return x + known_gradients(step, lambda g: [solve_adjoint(g)], [residual])

    def _refine(
        self, b: Array, x: Array, residual: Apply, apply: Apply, rtol: float
    ) -> Array:
        """Refine ``x`` until the residual of every column is small enough."""
        xp = self.space.xp
        # of entries of about 1, whose squares neither overflow nor underflow
        top = positive_or_one(xp.max(xp.abs(detach(b)), axis=0))
        sizes = positive_or_one(xp.linalg.vector_norm(detach(b) / top, axis=0))
        before = float("inf")
        for _ in range(MOST_STEPS):
            r = residual(x)
            norms = xp.linalg.vector_norm(detach(r) / top, axis=0)
            reached = float(xp.max(norms / sizes))
            if reached <= rtol:
                return x
            if not reached < before / 2:
                break
            before, x = reached, x + apply(r)
        msg = (
            f"`rtol` = {rtol:.3g} was not reached: refinement in {self.space.name} ends "
            f"at a relative residual of {reached:.3g}. Allow more, or use a `shift`"
            f"{self.space.or_wider(' or')}."
        )
        raise ToleranceError(msg, rtol, reached)

    def _check_precision(self, limit: float, advice: str, *, stable: bool) -> float:
        """Raise unless ``E = (H + shift·I) F⁻¹ − I`` is small, as `factorize` says.

        Random vectors find its Frobenius norm, which is returned. Only if that is too
        large, its spectral radius decides: ``det(I + E)`` is positive and refinement
        converges if that is below 1. Unless a factorization is backward ``stable``, and a
        step of refinement makes errors smaller, it is the root of the norm of ``E²``,
        which is what that step leaves.
        """
        space, tree = self.space, self.tree

        def error(z: Array) -> Array:
            return self._residual(z, cleared(self._apply(z), tree), self._multiply)

        with without_gradients(space.xp), np.errstate(all="ignore"):
            z = space.normal((tree.n, PROBES), tree.n, PROBES)
            first = error(pad_rows(z, tree))
            found = lost = safe_norm(first) / math.sqrt(PROBES)
            if found > limit and math.isfinite(found):
                radius = safe_norm(error(first / found)) / math.sqrt(PROBES)
                bound = math.sqrt(found * radius)
                found = min(found, radius if stable and bound < 1 else bound)
        if not found <= limit:
            msg = (
                f"The factorization has lost its digits: its inverse times the matrix "
                f"differs from the identity by {found:.3g}, allowed is {limit:.3g} in "
                f"{space.name}. Use a `shift`{advice}."
            )
            raise PrecisionError(msg, found)
        return lost

    def sample(self, z: Array | np.random.Generator, size: int | None = None) -> Array:
        """Return ``W z`` with ``W Wᴴ = H + shift·I``.

        White noise ``z`` becomes a sample of the normal distribution with this
        covariance.

        Parameters
        ----------
        z : array (n,) or (n, q), or numpy.random.Generator
            White noise of the library, dtype and device of the matrix; or what draws it.
        size : int, optional
            Samples to draw from a generator: the result is (n, size). Default: one, (n,).

        Returns
        -------
        array
            Of the shape of ``z``, or as ``size`` says.

        Raises
        ------
        TypeError
            If there is no such factor: a `HODLR` has one with ``method="cholesky"``. Or if
            a ``size`` is given beside an array, which has its own.
        ShapeError, DTypeError, BackendError
            If ``z`` does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import hmatrix as hm
        >>> t = np.linspace(0, 1, 200)
        >>> H = hm.from_dense(np.exp(-abs(t[:, None] - t)), levels=3)
        >>> F = hm.factorize(H, method="cholesky")
        >>> W = F.sample(np.eye(200))
        >>> bool(np.allclose(W @ W.T, H))
        True
        >>> F.sample(np.random.default_rng(0), 5).shape
        (200, 5)
        """
        factor = self._symmetric_factor()
        if isinstance(z, np.random.Generator):
            z = self._noise(z, size)
        elif size is not None:
            msg = (
                "`size` goes with a `numpy.random.Generator`; an array `z` has its own."
            )
            raise TypeError(msg)
        return apply_padded("z", z, self.tree, self.space, factor.apply)

    def _noise(self, generator: np.random.Generator, size: int | None) -> Array:
        """Draw standard normal numbers (n,) or (n, size), complex ones of variance 1."""
        count = () if size is None else (check_int("size", size, 0),)
        shape = (2, self.tree.n, *count)
        if not self.space.is_complex:
            return self.space.asarray(generator.standard_normal(shape[1:]))
        real, imaginary = generator.standard_normal(shape) / math.sqrt(2)
        return self.space.asarray(real + 1j * imaginary)

    def whiten(self, x: Array) -> Array:
        """Return ``W⁻¹ x``, the inverse of `sample`; ``‖W⁻¹ x‖² = xᴴ (H + shift·I)⁻¹ x``.

        Parameters
        ----------
        x : array (n,) or (n, q)
            Of the library, dtype and device of the matrix.

        Returns
        -------
        array
            Of the shape of ``x``.

        Raises
        ------
        TypeError
            If there is no such factor: a `HODLR` has one with ``method="cholesky"``.
        ShapeError, DTypeError, BackendError
            If ``x`` does not fit.
        """
        factor = self._symmetric_factor()
        return apply_padded("x", x, self.tree, self.space, factor.solve)

    def _symmetric_factor(self) -> SymmetricFactor:
        msg = (
            f"{type(self).__name__} has no symmetric factor W; use "
            'factorize(H, method="cholesky") of a positive definite matrix.'
        )
        raise TypeError(msg)

    @abstractmethod
    def _apply(self, x: Array) -> Array:
        """Product of the inverse with a padded block."""

    def _apply_adjoint(self, x: Array) -> Array:
        """Product of the adjoint inverse with a padded block: Hermitian, unless said."""
        return self._apply(x)

    # NumPy must leave ``array @ F`` to ``F.__rmatmul__``.
    __array_ufunc__: ClassVar[None] = None

    def __matmul__(self, x: object) -> NoReturn:
        msg = (
            "A factorization is not a matrix: `F.solve(b)` applies its inverse, "
            "`F.inverse() @ b` too, and `F.matrix @ b` multiplies with what was factorized."
        )
        raise TypeError(msg)

    __rmatmul__ = __matmul__

    @abstractmethod
    def inverse(self) -> Operator:
        """Return the inverse as an operator."""

    @abstractmethod
    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,)."""

    def slogdet(self) -> tuple[float | complex, Any]:
        """Return sign and log of the absolute value of the determinant.

        Both are Python numbers, the sign a complex one of absolute value 1 for a
        complex matrix that is not Hermitian. If the matrix holds torch tensors that
        want gradients, the log is a float64 tensor () with one.
        """
        value = self._logdet
        return self._sign_of_determinant(), (
            value if wants_gradient(value) else float(value)
        )

    def _sign_of_determinant(self) -> float | complex:
        sign, H = complex(self._sign), self.matrix
        if not self.space.is_complex or isinstance(H, MLR) or H.symmetric:
            return math.copysign(1.0, sign.real)  # real, to rounding
        return sign / abs(sign)

    def logdet(self) -> Any:
        """Return the log of the determinant.

        A float; or a float64 tensor (), if the matrix holds torch tensors that want
        gradients.

        Raises
        ------
        ValueError
            If the determinant is negative, or complex by more than the square root of
            epsilon; `slogdet` gives its sign.
        """
        sign, value = self.slogdet()
        # of a complex matrix whose determinant is real, rounding is imaginary
        if not abs(sign - 1) <= math.sqrt(self.space.eps):
            msg = (
                f"The determinant has sign {sign} and no real log; use slogdet(). If the "
                "matrix should be positive definite, its compression was too loose: use "
                "a smaller `rtol`, a larger `shift`, or `definite=True`."
            )
            raise ValueError(msg)
        return value

    @abstractmethod
    def _arrays(self) -> dict[str, Array]:
        """Arrays that, with matrix and shift, are the factorization."""

    @classmethod
    def _restore(cls, H: Any, shift: float, arrays: Mapping[str, Array]) -> Self:
        """Return the factorization of ``H`` that has these arrays."""
        self = cls.__new__(cls)
        Factorization.__init__(self, H, shift)
        self._logdet = take_array(arrays, "logdet", ())
        self._set_arrays(arrays)
        return self

    @abstractmethod
    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Take back what `_arrays` gave."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n={self.tree.n}, levels={self.tree.levels}, "
            f"{self.space.name}, {self.space.place})"
        )


def narrow(method: Callable[[Fact], Result]) -> Callable[[Fact], Result]:
    """Hold BLAS to one thread in a method if all arrays of the factorization are narrow."""

    @wraps(method)
    def held(self: Fact) -> Result:
        arrays = [x for x in self._arrays().values() if len(x.shape) > 1]
        sides = (min(int(size) for size in x.shape[-2:]) for x in arrays)
        with one_blas_thread_if_narrow(self.space, *sides):
            return method(self)

    return held


def has_gradients(H: HODLR) -> bool:
    """Tell whether a matrix has tensors that want gradients."""
    return any(map(wants_gradient, H._arrays().values()))
