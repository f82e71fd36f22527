"""Matrices from low-rank terms that reach over several levels.

Products, inverses and low-rank updates add at every level low-rank terms to the diagonal
blocks too. Those are handed down, level by level: a slice of their rows joins each
off-diagonal block on the way, the rest ends in the leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    safe_norm,
    safe_norms,
    without_gradients,
)
from hmatrix._checks import NonFiniteError, check_int
from hmatrix._operator import pad_rows
from hmatrix.construct import block_sides, block_tolerance, check_rtol
from hmatrix.hodlr import HODLR, clear_padding, from_sides
from hmatrix.lowrank import (
    LowRank,
    beside,
    cut_triplets,
    differentiated,
    recompress,
    stack,
)
from hmatrix.tree import ClusterTree

__all__ = ["Terms", "assemble", "estimate_norm", "node_terms"]

#: Of a level, root first: what is added to the blocks ``B12`` and ``B21`` of its nodes,
#: and to the diagonal blocks ``B11, B22`` as one batch (2**(level + 1), half, half).
Terms = tuple[LowRank, LowRank, LowRank]

#: Part of the permitted error that may be spent before the norm is known. Ranks grow
#: with the log of it, and whatever of it is left goes to the final truncation.
EARLY = 0.1


def assemble(
    tree: ClusterTree,
    leaves: Array,
    terms: Iterable[Terms],
    *,
    size: float,
    rtol: float | None,
    max_rank: int | None,
    symmetric: bool,
) -> HODLR:
    """Return the sum of leaves and terms as a `HODLR` matrix.

    Parameters
    ----------
    tree, leaves
        Those of the result; ``leaves`` without the terms.
    terms
        For each level. Widths are cut as they arrive, so that no more than one level's
        is held at a time.
    size
        Rough Frobenius norm of the sum; see `estimate_norm`.
    rtol, max_rank
        As of `truncate`, relative to the exact norm of the sum, and so is ``error``. The
        cap is for the result alone: what is handed down is cut by the tolerance.
    symmetric
        Whether the sum is Hermitian; the terms of ``B21`` are then not looked at.

    Notes
    -----
    Errors of off-diagonal blocks are orthogonal to each other, those of handed-down terms
    are added up: one half of the early part for either.
    """
    space = Space.of(leaves)
    rtol = check_rtol(space, rtol)
    max_rank = None if max_rank is None else check_int("max_rank", max_rank, 0)
    _check_finite(space, size)
    early = EARLY / 2 * rtol * size
    sides: list[list[LowRank]] = [[]] if symmetric else [[], []]
    # B12 stands for B21 too if that is not stored, and so do the errors in it
    twice = math.sqrt(2) if symmetric else 1.0
    handed, losses, losses_below = _hand_down(tree, terms, early, sides)
    if handed is not None:
        leaves = leaves + handed.to_dense()
    if symmetric:
        leaves = (leaves + adjoint(leaves)) / 2
    # orthonormal factors: the norm is that of the scales
    scales = [block.S for side in sides for block in side]
    found = iter(safe_norms([leaves, *scales, *losses, *losses_below]))
    norm = math.hypot(next(found), twice * math.hypot(*islice(found, len(scales))))
    lost = twice * math.hypot(*islice(found, len(losses)))
    lost += twice * sum(found)
    _check_finite(space, norm)
    allowed = max(rtol * (norm - lost) - lost, 0.0)
    losses = []
    for side in sides:
        for level, b in enumerate(side):
            tolerance = block_tolerance(tree, level, allowed)
            with without_gradients(space.xp):
                cut, cost, _ = cut_triplets(b.U, b.S, b.V, tolerance, max_rank)
            side[level] = differentiated(cut, b, partial(block_sides, tree, level))
            losses.append(cost)
    lost += twice * math.hypot(*safe_norms(losses))
    # relative to the exact sum, whose norm may be smaller by what was lost
    error = lost / (norm - lost) if lost < norm else None if lost else 0.0
    return clear_padding(from_sides(tree, leaves, sides, error))


def node_terms(left: Array, core: Array, right: Array) -> Terms:
    """Return the terms ``left core rightᴴ`` of a level's nodes.

    The rows of ``left`` and ``right`` (b, 2, half, r) are those of the halves of a node; the
    four blocks of ``core`` (b, 2r, 2r) say how the halves meet.
    """
    r = int(left.shape[-1])
    ones = Space.of(left).real.ones(int(left.shape[0]), r)

    def term(row: int, column: int) -> LowRank:
        block = core[:, r * row :, r * column :][:, :r, :r]
        return LowRank(left[:, row, :, :] @ block, ones, right[:, column, :, :])

    return term(0, 1), term(1, 0), stack(term(0, 0), term(1, 1))


def _hand_down(
    tree: ClusterTree, terms: Iterable[Terms], early: float, sides: list[list[LowRank]]
) -> tuple[LowRank | None, list[Array], list[Array]]:
    """Put the blocks of all levels into ``sides``, and return what ends in the leaves.

    Also returns what blocks lost, and what the terms handed down lost: ``early`` at most.
    """
    losses: list[Array] = []
    losses_below: list[Array] = []
    handed: LowRank | None = None
    for level, (B12, B21, diagonal) in enumerate(terms):
        below = [diagonal]
        blocks = [B12, B21]
        if handed is not None:
            offsides, halves = _split(handed)
            blocks = [beside(*two) for two in zip(blocks, offsides, strict=True)]
            below.append(halves)
        tolerance = block_tolerance(tree, level, early)
        real = partial(block_sides, tree, level)
        for side, block in zip(sides, blocks, strict=False):
            kept, cost, _ = recompress(block, tolerance, sides=real)
            side.append(kept)
            losses.append(cost)
        handed = beside(*below)
        if level + 1 < tree.levels:
            # one share for each cut on the way down; what ends in the leaves is not cut
            share = early / ((tree.levels - 1) * math.sqrt(tree.nodes(level + 1)))
            real = partial(tree.counts, level + 1)
            handed, cost, _ = recompress(handed, share, sides=real)
            losses_below.append(cost)
    return handed, losses, losses_below


def estimate_norm(
    apply: Callable[[Array], Array], tree: ClusterTree, space: Space
) -> float:
    """Return the root mean square of ‖A x‖ for normal x, about ‖A‖_F.

    By eight vectors: it is hardly ever off by a factor of ten, which `assemble` bears.
    """
    count = 8
    x = pad_rows(space.normal((tree.n, count), tree.n), tree)
    return safe_norm(apply(x)) / math.sqrt(count)


def _check_finite(space: Space, norm: float) -> None:
    if not math.isfinite(norm):
        advice = f"scale the matrices{space.or_wider(', or use')}."
        msg = f"The result overflows {space.name}; {advice}"
        raise NonFiniteError(msg)


def _split(handed: LowRank) -> tuple[tuple[LowRank, LowRank], LowRank]:
    """Split blocks of nodes into B12 and B21 of the nodes, and all B11 and B22."""
    xp = Space.of(handed.U).xp
    count, size, rank = handed.U.shape
    U, V = (xp.reshape(x, (count, 2, size // 2, rank)) for x in (handed.U, handed.V))
    S = handed.S
    B12, B21 = (LowRank(U[:, i, :, :], S, V[:, 1 - i, :, :]) for i in range(2))
    shape = (2 * count, size // 2, rank)
    S = xp.reshape(xp.stack([S, S], axis=1), (2 * count, rank))
    return (B12, B21), LowRank(xp.reshape(U, shape), S, xp.reshape(V, shape))
