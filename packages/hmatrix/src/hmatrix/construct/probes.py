"""Ranges of blocks, norms and errors, from products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from hmatrix._backend import Array, Space, adjoint, frobenius, namespace, qr
from hmatrix._checks import ToleranceError
from hmatrix._operator import pad_rows
from hmatrix.hodlr import HODLR
from hmatrix.tree import ClusterTree

__all__ = ["ROUNDING", "Probes", "Product", "find_range"]

#: Product of a matrix with a block of vectors.
Product = Callable[[Array], Array]

#: Random vectors that measure norm and error.
PROBES = 16
#: Of the relative errors that are asked for, the smallest that products can show, in
#: units of epsilon.
ROUNDING = 100
_KEY = 1  # first word of the keys of random numbers


def find_range(
    sample: Callable[[int, int], Array], width: int, step: int, tolerance: float
) -> Array:
    """Find bases of the ranges of a batch of blocks by growing a random sample.

    Parameters
    ----------
    sample
        ``sample(q, c)`` returns ``c`` more columns ``B Ω`` (..., m, c) of the blocks,
        ``q`` being the number it returned before.
    width : int
        Columns at most; m of them always suffice.
    step : int
        Columns that the sample grows by, at least.
    tolerance : float
        Frobenius norm of all the blocks together that may lie outside.

    Returns
    -------
    array (..., m, q)
        Orthonormal columns.
    """
    Y = sample(0, min(step, width))
    while True:
        Q, _ = qr(Y)
        q = int(Y.shape[-1])
        if q >= width:
            return Q
        new = sample(q, min(max(step, q // 4), width - q))
        # E‖(I − QQᴴ) B ω‖² = ‖(I − QQᴴ) B‖_F² for columns that Q was not made of
        outside = float(frobenius(new - Q @ (adjoint(Q) @ new)))
        Y = namespace(Y).concat([Y, new], axis=-1)
        if outside <= tolerance * math.sqrt(new.shape[-1]):
            return qr(Y)[0]


@dataclass(frozen=True)
class Probes:
    """Random vectors and a matrix's products with them, padded: they measure errors.

    ``E‖(A − H) ω‖² = ‖A − H‖_F²`` for vectors that ``H`` was not made of.
    """

    vectors: Array
    products: Array

    @classmethod
    def of(cls, product: Product, tree: ClusterTree, space: Space, seed: int) -> Probes:
        """Draw vectors and multiply, padded (padded, q) to (padded, q)."""
        vectors = pad_rows(space.normal((tree.n, PROBES), _KEY, seed), tree)
        return cls(vectors, product(vectors))

    @property
    def norm(self) -> float:
        """Estimate of ``‖A‖_F``."""
        return float(frobenius(self.products)) / math.sqrt(PROBES)

    def error(self, H: HODLR) -> float:
        """Estimate of ``‖A − H‖_F``."""
        difference = self.products - H._apply(self.vectors)
        return float(frobenius(difference)) / math.sqrt(PROBES)

    def judge(self, H: HODLR, norm: float, allowed: float, advice: str) -> HODLR:
        """Return ``H`` with its relative error.

        Raises
        ------
        ToleranceError
            If the error is more than is allowed.
        """
        reached = self.error(H)
        if reached > allowed:
            scale = norm or 1.0
            msg = (
                f"A relative error of {allowed / scale:.3g} was asked for, and "
                f"{reached / scale:.3g} reached. {advice}, or give `max_rank` to take "
                "what can be had."
            )
            raise ToleranceError(msg, allowed / scale, reached / scale)
        error = reached / norm if norm else 0.0
        return replace(H, error=error)
