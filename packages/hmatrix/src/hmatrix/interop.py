"""Hierarchical matrices as operators of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hmatrix._backend import Array, to_numpy
from hmatrix._checks import check_kind
from hmatrix._operator import Operator
from hmatrix.factor import Factorization

__all__ = ["aslinearoperator"]


def aslinearoperator(H: Operator) -> Any:
    """Return a ``scipy.sparse.linalg.LinearOperator`` that acts like ``H``.

    Parameters
    ----------
    H : HODLR, MLR, or what ``inverse`` returns
        The matrix, on any device: vectors are copied to it and back. Complex ones are
        multiplied with a real matrix part by part. Products with float64 vectors, of a
        float32 matrix, are float64 arrays of float32 accuracy, whatever the vectors' size.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        Of shape (n, n), with products of the transpose.

    Raises
    ------
    TypeError
        If ``H`` is not such a matrix; of a factorization, pass its `inverse`.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> from scipy.sparse.linalg import cg
    >>> t = np.linspace(0, 1, 100)
    >>> H = hm.from_dense(np.eye(100) + np.exp(-abs(t[:, None] - t)), levels=2)
    >>> x, info = cg(hm.aslinearoperator(H), t, rtol=1e-10)
    >>> info, bool(np.allclose(H @ x, t))
    (0, True)

    A factorization at a loose tolerance preconditions the matrix itself:

    >>> A = np.eye(100) + 1 / (1e-4 + abs(t[:, None] - t))
    >>> M = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-2, definite=True)).inverse()
    >>> steps = []
    >>> x, info = cg(A, t, M=hm.aslinearoperator(M), callback=steps.append)
    >>> info, len(steps) < 10
    (0, True)
    """
    from scipy.sparse.linalg import LinearOperator

    if isinstance(H, Factorization):
        msg = "`H` is a Factorization; pass `H.inverse()`, or the matrix itself."
        raise TypeError(msg)
    check_kind("H", H, Operator)
    dtype = np.dtype(H.space.name)

    def host(product: Callable[[Array], Array]) -> Callable[[np.ndarray], np.ndarray]:
        def apply(x: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(x) and not H.space.is_complex:
                return apply(x.real) + 1j * apply(x.imag)
            wide = np.result_type(x.dtype, dtype)
            if wide == dtype:
                return to_numpy(product(H.space.asarray(x)))
            # of about 1, lest numbers that only the wider dtype has become 0 or infinite
            size = np.max(np.abs(x), axis=0, initial=0.0)
            size = np.where((size > 0) & np.isfinite(size), size, 1.0)
            return to_numpy(product(H.space.asarray(x / size))).astype(wide) * size

        return apply

    return LinearOperator(
        H.shape,
        # SciPy hands vectors as (n,) or (n, 1); `@` takes both
        matvec=host(H.__matmul__),
        matmat=host(H.matmat),
        rmatvec=host(lambda x: H.rmatvec(x) if len(x.shape) == 1 else H.rmatmat(x)),
        rmatmat=host(H.rmatmat),
        dtype=dtype,
    )
