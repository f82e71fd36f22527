"""Hierarchical matrices from other descriptions of a matrix."""

from __future__ import annotations

from hmatrix.construct.budget import block_tolerance
from hmatrix.construct.dense import from_dense
from hmatrix.construct.matvec import from_matvec

__all__ = ["block_tolerance", "from_dense", "from_matvec"]
