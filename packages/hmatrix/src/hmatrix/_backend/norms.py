"""Frobenius norms of arrays whose squares may overflow or underflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import array_api_compat
import numpy as np

from .arrays import Array, detach, namespace, positive_or_one, to_numpy
from .space import Space

__all__ = ["floats", "frobenius", "safe_norm", "safe_norms", "unscaled_norm"]


def frobenius(x: Array) -> Array:
    """Return the Frobenius norm of a whole array as an array (); squares may overflow."""
    xp, norm = namespace(x), unscaled_norm(x)
    if math.prod(x.shape) and float(norm) < Space.of(x).smallest_norm:
        # Squares of these underflow; and complex division overflows at subnormal numbers,
        # from which a power of two leads away
        away = 1 / float(xp.finfo(x.dtype).smallest_normal)
        x = x * away
        largest = xp.max(xp.abs(x))
        if float(largest) > 0:
            norm = largest * xp.linalg.vector_norm(x / largest) / away
    return norm


def unscaled_norm(x: Array) -> Array:
    """Return `frobenius` whose squares may underflow too: the host does not wait."""
    if array_api_compat.is_numpy_array(x):
        # vdot needs no array of squares, and an overflow is the caller's to judge
        with np.errstate(over="ignore", invalid="ignore"):
            return np.sqrt(np.vdot(x, x).real)
    return namespace(x).linalg.vector_norm(x)


def safe_norm(x: Array) -> float:
    """Return the Frobenius norm of a whole array; squares neither over- nor underflow."""
    return safe_norms([x])[0]


def safe_norms(arrays: Sequence[Array]) -> list[float]:
    """Return `safe_norm` of some arrays, for all of which the host waits once."""
    numbers: list[Array] = []
    for x in map(detach, arrays):
        xp = namespace(x)
        if math.prod(x.shape):
            top = xp.max(xp.abs(x))
            scale = positive_or_one(top)
            numbers += [top, xp.sum((xp.abs(x) / scale) ** 2)]
        else:
            numbers += [Space.of(x).real.zeros()] * 2
    found = iter(floats(numbers))
    return [top * math.sqrt(total) for top, total in zip(found, found, strict=True)]


def floats(numbers: Sequence[Array]) -> list[float]:
    """Bring numbers, arrays (), to the host in one piece."""
    if not numbers:
        return []
    found: list[float] = to_numpy(namespace(numbers[0]).stack(numbers)).tolist()
    return found
