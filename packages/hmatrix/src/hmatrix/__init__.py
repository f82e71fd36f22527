"""Hierarchical low-rank matrices on NumPy, PyTorch and CuPy arrays."""
