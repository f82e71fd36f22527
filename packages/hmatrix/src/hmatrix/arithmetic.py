"""Operations that make a new matrix from old ones, and norms."""

from __future__ import annotations

import math
from typing import TypeVar

from hmatrix._backend import Array, namespace, qr, transpose
from hmatrix._checks import ShapeError, check_float, check_int, check_operand
from hmatrix.construct import block_tolerance
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, recompress
from hmatrix.mlr import MLR
from hmatrix.update import StreamingMLR

__all__ = ["add", "norm", "scale", "shift", "truncate"]

Matrix = TypeVar("Matrix", HODLR, MLR)


def scale(H: Matrix, factor: float) -> Matrix:
    """Return ``factor · H``.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    factor : float
        Any finite number; not negative for an `MLR`, whose terms are squares.
    """
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
    added = xp.concat([added, space.zeros(tree.padded - tree.n)])
    added = xp.reshape(added, H.leaves.shape[:2])
    leaves = H.leaves + added[:, :, None] * space.eye(tree.leaf_size)
    if isinstance(H, MLR):
        return MLR(tree, leaves, H.factors, H.sign)
    return HODLR(tree, leaves, H.upper, H.lower)


def norm(H: HODLR | MLR) -> float:
    """Return the Frobenius norm, without forming the matrix.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> A = np.add.outer(np.arange(50.0), np.arange(50.0))
    >>> bool(np.isclose(hm.norm(hm.from_dense(A, levels=2)), np.linalg.norm(A)))
    True
    """
    xp = H.space.xp
    squares = float(xp.sum(H.leaves**2))
    if isinstance(H, HODLR):
        for level in range(H.tree.levels):
            for block in H.blocks(level):
                # the core of both QRs: no cancellation between dependent columns
                _, Ru = qr(block.U)
                _, Rv = qr(block.V)
                core = (Ru * block.S[..., None, :]) @ transpose(Rv)
                squares += float(xp.sum(core**2))
        return math.sqrt(squares)
    for k, F in enumerate(H.factors):
        # ⟨G Gᵀ, F Fᵀ⟩ = ‖Gᵀ F‖² node by node, for the levels G above and at F
        for j, G in enumerate(H.factors[: k + 1]):
            inner = transpose(xp.reshape(G, (*F.shape[:2], G.shape[-1]))) @ F
            squares += float(xp.sum(inner**2)) * (1 if j == k else 2)
        part = xp.reshape(F, (*H.leaves.shape[:2], F.shape[-1]))
        squares += 2 * H.sign * float(xp.sum(part * (H.leaves @ part)))
    return math.sqrt(max(squares, 0.0))


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


def truncate(
    H: Matrix, *, rtol: float | None = None, max_rank: int | None = None
) -> Matrix:
    """Return ``H`` with smaller ranks.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    rtol : float, optional
        For a `HODLR`: ``‖H − result‖_F ≤ rtol · ‖H‖_F``; default: rounding only.
    max_rank : int, optional
        Cap on the ranks. An `MLR` needs it: what its nodes cannot hold goes down to
        their children and the leaves, so that the diagonal and the leaf blocks stay
        exact.

    Raises
    ------
    ValueError
        If ``rtol`` is given for an `MLR`, or ``max_rank`` is not.
    """
    if max_rank is not None:
        max_rank = check_int("max_rank", max_rank, 1 if isinstance(H, MLR) else 0)
    if isinstance(H, MLR):
        if rtol is not None or max_rank is None:
            msg = "An MLR matrix is truncated by `max_rank`, not by `rtol`."
            raise ValueError(msg)
        stream = StreamingMLR(
            H.tree.n, H.tree.levels, max_rank, like=H.leaves, method="eigh"
        )
        stream.add_factors(H.factors)
        held = stream.result(normalize=False)
        leaves = H.leaves + H.sign * held.leaves
        return MLR(H.tree, leaves, held.factors, H.sign)
    rtol = H.space.eps if rtol is None else check_float("rtol", rtol, minimum=0.0)
    xp, size = H.space.xp, norm(H)
    upper: list[LowRank] = []
    lower: list[LowRank] = []
    squares = 0.0
    for level in range(H.tree.levels):
        tolerance = block_tolerance(H.tree, level, rtol * size)
        for side, block in zip((upper, lower), H.blocks(level), strict=True):
            if side is lower and H.symmetric:
                continue
            cut, lost = recompress(block, tolerance=tolerance, max_rank=max_rank)
            side.append(cut)
            squares += float(xp.sum(lost**2)) * (2 if H.symmetric else 1)
    error = math.sqrt(squares) / size if size else 0.0
    return HODLR(
        H.tree,
        H.leaves,
        tuple(upper),
        None if H.symmetric else tuple(lower),
        None if H.error is None else H.error + error,
    )


def _beside(a: LowRank, b: LowRank) -> LowRank:
    """Return a + b with the factors side by side."""
    xp = namespace(a.S)
    pairs = ((a.U, b.U), (a.S, b.S), (a.V, b.V))
    return LowRank(*(xp.concat(pair, axis=-1) for pair in pairs))
