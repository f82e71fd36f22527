"""Streaming: second moments ``Σ w zzᵀ`` held hierarchically, batch after batch.

Two accumulators with one interface. `StreamingMLR` stays positive semidefinite and
keeps the diagonal exact; `StreamingHODLR` is the hierarchical incremental SVD.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from hmatrix._backend import (
    Array,
    Space,
    cholesky,
    contiguous,
    detach,
    eigh_descending,
    inverse_lower,
    is_array,
    nbytes,
    subtract_product,
    transpose,
)
from hmatrix._checks import (
    FileFormatError,
    NonFiniteError,
    ShapeError,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_operand,
    check_space,
)
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR
from hmatrix.tree import ClusterTree

__all__ = ["StreamingHODLR", "StreamingMLR"]

#: Version of the dictionaries that ``state`` returns.
STATE_VERSION = 1
#: Columns beyond the rank in the randomized range finder.
OVERSAMPLING = 8
#: Random vectors that estimate a Frobenius norm too large to compute.
PROBES = 8
#: Noise added to unit columns before Cholesky QR, the rounding of float32 products.
NOISE = 1e-6


class _Streaming(ABC):
    """What both accumulators share: checking, chunking, counting, checkpoints."""

    # Names of the attributes that hold one array for each level.
    _series: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        n: int,
        levels: int = 4,
        rank: int = 32,
        *,
        like: Array | None = None,
        dtype: object = None,
        seed: int = 0,
    ) -> None:
        self.tree = ClusterTree(n, levels)
        self.rank = check_int("rank", rank, 1)
        self.seed = check_int("seed", seed, 0)
        if like is not None:
            check_array("like", like)
        self.space = check_space(Space.like(like, dtype))
        self._count = 0.0
        m = self.tree.leaf_size
        self._leaves = self.space.zeros(self.tree.nodes(self.tree.levels), m, m)
        # Frobenius norm lost so far in each upper off-diagonal block
        self._lost = [
            self.space.zeros(self.tree.nodes(k)) for k in range(self.tree.levels)
        ]

    @property
    def count(self) -> float:
        """Sum of the weights of the samples seen."""
        return self._count

    @property
    def discarded(self) -> float:
        """Frobenius norm lost to truncation, of the sum (not of the mean).

        Losses of one block add up over the updates (triangle inequality), those of
        different blocks are orthogonal. A bound on ``‖exact − held‖_F``, to rounding,
        except where randomized updates of `StreamingMLR` estimate their part.
        """
        xp = self.space.xp
        return math.sqrt(sum(2 * float(xp.sum(lost**2)) for lost in self._lost))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held between updates."""
        return nbytes(*self._arrays().values())

    def update(self, Z: Array, weight: float = 1.0) -> None:
        """Add ``weight · ZᵀZ``.

        Parameters
        ----------
        Z : array (c, n)
            Samples, one a row, in the library and on the device of the accumulator.
            float16 and bfloat16 (and float32 into a float64 accumulator) are
            converted before anything is summed. Large batches are taken in pieces.
        weight : float
            Weight of each sample, not negative.

        Raises
        ------
        ShapeError, DTypeError, BackendError
            If ``Z`` does not fit.
        NonFiniteError
            If ``Z`` or ``weight`` is NaN or infinite. Nothing has been added then.
        """
        Z = detach(check_operand("Z", Z, self.space, narrower=True))
        if len(Z.shape) != 2 or Z.shape[1] != self.tree.n:
            msg = (
                f"`Z` must have shape (samples, {self.tree.n}), got {tuple(Z.shape)}; "
                "flatten leading axes first."
            )
            raise ShapeError(msg)
        root = math.sqrt(check_float("weight", weight, minimum=0.0))
        pieces = self._pieces(Z)
        self._check_finite(Z, pieces, root)
        xp, missing = self.space.xp, self.tree.padded - self.tree.n
        for piece in pieces:
            E = xp.astype(piece, self.space.dtype, copy=False)
            E = contiguous(transpose(E if root == 1 else E * root))
            if missing:
                E = xp.concat([E, self.space.zeros(missing, E.shape[1])], axis=0)
            self._add(E)
        self._count += float(weight) * int(Z.shape[0])

    def merge(self, other: Self) -> None:
        """Add what ``other`` holds; both keep working afterwards.

        Raises
        ------
        TypeError
            If ``other`` is another kind of accumulator.
        ShapeError, DTypeError, BackendError
            If it has another size, depth, dtype, library or device. Ranks may differ.
        """
        if type(other) is not type(self):
            msg = (
                f"`other` must be a {type(self).__name__}, got {type(other).__name__}."
            )
            raise TypeError(msg)
        if other.tree != self.tree:
            msg = f"`other` must have {self.tree}, got {other.tree}."
            raise ShapeError(msg)
        check_operand("other", other._leaves, self.space)
        self._merge(other)
        self._lost = [a + b for a, b in zip(self._lost, other._lost, strict=True)]
        self._count += other._count

    def state(self) -> dict[str, Any]:
        """Return everything needed to go on: arrays, numbers and strings, flat."""
        return {
            "kind": type(self).__name__,
            "version": STATE_VERSION,
            "count": self._count,
            **self._options(),
            **self._arrays(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, like: Array | None = None) -> Self:
        """Rebuild an accumulator from `state`.

        Parameters
        ----------
        state : mapping
            What `state` returned; its arrays may have become those of another library.
        like : array, optional
            Array whose library and device to use; default: those of the state. The
            dtype is the state's.

        Raises
        ------
        FileFormatError
            If ``state`` is another kind's or version's, or is damaged.
        """
        kind, version = state.get("kind"), state.get("version")
        if kind != cls.__name__ or version != STATE_VERSION:
            msg = (
                f"`state` must be of kind {cls.__name__}, version {STATE_VERSION}; "
                f"got kind {kind!r}, version {version!r}."
            )
            raise FileFormatError(msg)
        leaves = state.get("leaves")
        if leaves is None or not is_array(leaves):
            msg = f"`state` must hold an array `leaves`, got {type(leaves).__name__}."
            raise FileFormatError(msg)
        space = Space.like(leaves if like is None else like, leaves.dtype)
        try:
            self = cls._from_options(state, space.zeros(0))
        except KeyError as error:
            msg = f"`state` lacks {error}."
            raise FileFormatError(msg) from None
        for name, expected in self._arrays().items():
            found = state.get(name)
            shape = tuple(getattr(found, "shape", ()))
            if found is None or not is_array(found) or shape != tuple(expected.shape):
                msg = f"`state[{name!r}]`: expected an array {tuple(expected.shape)}, got {shape}."
                raise FileFormatError(msg)
        self._leaves = space.asarray(leaves)
        for series in cls._series:
            parts = getattr(self, series)
            parts[:] = [
                space.asarray(state[f"{series.lstrip('_')}.{k}"])
                for k in range(len(parts))
            ]
        self._count = float(state["count"])
        return self

    @classmethod
    def _from_options(cls, state: Mapping[str, Any], like: Array) -> Self:
        return cls(
            int(state["n"]),
            int(state["levels"]),
            int(state["rank"]),
            like=like,
            seed=int(state["seed"]),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "n": self.tree.n,
            "levels": self.tree.levels,
            "rank": self.rank,
            "seed": self.seed,
        }

    def _arrays(self) -> dict[str, Array]:
        series = {
            f"{name.lstrip('_')}.{k}": part
            for name in self._series
            for k, part in enumerate(getattr(self, name))
        }
        return {"leaves": self._leaves, **series}

    def _pieces(self, Z: Array) -> list[Array]:
        """Cut a batch into nearly equal pieces of at most ``_chunk`` samples."""
        c = int(Z.shape[0])
        count = -(-c // self._chunk(c)) if c else 0
        edges = [c * i // count for i in range(count + 1)] if count else []
        return [Z[a:b, :] for a, b in itertools.pairwise(edges)]

    def _check_finite(self, Z: Array, pieces: Sequence[Array], root: float) -> None:
        """Refuse a batch before any of it is added; one number leaves the device."""
        if not pieces:
            return
        xp = self.space.xp
        norms = [
            xp.linalg.vector_norm(xp.astype(piece, self.space.dtype, copy=False))
            for piece in pieces
        ]
        energy = xp.sum(xp.stack(norms) ** 2) * root**2
        if not bool(xp.isfinite(energy)):
            bad = int(xp.sum(xp.astype(~xp.isfinite(Z), xp.int64)))
            found = f"{bad} NaN or infinite values" if bad else "values too large"
            msg = (
                f"`Z` of shape {tuple(Z.shape)} holds {found} to sum their squares in "
                f"{self.space.name}; nothing was added. Drop or rescale the samples."
            )
            raise NonFiniteError(msg)

    def _add_to_leaves(self, E: Array) -> None:
        """Add the diagonal blocks of ``E Eᵀ``, E (padded, c)."""
        shape = (*self._leaves.shape[:2], E.shape[-1])
        E = self.space.xp.reshape(E, shape)
        self._leaves = self._leaves + E @ transpose(E)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n={self.tree.n}, levels={self.tree.levels}, "
            f"rank={self.rank}, count={self.count:g}, {self.space.name}, "
            f"{self.space.place})"
        )

    @abstractmethod
    def _chunk(self, c: int) -> int:
        """Return how many of ``c`` samples to take at once."""

    @abstractmethod
    def _add(self, E: Array) -> None:
        """Add ``E Eᵀ``, E (padded, c)."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Add what ``other`` holds, but its count and losses."""


class StreamingMLR(_Streaming):
    """Second moments as a positive semidefinite `MLR` matrix, fed by a cascade.

    Each node keeps the best ``rank`` directions it has seen and passes the rest down to
    its two children; the leaves take what reaches them exactly. With ``M = [F E]``, the
    columns held and those arriving, and any orthonormal ``V``::

        F ← M V_r,   E ← M (I − V_r V_rᵀ),   and   F Fᵀ + E Eᵀ = M Mᵀ

    so the diagonal, the leaf blocks and positive semidefiniteness are exact whatever
    ``V`` is; lost are only the off-diagonal blocks of what is passed down.

    Parameters
    ----------
    n : int
        Length of a sample.
    levels : int
        Halvings, ``2**levels <= n``.
    rank : int
        Columns that a node holds.
    like : array, optional
        Array whose library, device and dtype to use (float32 for a half-precision
        one); default NumPy float64.
    dtype : str or dtype, optional
        ``"float32"`` or ``"float64"``, instead of that of ``like``.
    seed : int
        Seed of the randomized updates. Equal seeds and equal batches give equal
        results on one library and kind of device.
    method : {"auto", "eigh", "randomized"}
        How ``V`` is found: ``"eigh"`` takes the leading eigenvectors of ``MᵀM``,
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
        n: int,
        levels: int = 4,
        rank: int = 32,
        *,
        like: Array | None = None,
        dtype: object = None,
        seed: int = 0,
        method: str = "auto",
    ) -> None:
        super().__init__(n, levels, rank, like=like, dtype=dtype, seed=seed)
        self.method = check_choice("method", method, ("auto", "eigh", "randomized"))
        self._draws = 0
        self._factors = [
            self.space.zeros(
                self.tree.nodes(k),
                self.tree.size(k),
                min(self.rank, self.tree.size(k)),
            )
            for k in range(self.tree.levels)
        ]

    def result(self, *, normalize: bool = True) -> MLR:
        """Return the matrix: the weighted mean of ``zzᵀ``, or their sum.

        Without samples it is zero.
        """
        scale = 1 / self._count if normalize and self._count else 1.0
        root = math.sqrt(scale)
        factors = tuple(F * root for F in self._factors)
        return MLR(self.tree, self._leaves * scale, factors)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "method": self.method, "draws": self._draws}

    @classmethod
    def _from_options(cls, state: Mapping[str, Any], like: Array) -> Self:
        self = super()._from_options(state, like)
        self.method = str(state["method"])
        self._draws = int(state["draws"])
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
        self._leaves = self._leaves + other._leaves

    def _cascade(self, columns: Sequence[Array]) -> None:
        """Add ``Σ_k blkdiag(E_k E_kᵀ)``, ``columns[k]`` entering at level k."""
        xp, E = self.space.xp, None
        for k, F in enumerate(self._factors):
            arriving: list[Array] = [] if E is None else [E]
            arriving += columns[k : k + 1]
            parts = [xp.reshape(C, (*F.shape[:2], C.shape[-1])) for C in arriving]
            M = xp.concat([F, *parts], axis=-1)
            self._factors[k], E = self._split(M, int(F.shape[-1]))
            self._lost[k] = self._lost[k] + self._norm_between_halves(E)
        if E is None:  # no level: everything is one leaf
            E = columns[0] if columns else self.space.zeros(self.tree.padded, 0)
        self._add_to_leaves(E)

    def _split(self, M: Array, r: int) -> tuple[Array, Array]:
        """Split ``M`` (b, m, w) into F (b, m, r) and E so that MMᵀ = FFᵀ + EEᵀ.

        M is overwritten.
        """
        m, w = int(M.shape[-2]), int(M.shape[-1])
        sketch = self.rank + OVERSAMPLING
        # below these sizes a full eigendecomposition is the cheaper one
        small = (2 if self.method == "randomized" else 3) * sketch
        narrow = (1 if self.method == "randomized" else 4) * sketch
        if self.method != "eigh" and w > small and m > narrow:
            return self._split_randomized(M, r, sketch)
        if w > m:
            M = _square_root(M)
        _, V = eigh_descending(transpose(M) @ M)
        MV = M @ V
        return MV[..., :r], MV[..., r:]

    def _split_randomized(self, M: Array, r: int, sketch: int) -> tuple[Array, Array]:
        omega = self._normal(int(M.shape[-1]), sketch)
        Q = _orthonormal(transpose(M) @ (M @ omega), omega)
        MQ = M @ Q
        _, V = eigh_descending(transpose(MQ) @ MQ)
        F = (MQ @ V)[..., :r]
        return F, subtract_product(M, F, transpose((Q @ V)[..., :r]))

    def _norm_between_halves(self, E: Array) -> Array:
        """Frobenius norm of ``E₁ E₂ᵀ``, the halves of the rows of E (b, m, w): (b,)."""
        xp, half, w = self.space.xp, int(E.shape[-2]) // 2, int(E.shape[-1])
        upper, lower = E[..., :half, :], E[..., half:, :]
        sketch = self.rank + OVERSAMPLING
        if half <= 2 * sketch:
            product = upper @ transpose(lower)
            squared = xp.sum(product * product, axis=(-2, -1))
        elif w <= 4 * sketch or self.method == "eigh":
            # ‖E₁E₂ᵀ‖² = ⟨E₁ᵀE₁, E₂ᵀE₂⟩; rounding may push zero below zero
            grams = (transpose(upper) @ upper) * (transpose(lower) @ lower)
            squared = xp.sum(grams, axis=(-2, -1))
            squared = xp.where(squared > 0, squared, xp.zeros_like(squared))
        else:
            probed = upper @ (transpose(lower) @ self._normal(half, PROBES))
            squared = xp.sum(probed * probed, axis=(-2, -1)) / PROBES
        return xp.sqrt(squared)

    def _normal(self, *shape: int) -> Array:
        self._draws += 1
        return self.space.normal(shape, self.seed, self._draws)


def _square_root(M: Array) -> Array:
    """Return L (b, m, m) with ``L Lᵀ = M Mᵀ``, M (b, m, w) wider than high.

    The rows are brought to norm 1 first, so that rounding stays small beside each row's
    own norm, as it does in ``M Mᵀ``.
    """
    xp = Space.of(M).xp
    norms = xp.linalg.vector_norm(M, axis=-1, keepdims=True)
    rows = M / xp.where(norms > 0, norms, xp.ones_like(norms))
    values, vectors = eigh_descending(rows @ transpose(rows))
    roots = xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values)))
    return norms * (vectors * roots[:, None, :])


def _orthonormal(Y: Array, noise: Array) -> Array:
    """Return an orthonormal basis (b, w, s) that holds the span of ``Y``.

    Householder QR runs at a tenth of the speed of products here. In float32 there is
    room for Cholesky QR, done twice in float64: ``noise``, standard normal (w, s), at the
    level of float32 rounding bounds the condition number even of a zero ``Y``.
    """
    space = Space.of(Y)
    xp = space.xp
    if space.name == "float32":
        Q = xp.astype(Y, xp.float64)
        norms = xp.linalg.vector_norm(Q, axis=-2, keepdims=True)
        level = NOISE / math.sqrt(noise.shape[0])
        Q = Q / xp.where(norms > 0, norms, xp.ones_like(norms)) + level * xp.astype(
            noise, xp.float64
        )
        for _ in range(2):
            L = cholesky(transpose(Q) @ Q)
            if L is None:
                break
            Q = Q @ transpose(inverse_lower(L))
        else:
            return xp.astype(Q, space.dtype)
    return xp.linalg.qr(Y)[0]


class StreamingHODLR(_Streaming):
    """Second moments as a symmetric `HODLR` matrix, by incremental SVD.

    Each off-diagonal block ``B₁₂ ≈ U diag(Λ) Vᵀ`` takes a batch ``Z₁ᵀ Z₂`` by Brand's
    rank-c update ("Fast low-rank modifications of the thin singular value
    decomposition", 2006)::

        Q_u R_u = qr [U Z₁ᵀ],   Q_v R_v = qr [V Z₂ᵀ]
        Ψ = R_u diag(Λ, I) R_vᵀ = Ũ Λ̃ Ṽᵀ;   U ← Q_u Ũ_r,  V ← Q_v Ṽ_r,  Λ ← Λ̃_r

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

    def __init__(
        self,
        n: int,
        levels: int = 4,
        rank: int = 32,
        *,
        like: Array | None = None,
        dtype: object = None,
        seed: int = 0,
    ) -> None:
        super().__init__(n, levels, rank, like=like, dtype=dtype, seed=seed)
        tree = self.tree
        sizes = [
            (tree.nodes(k), tree.size(k + 1), min(self.rank, tree.size(k + 1)))
            for k in range(tree.levels)
        ]
        # U and V of a level side by side: they are factorised in one batched call
        self._bases = [self.space.zeros(b, 2, half, r) for b, half, r in sizes]
        self._scales = [self.space.zeros(b, r) for b, _, r in sizes]

    def result(self, *, normalize: bool = True) -> HODLR:
        """Return the matrix: the weighted mean of ``zzᵀ``, or their sum.

        Without samples it is zero.
        """
        scale = 1 / self._count if normalize and self._count else 1.0
        upper = tuple(
            LowRank(basis[:, 0, :, :], S * scale, basis[:, 1, :, :])
            for basis, S in zip(self._bases, self._scales, strict=True)
        )
        return HODLR(self.tree, self._leaves * scale, upper)

    def _chunk(self, c: int) -> int:
        return min(c, max(32, 2 * self.rank))

    def _add(self, E: Array) -> None:
        for k, basis in enumerate(self._bases):
            shape = (*basis.shape[:3], E.shape[-1])
            self._add_to_level(k, self.space.xp.reshape(E, shape))
        self._add_to_leaves(E)

    def _merge(self, other: Self) -> None:
        for k, (basis, S) in enumerate(zip(other._bases, other._scales, strict=True)):
            roots = self.space.xp.sqrt(S)[:, None, None, :]
            self._add_to_level(k, basis * roots)
        self._leaves = self._leaves + other._leaves

    def _add_to_level(self, k: int, Z: Array) -> None:
        """Add ``Z₁ Z₂ᵀ`` to the blocks of a level, Z (2**k, 2, half, c)."""
        xp = self.space.xp
        basis, S = self._bases[k], self._scales[k]
        r = int(S.shape[-1])
        Q, R = xp.linalg.qr(xp.concat([basis, Z], axis=-1))
        ones = xp.ones_like(Z[:, 0, 0, :])
        weights = xp.concat([S, ones], axis=-1)[:, None, :]
        core = (R[:, 0, :, :] * weights) @ transpose(R[:, 1, :, :])
        U, S, Vt = xp.linalg.svd(core, full_matrices=False)
        small = xp.stack([U[..., :r], transpose(Vt)[..., :r]], axis=1)
        self._bases[k] = Q @ small
        self._scales[k] = S[..., :r]
        self._lost[k] = self._lost[k] + xp.linalg.vector_norm(S[..., r:], axis=-1)
