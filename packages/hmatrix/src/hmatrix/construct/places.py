"""Which rows and columns of a block samples and checks look at."""

from __future__ import annotations

import numpy as np

from hmatrix._backend import Array
from hmatrix.construct.blocks import Blocks

__all__ = ["grid"]

#: The part of the places that lie next to each other at either end, or at the one.
ENDS, START = 1 / 8, 1 / 4


def grid(
    blocks: Blocks, count: int, chance: np.random.Generator | None = None
) -> tuple[Array, Array, Array]:
    """Return ``count`` rows and columns (b, count) of blocks, or all, more where they meet.

    In blocks of points these are the ones close to the other cluster, in others the
    corners. With ``chance``, others each time: one by chance from each stretch between
    neighbours. And the square roots of the numbers that they stand for (count,).
    """
    space, xp, m, near = blocks.space, blocks.xp, blocks.size, blocks.near
    whole = space.integers(np.tile(np.arange(m), (blocks.count, 1)))
    if m <= count:
        return whole, whole, space.real.ones(m)
    orders = (whole, whole) if near is None else (near.row_order, near.column_order)
    choose = _dense_at_ends if near is None else _dense_at_start
    both, weights = [], np.ones(0)
    for order in orders:
        index, weights = choose(m, count, chance)
        both.append(xp.take(order, space.integers(index), axis=1))
    return both[0], both[1], space.real.asarray(np.sqrt(weights))


Chosen = tuple[np.ndarray, np.ndarray]


def _dense_at_ends(m: int, count: int, chance: np.random.Generator | None) -> Chosen:
    """Return ``count`` of m places, all at either end, then fewer and fewer.

    A kernel of short range may be all there is in a block of sorted points. Some of the
    places come twice. And how many places each stands for.
    """
    edge, last = np.arange(int(count * ENDS)), count - 2 * int(count * ENDS) - 1
    steps = np.arange(last + 1) * 1.0

    def place(steps: np.ndarray) -> np.ndarray:
        return (1 - np.cos(np.pi * np.clip(steps / last, 0, 1))) / 2 * (m - 1)

    widths = place(steps + 0.5) - place(steps - 0.5)
    if chance is not None:
        steps += chance.uniform(-0.5, 0.5, len(steps))
    inner = np.round(place(steps)).astype(np.int64)
    ones = np.ones(len(edge))
    return np.concatenate([edge, inner, m - 1 - edge]), np.concatenate(
        [ones, widths, ones]
    )


def _dense_at_start(m: int, count: int, chance: np.random.Generator | None) -> Chosen:
    """Return ``count`` of m places, all at the start, then fewer and fewer.

    And how many places each stands for.
    """
    edge = int(count * START)
    bounds = np.linspace(0, 1, count - edge + 1) ** 2 * (m - edge)
    part = 0.5 if chance is None else chance.random(count - edge)
    inner = bounds[:-1] + part * np.diff(bounds)
    index = np.concatenate([np.arange(edge), edge + inner.astype(np.int64)])
    return index, np.concatenate([np.ones(edge), np.diff(bounds)])
