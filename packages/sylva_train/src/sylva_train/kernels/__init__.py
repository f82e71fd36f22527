"""Block-sparse operations on dense weights; the only place that chooses a kernel.

`reference` is plain PyTorch and right everywhere.
"""

from __future__ import annotations

import torch

from . import reference
from .reference import gather_blocks, scatter_blocks_

__all__ = ["block_sddmm", "gather_blocks", "scatter_blocks_"]


@torch.library.custom_op("sylva_train::block_sddmm", mutates_args=())
def _opaque_sddmm(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Compute what `reference.block_sddmm` does, as one operation to a compiler."""
    return reference.block_sddmm(dy, x, indices, block_size)


@_opaque_sddmm.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,  # noqa: ARG001
    indices: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.new_empty((len(indices), block_size, block_size), dtype=wide)


def block_sddmm(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``; see `reference.block_sddmm`."""
    if torch.compiler.is_compiling():
        blocks: torch.Tensor = _opaque_sddmm(dy, x, indices, block_size)
        return blocks
    return reference.block_sddmm(dy, x, indices, block_size)
