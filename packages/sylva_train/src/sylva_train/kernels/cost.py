"""What ways to blocks of a product cost on a CPU, and in which dtype it multiplies."""

from __future__ import annotations

import functools

import torch

from sylva_train._torch import has_amx, has_fast_bfloat16

__all__ = ["choose_way", "product_dtype", "speeds_of", "wide"]

# Cost model of the ways on a CPU, in multiply-adds of the dense product for each token
# (benchmarks/bench_layer.py): copying an active row or column of blocks costs so much for
# each element, both sides of a stack's product so much together; products of block rows
# (and blocks) and of a rectangle are slower by these factors;
# and another way must be cheaper than the dense product by this margin to be taken.
# Beside, for all tokens together, each call of a product costs so much, writing each
# element of its result, and putting together those of narrow ones. What each thread more
# makes the dense product faster by, it does not do for narrow ones, which even lose
# a little, since threads wait for each other; those of a stack less. Inputs of as many
# elements are too large for the cache, and each run of a block's row that is copied out
# of them costs more by this.
COPY_COST, STACK_COST = 34.0, 56.0
ROW_COST, RECTANGLE_COST, MARGIN = 1.05, 1.15, 0.92
CALL_COST, WRITE_COST, JOIN_COST = 3 << 17, 5.0, 20.0
THREAD_COST, STACK_THREAD_COST = 1.4, 1.2
FAR_ELEMENTS, FAR_COST = 1 << 23, 500.0
# How fast products are, relative to those of float32 on the CPU that the costs are of,
# where copies and calls are as slow as ever: (float32, bfloat16 where a CPU has it).
SPEEDS = {"AMX": (2.5, 16.0), "other": (1.0, 4.0)}


@functools.lru_cache(maxsize=4096)
def choose_way(
    blocks: int,
    active: tuple[int, int],
    grid: tuple[int, int],
    block_size: int,
    tokens: int,
    threads: int = 1,
    speed: float = 1.0,
    copying: float = 1.0,
    stacked: float = 0.0,
) -> str:
    """Choose the cheapest way to blocks of a product, the dense one when in doubt.

    Parameters
    ----------
    blocks : int
        Number of active blocks.
    active, grid : (int, int)
        Active and existing rows and columns of blocks.
    block_size : int
        Side of a block.
    tokens : int
        Rows of the operands.
    threads : int
        That compute: copies and narrow products gain nothing by more of them.
    speed, copying : float
        How fast products are, and what copying an element costs in units of them: see
        `speeds_of`.
    stacked : float
        How many times as long as the dense product those of a stack take, which are of
        float32 at least. 0: there is no stack among the ways.

    Returns
    -------
    str
        ``"rows"``, ``"cartesian"``, ``"dense"`` or ``"stack"``.
    """
    area, b = block_size**2, block_size
    once = CALL_COST, WRITE_COST, JOIN_COST
    call, write, join = (cost * speed / tokens for cost in once)
    narrow = 1 + THREAD_COST * (threads - 1)
    is_far = tokens * grid[1] * b >= FAR_ELEMENTS
    far = FAR_COST if is_far else 0
    copy = (COPY_COST * b + far) * copying
    taken = blocks * area * write  # out of a larger product
    costs = {
        "rows": blocks * (narrow * (ROW_COST * area + copy) + join * area)
        + narrow * active[0] * call,
        "cartesian": active[0] * active[1] * area * (RECTANGLE_COST + write)
        + threads * (sum(active) * copy + call)
        + taken,
        "dense": grid[0] * grid[1] * area * (MARGIN + write) + taken,
    }
    if stacked:
        both = (STACK_COST * b + 2 * far) * speed
        narrow = 1 + STACK_THREAD_COST * (threads - 1)
        product = narrow * (stacked * ROW_COST * area + both)
        costs["stack"] = blocks * (product + area * write) + narrow * call
    return min(costs, key=lambda way: costs[way])


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of a dtype are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype of products of a dtype, all of which are added up in float32.

    A CPU's product of bfloat16, several times as fast as one of float32, is rounded at
    the end, as PyTorch's own dense gradient is.
    """
    if dtype != torch.bfloat16 or device != "cpu":
        return wide(dtype)
    return dtype if has_fast_bfloat16() else torch.float32


def speeds_of(x: torch.Tensor) -> tuple[float, float, float]:
    """Return the speed of a tensor's products, and two costs relative to it.

    Those of copies, and of products in float32 at least, as those of a stack are.
    """
    float32, bfloat16 = SPEEDS["AMX" if has_amx() else "other"]
    if product_dtype(x.dtype, x.device.type) == torch.bfloat16:
        # half as many bytes to copy
        return bfloat16, bfloat16 / 2, bfloat16 / float32
    return float32, float32, 1.0
