"""Norms."""

from __future__ import annotations

import math

from hmatrix._backend import qr, transpose
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR

__all__ = ["norm"]


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
    squares = float(xp.sum(xp.abs(H.leaves) ** 2))
    if isinstance(H, HODLR):
        for level in range(H.tree.levels):
            for block in H.blocks(level):
                # the core of both QRs: no cancellation between dependent columns
                _, Ru = qr(block.U)
                _, Rv = qr(block.V)
                core = LowRank(Ru, block.S, Rv).to_dense()
                squares += float(xp.sum(xp.abs(core) ** 2))
        return math.sqrt(squares)
    for k, F in enumerate(H.factors):
        # ⟨G Gᵀ, F Fᵀ⟩ = ‖Gᵀ F‖² node by node, for the levels G above and at F
        for j, G in enumerate(H.factors[: k + 1]):
            inner = transpose(xp.reshape(G, (*F.shape[:2], G.shape[-1]))) @ F
            squares += float(xp.sum(inner**2)) * (1 if j == k else 2)
        part = xp.reshape(F, (*H.leaves.shape[:2], F.shape[-1]))
        squares += 2 * H.sign * float(xp.sum(part * (H.leaves @ part)))
    return math.sqrt(max(squares, 0.0))
