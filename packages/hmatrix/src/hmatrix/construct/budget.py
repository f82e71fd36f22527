"""The tree and the tolerances of constructors: how much each block may lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from hmatrix._backend import Array, Space, frobenius, safe_norms
from hmatrix._checks import ShapeError, check_float, check_int, check_kind
from hmatrix._operator import real_rows
from hmatrix.hodlr import HODLR, clear_padding, from_sides
from hmatrix.lowrank import LowRank
from hmatrix.tree import ClusterTree

__all__ = [
    "LEAF_SIZE",
    "Cut",
    "block_sides",
    "block_tolerance",
    "check_rtol",
    "check_symmetric",
    "check_tolerances",
    "cut_blocks",
    "make_tree",
]

#: Cuts the blocks of a level, called with ``tolerance``, ``max_rank`` and ``spectral`` as
#: `recompress` is, and gives what that does.
Cut = Callable[[float, int | None, float], tuple[LowRank, Array, Array]]

#: Rows of a leaf where neither ``levels`` nor ``leaf_size`` is given.
LEAF_SIZE = 64
#: The smallest relative tolerance but zero, in units of epsilon: below it rounding, which
#: has full rank, would be stored.
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
    sides: Iterable[Iterable[Cut]],
    *,
    norm: float,
    total: float,
    max_rank: int | None,
    definite: bool = False,
) -> HODLR:
    """Return a matrix whose off-diagonal blocks are cut to what they may lose.

    Parameters
    ----------
    tree : ClusterTree
        The halving.
    leaves : array (2**K, m, m)
        Leaves of the matrix.
    sides : iterable of iterables of Cut
        The blocks of each level above the diagonal and, of a general matrix, below it.
        They are taken one by one: an iterator need not hold them all.
    norm : float
        Frobenius norm of the matrix.
    total : float
        Frobenius norm that the matrix may lose.
    max_rank : int, optional
        Cap on the ranks.
    definite : bool
        Keep a Hermitian positive semidefinite matrix so, by additions to its diagonal.

    Returns
    -------
    HODLR
        Its ``error`` is what was lost, relative to ``norm``.

    Notes
    -----
    Cutting ``E`` off ``B12`` takes ``[[0, E], [Eᴴ, 0]] ⪯ ‖E‖₂ I`` from a node. Where the
    matrix is to stay definite, ``‖E‖₂`` is added to the node's diagonal, and the result is
    never below the matrix in the Loewner order. The additions are errors of their own:
    they and the blocks get half of the square of ``total`` each.
    """
    if definite:
        total /= math.sqrt(2)
    cut: list[list[LowRank]] = []
    losses: list[Array] = []
    added: list[Array] = []
    for side in sides:
        cut.append([])
        for level, cut_block in enumerate(side):
            tolerance, spectral = block_tolerance(tree, level, total), math.inf
            if definite:
                # the additions of all levels meet on one diagonal: their norms add up
                spectral = total / (tree.levels * math.sqrt(tree.n))
            block, lost, largest = cut_block(tolerance, max_rank, spectral)
            cut[-1].append(block)
            losses.append(lost)
            added.append(largest)
    loss = math.hypot(*safe_norms(losses)) * (math.sqrt(2) if len(cut) == 1 else 1)
    if definite:
        leaves, more = _raised(tree, leaves, added)
        loss = math.hypot(loss, more)
    return clear_padding(from_sides(tree, leaves, cut, loss / norm if norm else 0.0))


def _raised(
    tree: ClusterTree, leaves: Array, added: Iterable[Array]
) -> tuple[Array, float]:
    """Add numbers (2**k,) to the diagonals of all nodes of each level k.

    Returns the leaves, and the Frobenius norm of all that was added.
    """
    space = Space.of(leaves)
    xp, count, m = space.xp, tree.nodes(tree.levels), tree.leaf_size
    total = space.real.zeros(count)
    for numbers in added:
        total = total + xp.repeat(numbers, count // numbers.shape[0])
    real = xp.reshape(real_rows(tree, space), (-1, m))
    diagonal = total[:, None] * xp.astype(real, total.dtype)
    norm = float(frobenius(diagonal))
    return leaves + diagonal[:, :, None] * space.eye(m), norm


def check_rtol(space: Space, rtol: float | None, default: float | None = None) -> float:
    """Return a relative tolerance, zero or no less than rounding.

    Default: ``default``, or rounding if that is None too.
    """
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
