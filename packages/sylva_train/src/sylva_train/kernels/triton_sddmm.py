"""Blocks of ``dyᵀ x`` in Triton: sampled dense-dense matrix products.

A program computes a tile of ``ROWS`` block rows × ``COLUMNS`` active block columns over
one stretch of the tokens, as `plan` arranged it, and stores the blocks that the mask
has. Stretches are added up in their order by a second kernel, without atomics: the same
input gives the same bits. (Which configuration the autotuner prefers may differ from one
process to the next; `torch.use_deterministic_algorithms` fixes it.)
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .capture import is_capturing
from .plan import Plan, find_plan, make_plan

__all__ = ["INTERPRETED", "block_sddmm", "run_plan", "self_check", "supports"]

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Whether Triton runs on a CPU, step by step, without a compiler.
INTERPRETED: bool = triton.knobs.runtime.interpret

#: What Triton raises before anything runs.
FAILURES = (triton.TritonError,)

#: Programs to each of a GPU's processors that a launch should have at least, by
#: splitting the tokens; tokens that are worth a program; most stretches.
WAVES, LEAST_TOKENS, MOST_SPLITS = 2, 256, 32


# Numbers that differ from call to call would otherwise be compiled anew, each time that
# one of them is a multiple of 16, or 1.
@triton.jit(do_not_specialize=["tokens", "blocks", "token_bucket", "device"])
def sddmm_kernel(
    dy_ptr,
    x_ptr,
    result_ptr,
    members_ptr,
    groups_ptr,
    pairs_ptr,
    slots_ptr,
    tokens,
    outputs,
    inputs,
    blocks,
    tokens_per_split,
    dy_token_stride,
    dy_column_stride,
    x_token_stride,
    x_column_stride,
    token_bucket,  # noqa: ARG001 - the autotuner reads it
    device,  # noqa: ARG001
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Store one tile of one stretch: (splits, blocks, BLOCK, BLOCK) += or =."""
    group, split = tl.program_id(0), tl.program_id(1)
    super_row = tl.load(groups_ptr + 3 * group)
    first = tl.load(groups_ptr + 3 * group + 1)
    end = tl.load(groups_ptr + 3 * group + 2)

    m = tl.arange(0, ROWS * BLOCK)
    n = tl.arange(0, COLUMNS * BLOCK)
    row = tl.load(members_ptr + super_row * ROWS + m // BLOCK).to(tl.int64)
    row = row * BLOCK + m % BLOCK
    pair = first + n // BLOCK
    has_pair = pair < end
    column = tl.load(pairs_ptr + pair, mask=has_pair, other=0).to(tl.int64)
    column = column * BLOCK + n % BLOCK
    row_inside = (row < outputs)[:, None]
    column_inside = (has_pair & (column < inputs))[None, :]

    # In 64 bits: activations of long sequences have more than 2³¹ elements.
    t = tl.arange(0, TOKENS)
    start = split * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, tokens)
    token = (start + t).to(tl.int64)
    dy_tile = (
        dy_ptr + row[:, None] * dy_column_stride + token[None, :] * dy_token_stride
    )
    x_tile = x_ptr + token[:, None] * x_token_stride + column[None, :] * x_column_stride
    total = tl.zeros((ROWS * BLOCK, COLUMNS * BLOCK), tl.float32)
    for now in range(start, stop, TOKENS):
        live = now + t < stop
        a = tl.load(dy_tile, mask=row_inside & live[None, :], other=0.0)
        b = tl.load(x_tile, mask=column_inside & live[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        dy_tile += TOKENS * dy_token_stride
        x_tile += TOKENS * x_token_stride

    slot = slots_ptr + pair[None, :] * ROWS + (m // BLOCK)[:, None]
    block = tl.load(slot, mask=has_pair[None, :] & (m[:, None] >= 0), other=-1)
    place = (split.to(tl.int64) * blocks + block) * (BLOCK * BLOCK)
    result = result_ptr + place + (m % BLOCK)[:, None] * BLOCK + (n % BLOCK)[None, :]
    if ADD:
        total += tl.load(result, mask=block >= 0, other=0.0)
    tl.store(result, total, mask=block >= 0)


@triton.jit(do_not_specialize=["splits"])
def add_splits_kernel(
    parts_ptr, result_ptr, size, splits, ADD: tl.constexpr, CHUNK: tl.constexpr
):
    """Add up stretches in their order: (splits, size) to (size,)."""
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = place < size
    total = tl.zeros((CHUNK,), tl.float32)
    if ADD:
        total += tl.load(result_ptr + place, mask=inside, other=0.0)
    for _ in range(splits):
        total += tl.load(parts_ptr + place, mask=inside, other=0.0)
        parts_ptr += size
    tl.store(result_ptr + place, total, mask=inside)


def supports(dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernel takes operands of a dtype, and blocks of a size."""
    return dtype in DTYPES and block_size in BLOCKS


def configurations() -> list[triton.Config]:
    """Return what the autotuner may choose from: of each tile half, see `warps`.

    The first fits into the 99 KB of shared memory of a consumer's GPU whatever the tile.
    """
    pieces = ((32, 2), (32, 4), (64, 3), (64, 4), (128, 2))
    return [
        triton.Config({"TOKENS": tokens}, num_stages=stages, num_warps=warps)
        for warps in (4, 8)
        for tokens, stages in pieces
    ]


def warps(rows: int, columns: int, block_size: int) -> int:
    """Return how many warps compute a tile.

    Four would spill a sum of 128 × 128 out of their registers, and eight read the
    operands of a smaller one more often than they compute with them.
    """
    return 8 if rows * columns * block_size**2 > 64 * 128 else 4


def prune(
    configs: list[triton.Config], named: dict[str, Any], **rest: Any
) -> list[triton.Config]:
    """Leave out what does not fit into shared memory, or spans all tokens and more.

    Exact products of float32 have no tensor cores: long pieces only take long to compile.
    """
    given = named | rest
    rows, columns, block = given["ROWS"], given["COLUMNS"], given["BLOCK"]
    exact = given["dy_ptr"].itemsize == 4 and given["PRECISION"] == "ieee"
    sides = (rows + columns) * block
    memory = shared_memory(given["dy_ptr"].device)

    def fits(config: triton.Config) -> bool:
        tokens: int = config.kwargs["TOKENS"]
        size: int = sides * tokens * given["dy_ptr"].itemsize * config.num_stages
        most: int = 32 if exact else max(32, given["tokens_per_split"])
        return size <= memory and tokens <= most

    mine = [c for c in configs if c.num_warps == warps(rows, columns, block)]
    return [c for c in mine if fits(c)] or mine[:1]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 16
    properties = torch.cuda.get_device_properties(device)
    # What every GPU since 2018 has, where this PyTorch does not tell.
    return int(getattr(properties, "shared_memory_per_block_optin", 1 << 16))


def searched(kernel: Any, **options: Any) -> Any:
    """Return a kernel that times its configurations at the first use of a key.

    A bucket of tokens is a power of two, so that a new length rarely searches again. What
    is added to is put back between trials. Triton keeps what was found on disk, beside
    the compiled kernels, for the next process.
    """
    key = ["BLOCK", "ROWS", "COLUMNS", "PRECISION", "token_bucket", "device"]
    return triton.autotune(
        configurations(),
        key=key,
        prune_configs_by={"early_config_prune": prune},
        restore_value=["result_ptr"],
        cache_results=not INTERPRETED,  # of which Triton 3.4 knows nothing
        **options,
    )(kernel)


tuned_sddmm_kernel = searched(sddmm_kernel)

#: What was found in this process: looked up in less time than the autotuner takes.
_found: dict[tuple[Any, ...], dict[str, Any]] = {}
#: Each GPU's backward pass has a thread of its own, and the autotuner is one for all.
_searching = threading.Lock()


def precision() -> str:
    """Return how float32 products are to be rounded, as PyTorch's own are."""
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)  # since 2.9
    return "tf32" if chosen == "tf32" or (not chosen and matmul.allow_tf32) else "ieee"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of a GPU's processors."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split(programs: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """Return the number of stretches of tokens, and the tokens of each."""
    # Not by `triton.cdiv`, which takes as long as all else here.
    wanted = -(-WAVES * processors(device) // programs)
    splits = max(1, min(wanted, MOST_SPLITS, tokens // LEAST_TOKENS))
    each = -(-tokens // (128 * splits)) * 128
    return -(-tokens // each), each


def untuned(plan: Plan, block_size: int) -> dict[str, Any]:
    """Return a configuration that does for every tile, where no search may be made."""
    count = warps(plan.rows, plan.columns, block_size)
    return {"TOKENS": 32, "num_stages": 2, "num_warps": count}


def search(
    grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any] | None:
    """Time the configurations, launch the fastest and return it.

    None, and nothing was launched, where memory does not suffice: trials take a copy of
    the result and a piece of memory that fills the cache.
    """
    try:
        with _searching:
            tuned_sddmm_kernel[grid](*arguments, **options)
            found: dict[str, Any] = tuned_sddmm_kernel.best_config.all_kwargs()
    except torch.OutOfMemoryError:
        return None
    return found


def run_plan(
    plan: Plan,
    dy: torch.Tensor,
    x: torch.Tensor,
    blocks: int,
    block_size: int,
    out: torch.Tensor | None = None,
    splits: tuple[int, int] | None = None,
    tune: bool = True,
) -> torch.Tensor:
    """Compute ``blocks`` blocks by the programs of a plan; see `block_sddmm`.

    ``splits`` are the number of stretches of tokens and the tokens of each, instead of
    what the device suggests; ``tune`` lets the autotuner choose a configuration.
    """
    device, add = dy.device, out is not None
    shape = (blocks, block_size, block_size)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    programs, tokens = plan.groups.shape[0], dy.shape[0]
    count, each = splits or split(programs, tokens, device)
    parts = out if count == 1 else out.new_empty((count, *shape))
    options: dict[str, Any] = {
        "BLOCK": block_size,
        "ROWS": plan.rows,
        "COLUMNS": plan.columns,
        "ADD": add and count == 1,
        # The interpreter's products of bfloat16 are wrong.
        "WIDEN": INTERPRETED and dy.dtype == torch.bfloat16,
        "PRECISION": precision(),
    }
    arguments = (
        dy,
        x,
        parts,
        plan.members,
        plan.groups,
        plan.pairs,
        plan.slots,
        tokens,
        dy.shape[1],
        x.shape[1],
        blocks,
        each,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        tokens.bit_length(),
        device.index or 0,
    )
    key = (*options.values(), dy.dtype, tokens.bit_length(), device)
    chosen = _found.get(key)
    if INTERPRETED or not tune or torch.are_deterministic_algorithms_enabled():
        chosen = untuned(plan, block_size)
    elif chosen is None and is_capturing(device):
        chosen = untuned(plan, block_size)  # trials wait for the device
    found = None
    with torch.cuda.device_of(dy):
        if chosen is None:
            found = search((programs, count), arguments, options)
            chosen = _found[key] = found or untuned(plan, block_size)
        if found is None:
            sddmm_kernel[programs, count](*arguments, **options, **chosen)
        if count > 1:
            grid = (-(-out.numel() // 1024),)
            add_splits_kernel[grid](parts, out, out.numel(), count, ADD=add, CHUNK=1024)
    return out


def block_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``, as `reference.block_sddmm` computes them.

    Operands may have any strides. ``out`` has to be contiguous and float32.
    """
    if indices.shape[0] == 0 or dy.shape[0] == 0:
        return reference.block_sddmm(dy, x, indices, block_size, out=out)
    shape = (dy.shape[1], x.shape[1])
    plan = find_plan(indices, shape, block_size, dy.dtype.itemsize)
    way = plan.way(dy.shape[0])
    if way == "blocks":
        return run_plan(plan, dy, x, indices.shape[0], block_size, out)
    take = reference.from_rectangle if way == "rectangle" else reference.from_dense
    blocks = take(dy, x, indices, block_size)
    return blocks if out is None else out.add_(blocks)


def self_check(device: torch.device, dtype: torch.dtype, block_size: int) -> float:
    """Return the largest error on a small random problem, in units of what is allowed.

    Ragged edges, two stretches of tokens, and a gradient to add to.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * block_size + 3, 3 * block_size - 5)
    indices = torch.tensor([[0, 0], [0, 2], [1, 0], [2, 1]], device=device)
    dy, x = (torch.randn(67, n, generator=generator).to(device, dtype) for n in shape)
    plan = make_plan(indices, shape, block_size, dtype.itemsize)
    out = torch.ones((4, block_size, block_size), device=device)
    run_plan(plan, dy, x, 4, block_size, out, splits=(2, 40), tune=False)
    exact = reference.block_sddmm(dy.double(), x.double(), indices, block_size) + 1
    rounded = dtype == torch.float32 and precision() == "tf32"
    # Sums of 67 products of normal numbers have a size of about 8.
    return float((out - exact).abs().max()) / (0.1 if rounded else 1e-4)
