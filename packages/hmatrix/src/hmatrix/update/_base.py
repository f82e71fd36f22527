"""What all accumulators share: checks, pieces, counting, checkpoints."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from hmatrix._backend import (
    Array,
    Space,
    adjoint,
    detach,
    in_own_precision,
    is_array,
    nbytes,
    to_numpy,
    unscaled_norm,
)
from hmatrix._checks import (
    FileFormatError,
    NonFiniteError,
    ShapeError,
    check_float,
    check_int,
    check_operand,
    not_finite,
    space_like,
)
from hmatrix._operator import Operator, pad_rows
from hmatrix.tree import ClusterTree

__all__ = ["Streaming"]

#: Version of the dictionaries that ``state`` returns.
STATE_VERSION = 1

#: What an accumulator gives.
Matrix = TypeVar("Matrix", bound=Operator)


class Streaming(ABC, Generic[Matrix]):
    """What all accumulators share: checks, pieces, counting, checkpoints."""

    # Names of the attributes that hold one array for each level.
    _series: ClassVar[tuple[str, ...]]

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
    ) -> None:
        self.tree = n if isinstance(n, ClusterTree) else ClusterTree(n, levels)
        self.rank = check_int("rank", rank, 1)
        self.seed = check_int("seed", seed, 0)
        self.space = space_like(like, dtype)
        self._count = 0.0
        m = self.tree.leaf_size
        self._leaves = self.space.zeros(self.tree.nodes(self.tree.levels), m, m)
        # in double precision, where the share of a late batch does not fall below rounding
        self._mean = self.space.double.zeros(self.tree.n) if center else None
        # Frobenius norm lost so far in each upper off-diagonal block
        self._lost = [
            self.space.real.zeros(self.tree.nodes(k)) for k in range(self.tree.levels)
        ]
        self._allocate()

    @property
    def count(self) -> float:
        """Sum of the weights of the samples seen."""
        return self._count

    @property
    def mean(self) -> Array:
        """Weighted mean of the samples seen: (n,), zero without any.

        Raises
        ------
        ValueError
            If the accumulator does not keep it.
        """
        if self._mean is None:
            msg = "The mean is kept with `center=True` only."
            raise ValueError(msg)
        return self.space.asarray(self._mean, copy=True)

    @property
    def discarded(self) -> float:
        """Frobenius norm lost to truncation, of the sum (not of the mean).

        Losses of one block add up over the updates (triangle inequality), those of
        different blocks are orthogonal. A bound on ``‖exact − held‖_F``, to rounding,
        except where randomized updates of `StreamingMLR` estimate their part.
        """
        # in Python's floats: squares of float32 may overflow or underflow
        lost = itertools.chain(*(to_numpy(x).tolist() for x in self._lost))
        return math.sqrt(2) * math.hypot(*lost)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held between updates."""
        return nbytes(*self._arrays().values())

    @in_own_precision
    def update(self, Z: Array, weight: float | Array = 1.0) -> None:
        """Add ``Σ w conj(z) zᵀ`` of samples z of weights w; of real ones ``ZᵀZ``.

        With ``center=True``, that of their deviations from the mean of all that were
        and will be seen. Its entry (i, j) is the sum of ``conj(z_i) z_j``; the
        covariance ``E z zᴴ`` of complex samples is its conjugate, which their
        conjugates give.

        Parameters
        ----------
        Z : array (c, n)
            Samples, one a row, in the library and on the device of the accumulator.
            float16 and bfloat16 (and float32 into a float64 accumulator) are
            converted before anything is summed, under ``torch.autocast`` too. Large
            batches are taken in pieces.
        weight : float or array (c,)
            Weight of each sample, not negative: one for all, or real numbers of the
            library and device of ``Z``.

        Raises
        ------
        ShapeError, DTypeError, BackendError
            If ``Z`` or ``weight`` does not fit.
        NonFiniteError
            If ``Z`` or ``weight`` is NaN or infinite. Nothing has been added then.
        ValueError
            If a weight is negative. Nothing has been added then.
        """
        Z = detach(check_operand("Z", Z, self.space, narrower=True))
        if len(Z.shape) != 2 or Z.shape[1] != self.tree.n:
            msg = (
                f"`Z` must have shape (samples, {self.tree.n}), got {tuple(Z.shape)}; "
                "flatten leading axes first."
            )
            raise ShapeError(msg)
        roots, weights = self._check_weight(weight, int(Z.shape[0]))
        parts = self._parts(int(Z.shape[0]))
        self._check_finite(Z, parts, float(weights.max(initial=0)))
        for part in parts:
            E = self.space.xp.astype(Z[part, :], self.space.dtype, copy=False)
            root = None if roots is None else roots[part, None]
            E = self._weighted(E, root, float(weights[part].sum()))
            self._add(pad_rows(adjoint(E), self.tree))

    @in_own_precision
    def result(self, *, normalize: bool = True) -> Matrix:
        """Return the matrix: the weighted mean of ``conj(z) zᵀ``, or their sum.

        Parameters
        ----------
        normalize : bool
            Divide the sum by `count`.

        Returns
        -------
        MLR or HODLR
            Zero without samples. With ``center=True`` z are deviations from `mean`.
        """
        return self._result(1 / self._count if normalize and self._count else 1.0)

    @in_own_precision
    def merge(self, other: Self) -> None:
        """Add what ``other`` holds; both keep working afterwards.

        Raises
        ------
        TypeError
            If ``other`` is another kind of accumulator.
        ShapeError, DTypeError, BackendError
            If it has another size, depth, dtype, library or device. Ranks may differ.
        ValueError
            If one of both is centered and the other is not.
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
        if (other._mean is None) != (self._mean is None):
            msg = f"`other` must have center={self._mean is not None}, as this one has."
            raise ValueError(msg)
        self._merge(other)
        self._leaves = self._leaves + other._leaves
        self._lost = [a + b for a, b in zip(self._lost, other._lost, strict=True)]
        between = self._between(other._mean, other._count)
        if between is not None:
            self._add(pad_rows(adjoint(between), self.tree))

    def scale(self, factor: float) -> None:
        """Multiply what has been added so far, and ``count``, by ``factor``.

        Before each batch it makes the result a mean that forgets exponentially.

        Parameters
        ----------
        factor : float
            Not negative.

        Raises
        ------
        DTypeError, NonFiniteError, ValueError
            If ``factor`` is no such number.
        """
        factor = check_float("factor", factor, minimum=0.0)
        self._scale(factor)
        self._leaves = self._leaves * factor
        self._lost = [x * factor for x in self._lost]
        self._count *= factor

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
        space = space_like(leaves if like is None else like, leaves.dtype)
        try:
            self = cls._from_options(state, space.zeros(0))
            self._count = check_float("count", state["count"], minimum=0.0)
        except KeyError as error:
            msg = f"`state` lacks {error}."
            raise FileFormatError(msg) from None
        except (TypeError, ValueError) as error:
            msg = f"`state` is damaged: {type(error).__name__}: {error}"
            raise FileFormatError(msg) from error
        for name, expected in self._arrays().items():
            found = state.get(name)
            shape = tuple(getattr(found, "shape", ()))
            if found is None or not is_array(found) or shape != tuple(expected.shape):
                msg = f"`state[{name!r}]`: expected an array {tuple(expected.shape)}, got {shape}."
                raise FileFormatError(msg)
        self._leaves = space.asarray(leaves, copy=True)
        if self._mean is not None:
            self._mean = Space.of(self._mean).asarray(state["mean"], copy=True)
        for series in cls._series:
            parts = getattr(self, series)
            parts[:] = [
                Space.of(part).asarray(state[f"{series.lstrip('_')}.{k}"], copy=True)
                for k, part in enumerate(parts)
            ]
        return self

    @classmethod
    def _from_options(cls, state: Mapping[str, Any], like: Array) -> Self:
        # a plain tree has neither sizes nor permutation
        places = {
            name: None if state.get(name) is None else to_numpy(state[name])
            for name in ("sizes", "permutation")
        }
        return cls(
            ClusterTree(int(state["n"]), int(state["levels"]), **places),
            rank=int(state["rank"]),
            like=like,
            seed=int(state["seed"]),
            center=bool(state["center"]),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "n": self.tree.n,
            "levels": self.tree.levels,
            "rank": self.rank,
            "seed": self.seed,
            "center": self._mean is not None,
            **self.tree._arrays(),
        }

    def _arrays(self) -> dict[str, Array]:
        series = {
            f"{name.lstrip('_')}.{k}": part
            for name in self._series
            for k, part in enumerate(getattr(self, name))
        }
        mean = {} if self._mean is None else {"mean": self._mean}
        return {"leaves": self._leaves, **mean, **series}

    def _check_weight(
        self, weight: float | Array, c: int
    ) -> tuple[Array | None, np.ndarray]:
        """Return roots of weights (c,), None if all are one, and the weights (c,)."""
        space = self.space
        if not getattr(weight, "ndim", 0):
            weight = check_float("weight", weight, minimum=0.0)
            root = None if weight == 1 else space.ones(c) * math.sqrt(weight)
            return root, np.full(c, weight)
        weights = detach(check_operand("weight", weight, space.real, narrower=True))
        if tuple(weights.shape) != (c,):
            msg = f"`weight` must be a number or have shape ({c},), got {tuple(weights.shape)}."
            raise ShapeError(msg)
        weights = space.xp.astype(weights, space.real.dtype, copy=False)
        numbers = to_numpy(weights).astype(float)
        for extreme in (numbers.min(initial=0), numbers.max(initial=0)):
            check_float("weight", extreme, minimum=0.0)
        return space.xp.sqrt(weights), numbers

    def _parts(self, c: int) -> list[slice]:
        """Cut a batch into nearly equal pieces of at most ``_chunk`` samples."""
        count = -(-c // self._chunk(c)) if c else 0
        return [slice(c * i // count, c * (i + 1) // count) for i in range(count)]

    def _check_finite(self, Z: Array, parts: Sequence[slice], weight: float) -> None:
        """Refuse a batch before any of it is added; one number leaves the device."""
        if not parts:
            return
        xp, dtype = self.space.xp, self.space.dtype
        norms = [unscaled_norm(xp.astype(Z[p, :], dtype, copy=False)) for p in parts]
        norm = float(unscaled_norm(xp.stack(norms)))
        if not norm * norm * weight <= float(xp.finfo(dtype).max):
            raise NonFiniteError(not_finite("Z", Z, self.space.name))

    def _weighted(self, E: Array, roots: Array | None, weight: float) -> Array:
        """Count samples (c, n) of this ``weight`` in all; return the rows E to add as EᴴE.

        A centered accumulator adds their deviations from their own mean, and a row for the
        difference of that from the mean held.
        """
        if self._mean is None or not weight:
            self._count += weight
            return E if roots is None else E * roots
        xp = self.space.xp
        # rounding is then relative to the deviations, not to the samples
        pivot = self.space.asarray(self._mean) if self._count else E[0, :]
        E = E - pivot
        shares = 1 / E.shape[0] if roots is None else roots**2 / weight
        step = xp.sum(E * shares, axis=0)
        E = E - step
        E = E if roots is None else E * roots
        pivot, step = (xp.astype(x, self._mean.dtype) for x in (pivot, step))
        between = self._between(pivot + step, weight)
        return E if between is None else xp.concat([E, between], axis=0)

    def _between(self, mean: Array | None, weight: float) -> Array | None:
        """Update `count` and `mean` by samples of this mean and weight.

        Returns the row (1, n) that the difference of both means adds to the deviations, if
        any (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances", 1979).
        """
        before, self._count = self._count, self._count + weight
        if mean is None or self._mean is None or not weight:
            return None
        step = mean - self._mean
        self._mean = self._mean + step * (weight / self._count) if before else mean
        between = step * math.sqrt(before * (weight / self._count))
        return self.space.asarray(between)[None, :] if before else None

    def _add_to_leaves(self, E: Array) -> None:
        """Add the diagonal blocks of ``E Eᴴ``, E (padded, c)."""
        shape = (*self._leaves.shape[:2], E.shape[-1])
        E = self.space.xp.reshape(E, shape)
        self._leaves = self._leaves + E @ adjoint(E)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n={self.tree.n}, levels={self.tree.levels}, "
            f"rank={self.rank}, count={self.count:g}, "
            f"{'' if self._mean is None else 'centered, '}"
            f"{self.space.name}, {self.space.place})"
        )

    @abstractmethod
    def _allocate(self) -> None:
        """Make the arrays of each level, which are zero."""

    @abstractmethod
    def _chunk(self, c: int) -> int:
        """Return how many of ``c`` samples to take at once."""

    @abstractmethod
    def _add(self, E: Array) -> None:
        """Add ``E Eᴴ``, E (padded, c)."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Add what ``other`` holds, but its leaves, count and losses."""

    @abstractmethod
    def _result(self, scale: float) -> Matrix:
        """Return the sum, multiplied by a number."""

    @abstractmethod
    def _scale(self, factor: float) -> None:
        """Multiply what is held, but leaves, count and losses."""
