"""Arrays of any library: what they are, and what the standard leaves out."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import array_api_compat
import numpy as np

__all__ = [
    "COMPLEX",
    "FLOATS",
    "HALVES",
    "NUMBERS",
    "Array",
    "Namespace",
    "add_product",
    "add_to_diagonals",
    "adjoint",
    "block_diagonal_times",
    "block_matrix",
    "conjugate",
    "detach",
    "dtype_name",
    "is_array",
    "is_real",
    "is_writeable",
    "materialized",
    "multiply_into",
    "namespace",
    "plus_product",
    "positive_or_one",
    "real_part",
    "squares",
    "to_numpy",
    "to_one",
    "transpose",
]

Array = Any  # an array of any supported library; the standard has no common type
Namespace = Any
_namespaces: dict[type, Namespace] = {}
_names: dict[tuple[type, object], str] = {}

FLOATS = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
NUMBERS = (*FLOATS, *COMPLEX)
HALVES = ("float16", "bfloat16")


def is_array(x: object) -> bool:
    """Tell whether ``x`` is an array of a supported library."""
    # a masked array's hidden numbers would be read as if they were valid
    masked = isinstance(x, np.ma.MaskedArray)
    return not masked and bool(array_api_compat.is_array_api_obj(x))


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace of ``x``."""
    kind = type(x)
    # called thousands of times for one matrix: found once for each type
    if kind not in _namespaces:
        # NumPy follows the standard since 2.1, and the calls through array-api-compat
        # would take a twentieth of the time that small matrices take
        numpys = issubclass(kind, np.ndarray | np.generic)
        bare = numpys and hasattr(np, "cumulative_sum")
        _namespaces[kind] = array_api_compat.array_namespace(
            x, use_compat=False if bare else None
        )
    return _namespaces[kind]


def dtype_name(dtype: object) -> str:
    """Return the bare name of a dtype of any library, ``float32`` say.

    Strings are read as NumPy reads them.

    Examples
    --------
    >>> import numpy as np
    >>> from hmatrix._backend import dtype_name
    >>> dtype_name(np.dtype("float64")), dtype_name(np.float32), dtype_name("float32")
    ('float64', 'float32', 'float32')
    >>> dtype_name(float), dtype_name(complex)  # as NumPy takes them; torch.float is single
    ('float64', 'complex128')
    >>> dtype_name("f8"), dtype_name("double"), dtype_name("torch.float32")
    ('float64', 'float64', 'float32')
    """
    if dtype is float or dtype is complex:
        dtype = np.dtype(dtype)
    # by type first: dtypes of two libraries are not to be compared
    key = type(dtype), dtype
    if key not in _names:
        name = getattr(dtype, "__name__" if isinstance(dtype, type) else "name", None)
        name = name if isinstance(name, str) else str(dtype).rsplit(".", 1)[-1]
        if isinstance(dtype, str):
            with suppress(TypeError):  # of other names, bfloat16 among them
                name = np.dtype(name).name
        _names[key] = name
    return _names[key]


def detach(x: Array) -> Array:
    """Cut a torch tensor off its autograd graph; return other arrays as they are."""
    return x.detach() if array_api_compat.is_torch_array(x) else x


def materialized(x: Array) -> Array:
    """Carry out the conjugation or negation that torch puts off for some views."""
    return x.resolve_conj().resolve_neg() if array_api_compat.is_torch_array(x) else x


def to_numpy(x: Array) -> np.ndarray:
    """Return an array of any library and device as one of NumPy, a view if possible."""
    if array_api_compat.is_torch_array(x):
        return np.asarray(materialized(x.detach().cpu()))
    if array_api_compat.is_cupy_array(x):
        if x.ndim > 1 and not x.flags.c_contiguous:
            turned = x.swapaxes(-2, -1)
            if turned.flags.c_contiguous:  # `get` would not keep columns in one piece
                return np.swapaxes(turned.get(), -2, -1)
        return np.asarray(x.get())
    if array_api_compat.is_numpy_array(x):
        return np.asarray(x)
    return np.from_dlpack(x)


def transpose(x: Array) -> Array:
    """Swap the last two axes."""
    return namespace(x).matrix_transpose(x)


def conjugate(x: Array) -> Array:
    """Return the complex conjugate; a real array is returned as it is."""
    return namespace(x).conj(x) if dtype_name(x.dtype) in COMPLEX else x


