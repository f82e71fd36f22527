"""Sparse embedded linear layers: trainable blocks that live inside a frozen weight.

A layer keeps its dense weight as a frozen parameter and, for each adapter, float32
values of the active blocks as a parameter of shape (k, b, b). The values are written
into the dense weight whenever they changed, so forward and input gradient are the base
layer's own and cost nothing more; only the gradient of the active blocks is added.
"""

from .embedding import (
    check_masks,
    check_unembedded,
    embed,
    embed_blocks,
    embedded_layers,
    find_saved,
    merge,
    sync,
    uncovered_statistics,
    unload,
    warn_of_statistics,
)
from .gradient import accumulating
from .linear import SparseEmbeddedLinear, values_dtype
from .storage import check_in_memory, layer_showing

__all__ = [
    "SparseEmbeddedLinear",
    "accumulating",
    "check_in_memory",
    "check_masks",
    "check_unembedded",
    "embed",
    "embed_blocks",
    "embedded_layers",
    "find_saved",
    "layer_showing",
    "merge",
    "sync",
    "uncovered_statistics",
    "unload",
    "values_dtype",
    "warn_of_statistics",
]
