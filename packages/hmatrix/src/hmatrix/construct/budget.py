"""What all constructors share: the tree, and how much each block may lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hmatrix._backend import Array, Space, frobenius, namespace, safe_norms
from hmatrix._checks import ShapeError, check_float, check_int, check_kind
from hmatrix._operator import real_rows
from hmatrix.hodlr import HODLR, clear_padding, from_sides
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = [
    "LEAF_SIZE",
    "Guard",
    "block_sides",
    "block_tolerance",
    "check_rtol",
    "check_symmetric",
    "check_tolerances",
    "cut_blocks",
    "make_tree",
]

#: Rows of a leaf where neither ``levels`` nor ``leaf_size`` is given.
LEAF_SIZE = 64
#: The smallest relative error above zero that is asked for, in units of epsilon: below
#: it rounding, which has full rank, would be stored.
ROUNDING = 10


def block_tolerance(tree: ClusterTree, level: int, total: float) -> float:
    """Return what each off-diagonal block of ``level`` may lose in Frobenius norm.

    Levels share the square of ``total`` equally, and so do the blocks of a level; the
    errors of all blocks together are then at most ``total``.
    """
    return total / math.sqrt(tree.levels * 2 * tree.nodes(level))


def block_sides(tree: ClusterTree, level: int) -> np.ndarray:
    """Return the smaller side of each off-diagonal block of ``level``, padding left out."""
    sides: np.ndarray = tree.counts(level + 1).reshape(-1, 2).min(axis=1)
    return sides


def cut_blocks(
    tree: ClusterTree,
    leaves: Array,
    upper: Iterable[LowRank],
    lower: Iterable[LowRank] | None,
    *,
    norm: float,
    total: float,
    max_rank: int | None,
) -> HODLR:
    """Cut the blocks of a matrix to what it may lose.

    Parameters
    ----------
    tree, leaves, upper, lower
        Of the matrix, as `HODLR` takes them. Blocks are taken one by one, so that an
        iterator need not hold them all; their factors need not be orthonormal.
    norm : float
        Frobenius norm of the matrix.
    total : float
        Frobenius norm that all blocks together may lose.
    max_rank : int, optional
        Cap on the ranks.

    Returns
    -------
    HODLR
        Its ``error`` is what the cut lost.
    """
    twice = math.sqrt(2) if lower is None else 1.0
    losses: list[Array] = []
    sides: list[list[LowRank]] = []
    for blocks in (upper,) if lower is None else (upper, lower):
        sides.append([])
        for level, block in enumerate(blocks):
            tolerance = block_tolerance(tree, level, total)
            cut, lost = recompress(block, tolerance=tolerance, max_rank=max_rank)
            sides[-1].append(cut)
            losses.append(lost)
    error = math.hypot(*safe_norms(losses)) * twice / norm if norm else 0.0
    return clear_padding(from_sides(tree, leaves, sides, error))


class Guard:
    """What keeps a Hermitian matrix positive definite while its blocks are cut.

    Cutting ``E`` off ``B12`` takes ``[[0, E], [Eᴴ, 0]] ⪯ ‖E‖₂ I`` from the node. So
    ``‖E‖₂`` is added to the node's diagonal, and the result is never below what it
    approximates in the Loewner order. The additions are errors of their own: they and
    the blocks get half of the square of the whole error each.

    Parameters
    ----------
    tree : ClusterTree
        The halving.
    leaves : array (2**K, m, m)
        Leaves of the matrix.
    total : float
        Frobenius norm that the matrix may lose.
    """

    def __init__(self, tree: ClusterTree, leaves: Array, total: float) -> None:
        self.tree = tree
        self._leaves = leaves
        self._total = total / math.sqrt(2)
        self._added = Space.of(leaves).real.zeros(tree.nodes(tree.levels))

    def cut(
        self, level: int, cut: Callable[..., Any], max_rank: int | None
    ) -> tuple[LowRank, Array]:
        """Cut the blocks B12 of a level; return them and what they lost.

        ``cut(tolerance, max_rank, spectral)`` does so, as `cut_triplets`.
        """
        tree, xp = self.tree, namespace(self._leaves)
        # the additions of all levels meet on one diagonal: their norms add up
        spectral = self._total / (tree.levels * math.sqrt(tree.n))
        tolerance = block_tolerance(tree, level, self._total)
        block, lost, norms = cut(tolerance, max_rank, spectral)
        leaves = tree.nodes(tree.levels) // tree.nodes(level)
        self._added = self._added + xp.reshape(
            xp.broadcast_to(norms[:, None], (tree.nodes(level), leaves)), (-1,)
        )
        return block, lost

    def finish(self) -> tuple[Array, float]:
        """Return the leaves with the additions, and the Frobenius norm of these."""
        space = Space.of(self._leaves)
        xp, m = space.xp, self.tree.leaf_size
        real = xp.astype(real_rows(self.tree, space), self._added.dtype)
        added = self._added[:, None] * xp.reshape(real, (-1, m))
        norm = float(frobenius(added))
        added = xp.astype(added, space.dtype, copy=False)
        return self._leaves + added[:, :, None] * space.eye(m), norm


def check_rtol(space: Space, rtol: float | None, default: float | None = None) -> float:
    """Return a relative tolerance, by default that of rounding; no less, but zero."""
    rounding = ROUNDING * space.eps
    if rtol is None:
        return rounding if default is None else default
    rtol = check_float("rtol", rtol, minimum=0)
    return max(rtol, rounding) if rtol else rtol


def check_tolerances(
    space: Space, rtol: float | None, atol: float, max_rank: int | None
) -> tuple[float, float, int | None]:
    """Return ``rtol`` (default: square root of epsilon), ``atol`` and ``max_rank``."""
    rtol = check_rtol(space, rtol, math.sqrt(space.eps))
    atol = check_float("atol", atol, minimum=0)
    return rtol, atol, None if max_rank is None else check_int("max_rank", max_rank, 0)


def check_symmetric(difference: float, norm: float, eps: float) -> None:
    """Raise if a matrix said to be symmetric differs from its adjoint beyond rounding."""
    if difference > 100 * eps * norm:
        msg = (
            "`symmetric` or `definite` is true, but `A` differs from its adjoint by "
            f"{difference / norm:.3g} of its norm; pass (A + A.T.conj()) / 2."
        )
        raise ValueError(msg)


def make_tree(
    n: int, levels: int | None, leaf_size: int | None, tree: ClusterTree | None
) -> ClusterTree:
    """Return the tree that one of the three arguments, or none, asks for."""
    given = [x is not None for x in (levels, leaf_size, tree)]
    if sum(given) > 1:
        msg = "Give one of `levels`, `leaf_size` and `tree`, not several."
        raise ShapeError(msg)
    if tree is not None:
        check_kind("tree", tree, ClusterTree)
        if tree.n != n:
            msg = f"`tree` is of {tree.n} rows, the matrix has {n}."
            raise ShapeError(msg)
        return tree
    if levels is not None:
        return ClusterTree(n, levels)
    return ClusterTree.from_leaf_size(n, LEAF_SIZE if leaf_size is None else leaf_size)
