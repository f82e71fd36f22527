"""Which rows and columns of a block samples and checks look at."""

from __future__ import annotations

import numpy as np

from hmatrix._backend import Array
from hmatrix.construct.blocks import Blocks

__all__ = ["grid"]

#: The part of the places that are all of those at either end, or at the start of an order.
ENDS, START = 1 / 8, 1 / 4
#: Into how many parts a block is divided: places between its ends are multiples.
PARTS = 2**31


def grid(
    blocks: Blocks, count: int, chance: np.random.Generator | None = None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Return ``count`` rows and columns (b, count) of blocks, or all if there are no more.

    They are denser where the clusters meet: of blocks of points, close to the other cluster,
    of other blocks, at the corners. With ``chance`` each is drawn from the stretch between
    its neighbours. Also returns weights: square roots of how many rows, and how many
    columns, each of them stands for.
    """
    space, b, m = blocks.space, blocks.count, blocks.size
    if m <= count:
        whole = space.integers(np.tile(np.arange(m), (b, 1)))
        ones = space.real.ones(b, m)
        return whole, whole, (ones, ones)
    if blocks.near is None:
        (i, rows), (j, columns) = (
            _dense_at_ends(blocks, *places, count, chance) for places in blocks.places
        )
    else:
        orders = blocks.near.row_order, blocks.near.column_order
        (i, rows), (j, columns) = (
            _dense_at_start(blocks, order, count, chance) for order in orders
        )
    return i, j, (rows, columns)


def _dense_at_ends(
    blocks: Blocks,
    places: Array | None,
    many: Array,
    count: int,
    chance: np.random.Generator | None,
) -> tuple[Array, Array]:
    """Return ``count`` places that are dense at either end, and their weights.

    They are chosen from ``many`` (b,) ``places``, as of `Blocks.places`; some may come
    twice. A kernel of short range is nonzero in a corner alone of a block of sorted points.
    """
    space, xp = blocks.space, blocks.xp
    edge, most = np.arange(int(count * ENDS)), count - 2 * int(count * ENDS) - 1
    steps = np.arange(most + 1) * 1.0

    def place(steps: np.ndarray) -> np.ndarray:
        return (1 - np.cos(np.pi * np.clip(steps / most, 0, 1))) / 2

    widths = place(steps + 0.5) - place(steps - 0.5)
    if chance is not None:
        steps += chance.uniform(-0.5, 0.5, len(steps))
    last = many[:, None] - 1
    # in integers, which all libraries round alike
    parts = space.integers(np.round(place(steps) * PARTS).astype(np.int64))
    inner = (parts[None, :] * last + PARTS // 2) // PARTS
    first = space.integers(edge)[None, :]
    zero = xp.zeros_like(last)
    ends = xp.minimum(zero + first, last), xp.maximum(last - first, zero)
    one = space.real.ones(blocks.count, len(edge))
    inside = space.real.asarray(np.sqrt(widths))[None, :]
    inside = inside * xp.sqrt(xp.astype(last, space.real.dtype))
    chosen = xp.concat([ends[0], inner, ends[1]], axis=1)
    if places is not None:
        chosen = xp.take_along_axis(places, chosen, axis=1)
    return chosen, xp.concat([one, inside, one], axis=1)


def _dense_at_start(
    blocks: Blocks, order: Array, count: int, chance: np.random.Generator | None
) -> tuple[Array, Array]:
    """Return ``count`` places that are dense at the start of an order, and their weights."""
    space, xp, edge = blocks.space, blocks.xp, int(count * START)
    bounds = np.linspace(0, 1, count - edge + 1) ** 2 * (blocks.size - edge)
    widths = np.diff(bounds)
    part = 0.5 if chance is None else chance.random(count - edge)
    inner = (bounds[:-1] + part * widths).astype(np.int64)
    index = space.integers(np.concatenate([np.arange(edge), edge + inner]))
    roots = space.real.asarray(np.sqrt(np.concatenate([np.ones(edge), widths])))
    chosen = xp.take(order, index, axis=1)
    return chosen, xp.broadcast_to(roots, tuple(chosen.shape))
