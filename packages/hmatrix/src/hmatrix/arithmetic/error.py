"""What the errors of matrices do to those of their sums, products and inverses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hmatrix._backend import Array, adjoint, conjugate, detach, frobenius
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
    if not any(part.error for part in parts):
        return replace(total, error=0.0)
    norms = [_norm(part) for part in parts]
    lost = sum(map(_absolute, parts, norms))
    # where parts cancel, the norm of the sum is known to rounding of theirs only
    unsure = math.sqrt(total.space.eps) * sum(norms)
    return replace(total, error=_relative(lost, _norm(total) - unsure))


def product_error(product: HODLR, H: HODLR, G: HODLR) -> float | None:
    """Return the relative error of ``H G`` because of those of ``H`` and ``G``.

    ``product`` is ``H G`` to its own ``error``, and so is ``X`` of `inverse_error`.
    """
    if _unknown(H, G):
        return None
    if not (H.error or G.error):
        return 0.0
    norms = [_norm(H), _norm(G)]
    h, g = map(_absolute, (H, G), norms)
    lost = h * (norms[1] + g) + norms[0] * g
    return _relative(lost, _norm(product) / (1 + (product.error or 0.0)))


def inverse_error(X: HODLR, H: HODLR) -> float | None:
    """Return the relative error of ``X = H⁻¹`` because of that of ``H``.

    ``A⁻¹ − H⁻¹ = A⁻¹ (H − A) H⁻¹``.
    """
    if _unknown(H, X):
        return None
    if not H.error:
        return 0.0
    bound = _absolute(H, _norm(H)) * _norm(X) / (1 - (X.error or 0.0))
    return bound if math.isfinite(bound) else None


def _unknown(*parts: HODLR) -> bool:
    return any(part.error is None or part.error >= 1 for part in parts)


def _absolute(H: HODLR, norm: float) -> float:
    """Return ``‖A − H‖``, given ``H.error`` relative to ``A`` and the norm of ``H``."""
    error = H.error or 0.0
    return error / (1 - error) * norm


def _relative(lost: float, norm: float) -> float | None:
    """Return ``lost`` relative to what ``norm`` is the norm of without that loss."""
    return lost / (norm - lost) if lost < norm < math.inf else None


def _norm(H: HODLR) -> float:
    """Return the Frobenius norm to half the digits, by products alone."""
    xp = H.space.xp

    def square(U: Array, S: Array, V: Array) -> float:
        U, V, S = detach(U), detach(V), xp.astype(detach(S), U.dtype, copy=False)
        weights = S[..., :, None] * S[..., None, :]
        grams = (adjoint(U) @ U) * conjugate(adjoint(V) @ V)
        return complex(xp.sum(grams * weights)).real

    with np.errstate(over="ignore", invalid="ignore"):
        diagonal = float(frobenius(detach(H.leaves)))
        total = diagonal * diagonal  # a power would raise on overflow
        for block in H.upper:
            total += square(block.U, block.S, block.V) * (2 if H.symmetric else 1)
        for block in H.lower or ():
            total += square(block.U, block.S, block.V)
    return math.sqrt(max(total, 0.0))
