"""Matrices from functions of labels (row numbers or points), level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    add_to_diagonals,
    adjoint,
    conjugate,
    detach,
    frobenius,
    in_own_precision,
    namespace,
    one_blas_thread_if_narrow,
)
from hmatrix._checks import ToleranceError, check_int, check_norm
from hmatrix._operator import real_rows
from hmatrix.construct.blocks import Blocks, Function, chunks, masked
from hmatrix.construct.budget import block_tolerance, check_tolerances
from hmatrix.construct.cross import Found, approximate
from hmatrix.construct.near import Near
from hmatrix.construct.pivots import SAMPLE, Pivots, search, together
from hmatrix.hodlr import HODLR, from_sides
from hmatrix.lowrank import LowRank, kept, widened
from hmatrix.tree import ClusterTree

__all__ = ["build"]

#: Entries of each row and each column that are compared with their mirror images.
LOOKS = 8
#: For each level, batches of the blocks on one side of the diagonal, with their errors.
Side = list[list[Found]]


@in_own_precision
def build(
    function: Function,
    labels: Array,
    tree: ClusterTree,
    space: Space,
    rtol: float | None,
    atol: float,
    max_rank: int | None,
    symmetric: bool | None,
    seed: int,
    near: list[Near] | None = None,
    nugget: Array | None = None,
) -> HODLR:
    """Build the matrix of a function of labels, which are in the order of the leaves.

    ``nugget`` (padded,) is added to the diagonal.
    """
    # blocks are worked on some at a time, and are small
    with one_blas_thread_if_narrow(space):
        rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
        seed = check_int("seed", seed, 0)

        def allowed(norm: float) -> float:
            return max(rtol * norm, atol)

        real = real_rows(tree, space) if tree.padded > tree.n else None
        leaves = diagonal_blocks(function, labels, real, tree, space)
        if nugget is not None:
            nugget = space.xp.reshape(nugget, leaves.shape[:2])
            leaves = add_to_diagonals(leaves, nugget)
        norm = check_norm(float(frobenius(detach(leaves))), space, whole=False)
        if symmetric is None:
            symmetric = looks_hermitian(function, labels, leaves, seed)
        elif symmetric:
            leaves = symmetrized(leaves, allowed(norm))
        blocks = [
            blocks_of(function, labels, real, tree, level, space, near)
            for level in range(tree.levels)
        ]
        sides, norm = approximate_levels(
            tree, blocks, norm, allowed, max_rank, seed, symmetric
        )
        check_norm(norm, space)
        return trimmed(tree, leaves, sides, norm, allowed(norm), max_rank)


def approximate_levels(
    tree: ClusterTree,
    blocks: list[Blocks],
    norm: float,
    allowed: Callable[[float], float],
    max_rank: int | None,
    seed: int,
    symmetric: bool,
) -> tuple[list[Side], float]:
    """Approximate the blocks of all levels, the smallest first.

    ``norm`` is that of the leaves. Each level may lose what is ``allowed`` for the norm of
    what is known by then, which is too little; `trimmed` cuts again. Returns the blocks of
    one side or both, and the norm of the matrix.
    """
    both = [blocks] if symmetric else [blocks, [x.lower for x in blocks]]
    sides: list[Side] = [[] for _ in both]
    once = together(blocks)
    pivots: list[list[Pivots]] = [[] for _ in both]
    for level in reversed(range(tree.levels)):
        space = blocks[level].space
        # in the end it is no smaller than `check_norm` allows
        known = allowed(max(norm, space.smallest_norm) if norm else 0.0)
        if level + 1 == once:
            tails = [block_tolerance(tree, k, known) / 4 for k in range(once)]
            pivots = [search(x[:once], tails, max_rank, seed) for x in both]
        tolerance = block_tolerance(tree, level, known)
        for side, x, found in zip(sides, both, pivots, strict=True):
            first = found[level] if found else None
            below = max(block.rank for block, _ in side[0]) if side else 2
            parts = approximate(x[level], tolerance, max_rank, seed, first, below)
            side.insert(0, parts)
            for block, lost in parts:
                # where a cap leaves little or nothing, most of the norm was cut off
                size = max(float(frobenius(block.S)), float(frobenius(lost)))
                norm = math.hypot(norm, size * (math.sqrt(2) if symmetric else 1))
        check_norm(norm, space, whole=False)
    return sides, norm


def trimmed(
    tree: ClusterTree,
    leaves: Array,
    sides: list[Side],
    norm: float,
    total: float,
    max_rank: int | None,
) -> HODLR:
    """Return the matrix of the blocks found, cut again now that its norm is known.

    Raises
    ------
    ToleranceError
        If it has lost more than ``total`` without a cap on the ranks.
    """
    square = 0.0
    blocks: list[list[LowRank]] = []
    for side in sides:
        blocks.append([])
        for level, parts in enumerate(side):
            tolerance = block_tolerance(tree, level, total)
            block, lost = joined(parts, tolerance, max_rank)
            parts.clear()
            blocks[-1].append(block)
            square += lost * (2 if len(sides) == 1 else 1)
    reached = math.sqrt(square)
    if max_rank is None and not reached <= total:
        msg = (
            f"The error is {reached / norm:.3g} of the norm by the estimate, "
            f"{total / norm:.3g} was asked for: entries may be too rough or too noisy for "
            "low rank. Use a larger `rtol`, another order of the rows, or a `max_rank`."
        )
        raise ToleranceError(msg, total / norm, reached / norm)
    return from_sides(tree, leaves, blocks, reached / norm if norm else 0.0)


def blocks_of(
    function: Function,
    labels: Array,
    real: Array | None,
    tree: ClusterTree,
    level: int,
    space: Space,
    near: list[Near] | None,
) -> Blocks:
    """Return the blocks of a level above the diagonal."""
    shape = (tree.nodes(level), 2, tree.size(level + 1))
    halves = space.xp.reshape(labels, (*shape, *labels.shape[1:]))
    masks = None if real is None else space.xp.reshape(real, shape)
    return Blocks(
        function,
        halves[:, 0, ...],
        halves[:, 1, ...],
        None if masks is None else (masks[:, 0, :], masks[:, 1, :]),
        space,
        None if near is None else near[level],
    )


def joined(
    parts: list[Found], tolerance: float, max_rank: int | None
) -> tuple[LowRank, float]:
    """Join batches of a level's blocks, cut again now that the norm is known.

    Returns the blocks, and the squares of the errors of all of them.
    """
    xp = namespace(parts[0][1])
    error = xp.concat([lost for _, lost in parts], axis=0)
    width = max(block.rank for block, _ in parts)
    S = xp.concat([widened(block.S, width) for block, _ in parts], axis=0)
    rest = tolerance**2 - error**2
    rest = 0.9 * xp.sqrt(xp.where(rest > 0, rest, 0.0))
    keep, more, _ = kept(S, rest[:, None], max_rank)
    square = float(xp.sum(error**2 + more**2))
    rank = int(keep.shape[-1])
    if len(parts) == 1 and rank == width and bool(xp.all(keep | (S == 0))):
        return parts[0][0], square

    cut = not bool(xp.all(keep))

    def all_of(name: str) -> Array:
        first = getattr(parts[0][0], name)
        x = Space.of(first).zeros(error.shape[0], *first.shape[1:-1], rank)
        start = 0
        for block, lost in parts:
            stop = start + lost.shape[0]
            part = getattr(block, name)[..., :rank]
            mask = keep[start:stop, : part.shape[-1]]
            x[start:stop, ..., : part.shape[-1]] = part
            if cut:
                mask = xp.reshape(mask, (stop - start, *[1] * (x.ndim - 2), -1))
                x[start:stop, ..., : part.shape[-1]] *= xp.astype(mask, x.dtype)
            start = stop
        return x

    return LowRank(*map(all_of, ("U", "S", "V"))), square


def diagonal_blocks(
    function: Function,
    labels: Array,
    real: Array | None,
    tree: ClusterTree,
    space: Space,
) -> Array:
    """Evaluate the leaves, some at a time: (2**K, m, m)."""
    xp, m, count = space.xp, tree.leaf_size, tree.nodes(tree.levels)
    labels = xp.reshape(labels, (count, m, *labels.shape[1:]))
    leaves = space.zeros(count, m, m)
    for some in chunks(space, count, m * m):
        x = labels[some, ...]
        leaves[some, :, :] = function(x[:, :, None, ...], x[:, None, ...])
    if real is None:
        return leaves
    masks = xp.reshape(real, (count, m))
    return masked(leaves, masks[:, :, None], masks[:, None, :])


def symmetrized(leaves: Array, allowed: float) -> Array:
    """Return the Hermitian part of the leaves of a matrix said to be Hermitian.

    Raises
    ------
    ValueError
        If it differs from the leaves by more than is ``allowed`` and than rounding.
    """
    difference = float(frobenius(detach(leaves - adjoint(leaves))))
    norm = float(frobenius(detach(leaves)))
    if difference > max(allowed, 100 * Space.of(leaves).eps * norm):
        msg = (
            "`symmetric` is true, but the function's diagonal blocks differ from their "
            f"adjoints by {difference / norm:.3g} of their norm; leave `symmetric` out."
        )
        raise ValueError(msg)
    return (leaves + adjoint(leaves)) / 2


def looks_hermitian(
    function: Function, labels: Array, leaves: Array, seed: int
) -> bool:
    """Tell whether the leaves and some other entries are those of a Hermitian matrix.

    ``LOOKS`` of each row and each column, so that a row that differs is seen; of a matrix of
    no more than two samples' rows all entries.
    """
    xp, space, n = namespace(leaves), Space.of(leaves), int(labels.shape[0])
    if not bool(xp.all(leaves == adjoint(leaves))):
        return False
    if leaves.shape[0] == 1:
        return True
    chance = np.random.default_rng(seed)

    def pairs() -> Iterator[tuple[np.ndarray, ...]]:
        if n <= 2 * SAMPLE:
            yield np.tril_indices(n, -1)
            return
        for some in chunks(space, LOOKS, n):
            orders = [chance.permutation(n) for _ in range(LOOKS)[some]]
            columns = np.concatenate(orders)
            for part in chunks(space, len(columns), 1):
                yield np.arange(part.start, part.stop) % n, columns[part]

    for pair in pairs():
        a, b = (xp.take(labels, space.integers(i), axis=0) for i in pair)
        if not bool(xp.all(function(a, b) == conjugate(function(b, a)))):
            return False
    return True
