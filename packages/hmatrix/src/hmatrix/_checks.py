"""Exceptions of the package, and the checks that raise them."""

from __future__ import annotations

import copyreg
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hmatrix._backend import (
    COMPLEX,
    FLOATS,
    HALVES,
    NUMBERS,
    Array,
    Space,
    detach,
    frobenius,
    is_array,
    namespace,
)

__all__ = [
    "BackendError",
    "DTypeError",
    "EntryError",
    "FileFormatError",
    "HMatrixError",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "OverwrittenError",
    "PrecisionError",
    "ShapeError",
    "SingularBlockError",
    "SingularLeafError",
    "ToleranceError",
    "check_array",
    "check_choice",
    "check_finite",
    "check_float",
    "check_int",
    "check_kind",
    "check_norm",
    "check_operand",
    "check_shape",
    "check_space",
    "not_finite",
    "remedy",
    "space_like",
    "take_array",
]


class HMatrixError(Exception):
    """Base of every exception that this package defines."""

    def __reduce__(self) -> tuple[Any, ...]:
        # copies, another process's too, are not made by `__init__`, which asks for more
        # than the message
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class ShapeError(HMatrixError, ValueError):
    """An array or a size does not fit."""


class DTypeError(HMatrixError, TypeError):
    """A dtype is not supported, or does not match."""


class BackendError(HMatrixError, TypeError):
    """Not an array, or an array of another library or device."""


class NonFiniteError(HMatrixError, ValueError):
    """Data hold NaN or infinite values."""


class EntryError(HMatrixError, IndexError):
    """A row or column is out of range, or not an integer."""


class FileFormatError(HMatrixError, ValueError):
    """A file is truncated, damaged or not one of ours."""


class SingularBlockError(HMatrixError, np.linalg.LinAlgError):
    """A block that the factorization must invert is singular.

    Attributes
    ----------
    level, node
        Where in the cluster tree.
    """

    def __init__(self, message: str, level: int, node: int) -> None:
        super().__init__(message)
        self.level = level
        self.node = node


class SingularLeafError(SingularBlockError):
    """A diagonal leaf block is singular."""


class NotPositiveDefiniteError(SingularBlockError):
    """A matrix that must be positive definite is not.

    Attributes
    ----------
    level, node
        Where in the cluster tree.
    """


class OverwrittenError(HMatrixError, RuntimeError):
    """A matrix whose memory a factorization has taken over is used."""


class PrecisionError(HMatrixError, ArithmeticError):
    """A factorization has lost too many digits to be one.

    Attributes
    ----------
    error
        Estimate of ``‖H F⁻¹ − I‖_F``, or if that is smaller of a bound of its spectral
        radius.
    """

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


class ToleranceError(HMatrixError, ArithmeticError):
    """An approximation does not reach the tolerance that was asked for.

    Attributes
    ----------
    asked, reached
        Relative errors or residuals: the one allowed and the one left.
    """

    def __init__(self, message: str, asked: float, reached: float) -> None:
        super().__init__(message)
        self.asked = asked
        self.reached = reached


