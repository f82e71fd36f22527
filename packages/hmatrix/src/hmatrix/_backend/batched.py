"""Factorizations of many small matrices at once, where a device's own take them in turn.

cuSOLVER has a batched singular value decomposition up to 32 rows and columns, and no QR
decomposition; CuPy and torch loop over the matrices beyond that.
"""

from __future__ import annotations

import math

from .arrays import Array, adjoint, namespace, positive_or_one, to_one
from .gradients import wants_gradient
from .space import Space

__all__ = ["householder_qr", "in_turn"]

#: Fewer matrices are as fast in turn; wider ones fill a device each.
MANY, SMALL = 32, 256


def in_turn(a: Array, free: int = 0) -> bool:
    """Tell whether a device would loop over many small matrices (..., m, n).

    Those of up to ``free`` rows and columns it factorizes all at once.
    """
    small = free < max(a.shape[-2:]) and 0 < min(a.shape[-2:]) <= SMALL
    many = math.prod(a.shape[:-2]) >= MANY
    return bool(small and many and not Space.of(a).on_host and not wants_gradient(a))


def householder_qr(a: Array, *, complete: bool = False) -> tuple[Array, Array]:
    """QR decomposition of ``a`` (..., m, n), thin or with square Q: one column at a time."""
    xp, space, (m, n) = namespace(a), Space.of(a), a.shape[-2:]
    k, tiny = min(m, n), float(xp.finfo(a.dtype).smallest_normal)
    R = space.asarray(a, copy=True)
    reflectors = []
    for j in range(k):
        x, _ = to_one(R[..., j:, j : j + 1])
        size = xp.linalg.vector_norm(x, axis=-2, keepdims=True)
        first = x[..., :1, :]
        absolute = xp.abs(first)
        none = absolute < tiny  # complex division overflows at subnormal numbers
        sign = xp.where(none, 1.0, first)
        sign = sign / xp.where(none, 1.0, absolute)
        # of norm √2: v / ‖v‖ √2, whose first part cannot cancel
        length = positive_or_one(xp.sqrt(size * (size + absolute)))
        head = first + sign * size
        v = xp.concat([head, x[..., 1:, :]], axis=-2) / length
        reflectors.append(v)
        R[..., j:, j:] = R[..., j:, j:] - v @ (adjoint(v) @ R[..., j:, j:])
    width = m if complete else k
    Q = space.zeros(*a.shape[:-2], m, width)
    Q[..., :width, :] = space.eye(width)
    for j, v in reversed(list(enumerate(reflectors))):
        Q[..., j:, j:] = Q[..., j:, j:] - v @ (adjoint(v) @ Q[..., j:, j:])
    return Q, xp.triu(R[..., :width, :])
