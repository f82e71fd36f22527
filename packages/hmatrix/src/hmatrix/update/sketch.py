"""A linear sketch: the same whatever order samples come in, and exact to add up."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakValueDictionary

from hmatrix._backend import (
    Array,
    Space,
    add_product,
    adjoint,
    contiguous,
    eigh_descending,
    in_own_precision,
    one_thread_if_small,
    plus_product,
    positive_or_one,
    qr,
    safe_norm,
)
from hmatrix._operator import cleared
from hmatrix.mlr import MLR
from hmatrix.update._base import Streaming

__all__ = ["StreamingSketch"]

#: Random vectors that tell how far the result is off.
PROBES = 8


class StreamingSketch(Streaming[MLR]):
    """Second moments as a positive semidefinite `MLR` matrix, by a linear sketch.

    Of the blocks ``A_k`` of the moment on the diagonal at each level k, products with
    random vectors are added up, ``S_k = A_k Ω_k``; and the leaves. At the end each level
    takes Nyström's approximation of what those above have left,
    ``R_k = A_k − Σ_{j<k} F_j F_jᴴ`` (Tropp, Yurtsever, Udell & Cevher, "Fixed-rank
    approximation of a positive-semidefinite matrix from streaming data", 2017)::

        Y = R_k Ω_k,   F_k F_kᴴ = Y (Ω_kᴴ Y)⁺ Yᴴ ⪯ R_k

    so that the diagonal, the leaf blocks and positive semidefiniteness are exact (to the
    rounding of the whole) as with `StreamingMLR`, and an update is matrix products alone.

    All that is kept is linear in ``A``: how samples are cut into batches, in which order
    they come and how accumulators are merged changes nothing but rounding, at any rank.
    The price is a larger error at the same rank: in the Frobenius norm about three times
    that of `StreamingMLR` where the spectrum decays like a power (as measured by
    ``benchmarks/bench_hmatrix.py``), more where it decays faster.

    Parameters are those of `StreamingMLR`, without ``method``. ``rank`` is the number of
    columns of ``Ω_k``; merging asks for equal ranks and seeds. Accumulators of one size and
    seed share the random vectors, about ``2 n rank`` numbers, which `nbytes` leaves out.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> X = np.random.default_rng(0).standard_normal((500, 64)).cumsum(axis=1)
    >>> one, two = (hm.StreamingSketch(64, levels=2, rank=12) for _ in range(2))
    >>> one.update(X)
    >>> for batch in X[::-1]:
    ...     two.update(batch[None])
    >>> bool(np.allclose(one.result().to_dense(), two.result().to_dense()))
    True
    >>> exact = X.T @ X / 500
    >>> error = np.linalg.norm(one.result().to_dense() - exact)
    >>> bool(error < 0.01 * np.linalg.norm(exact)), bool(error < one.discarded / 250)
    (True, True)
    """

    _series = ("_sketches",)

    def _allocate(self) -> None:
        tree, self._lost = self.tree, []
        shapes = [
            (tree.nodes(k), tree.size(k), min(self.rank, tree.size(k)))
            for k in range(tree.levels)
        ]
        shapes.append((1, tree.padded, PROBES))
        self._sketches = [self.space.zeros(*shape) for shape in shapes]
        self._drawn: _Vectors | None = None

    @property
    def _vectors(self) -> list[Array]:
        """``Ω`` of each level, one for all of its nodes, and those of the probes."""
        if self._drawn is None:
            shapes = tuple(tuple(S.shape[1:]) for S in self._sketches)
            self._drawn = _vectors_of(self.space, shapes, self.seed)
        return self._drawn.arrays

    @property
    @in_own_precision
    def discarded(self) -> float:
        """Frobenius norm lost to the sketch, of the sum (not of the mean): an estimate.

        From the products with some more random vectors, which the result does not depend
        on: its relative standard deviation is a quarter if all is lost in one direction,
        and less otherwise.
        """
        Ω, held = self._vectors[-1], self.result(normalize=False)
        lost = self._sketches[-1][0, ...] - held._apply(Ω)
        return safe_norm(lost) / math.sqrt(PROBES)

    def _result(self, scale: float) -> MLR:
        tree, space = self.tree, self.space
        wide = space.double  # what is left of a level is a difference
        leaves = wide.asarray(self._leaves, copy=True)
        factors: list[Array] = []
        for S, Ω in zip(self._sketches[: tree.levels], self._vectors, strict=False):
            Y, vectors = wide.asarray(S, copy=True), wide.asarray(Ω)
            rounding = space.eps * space.xp.linalg.vector_norm(Y, axis=(-2, -1))
            for F in factors:
                above = space.xp.reshape(F, (*Y.shape[:2], F.shape[-1]))
                add_product(Y, above, adjoint(above) @ vectors, -1)
            F = _nystrom(Y, vectors, rounding)
            flat = space.xp.reshape(F, (tree.padded, F.shape[-1]))
            F = space.xp.reshape(cleared(flat, tree), F.shape)
            below = space.xp.reshape(F, (*leaves.shape[:2], F.shape[-1]))
            add_product(leaves, below, adjoint(below), -1)
            factors.append(F)
        root = math.sqrt(scale)
        return MLR(
            tree,
            space.asarray(leaves * scale),
            tuple(space.asarray(F * root) for F in factors),
        )

    def _chunk(self, c: int) -> int:
        # few large products, in temporaries of some ten megabytes; a device takes larger
        # ones to be busy with
        numbers = 2**22 if self.space.on_host else 2**24
        return min(c, max(512, numbers // self.tree.padded))

    def _add(self, E: Array) -> None:
        xp, c = self.space.xp, int(E.shape[1])
        rows = contiguous(adjoint(E))
        for k, (S, Ω) in enumerate(zip(self._sketches, self._vectors, strict=True)):
            nodes, size, width = S.shape
            products = xp.reshape(rows, (c * nodes, size)) @ Ω
            products = xp.reshape(products, (c, nodes, width))
            parts = xp.permute_dims(xp.reshape(rows, (c, nodes, size)), (1, 0, 2))
            # into new memory: what `state` gave is not written over
            self._sketches[k] = plus_product(
                S, adjoint(parts), xp.permute_dims(products, (1, 0, 2))
            )
        self._add_to_leaves(E)

    def _merge(self, other: StreamingSketch) -> None:
        if (other.rank, other.seed) != (self.rank, self.seed):
            msg = (
                f"`other` must have rank={self.rank} and seed={self.seed}, as this one has:"
                f" sketches by other vectors do not add up; got rank={other.rank} and"
                f" seed={other.seed}."
            )
            raise ValueError(msg)
        self._sketches = [
            a + b for a, b in zip(self._sketches, other._sketches, strict=True)
        ]

    def _scale(self, factor: float) -> None:
        self._sketches = [S * factor for S in self._sketches]


class _Vectors:
    """Random vectors, which all accumulators of one size and seed share.

    Orthonormal ones but for the last, which are standard normal.
    """

    def __init__(
        self, space: Space, shapes: tuple[tuple[int, ...], ...], seed: int
    ) -> None:
        self.made_of = space, shapes, seed
        # real ones do for complex samples, and give real ones the same in complex numbers
        drawn = [space.real.normal(shape, seed, k) for k, shape in enumerate(shapes)]
        # bases of their spans leave the cores as well conditioned as the matrix
        drawn[:-1] = [qr(x)[0] for x in drawn[:-1]]
        self.arrays = [space.asarray(x) for x in drawn]

    def __reduce__(self) -> tuple[Any, ...]:
        return _vectors_of, self.made_of  # copies share them too


_shared: WeakValueDictionary[Any, _Vectors] = WeakValueDictionary()


def _vectors_of(
    space: Space, shapes: tuple[tuple[int, ...], ...], seed: int
) -> _Vectors:
    key = (space.library, space.name, str(space.device), shapes, seed)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = _Vectors(space, shapes, seed)
    return found


def _nystrom(Y: Array, vectors: Array, rounding: Array) -> Array:
    """Return F (b, m, s) with ``F Fᴴ ⪯ R`` from ``Y = R Ω`` (b, m, s), orthonormal Ω (m, s).

    ``R`` is shifted by its error, ``rounding`` (b,), so that it is definite, and the shift
    is subtracted from the eigenvalues of ``F Fᴴ`` again.
    """
    xp, shift = Space.of(Y).xp, rounding[:, None]
    Y = Y + shift[..., None] * vectors
    core = adjoint(vectors) @ Y
    with one_thread_if_small(core):
        values, V = eigh_descending((core + adjoint(core)) / 2)
    # directions in which a singular core is zero are left out
    roots = xp.where(values > shift, xp.sqrt(positive_or_one(values)), math.inf)
    B = Y @ (V / roots[:, None, :])
    squared = adjoint(B) @ B
    with one_thread_if_small(squared):
        values, V = eigh_descending(squared)
    rest = 1 - shift / positive_or_one(values)
    kept = xp.where((values > shift) & (rest > 0), rest, 0.0)
    return B @ (V * xp.sqrt(kept)[:, None, :])
