"""What the errors of matrices do to those of their sums, products and inverses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hmatrix._backend import (
    Array,
    adjoint,
    conjugate,
    detach,
    frobenius,
    real_part,
    to_numpy,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank

__all__ = ["after", "inverse_error", "product_error", "with_error_of_sum"]


def after(first: float | None, second: float | None) -> float | None:
    """Return the relative error of two approximations, one of the other."""
    if first is None or second is None:
        return None
    # the second is relative to the first, whose norm is at most 1 + first
    return first + (1 + first) * second


def with_error_of_sum(total: HODLR, *parts: HODLR) -> HODLR:
    """Return ``total``, the sum of ``parts`` and of exact terms, with its ``error``."""
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
    (size_h, two_h), (size_g, two_g) = _norms(H), _norms(G)
    h, g = _absolute(H, size_h), _absolute(G, size_g)
    lost = h * (two_g + g) + two_h * g
    return _relative(lost, _norm(product) / (1 + (product.error or 0.0)))


def inverse_error(X: HODLR, H: HODLR) -> float | None:
    """Return the relative error of ``X = H⁻¹`` because of that of ``H``.

    ``A⁻¹ − H⁻¹ = A⁻¹ (H − A) H⁻¹``.
    """
    if _unknown(H, X):
        return None
    if not H.error:
        return 0.0
    size, two = _norms(X)
    own = _absolute(X, size)
    h, two = _absolute(H, _norm(H)), two + own
    bounds = [h * two]
    if h * two < 1:
        # the error E is no more than (‖H⁻¹‖₂ + E) h ‖H⁻¹‖₂
        bounds.append(_relative(h * two**2 / (1 - h * two), size - own) or math.inf)
    return min(bounds) if math.isfinite(bounds[0]) else None


def _unknown(*parts: HODLR) -> bool:
    return any(part.error is None or part.error >= 1 for part in parts)


def _absolute(H: HODLR, norm: float) -> float:
    """Return ``‖A − H‖``, given ``H.error`` relative to ``A`` and the norm of ``H``."""
    error = H.error or 0.0
    return error / (1 - error) * norm


def _relative(lost: float, norm: float) -> float | None:
    """Return ``lost`` relative to the exact matrix, whose norm is ``norm − lost`` or more."""
    return lost / (norm - lost) if lost < norm < math.inf else None


def _norm(H: HODLR) -> float:
    """Return the Frobenius norm to half the digits, by products alone."""
    with np.errstate(over="ignore", invalid="ignore"):
        diagonal = float(frobenius(detach(H.leaves)))
        total = diagonal * diagonal  # a power would raise on overflow
        if H.upper:  # for all blocks the host waits once
            xp = H.space.xp
            squares = xp.stack([xp.sum(real_part(_terms(b))) for b in H._blocks])
            off = float(np.sum(to_numpy(squares), dtype=np.float64))
            total += off * (2 if H.symmetric else 1)
    return math.sqrt(max(total, 0.0))


def _terms(block: LowRank) -> Array:
    """Return what sums to the squares of the norms of blocks (b,): (b, r, r)."""
    U, V = detach(block.U), detach(block.V)
    S = detach(block.S)
    weights = S[..., :, None] * S[..., None, :]
    return (adjoint(U) @ U) * conjugate(adjoint(V) @ V) * weights


def _norms(H: HODLR) -> tuple[float, float]:
    """Return the Frobenius norm to half the digits, and a bound of the 2-norm.

    By products alone. A level's blocks lie beside each other: its 2-norm is that of the
    largest, and no more than a Frobenius norm.
    """
    xp, eps = H.space.xp, H.space.eps

    def squares(block: LowRank) -> Array:
        """Return the sum of the squares of blocks' norms, and a bound of the largest."""
        terms = _terms(block)
        each = real_part(xp.sum(terms, axis=(-2, -1)))
        rounding = eps * xp.sum(xp.abs(terms), axis=(-2, -1))  # where terms cancel
        return xp.stack([xp.sum(each), xp.max(each + rounding)])

    with np.errstate(over="ignore", invalid="ignore"):
        leaves = detach(H.leaves)
        diagonal, sizes = float(frobenius(leaves)), xp.abs(leaves)
        rows, columns = (float(xp.max(xp.sum(sizes, axis=k))) for k in (-1, -2))
        total = diagonal * diagonal  # a power would raise on overflow
        two = min(diagonal, math.sqrt(rows * columns))
        sides = H._sides.values()
        if H.upper:
            found = [xp.stack([squares(block) for block in side]) for side in sides]
            both = to_numpy(xp.stack(found)).astype(np.float64)
            total += float(np.sum(both[..., 0])) * (2 / len(sides))
            largest = np.max(both[..., 1], axis=0)
            two += float(np.sum(np.sqrt(np.maximum(largest, 0.0))))
    norm = math.sqrt(max(total, 0.0))
    return norm, min(norm * (1 + math.sqrt(eps)), two)
