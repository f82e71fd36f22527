"""Hierarchical matrices from other descriptions of a matrix."""

from __future__ import annotations

from hmatrix.construct.budget import (
    Cut,
    block_sides,
    block_tolerance,
    check_rtol,
    cut_blocks,
)
from hmatrix.construct.dense import from_dense
from hmatrix.construct.entries import from_entries, from_kernel
from hmatrix.construct.matvec import from_matvec
from hmatrix.construct.sparse import from_sparse
from hmatrix.construct.structured import from_diagonal, from_low_rank, identity, slices
from hmatrix.construct.toeplitz import from_toeplitz

__all__ = [
    "Cut",
    "block_sides",
    "block_tolerance",
    "check_rtol",
    "cut_blocks",
    "from_dense",
    "from_diagonal",
    "from_entries",
    "from_kernel",
    "from_low_rank",
    "from_matvec",
    "from_sparse",
    "from_toeplitz",
    "identity",
    "slices",
]
