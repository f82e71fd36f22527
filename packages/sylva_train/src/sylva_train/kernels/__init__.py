"""Block-sparse operations on dense weights; the only place that chooses a kernel.

`reference` is plain PyTorch and right everywhere; on a CPU `cost` tells it the cheapest
way. On a GPU, Triton kernels of the same signatures take its place: `dispatch` says when,
`plan` how the blocks of a mask share tiles and when a dense product is cheaper than any
kernel.
"""

from . import adamw
from .adamw import OPTIONS, BlockState
from .capture import Mirror, is_capturing
from .dispatch import check_kernels, find_kernel, find_mode, is_demanded
from .operators import block_sddmm
from .quantize import GROUP
from .reference import gather_blocks, scatter_blocks_

__all__ = [
    "GROUP",
    "OPTIONS",
    "BlockState",
    "Mirror",
    "adamw",
    "block_sddmm",
    "check_kernels",
    "find_kernel",
    "find_mode",
    "gather_blocks",
    "is_capturing",
    "is_demanded",
    "scatter_blocks_",
]
