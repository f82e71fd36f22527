"""What all accumulators share: checks, pieces, counting, checkpoints."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

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
from hmatrix._operator import pad_rows
from hmatrix.tree import ClusterTree

__all__ = ["Streaming"]

#: Version of the dictionaries that ``state`` returns.
STATE_VERSION = 1


class Streaming(ABC):
    """What both accumulators share: checking, chunking, counting, checkpoints."""

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
    ) -> None:
        self.tree = n if isinstance(n, ClusterTree) else ClusterTree(n, levels)
        self.rank = check_int("rank", rank, 1)
        self.seed = check_int("seed", seed, 0)
        self.space = space_like(like, dtype)
        self._count = 0.0
        m = self.tree.leaf_size
        self._leaves = self.space.zeros(self.tree.nodes(self.tree.levels), m, m)
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
    def discarded(self) -> float:
        """Frobenius norm lost to truncation, of the sum (not of the mean).

        Losses of one block add up over the updates (triangle inequality), those of
        different blocks are orthogonal. A bound on ``‖exact − held‖_F``, to rounding,
        except where randomized updates of `StreamingMLR` estimate their part.
        """
        # of Python's numbers, since squares of float32 can leave the range
        lost = itertools.chain(*(to_numpy(x).tolist() for x in self._lost))
        return math.sqrt(2) * math.hypot(*lost)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held between updates."""
        return nbytes(*self._arrays().values())

    @in_own_precision
    def update(self, Z: Array, weight: float = 1.0) -> None:
        """Add ``weight · ZᴴZ``, of real samples ``ZᵀZ``.

        Its entry (i, j) is the sum of ``conj(z_i) z_j``; the covariance ``E z zᴴ`` of
        complex samples is its conjugate, which their conjugates give.

        Parameters
        ----------
        Z : array (c, n)
            Samples, one a row, in the library and on the device of the accumulator.
            float16 and bfloat16 (and float32 into a float64 accumulator) are
            converted before anything is summed, under ``torch.autocast`` too. Large
            batches are taken in pieces.
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
        weight = check_float("weight", weight, minimum=0.0)
        root = math.sqrt(weight)
        pieces = self._pieces(Z)
        self._check_finite(Z, pieces, weight)
        xp = self.space.xp
        for piece in pieces:
            E = xp.astype(piece, self.space.dtype, copy=False)
            E = adjoint(E if root == 1 else E * root)
            self._add(pad_rows(E, self.tree))
        self._count += weight * int(Z.shape[0])

    @in_own_precision
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
        )

    def _options(self) -> dict[str, Any]:
        return {
            "n": self.tree.n,
            "levels": self.tree.levels,
            "rank": self.rank,
            "seed": self.seed,
            **self.tree._arrays(),
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
        return [Z[c * i // count : c * (i + 1) // count, :] for i in range(count)]

    def _check_finite(self, Z: Array, pieces: Sequence[Array], weight: float) -> None:
        """Refuse a batch before any of it is added; one number leaves the device."""
        if not pieces:
            return
        xp, dtype = self.space.xp, self.space.dtype
        norms = [unscaled_norm(xp.astype(x, dtype, copy=False)) for x in pieces]
        norm = float(unscaled_norm(xp.stack(norms)))
        if not norm * norm * weight <= float(xp.finfo(dtype).max):
            raise NonFiniteError(not_finite("Z", Z, self.space.name))

    def _add_to_leaves(self, E: Array) -> None:
        """Add the diagonal blocks of ``E Eᴴ``, E (padded, c)."""
        shape = (*self._leaves.shape[:2], E.shape[-1])
        E = self.space.xp.reshape(E, shape)
        self._leaves = self._leaves + E @ adjoint(E)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n={self.tree.n}, levels={self.tree.levels}, "
            f"rank={self.rank}, count={self.count:g}, {self.space.name}, "
            f"{self.space.place})"
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
        """Add what ``other`` holds, but its count and losses."""

    @abstractmethod
    def _scale(self, factor: float) -> None:
        """Multiply what is held, but leaves, count and losses."""
