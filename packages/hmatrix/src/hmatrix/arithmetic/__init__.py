"""Operations that make a new matrix from old ones, and norms."""

from __future__ import annotations

from hmatrix.arithmetic.assembly import Terms, assemble, estimate_norm, node_terms
from hmatrix.arithmetic.error import after, inverse_error
from hmatrix.arithmetic.linear import add, add_low_rank, scale, shift, subtract
from hmatrix.arithmetic.norms import norm
from hmatrix.arithmetic.product import matmul
from hmatrix.arithmetic.truncation import truncate

__all__ = [
    "Terms",
    "add",
    "add_low_rank",
    "after",
    "assemble",
    "estimate_norm",
    "inverse_error",
    "matmul",
    "node_terms",
    "norm",
    "scale",
    "shift",
    "subtract",
    "truncate",
]
