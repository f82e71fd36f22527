"""Norms."""

from __future__ import annotations

import math
from typing import Any

from hmatrix._backend import (
    adjoint,
    conjugate,
    detach,
    floats,
    frobenius,
    in_own_precision,
    real_part,
    safe_norm,
    squares,
    without_gradients,
)
from hmatrix._checks import check_kind
from hmatrix._operator import Operator, pad_rows
from hmatrix.hodlr import HODLR, frobenius_norm
from hmatrix.mlr import MLR

__all__ = ["norm"]

#: Products with the matrix and its adjoint that the 2-norm may take at most, and the
#: residual, relative to the eigenvalue of AᴴA, that ends them before.
STEPS = 200
RESIDUAL = 1e-6


@in_own_precision
def norm(H: Operator, kind: str | int = "fro") -> float:
    """Return the Frobenius norm or the 2-norm, without forming the matrix.

    Parameters
    ----------
    H : HODLR, MLR, or for the 2-norm any operator
        The matrix. `Factorization.inverse` gives an operator too, and with it
        ``norm(H, 2) * norm(F.inverse(), 2)`` is the condition number.
    kind : {"fro", 2}
        ``"fro"`` is exact to rounding.

        ``2`` is the largest singular value, from Lanczos steps on ``HᴴH`` with a start
        vector that is always the same. Never above the norm (to rounding), and below it
        by a relative 1e-6 at most (1e-5 in float32) once its residual is that small. If
        200 steps do not suffice, because the largest singular values are very
        close, 1e-3 is the expected bound for n up to a million (Kuczyński &
        Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos
        algorithms with a random start", 1992).

    Returns
    -------
    float
        The norm; gradients are not recorded.

    Raises
    ------
    TypeError
        If ``H`` is not such a matrix.
    ValueError
        If ``kind`` is something else.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> A = np.add.outer(np.arange(50.0), np.arange(50.0))
    >>> H = hm.from_dense(A, levels=2)
    >>> bool(np.isclose(hm.norm(H), np.linalg.norm(A)))
    True
    >>> bool(np.isclose(hm.norm(H, 2), np.linalg.norm(A, 2)))
    True
    """
    if kind == 2:
        check_kind("H", H, Operator)
        with without_gradients(H.space.xp):
            return _largest_singular_value(H)
    if kind != "fro":
        msg = f"`kind` must be 'fro' or 2, got {kind!r}."
        raise ValueError(msg)
    check_kind("H", H, HODLR, MLR)
    if isinstance(H, HODLR):
        return frobenius_norm(H.leaves, H._sides.values())
    return _frobenius_of_mlr(H)


def _frobenius_of_mlr(H: Any) -> float:
    xp = H.space.xp
    # brought to about 1, so that squares of products stay in range
    arrays = [detach(x) for x in (H.leaves, *H.factors) if math.prod(x.shape)]
    tops = floats([xp.max(xp.abs(x)) for x in arrays])
    scale = max(tops[0], *(top**2 for top in tops[1:]), 0.0)
    if not scale:
        return 0.0
    leaves = detach(H.leaves) / scale
    factors = [detach(F) / math.sqrt(scale) for F in H.factors]
    products, weights = [xp.sum(squares(leaves))], [1]
    for k, F in enumerate(factors):
        # ⟨G Gᴴ, F Fᴴ⟩ = ‖Gᴴ F‖² node by node, for the levels G above and at F
        for j, G in enumerate(factors[: k + 1]):
            inner = adjoint(xp.reshape(G, (*F.shape[:2], G.shape[-1]))) @ F
            products.append(xp.sum(squares(inner)))
            weights.append(1 if j == k else 2)
        part = xp.reshape(F, (*leaves.shape[:2], F.shape[-1]))
        products.append(xp.sum(real_part(conjugate(part) * (leaves @ part))))
        weights.append(2 * H.sign)
    total = sum(w * x for w, x in zip(weights, floats(products), strict=True))
    return scale * math.sqrt(max(total, 0.0))


def _largest_singular_value(H: Operator) -> float:
    """Lanczos on HᴴH, without reorthogonalization: copies of the largest do no harm."""
    from scipy.linalg import eigh_tridiagonal

    space, n = H.space, H.tree.n
    v = pad_rows(space.normal((n, 1), n), H.tree)
    v = v / frobenius(v)
    # brought to about 1, so that squares stay in range
    scale = safe_norm(H._apply(v))
    if not scale or not math.isfinite(scale):
        return scale
    before, off = space.xp.zeros_like(v), 0.0
    diagonal: list[float] = []
    offs: list[float] = []
    tolerance = max(RESIDUAL, 100 * space.eps)
    while True:
        w = H._apply_adjoint(H._apply(v) / scale) / scale - off * before
        diagonal.append(complex(space.xp.sum(conjugate(v) * w)).real)
        w = w - diagonal[-1] * v
        off = float(frobenius(w))
        last = len(diagonal) - 1
        value, vector = (
            part.item(-1)
            for part in eigh_tridiagonal(
                diagonal, offs, select="i", select_range=(last, last)
            )
        )
        if off * abs(vector) <= tolerance * value or last + 1 == STEPS:
            return scale * math.sqrt(max(value, 0.0))
        offs.append(off)
        before, v = v, w / off
