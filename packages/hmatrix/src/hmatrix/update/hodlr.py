"""Hierarchical incremental SVD."""

from __future__ import annotations

from typing import Self

from hmatrix._backend import (
    Array,
    adjoint,
    contiguous,
    one_thread_if_small,
    positive_or_one,
    qr,
    svd,
)
from hmatrix.hodlr import HODLR, clear_padding
from hmatrix.lowrank import LowRank
from hmatrix.update._base import Streaming

__all__ = ["StreamingHODLR"]


class StreamingHODLR(Streaming[HODLR]):
    """Second moments as a symmetric `HODLR` matrix, by incremental SVD.

    Each off-diagonal block ``B₁₂ ≈ U diag(Λ) Vᴴ`` takes a batch ``Z₁ᴴ Z₂`` by Brand's
    rank-c update ("Fast low-rank modifications of the thin singular value
    decomposition", 2006)::

        Q_u R_u = qr [U Z₁ᴴ],   Q_v R_v = qr [V Z₂ᴴ]
        Ψ = R_u diag(Λ, I) R_vᴴ = Ũ Λ̃ Ṽᴴ;   U ← Q_u Ũ_r,  V ← Q_v Ṽ_r,  Λ ← Λ̃_r

    One Householder QR takes the place of projection, residual and its
    re-orthogonalisation: ``Q_u`` is orthonormal to rounding even where a sample lies in
    the span already, and the drift of ``U`` is removed on the way. Leaves are exact.
    Keeping the leading r after each batch is not the best rank r of the whole sum;
    `discarded` bounds the difference.

    Parameters are those of `StreamingMLR`, without ``method``; nothing here is random.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> X = np.random.default_rng(0).standard_normal((500, 64)).cumsum(axis=1)
    >>> stream = hm.StreamingHODLR(64, levels=2, rank=8)
    >>> stream.update(X)
    >>> exact = X.T @ X / 500
    >>> error = np.linalg.norm(stream.result().to_dense() - exact)
    >>> bool(error < 0.01 * np.linalg.norm(exact)), bool(error <= stream.discarded / 500)
    (True, True)
    """

    _series = ("_bases", "_scales", "_lost")

    def _allocate(self) -> None:
        tree = self.tree
        sizes = [
            (tree.nodes(k), tree.size(k + 1), min(self.rank, tree.size(k + 1)))
            for k in range(tree.levels)
        ]
        # U and V of a level side by side: they are factorised in one batched call
        self._bases = [self.space.zeros(b, 2, half, r) for b, half, r in sizes]
        self._scales = [self.space.real.zeros(b, r) for b, _, r in sizes]

    def _result(self, scale: float) -> HODLR:
        upper = tuple(
            LowRank(basis[:, 0, :, :], S * scale, basis[:, 1, :, :])
            for basis, S in zip(self._bases, self._scales, strict=True)
        )
        return clear_padding(HODLR(self.tree, self._leaves * scale, upper))

    def _chunk(self, c: int) -> int:
        return min(c, max(32, 2 * self.rank))

    def _add(self, E: Array) -> None:
        for k, basis in enumerate(self._bases):
            Z = self.space.xp.reshape(E, (*basis.shape[:3], E.shape[-1]))
            with one_thread_if_small(Z):
                self._add_to_level(k, Z)
        self._add_to_leaves(E)

    def _merge(self, other: Self) -> None:
        for k, (basis, S) in enumerate(zip(other._bases, other._scales, strict=True)):
            roots = self.space.xp.sqrt(S)[:, None, None, :]
            self._add_to_level(k, basis * roots)

    def _scale(self, factor: float) -> None:
        self._scales = [S * factor for S in self._scales]

    def _add_to_level(self, k: int, Z: Array) -> None:
        """Add ``Z₁ Z₂ᴴ`` to the blocks of a level, Z (2**k, 2, half, c)."""
        xp = self.space.xp
        basis, S = self._bases[k], self._scales[k]
        r = int(S.shape[-1])
        Q, R = qr(xp.concat([basis, Z], axis=-1))
        ones = self.space.real.ones(int(Z.shape[0]), int(Z.shape[-1]))
        weights = xp.concat([S, ones], axis=-1)[:, None, :]
        core = (R[:, 0, :, :] * weights) @ adjoint(R[:, 1, :, :])
        U, S, V = svd(core)
        small = xp.stack([U[..., :r], V[..., :r]], axis=1)
        self._bases[k] = Q @ small
        self._scales[k] = contiguous(S[..., :r])
        # beside the largest, which has a square where small ones have none
        top = positive_or_one(S[..., :1])
        lost = xp.linalg.vector_norm(S[..., r:] / top, axis=-1) * top[..., 0]
        self._lost[k] = self._lost[k] + lost
