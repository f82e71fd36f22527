"""The cascade: positive semidefinite, with an exact diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from hmatrix._backend import (
    Array,
    Space,
    add_product,
    adjoint,
    cholesky,
    conjugate,
    contiguous,
    detach,
    eigh_descending,
    in_own_precision,
    inverse_lower,
    one_thread_if_small,
    positive_or_one,
    qr,
    real_part,
    squares,
    to_one,
)
from hmatrix._checks import (
    ShapeError,
    check_choice,
    check_finite,
    check_int,
    check_operand,
)
from hmatrix.mlr import MLR
from hmatrix.tree import ClusterTree
from hmatrix.update._base import Streaming

__all__ = ["StreamingMLR"]

#: Ways to find the leading columns of nodes.
METHODS = ("auto", "eigh", "randomized")
#: Columns beyond the rank in the randomized range finder.
OVERSAMPLING = 8
#: Random vectors that estimate a Frobenius norm too large to compute.
PROBES = 8
#: Noise added to unit columns before Cholesky QR, the rounding of float32 products.
NOISE = 1e-6


class StreamingMLR(Streaming[MLR]):
    """Second moments as a positive semidefinite `MLR` matrix, fed by a cascade.

    Each node keeps the best ``rank`` directions it has seen and passes the rest down to
    its two children; the leaves take what reaches them exactly. With ``M = [F E]``, the
    columns held and those arriving, and any orthonormal ``V``::

        F ← M V_r,   E ← M (I − V_r V_rᴴ),   and   F Fᴴ + E Eᴴ = M Mᴴ

    so the diagonal, the leaf blocks and positive semidefiniteness are exact whatever
    ``V`` is; lost are only the off-diagonal blocks of what is passed down.

    Parameters
    ----------
    n : int or ClusterTree
        Length of a sample; or the tree, which has its own ``levels``.
    levels : int
        Halvings, ``2**levels <= n``.
    rank : int
        Columns that a node holds.
    like : array, optional
        Array whose library, device and dtype to use (float32 for a half-precision
        one); default NumPy float64.
    dtype : str or dtype, optional
        ``"float32"``, ``"float64"``, ``"complex64"`` or ``"complex128"``, instead of
        that of ``like``.
    seed : int
        Seed of the randomized updates. Equal seeds and equal batches give equal
        results on one library and kind of device.
    center : bool
        Whether to keep the samples' mean as well and to hold second moments about it: a
        covariance in place of ``E[z zᴴ]``.
    method : {"auto", "eigh", "randomized"}
        How ``V`` is found: ``"eigh"`` takes the leading eigenvectors of ``MᴴM``,
        ``"randomized"`` a sketch of them with one power step (Halko, Martinsson & Tropp,
        "Finding structure with randomness", 2011), all matrix products and the way for
        batches of many samples. ``"auto"`` chooses by the batch's size.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> X = np.random.default_rng(0).standard_normal((500, 64)).cumsum(axis=1)
    >>> stream = hm.StreamingMLR(64, levels=2, rank=8)
    >>> for batch in np.split(X, 5):
    ...     stream.update(batch)
    >>> stream.count
    500.0
    >>> A = stream.result()
    >>> exact = X.T @ X / 500
    >>> bool(np.allclose(A.diagonal(), np.diag(exact)))
    True
    >>> error = np.linalg.norm(A.to_dense() - exact)
    >>> bool(error < 0.01 * np.linalg.norm(exact)), bool(error <= stream.discarded / 500)
    (True, True)
    """

    _series = ("_factors", "_lost")

    def __init__(
        self,
        n: int | ClusterTree,
        levels: int = 4,
        rank: int = 32,
        *,
        like: Array | None = None,
        dtype: object = None,
        seed: int = 0,
        center: bool = False,
        method: str = "auto",
    ) -> None:
        super().__init__(
            n, levels, rank, like=like, dtype=dtype, seed=seed, center=center
        )
        self.method = check_choice("method", method, METHODS)
        self._draws = 0

    def _allocate(self) -> None:
        self._factors = [
            self.space.zeros(
                self.tree.nodes(k), self.tree.size(k), min(self.rank, self.tree.size(k))
            )
            for k in range(self.tree.levels)
        ]

    @in_own_precision
    def add_factors(self, factors: Sequence[Array]) -> None:
        """Add ``Σ_k blkdiag(E_k E_kᴴ)``; it counts as no sample.

        Parameters
        ----------
        factors : sequence of array (2**k, padded / 2**k, q)
            ``E_k`` of the levels k = 0, 1, …, as in `MLR`. torch tensors are detached.

        Raises
        ------
        ShapeError, DTypeError, BackendError, NonFiniteError
            If they do not fit, or are not finite. Nothing has been added then.
        """
        tree, columns = self.tree, []
        levels = range(max(tree.levels, 1))  # without halvings, the leaf is level 0
        wanted = [(tree.nodes(k), tree.padded // tree.nodes(k)) for k in levels]
        for factor in factors:
            columns.append(detach(check_operand("factors", factor, self.space)))
        shapes = [tuple(E.shape) for E in columns]
        if [shape[:-1] for shape in shapes] != wanted[: len(shapes)]:
            msg = f"`factors` must have shapes {wanted} with (…, q), got {shapes}."
            raise ShapeError(msg)
        for E in columns:
            check_finite("factors", E)
        self._cascade(columns)

    def _result(self, scale: float) -> MLR:
        root = math.sqrt(scale)
        factors = tuple(F * root for F in self._factors)
        return MLR(self.tree, self._leaves * scale, factors)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "method": self.method, "draws": self._draws}

    @classmethod
    def _from_options(cls, state: Mapping[str, Any], like: Array) -> Self:
        self = super()._from_options(state, like)
        self.method = check_choice("method", state["method"], METHODS)
        self._draws = check_int("draws", state["draws"], 0)
        return self

    def _chunk(self, c: int) -> int:
        if self.method == "eigh":
            return 4 * self.rank
        # few large products, in temporaries of some ten megabytes
        return min(c, max(512, 8 * self.rank, 2**22 // self.tree.padded))

    def _add(self, E: Array) -> None:
        self._cascade([E])

    def _merge(self, other: Self) -> None:
        self._cascade(other._factors)

    def _scale(self, factor: float) -> None:
        self._factors = [F * math.sqrt(factor) for F in self._factors]

    def _cascade(self, columns: Sequence[Array]) -> None:
        """Add ``Σ_k blkdiag(E_k E_kᴴ)``, ``columns[k]`` entering at level k.

        The columns of all M lie in one array as rows: each node works on a view of it, and
        overwrites what it was given by what it passes on.
        """
        xp, n = self.space.xp, self.tree.padded
        start = sum(int(C.shape[-1]) for C in (*self._factors, *columns))
        rows = self.space.zeros(start, n)
        for k, F in enumerate(self._factors):
            for C in (*columns[k : k + 1], F):
                stop, start = start, start - int(C.shape[-1])
                rows[start:stop, :] = adjoint(xp.reshape(C, (n, C.shape[-1])))
            N = self._by_nodes(rows[start:, :], k)
            self._factors[k], left = self._split(N, int(F.shape[-1]))
            start += int(N.shape[1]) - left
            lost = self._norm_between_halves(self._by_nodes(rows[start:, :], k))
            self._lost[k] = self._lost[k] + lost
        if not self._factors and columns:  # no level: everything is one leaf
            E = columns[0]
            rows, start = adjoint(xp.reshape(E, (n, E.shape[-1]))), 0
        self._add_to_leaves(adjoint(self._by_nodes(rows[start:, :], self.tree.levels)))

    def _by_nodes(self, rows: Array, level: int) -> Array:
        """View rows (w, padded) as the parts of a level's nodes: (2**level, w, m)."""
        xp, nodes = self.space.xp, self.tree.nodes(level)
        parts = xp.reshape(rows, (rows.shape[0], nodes, self.tree.padded // nodes))
        return xp.permute_dims(parts, (1, 0, 2))

    def _split(self, N: Array, r: int) -> tuple[Array, int]:
        """Split ``NᴴN``, N (b, w, m), into ``F Fᴴ + EᴴE``: F (b, m, r) and the rows of E.

        E takes the place of the last rows of N.
        """
        w, m = int(N.shape[-2]), int(N.shape[-1])
        sketch = self.rank + OVERSAMPLING
        # below these sizes a full eigendecomposition is the cheaper one
        small = (2 if self.method == "randomized" else 3) * sketch
        narrow = (1 if self.method == "randomized" else 4) * sketch
        if self.method != "eigh" and w > small and m > narrow:
            return self._split_randomized(N, r, sketch), w
        M = adjoint(N)
        if w > m:
            M = _square_root(M)
        with one_thread_if_small(M):
            _, V = eigh_descending(adjoint(M) @ M)
            MV = M @ V
        left = max(0, int(MV.shape[-1]) - r)
        N[:, w - left :, :] = adjoint(MV[..., r:])
        return contiguous(MV[..., :r]), left

    def _split_randomized(self, N: Array, r: int, sketch: int) -> Array:
        omega = self._normal(int(N.shape[-2]), sketch)
        Q = _orthonormal(N @ (adjoint(N) @ omega), omega)
        QN = adjoint(Q) @ N
        with one_thread_if_small(QN):
            _, V = eigh_descending(QN @ adjoint(QN))
            V = V[..., :r]
            F, QV = adjoint(QN) @ V, Q @ V
        add_product(N, QV, adjoint(F), -1)
        return F

    def _norm_between_halves(self, N: Array) -> Array:
        """Frobenius norm of ``N₁ᴴ N₂``, the halves of the columns of N (b, w, m): (b,)."""
        xp, w, half = self.space.xp, int(N.shape[-2]), int(N.shape[-1]) // 2
        first, second = N[..., :half], N[..., half:]
        sketch = self.rank + OVERSAMPLING
        # scaled to 1: squares of products may overflow or underflow in float32
        if half <= 2 * sketch:
            product, top = to_one(adjoint(first) @ second)
            squared = xp.sum(squares(product), axis=(-2, -1))
        elif w <= 4 * sketch or self.method == "eigh":
            # ‖N₁ᴴN₂‖² = ⟨N₁N₁ᴴ, N₂N₂ᴴ⟩; rounding may push zero below zero
            (one, a), (two, b) = (to_one(x @ adjoint(x)) for x in (first, second))
            squared = xp.sum(real_part(one * conjugate(two)), axis=(-2, -1))
            squared = xp.where(squared > 0, squared, 0.0)
            top = xp.sqrt(a) * xp.sqrt(b)
        else:
            probes = self._normal(half, PROBES)
            probed, top = to_one(adjoint(first) @ (second @ probes))
            squared = xp.sum(squares(probed), axis=(-2, -1)) / PROBES
        return xp.sqrt(squared) * top

    def _normal(self, *shape: int) -> Array:
        self._draws += 1
        return self.space.normal(shape, self.seed, self._draws)


def _square_root(M: Array) -> Array:
    """Return L (b, m, m) with ``L Lᴴ = M Mᴴ``, M (b, m, w) wider than high.

    The product is brought to unit diagonal first, so that rounding stays small beside
    each row's own norm, as it is in ``M Mᴴ``.
    """
    xp = Space.of(M).xp
    G = M @ adjoint(M)
    with one_thread_if_small(G):
        norms = xp.sqrt(real_part(xp.linalg.diagonal(G)))
        # one after the other: their product may be subnormal, where complex division fails
        rows = positive_or_one(norms)
        G = G / rows[:, :, None] / rows[:, None, :]
        values, vectors = eigh_descending(G)
        roots = xp.sqrt(xp.where(values > 0, values, 0.0))
        weights = norms[:, :, None] * roots[:, None, :]
    return weights * vectors


def _orthonormal(Y: Array, noise: Array) -> Array:
    """Return an orthonormal basis (b, w, s) that holds the span of ``Y``.

    Householder QR runs at a tenth of the speed of products here. In float32 there is
    room for Cholesky QR, done twice in float64: ``noise``, standard normal (w, s), at the
    level of float32 rounding bounds the condition number even of a zero ``Y``.
    """
    if Space.of(Y).name == "float32":
        with one_thread_if_small(Y):
            Q = _cholesky_qr_twice(Y, noise)
        if Q is not None:
            return Q
    return qr(Y)[0]


def _cholesky_qr_twice(Y: Array, noise: Array) -> Array | None:
    xp = Space.of(Y).xp
    Q = xp.astype(Y, xp.float64)
    norms = xp.linalg.vector_norm(Q, axis=-2, keepdims=True)
    level = NOISE / math.sqrt(noise.shape[0])
    Q = Q / positive_or_one(norms)
    Q = Q + level * xp.astype(noise, xp.float64)
    for _ in range(2):
        L = cholesky(adjoint(Q) @ Q, sure=True)  # by the noise
        if L is None:
            return None
        Q = Q @ adjoint(inverse_lower(L))
    return xp.astype(Q, Y.dtype)
