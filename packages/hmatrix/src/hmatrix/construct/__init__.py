"""Hierarchical matrices from other descriptions of a matrix."""

from __future__ import annotations

from hmatrix.construct.budget import Guard, block_tolerance
from hmatrix.construct.dense import from_dense
from hmatrix.construct.entries import from_entries, from_kernel

__all__ = ["Guard", "block_tolerance", "from_dense", "from_entries", "from_kernel"]
