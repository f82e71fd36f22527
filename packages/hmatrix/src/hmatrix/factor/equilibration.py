"""Matrices whose rows or columns differ much in size, brought to about one size first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from hmatrix._backend import Array, detach, namespace, nbytes, positive_or_one, to_numpy
from hmatrix._checks import PrecisionError, SingularBlockError, take_array
from hmatrix._operator import unpad_rows
from hmatrix.arithmetic import shift as shifted
from hmatrix.factor._base import Factorization
from hmatrix.factor.hodlr import HODLRFactorization
from hmatrix.factor.operator import HODLRInverse
from hmatrix.factor.orthogonal import HODLROrthogonal
from hmatrix.hodlr import HODLR, from_sides
from hmatrix.lowrank import LowRank

__all__ = ["General", "HODLREquilibrated", "equilibrated_if_lossy"]

#: Each halves the exponents: enough for all that float64 has.
TURNS = 12
#: Sizes of rows, or of columns, that are within this of each other cost few digits.
FAR = 2.0**10

General = HODLRFactorization | HODLROrthogonal
_KINDS: dict[str, type[General]] = {
    kind.__name__: kind for kind in (HODLRFactorization, HODLROrthogonal)
}


def equilibrated_if_lossy(
    make: Callable[[HODLR, float], General], H: HODLR, shift: float
) -> Factorization:
    """Factorize by ``make``; where that loses digits, equilibrated, if that loses fewer.

    Only matrices whose rows or columns differ much in size are equilibrated. Orthogonal
    elimination of those always is: what it loses of solutions with the adjoint, because
    columns differ, is not measured.
    """
    lost, failure = math.inf, None
    try:
        first = make(H, shift)
        lost = max(first._lost, math.sqrt(H.space.eps))
        if first._lost < lost and not isinstance(first, HODLROrthogonal):
            return first
    except (PrecisionError, SingularBlockError) as error:
        failure = error
    scaled, *sizes = _equilibrated(H, shift)
    if any(x.max() > FAR * x.min() for x in sizes):
        with suppress(PrecisionError, SingularBlockError):
            second = HODLREquilibrated(H, shift, make(scaled, 0.0), *sizes)
            if second._lost <= lost:
                return second
    if failure is not None:
        raise failure
    return first


class HODLREquilibrated(Factorization):
    """Factorization of ``diag(rows)⁻¹ (H + shift·I) diag(columns)⁻¹``; see `factorize`.

    Parameters
    ----------
    H, shift
        Of the matrix.
    factor : HODLRFactorization or HODLROrthogonal
        Of what it is when it is scaled.
    rows, columns : numpy.ndarray (padded,)
        Powers of two.
    """

    matrix: HODLR

    def __init__(
        self,
        H: HODLR,
        shift: float,
        factor: General,
        rows: np.ndarray,
        columns: np.ndarray,
    ) -> None:
        super().__init__(H, shift)
        self._factor, self._lost = factor, factor._lost
        self._rows, self._columns = map(self.space.real.asarray, (rows, columns))
        logs = float(np.sum(np.log2(rows)) + np.sum(np.log2(columns)))
        self._logdet = factor._logdet + math.log(2) * logs

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without those of ``matrix``."""
        return super().nbytes + nbytes(*self._factor.matrix._arrays().values())

    def inverse(self) -> HODLRInverse:
        """Return the inverse as an operator; nothing is formed."""
        return HODLRInverse(self, refined=self._lost > math.sqrt(self.space.eps))

    def inverse_diagonal(self) -> Array:
        """Return the diagonal of the inverse (n,)."""
        rows, columns = (unpad_rows(x, self.tree) for x in (self._rows, self._columns))
        return self._factor.inverse_diagonal() / rows / columns

    def _sign_of_determinant(self) -> float | complex:
        return self._factor._sign_of_determinant()

    def _apply(self, x: Array) -> Array:
        return self._factor._apply(x / self._rows[:, None]) / self._columns[:, None]

    def _apply_adjoint(self, x: Array) -> Array:
        y = self._factor._apply_adjoint(x / self._columns[:, None])
        return y / self._rows[:, None]

    def _arrays(self) -> dict[str, Array]:
        kind = type(self._factor).__name__
        own = {"logdet": self._logdet, "rows": self._rows, "columns": self._columns}
        own["lost"] = self.space.xp.full_like(detach(self._logdet), self._lost)
        return own | {f"{kind}.{k}": x for k, x in self._factor._arrays().items()}

    def _set_arrays(self, arrays: Mapping[str, Array]) -> None:
        self._rows, self._columns = (
            take_array(arrays, name, (self.tree.padded,))
            for name in ("rows", "columns")
        )
        scaled = _divided(shifted(self.matrix, self.shift), self._rows, self._columns)
        for name, kind in _KINDS.items():
            own = {
                key.removeprefix(f"{name}."): x
                for key, x in arrays.items()
                if key.startswith(f"{name}.")
            }
            if own:
                self._factor = kind._restore(scaled, 0.0, own)
        self._lost = float(take_array(arrays, "lost", ()))


