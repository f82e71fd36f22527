"""Block-sparse operations on dense weights; the only place that chooses a kernel.

`reference` is plain PyTorch and right everywhere.
"""

from .reference import block_sddmm, gather_blocks, scatter_blocks_

__all__ = ["block_sddmm", "gather_blocks", "scatter_blocks_"]
