"""What the errors of matrices do to those of their sums, products and inverses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hmatrix._backend import Array, adjoint, conjugate, detach
from hmatrix.hodlr import HODLR

__all__ = ["after", "inverse_error", "product_error", "with_error_of_sum"]


def after(first: float | None, second: float | None) -> float | None:
    """Return the relative error of two approximations, one of the other."""
    if first is None or second is None:
        return None
    # the second is relative to the first, whose norm is at most 1 + first
    return first + (1 + first) * second


def with_error_of_sum(total: HODLR, *parts: HODLR) -> HODLR:
    """Return a sum of matrices and of what has no error, with its ``error``."""
    if _unknown(*parts):
        return total
    losses = sum(part.error and _absolute(part) for part in parts)
    return replace(total, error=_relative(losses, total, parts))


def product_error(product: HODLR, H: HODLR, G: HODLR) -> float | None:
    """Return the relative error of ``H G`` because of those of ``H`` and ``G``.

    ``product`` is ``H G`` to its own ``error``, and so is ``X`` of `inverse_error`.
    """
    if _unknown(H, G):
        return None
    if not (H.error or G.error):
        return 0.0
    h, g = _absolute(H), _absolute(G)
    truncated = 1 + (product.error or 0.0)
    return _relative(truncated * (h * (_norm(G) + g) + _norm(H) * g), product, ())


def inverse_error(X: HODLR, H: HODLR) -> float | None:
    """Return the relative error of ``X = H⁻¹`` because of that of ``H``.

    ``A⁻¹ − H⁻¹ = A⁻¹ (H − A) H⁻¹``.
    """
    if _unknown(H, X):
        return None
    bound = _absolute(H) * _norm(X) / (1 - (X.error or 0.0)) if H.error else 0.0
    return bound if math.isfinite(bound) else None


def _unknown(*parts: HODLR) -> bool:
    return any(part.error is None or part.error >= 1 for part in parts)


def _absolute(H: HODLR) -> float:
    """Return ``‖A − H‖``, of ``H.error`` relative to ``A``."""
    error = H.error or 0.0
    return error / (1 - error) * _norm(H)


def _relative(loss: float, result: HODLR, parts: tuple[HODLR, ...]) -> float | None:
    """Return a bound of ``loss / ‖exact result‖``; None if there is none."""
    if not loss:
        return 0.0
    # where sums cancel, their squares are known to rounding of the parts' only
    unsure = math.sqrt(result.space.eps) * sum(map(_norm, parts))
    least = _norm(result) - loss - unsure
    return loss / least if 0 < least < math.inf else None


def _norm(H: HODLR) -> float:
    """Return the Frobenius norm to half the digits, by products alone."""
    xp = H.space.xp

    def square(U: Array, S: Array, V: Array) -> float:
        U, V = detach(U), detach(V)
        U = U * xp.astype(detach(S)[..., None, :], U.dtype, copy=False)
        return complex(xp.sum((adjoint(U) @ U) * conjugate(adjoint(V) @ V))).real

    with np.errstate(over="ignore", invalid="ignore"):
        total = float(xp.sum(xp.abs(detach(H.leaves)) ** 2))
        for blocks in (H.upper, H.upper if H.lower is None else H.lower):
            total += sum(square(b.U, b.S, b.V) for b in blocks)
    return math.sqrt(max(total, 0.0))