def check_int(name: str, value: object, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        msg = f"`{name}` must be an integer, got {type(value).__name__} {value!r}."
        raise ShapeError(msg)
    if value < minimum:
        msg = f"`{name}` must be at least {minimum}, got {value}."
        raise ShapeError(msg)
    return int(value)


def check_float(name: str, value: Any, *, minimum: float = -math.inf) -> float:
    """Return ``value`` as a finite float of at least ``minimum``."""
    try:
        # `float` drops the imaginary part of NumPy's numbers, and takes arrays of one;
        # `complex` reads strings
        taken = not (np.ndim(value) or isinstance(value, str))
        given = complex(value) if taken else None
    except (TypeError, ValueError):
        given = None
    if given is None or given.imag:
        msg = f"`{name}` must be a real number, got {type(value).__name__}."
        raise DTypeError(msg)
    number = given.real
    if not math.isfinite(number):
        msg = f"`{name}` must be finite, got {number}."
        raise NonFiniteError(msg)
    if number < minimum:
        msg = f"`{name}` must be at least {minimum}, got {number}."
        raise ValueError(msg)
    return number


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value``, one of ``choices``."""
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}."
        raise ValueError(msg)
    return str(value)


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Raise unless ``value`` is an instance of one of ``kinds``."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        article = "an" if expected[0] in "AEIOU" else "a"
        got = type(value).__name__
        msg = f"`{name}` must be {article} {expected}, got {got}{remedy(value)}."
        raise TypeError(msg)


def check_space(space: Space, dtypes: tuple[str, ...] = FLOATS) -> Space:
    """Return ``space`` if its dtype is one of ``dtypes``."""
    if space.name not in dtypes:
        msg = (
            f"`dtype` must be one of {', '.join(dtypes)}, got {space.name}; name "
            "one of these, or convert the array."
        )
        raise DTypeError(msg)
    return space


def space_like(like: object, dtype: object = None) -> Space:
    """Return the space of an array that was given as ``like``, of NumPy if it is None."""
    return check_space(
        Space.like(None if like is None else check_array("like", like), dtype), NUMBERS
    )


def remedy(x: object, otherwise: str = "") -> str:
    """Return what to do with something that was not expected, as the end of a message."""
    if isinstance(x, np.ma.MaskedArray):
        return "; fill in what is masked, with its `filled` say"
    if is_array(x):
        return "; `from_dense` compresses an array"
    if hasattr(x, "tocsr"):
        return "; `from_sparse` compresses it, `toarray` makes it dense"
    if hasattr(x, "inverse_diagonal"):
        return "; it has a `matrix`, and `inverse()` is an operator"
    if hasattr(x, "factors"):
        return "; `from_matvec(M, symmetric=True)` makes a HODLR of an MLR"
    if hasattr(x, "rmatmat") and not hasattr(x, "leaves"):
        return (
            "; `matmul` is for stored matrices, and `hmatrix.inverse` stores an inverse"
        )
    return otherwise


def check_array(name: str, x: object, ndim: int | None = None) -> Array:
    """Return ``x``, an array of a supported library with ``ndim`` axes.

    NumPy's subclasses and foreign byte orders, those of mapped files say, become plain.
    """
    if not is_array(x):
        msg = (
            f"`{name}` must be a NumPy, PyTorch or CuPy array, "
            f"got {type(x).__name__}{remedy(x, '; convert it, with numpy.asarray say')}."
        )
        raise BackendError(msg)
    layout = str(getattr(x, "layout", "torch.strided"))
    if layout != "torch.strided":
        msg = (
            f"`{name}` has the layout {layout}, expected torch.strided; `to_dense` makes "
            "it dense, and `from_sparse` takes SciPy's sparse matrices."
        )
        raise BackendError(msg)
    if isinstance(x, np.ndarray) and not (type(x) is np.ndarray and x.dtype.isnative):
        x = np.asarray(x, dtype=x.dtype.newbyteorder("="))
    shape = tuple(x.shape)  # type: ignore[attr-defined]
    if ndim is not None and len(shape) != ndim:
        msg = f"`{name}` must have {ndim} axes, got shape {shape}."
        raise ShapeError(msg)
    return x


def check_operand(
    name: str, x: object, space: Space, *, narrower: bool = False
) -> Array:
    """Return ``x`` if it lives in ``space``; ``narrower`` floats may be allowed."""
    array = check_array(name, x)
    found = Space.of(array)
    if found.xp is not space.xp:
        msg = (
            f"`{name}` is a {found.library} array, expected {space.library}; "
            f"convert one side, or build the other with `like={name}`."
        )
        raise BackendError(msg)
    if found.device != space.device:
        msg = (
            f"`{name}` is on device {found.device}, expected {space.device}; move it "
            f"there, or build the other side with `like={name}`."
        )
        raise BackendError(msg)
    arrived, expected = found.name, space.name
    allowed: tuple[str, ...] = (expected,)
    if narrower and expected not in COMPLEX:
        allowed = (*FLOATS[: FLOATS.index(expected) + 1], *HALVES)
    if arrived not in allowed:
        other = f", or use a matrix of dtype {arrived}" if arrived in NUMBERS else ""
        msg = (
            f"`{name}` has dtype {arrived}, expected {' or '.join(allowed)}; "
            f"cast it{other}."
        )
        raise DTypeError(msg)
    return array


def check_finite(name: str, x: Array) -> float:
    """Return the Frobenius norm of ``x``, or raise if it or its square is not finite.

    What follows sums squares: numbers too large for that are as bad as infinity.
    """
    xp, space = namespace(x), Space.of(x)
    norm = float(frobenius(detach(x)))
    if not norm * norm <= float(xp.finfo(space.dtype).max):
        raise NonFiniteError(not_finite(name, x, space.name))
    return norm


def check_norm(norm: float, space: Space, *, whole: bool = True) -> float:
    """Return the norm of a matrix, or raise if squares of its parts are no numbers.

    Of a part of a matrix, not the ``whole``, a small norm says nothing.
    """
    largest = math.sqrt(float(space.xp.finfo(space.dtype).max))
    smallest = space.smallest_norm if whole else 0.0
    if norm == 0 or smallest <= norm <= largest:
        return norm
    msg = (
        f"The norm of the matrix is {norm:.3g}: squares of its entries and of errors "
        f"overflow or underflow in {space.name}; rescale it{space.or_wider(', or use')}."
    )
    raise NonFiniteError(msg)


def not_finite(name: str, x: Array, dtype: str) -> str:
    """Message about NaN, infinite or overflowing values in ``x``."""
    xp = namespace(x)
    count = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int64)))
    what = f"`{name}` of shape {tuple(x.shape)} holds"
    if count:
        return f"{what} {count} NaN or infinite values; drop or replace them first."
    return (
        f"{what} values too large to sum their squares in {dtype}; rescale them first."
    )


def check_shape(
    name: str, x: Array, shape: tuple[int | None, ...], why: str = ""
) -> Array:
    """Return ``x`` if it has this shape, in which None stands for any number.

    ``why`` comes after the shape in the message.
    """
    found = tuple(x.shape)
    fits = len(found) == len(shape) and all(
        want in (have, None) for have, want in zip(found, shape, strict=True)
    )
    if not fits:
        msg = f"`{name}` must have shape {shape}{why}, got {found}."
        raise ShapeError(msg)
    return x


def take_array(
    arrays: Mapping[str, Array], name: str, shape: tuple[int | None, ...]
) -> Array:
    """Return the array of this name, checked as by `check_shape`."""
    return check_shape(name, arrays[name], shape)
