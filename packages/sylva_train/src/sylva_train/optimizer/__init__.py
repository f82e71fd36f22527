"""Sparse AdamW: PyTorch's own, or a kernel's, on the blocks' values alone."""

from .sparse import SparseAdamW

__all__ = ["SparseAdamW"]