def _equilibrated(H: HODLR, shift: float) -> tuple[HODLR, np.ndarray, np.ndarray]:
    """Equilibrate ``H + shift·I``: the largest entry of rows and columns becomes about 1.

    Returns the matrix, and the powers of two (padded,) that rows and columns were divided
    by, 1 in padding. Each turn divides by square roots of both sizes at once, which keeps
    symmetry (Ruiz, "A scaling
    algorithm to equilibrate both rows and columns norms in matrices", 2001).
    """
    H = shifted(H, shift) if shift else H
    rows = columns = np.ones(H.tree.padded)
    if _alike(H):
        return H, rows, columns
    for turn in range(TURNS):
        by_rows = _root(_sizes(H))
        by_columns = by_rows if H.symmetric else _root(_sizes(H.H))
        both = (by_rows, by_columns)
        if not turn and not any(x.max() ** 2 > FAR * x.min() ** 2 for x in both):
            break  # there is nothing to gain
        if all((x == 1).all() for x in both):
            break
        rows, columns = rows * by_rows, columns * by_columns
        H = _divided(H, *map(H.space.real.asarray, both))
    return H, rows, columns


def _alike(H: HODLR) -> bool:
    """Tell, by a quick test that may miss it, whether rows and columns are of one size.

    They are if each has an entry in its leaf that is within ``FAR`` of a bound of all
    entries. This takes a fraction of the time of `_sizes`.
    """
    xp, tree = H.space.xp, H.tree
    leaves, sides = xp.abs(detach(H.leaves)), 1 if H.symmetric else 2
    lines = (xp.reshape(xp.max(leaves, axis=-1 - k), (-1,)) for k in range(sides))
    least = xp.min(xp.stack([xp.min(unpad_rows(x, tree)) for x in lines]))
    tops = [xp.max(leaves)]
    for blocks in map(H.blocks, range(tree.levels)):
        for block in (b for b in blocks[:sides] if b.rank):
            U, S, V = (xp.max(xp.abs(detach(x))) for x in (block.U, block.S, block.V))
            tops.append(U * S * V)
    return bool(least * FAR > xp.max(xp.stack(tops)))


def _sizes(H: HODLR) -> np.ndarray:
    """Return the largest entry of each row (padded,), in its leaf or a term ``u s vᴴ``."""
    xp = H.space.xp
    found = [xp.max(xp.abs(detach(H.leaves)), axis=-1)]
    for blocks in map(H.blocks, range(H.tree.levels)):
        found.append(xp.stack([_largest_terms(block) for block in blocks], axis=1))
    rows = [np.reshape(to_numpy(x), (-1,)) for x in found]
    largest: np.ndarray = np.max(np.stack(rows), axis=0)
    return largest.astype(np.float64)


def _largest_terms(block: LowRank) -> Array:
    """Return of each row the largest entry of a term ``u s vᴴ``: (b, m)."""
    xp = namespace(block.U)
    U, S, V = (xp.abs(detach(x)) for x in (block.U, block.S, block.V))
    if not block.rank:
        return xp.sum(U, axis=-1)
    return xp.max(U * (S * xp.max(V, axis=-2))[..., None, :], axis=-1)


def _root(sizes: np.ndarray) -> np.ndarray:
    """Return powers of two near the square roots of sizes, 1 for zero."""
    exponents = np.log2(np.where(sizes > 0, sizes, 1.0)) / 2
    return 2.0 ** np.round(exponents)


def _divided(H: HODLR, rows: Array, columns: Array) -> HODLR:
    """Return ``diag(rows)⁻¹ H diag(columns)⁻¹``; columns of factors have maxima 1 or 0."""
    space, tree = H.space, H.tree
    xp, m = space.xp, tree.leaf_size
    leaves = H.leaves / xp.reshape(rows, (-1, m, 1)) / xp.reshape(columns, (-1, 1, m))

    def divided(side: int, level: int, block: LowRank) -> LowRank:
        shape = (tree.nodes(level), 2, tree.size(level + 1), 1)
        U = block.U / xp.reshape(rows, shape)[:, side, ...]
        V = block.V / xp.reshape(columns, shape)[:, 1 - side, ...]
        S = block.S
        parts = []
        for x in (U, V):
            top = positive_or_one(xp.max(xp.abs(detach(x)), axis=-2))
            parts.append(x / top[..., None, :])
            S = S * top
        return LowRank(parts[0], S, parts[1])

    sides = (
        [divided(side, level, block) for level, block in enumerate(blocks)]
        for side, blocks in enumerate(H._sides.values())
    )
    return from_sides(tree, leaves, sides)
