"""Array libraries: one namespace, and the only door to their differences.

Everything else in the package is written against the array API standard. What the
standard leaves out (seeded normal numbers, conversion to NumPy, whether a failed
Cholesky raises) is settled here.
"""

from .arrays import (
    COMPLEX,
    FLOATS,
    HALVES,
    NUMBERS,
    Array,
    add_product,
    adjoint,
    conjugate,
    detach,
    dtype_name,
    is_array,
    is_writeable,
    multiply_into,
    namespace,
    plus_product,
    real_part,
    squares,
    to_numpy,
    transpose,
)
from .gradients import (
    known_gradients,
    wants_gradient,
    without_gradients,
)
from .linalg import (
    cholesky,
    complete_qr,
    eigh_descending,
    frobenius,
    inverse,
    inverse_lower,
    qr,
    slogdet,
    solve,
    svd,
    triangle,
    unscaled_norm,
)
from .precision import in_own_precision
from .space import (
    Space,
    contiguous,
    library,
    nbytes,
)
from .threads import (
    default_workers,
    in_threads,
    one_blas_thread,
    one_blas_thread_if_narrow,
    one_thread_if_small,
)

__all__ = [
    "COMPLEX",
    "FLOATS",
    "HALVES",
    "NUMBERS",
    "Array",
    "Space",
    "add_product",
    "adjoint",
    "cholesky",
    "complete_qr",
    "conjugate",
    "contiguous",
    "default_workers",
    "detach",
    "dtype_name",
    "eigh_descending",
    "frobenius",
    "in_own_precision",
    "in_threads",
    "inverse",
    "inverse_lower",
    "is_array",
    "is_writeable",
    "known_gradients",
    "library",
    "multiply_into",
    "namespace",
    "nbytes",
    "one_blas_thread",
    "one_blas_thread_if_narrow",
    "one_thread_if_small",
    "plus_product",
    "qr",
    "real_part",
    "slogdet",
    "solve",
    "squares",
    "svd",
    "to_numpy",
    "transpose",
    "triangle",
    "unscaled_norm",
    "wants_gradient",
    "without_gradients",
]
