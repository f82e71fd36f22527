"""Smaller ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from hmatrix._backend import in_own_precision, wants_gradient
from hmatrix._checks import NonFiniteError, check_int, check_kind
from hmatrix.arithmetic.error import after
from hmatrix.arithmetic.norms import norm
from hmatrix.construct import Cut, block_sides, check_rtol, cut_blocks
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import GRADIENTS_LOST, LowRank, recompress
from hmatrix.mlr import MLR
from hmatrix.update import StreamingMLR

__all__ = ["truncate"]

Matrix = TypeVar("Matrix", HODLR, MLR)


@in_own_precision
def truncate(
    H: Matrix,
    *,
    rtol: float | None = None,
    max_rank: int | None = None,
    definite: bool = False,
) -> Matrix:
    """Return ``H`` with smaller ranks.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    rtol : float, optional
        For a `HODLR`: ``‖H − result‖_F ≤ rtol · ‖H‖_F``; default: rounding only. Less
        than 10 epsilon counts as 10 epsilon, but zero, which keeps rounding at full rank.
    max_rank : int, optional
        Cap on the ranks. An `MLR` needs it: what its nodes cannot hold goes down to
        their children and the leaves, so that the diagonal and the leaf blocks stay
        exact.
    definite : bool
        Keep a Hermitian positive semidefinite `HODLR` so, as in `from_dense`: the
        result is never below ``H``. (An `MLR` of sign 1 stays so by its form.)

    Returns
    -------
    HODLR or MLR
        The ``error`` of a `HODLR` bounds what it has lost, now and before; None if that of
        ``H`` is not known.

    Raises
    ------
    ValueError
        If ``rtol`` or ``definite`` is given for an `MLR`, or ``max_rank`` is not; or
        ``definite`` for a matrix that is not stored as Hermitian; or if tensors that want
        gradients would lose those of what is cut off.
    NonFiniteError
        If a `HODLR` holds NaN or infinite values.
    """
    check_kind("H", H, HODLR, MLR)
    if max_rank is not None:
        max_rank = check_int("max_rank", max_rank, 1 if isinstance(H, MLR) else 0)
    if isinstance(H, HODLR):
        return _truncate_hodlr(H, rtol, max_rank, definite)
    if rtol is not None or definite or max_rank is None:
        msg = "An MLR matrix is truncated by `max_rank`, not by `rtol` or `definite`."
        raise ValueError(msg)
    if any(map(wants_gradient, H._arrays().values())):
        raise ValueError(GRADIENTS_LOST)
    stream = StreamingMLR(H.tree, rank=max_rank, like=H.leaves, method="eigh")
    stream.add_factors(H.factors)
    held = stream.result(normalize=False)
    return MLR(H.tree, H.leaves + H.sign * held.leaves, held.factors, H.sign)


def _truncate_hodlr(
    H: HODLR, rtol: float | None, max_rank: int | None, definite: bool
) -> HODLR:
    rtol, size = check_rtol(H.space, rtol), norm(H)
    if not math.isfinite(size):
        msg = f"`H` holds NaN or infinite values: its norm is {size}."
        raise NonFiniteError(msg)
    if definite and not H.symmetric:
        msg = (
            "`definite` is true, but `H` is not stored as Hermitian (H.symmetric); "
            "construct it with `symmetric=True`."
        )
        raise ValueError(msg)

    def cuts(side: Iterable[LowRank]) -> Iterator[Cut]:
        for level, block in enumerate(side):
            yield partial(recompress, block, sides=partial(block_sides, H.tree, level))

    cut = cut_blocks(
        H.tree,
        H.leaves,
        map(cuts, H._sides.values()),
        norm=size,
        total=rtol * size,
        max_rank=max_rank,
        definite=definite,
    )
    return replace(cut, error=after(H.error, cut.error))
