"""Sums and multiples."""

from __future__ import annotations

import math
from typing import TypeVar

from hmatrix._backend import Array, namespace
from hmatrix._checks import ShapeError, check_float, check_operand
from hmatrix._operator import operation, pad_rows
from hmatrix.arithmetic.truncation import truncate
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR

__all__ = ["add", "scale", "shift", "subtract"]

Matrix = TypeVar("Matrix", HODLR, MLR)


@operation
def scale(H: Matrix, factor: complex) -> Matrix:
    """Return ``factor · H``.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    factor : float or complex
        Any finite number; not negative for an `MLR`, whose terms are squares, and
        complex only for a complex matrix.
    """
    if isinstance(H, HODLR) and H.space.is_complex and complex(factor).imag:
        return _scale_complex(H, factor)
    factor = check_float("factor", factor)
    if isinstance(H, MLR):
        root = math.sqrt(check_float("factor", factor, minimum=0.0))
        factors = tuple(F * root for F in H.factors)
        return MLR(H.tree, H.leaves * factor, factors, H.sign)

    def scaled(blocks: tuple[LowRank, ...]) -> tuple[LowRank, ...]:
        return tuple(LowRank(b.U, b.S * factor, b.V) for b in blocks)

    lower = None if H.lower is None else scaled(H.lower)
    return HODLR(H.tree, H.leaves * factor, scaled(H.upper), lower, H.error)


def shift(H: Matrix, diagonal: float | Array) -> Matrix:
    """Return ``H`` with a number, or a vector (n,), added to its diagonal.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    diagonal : float or array (n,)
        What to add; an array in the library, dtype and device of ``H``.
    """
    space, tree = H.space, H.tree
    xp = space.xp
    if isinstance(diagonal, int | float):
        added = xp.full((tree.n,), diagonal, dtype=space.dtype, device=space.device)
    else:
        added = check_operand("diagonal", diagonal, space)
        if tuple(added.shape) != (tree.n,):
            msg = f"`diagonal` must have shape ({tree.n},), got {tuple(added.shape)}."
            raise ShapeError(msg)
    added = xp.reshape(pad_rows(added, tree), H.leaves.shape[:2])
    leaves = H.leaves + added[:, :, None] * space.eye(tree.leaf_size)
    if isinstance(H, MLR):
        return MLR(tree, leaves, H.factors, H.sign)
    return HODLR(tree, leaves, H.upper, H.lower)


def _scale_complex(H: HODLR, factor: complex) -> HODLR:
    """Return ``factor · H``, which is not Hermitian; scales are real, so U takes it."""
    upper, lower = (
        tuple(
            LowRank(block.U * factor, block.S, block.V)
            for block in (H.blocks(k)[side] for k in range(H.tree.levels))
        )
        for side in (0, 1)
    )
    return HODLR(H.tree, H.leaves * factor, upper, lower, H.error)


@operation
def add(
    H: Matrix, G: Matrix, *, rtol: float | None = None, max_rank: int | None = None
) -> Matrix:
    """Return ``H + G``, truncated if ``rtol`` or ``max_rank`` is given.

    Parameters
    ----------
    H, G : HODLR or MLR
        Two matrices of one kind, tree, library, dtype and device.
    rtol, max_rank
        As of `truncate`, relative to the sum. Without them the sum is exact and its
        ranks are the sums of the ranks.

    Raises
    ------
    TypeError, ShapeError, DTypeError, BackendError
        If the two do not match.
    """
    if type(H) is not type(G):
        msg = f"`G` must be a {type(H).__name__}, got {type(G).__name__}."
        raise TypeError(msg)
    if H.tree != G.tree:
        msg = f"`G` must have {H.tree}, got {G.tree}."
        raise ShapeError(msg)
    check_operand("G", G.leaves, H.space)
    xp, levels = H.space.xp, range(H.tree.levels)
    if isinstance(H, MLR) and isinstance(G, MLR):
        if H.sign != G.sign:
            msg = f"`G` must have sign {H.sign}, got {G.sign}."
            raise ValueError(msg)
        factors = tuple(
            xp.concat(pair, axis=-1) for pair in zip(H.factors, G.factors, strict=True)
        )
        total = MLR(H.tree, H.leaves + G.leaves, factors, H.sign)
    else:
        pairs = [list(zip(H.blocks(k), G.blocks(k), strict=True)) for k in levels]
        upper, lower = (tuple(_beside(*p[side]) for p in pairs) for side in (0, 1))
        both = H.symmetric and G.symmetric
        total = HODLR(H.tree, H.leaves + G.leaves, upper, None if both else lower)
    if rtol is None and max_rank is None:
        return total
    return truncate(total, rtol=rtol, max_rank=max_rank)


@operation
def subtract(
    H: Matrix, G: Matrix, *, rtol: float | None = None, max_rank: int | None = None
) -> Matrix:
    """Return ``H − G``; arguments are those of `add`."""
    return add(H, scale(G, -1.0), rtol=rtol, max_rank=max_rank)


def _beside(a: LowRank, b: LowRank) -> LowRank:
    """Return a + b with the factors side by side."""
    xp = namespace(a.S)
    pairs = ((a.U, b.U), (a.S, b.S), (a.V, b.V))
    return LowRank(*(xp.concat(pair, axis=-1) for pair in pairs))