def adjoint(x: Array) -> Array:
    """Swap the last two axes and conjugate."""
    return conjugate(transpose(x))


def block_matrix(A11: Array, A12: Array, A21: Array, A22: Array) -> Array:
    """Return ``[[A11, A12], [A21, A22]]``, of batches of matrices too."""
    concat = namespace(A11).concat
    rows = concat([A11, A12], axis=-1), concat([A21, A22], axis=-1)
    return concat(rows, axis=-2)


def block_diagonal_times(blocks: Array, x: Array) -> Array:
    """Multiply rows x (b m, q) with the matrix of diagonal blocks (b, m, m)."""
    xp = namespace(x)
    y = blocks @ xp.reshape(x, (*blocks.shape[:2], x.shape[1]))
    return xp.reshape(y, x.shape)


def is_writeable(x: Array) -> bool:
    """Tell whether ``x`` is contiguous (no two numbers share memory) and not read-only."""
    if array_api_compat.is_torch_array(x):
        return bool(x.is_contiguous())
    if array_api_compat.is_numpy_array(x):
        return bool(x.flags.c_contiguous and x.flags.writeable)
    return array_api_compat.is_cupy_array(x) and bool(x.flags.c_contiguous)


def squares(x: Array) -> Array:
    """Squares of absolute values, real."""
    if dtype_name(x.dtype) not in COMPLEX:
        return x * x
    xp = namespace(x)
    return xp.real(x) ** 2 + xp.imag(x) ** 2


def real_part(x: Array) -> Array:
    """Real part; a real array is returned as it is."""
    return namespace(x).real(x) if dtype_name(x.dtype) in COMPLEX else x


def is_real(x: Array) -> bool:
    """Tell whether all numbers are real, whatever their dtype is."""
    xp = namespace(x)
    return dtype_name(x.dtype) not in COMPLEX or bool(xp.all(xp.imag(x) == 0))


def positive_or_one(x: Array) -> Array:
    """Return ``x``, with 1 where it is not positive, to divide by."""
    xp = namespace(x)
    return xp.where(x > 0, x, 1.0)


def to_one(x: Array) -> tuple[Array, Array]:
    """Divide matrices (..., m, n) by their largest absolute values, and return those (...).

    Where that is subnormal, by which complex division overflows, it is 1 instead.
    """
    xp = namespace(x)
    if not x.shape[-1]:
        return x, xp.sum(xp.abs(x), axis=(-2, -1)) + 1
    top = xp.max(xp.abs(x), axis=(-2, -1))
    normal = top >= xp.finfo(x.dtype).smallest_normal
    top = xp.where(normal, top, 1.0)
    return x / top[..., None, None], top


def add_product(x: Array, a: Array, b: Array, sign: int = 1) -> Array:
    """Return ``x ± a @ b`` (batches of matrices), computed in the memory of ``x``."""
    if array_api_compat.is_torch_array(x):
        return x.baddbmm_(a, b, alpha=sign)
    if sign < 0:
        x -= a @ b
    else:
        x += a @ b
    return x


def add_to_diagonals(blocks: Array, added: Array) -> Array:
    """Return blocks (b, m, m) with (b, m) on their diagonals, in the memory of ``blocks``."""
    xp, m = namespace(blocks), int(blocks.shape[-1])
    flat = xp.reshape(blocks, (-1, m * m))
    flat[:, :: m + 1] += added
    return xp.reshape(flat, blocks.shape)


def plus_product(x: Array, a: Array, b: Array, *, own: bool = False) -> Array:
    """Return ``x + a @ b`` (batches of matrices), allocating no more than the result.

    With ``own`` it is computed in the memory of ``x``, unless torch records operations.
    """
    torch = array_api_compat.is_torch_array(x)
    if own and not (torch and any(t.requires_grad for t in (x, a, b))):
        return add_product(x, a, b)
    if torch:
        return x.baddbmm(a, b)
    product = a @ b
    product += x
    return product


def multiply_into(out: Array, a: Array, b: Array) -> None:
    """Write ``a @ b`` (batches of matrices) into ``out``, which is neither of them."""
    if type(out) is np.ndarray:
        np.matmul(a, b, out=out)
    elif array_api_compat.is_cupy_array(out) or (
        array_api_compat.is_torch_array(out)
        and not any(x.requires_grad for x in (out, a, b))
    ):
        namespace(out).matmul(a, b, out=out)
    else:
        out[...] = a @ b
