"""Blocks of ``dyᵀ x`` in Triton: sampled dense-dense matrix products.

A program computes a tile of ``ROWS`` block rows × ``COLUMNS`` active block columns over
one stretch of the tokens, as `plan` arranged it, and stores the blocks that the mask
has. Stretches are added up in their order by a second kernel, without atomics: the same
input gives the same bits. (Which configuration the autotuner prefers may differ from one
process to the next; `torch.use_deterministic_algorithms` fixes it.)
"""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .capture import is_capturing, never_ran
from .plan import Plan, find_plan, make_plan

__all__ = ["INTERPRETED", "block_sddmm", "run_plan", "self_check", "supports"]

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Whether Triton runs on a CPU, step by step, without a compiler.
INTERPRETED: bool = triton.knobs.runtime.interpret

#: What `split` counts, in tokens of a tile's work: what it takes to begin and to end one,
#: and to write a tile and add it up; tokens that are worth a program; most stretches.
FILL_TOKENS, JOIN_TOKENS, LEAST_TOKENS, MOST_SPLITS = 128, 400, 256, 32
#: What a program loses that has a processor for itself, and waits.
LONE_FACTOR = 1.25

#: Registers of a thread of which two programs of eight warps have place.
FEW = 128


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
    FAR: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Store one tile of one stretch: (splits, blocks, BLOCK, BLOCK) += or =."""
    group, split = tl.program_id(0), tl.program_id(1)
    super_row = tl.load(groups_ptr + 3 * group)
    first = tl.load(groups_ptr + 3 * group + 1)
    end = tl.load(groups_ptr + 3 * group + 2)

    # Places are counted from a stretch's first token, in 32 bits unless it is too large:
    # addresses would take twice the registers, and keep a second program out.
    PLACE: tl.constexpr = tl.int64 if FAR else tl.int32
    m = tl.arange(0, ROWS * BLOCK)
    n = tl.arange(0, COLUMNS * BLOCK)
    row = tl.load(members_ptr + super_row * ROWS + m // BLOCK).to(PLACE)
    row = row * BLOCK + m % BLOCK
    pair = first + n // BLOCK
    has_pair = pair < end
    column = tl.load(pairs_ptr + pair, mask=has_pair, other=0).to(PLACE)
    column = column * BLOCK + n % BLOCK
    row_inside = (row < outputs)[:, None]
    column_inside = (has_pair & (column < inputs))[None, :]
    t = tl.arange(0, TOKENS)
    token = t.to(PLACE)
    dy_place = row[:, None] * dy_column_stride + token[None, :] * dy_token_stride
    x_place = token[:, None] * x_token_stride + column[None, :] * x_column_stride

    slot = slots_ptr + pair[None, :] * ROWS + (m // BLOCK)[:, None]
    block = tl.load(slot, mask=has_pair[None, :] & (m[:, None] >= 0), other=-1)
    place = (m % BLOCK)[:, None] * BLOCK + (n % BLOCK)[None, :]
    # In 64 bits: Triton before 3.9 brings what is widened into the order of the stores, and
    # addresses otherwise, by way of as much shared memory as a tile's sums twice.
    place += block.to(tl.int64) * (BLOCK * BLOCK)
    result_ptr += split.to(tl.int64) * blocks * (BLOCK * BLOCK)
    if ADD:
        # Now rather than at the end, when it would need registers beside the sums.
        total = tl.load(result_ptr + place, mask=block >= 0, other=0.0)
    else:
        total = tl.zeros((ROWS * BLOCK, COLUMNS * BLOCK), tl.float32)

    # Activations of long sequences have more than 2³¹ elements.
    start = split * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, tokens)
    dy_ptr += start.to(tl.int64) * dy_token_stride
    x_ptr += start.to(tl.int64) * x_token_stride
    dy_step = TOKENS * tl.cast(dy_token_stride, tl.int64)
    x_step = TOKENS * tl.cast(x_token_stride, tl.int64)
    for now in range(start, stop, TOKENS):
        # A mask of tokens takes a third of a step's instructions, and keeps copies from
        # being wide where tokens stand side by side.
        live = (t >= 0) if EVEN else (now + t < stop)
        a = tl.load(dy_ptr + dy_place, mask=row_inside & live[None, :], other=0.0)
        b = tl.load(x_ptr + x_place, mask=column_inside & live[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        dy_ptr += dy_step
        x_ptr += x_step
    tl.store(result_ptr + place, total, mask=block >= 0)


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
    """Return what the autotuner may choose from, what does well as a rule first.

    Of each tile those with its `warps`. Few registers leave place for a second program
    on a processor, which computes while the first one begins or ends; the last fits into
    the 99 KB of shared memory of a consumer's GPU whatever the tile.
    """
    pieces = ((64, 3), (32, 4), (64, 4), (128, 2), (32, 2))
    few = triton.Config({"TOKENS": 64}, num_stages=3, num_warps=8, maxnreg=FEW)
    return [few] + [
        triton.Config({"TOKENS": tokens}, num_stages=stages, num_warps=warps)
        for warps, (tokens, stages) in itertools.product((4, 8), pieces)
    ]


def warps(rows: int, columns: int, block_size: int) -> int:
    """Return how many warps compute a tile.

    Four would spill a sum of 128 × 128 out of their registers, and eight read the
    operands of a smaller one more often than they compute with them.
    """
    return 8 if rows * columns * block_size**2 > 64 * 128 else 4


@functools.lru_cache(maxsize=4096)
def candidates(
    device: torch.device,
    itemsize: int,
    exact: bool,
    rows: int,
    columns: int,
    block: int,
    tokens: int,
) -> list[triton.Config]:
    """Leave out what does not fit into shared memory, or spans all tokens and more.

    Exact products of float32 have no tensor cores: long pieces only take long to compile.
    """
    sides, memory = (rows + columns) * block, shared_memory(device)
    # A larger sum leaves no registers for long steps, nor do copies of 4 bytes, as TF32 has
    # on a Hopper, whose tensor cores want its tokens side by side.
    longest = 128 if rows * columns * block**2 <= 128 * 128 else 64
    most = 32 if exact else max(32, min(tokens, longest * 2 // itemsize))
    # Other tiles and dtypes would not do with few registers; nor would tensor cores that
    # take their operands from registers, as those of other GPUs do.
    is_square = rows * block == columns * block == 128
    is_tight = is_square and itemsize == 2 and is_hopper(device)

    def fits(config: triton.Config) -> bool:
        size: int = sides * config.kwargs["TOKENS"] * itemsize * config.num_stages
        is_allowed = config.maxnreg is None or is_tight
        return size <= memory and config.kwargs["TOKENS"] <= most and is_allowed

    mine = [c for c in configurations() if c.num_warps == warps(rows, columns, block)]
    return [c for c in mine if fits(c)] or mine[-1:]


def prune(
    configs: list[triton.Config],  # noqa: ARG001 - all that there are
    named: dict[str, Any],
    **rest: Any,
) -> list[triton.Config]:
    """Return what the autotuner is to try; see `candidates`."""
    given = named | rest
    dy = given["dy_ptr"]
    exact = dy.itemsize == 4 and given["PRECISION"] == "ieee"
    tile = given["ROWS"], given["COLUMNS"], given["BLOCK"]
    tokens = min(given["tokens_per_split"], 128)
    return candidates(dy.device, dy.itemsize, exact, *tile, tokens)


def is_hopper(device: torch.device) -> bool:
    """Whether a device has the tensor cores that read shared memory (`wgmma`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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
        cache_results=not INTERPRETED,  # Triton 3.5 would ask it for a GPU
        **options,
    )(kernel)


tuned_sddmm_kernel = searched(sddmm_kernel)

#: What was found in this process: looked up in less time than the autotuner takes.
_found: dict[tuple[Any, ...], dict[str, Any]] = {}
#: Each GPU's backward pass has a thread of its own, and the autotuner is one for all.
_searching = threading.Lock()


def precision() -> str:
    """Return how float32 products are to be rounded, as PyTorch's own are."""
    chosen: str = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if chosen == "tf32" else "ieee"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of a GPU's processors."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=4096)
def split(programs: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """Return the number of stretches of tokens, and the tokens of each.

    A launch takes as long as the processor with most programs: 138 programs on 132
    processors take twice as long as 132, three stretches of each 4/3 as long.
    """
    each_has = processors(device)

    def cost(splits: int) -> float:
        most = -(-programs * splits // each_has)
        work = most * (tokens / splits + FILL_TOKENS)
        joins = splits * JOIN_TOKENS * programs / each_has if splits > 1 else 0
        return work * (LONE_FACTOR if most == 1 else 1) + joins

    splits = min(
        range(1, 1 + max(1, min(MOST_SPLITS, tokens // LEAST_TOKENS))), key=cost
    )
    each = -(-tokens // (128 * splits)) * 128
    return -(-tokens // each), each


def untuned(arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that does well as a rule, where no search may be made."""
    named = dict(zip(sddmm_kernel.arg_names, arguments, strict=False))
    chosen: dict[str, Any] = prune([], named | options)[0].all_kwargs()
    return chosen


def is_far(sides: tuple[torch.Tensor, ...], block_size: int) -> bool:
    """Whether places within a stretch's first tokens need 64 bits."""
    most = [(t.shape[1] + block_size) * t.stride(1) + 128 * t.stride(0) for t in sides]
    return max(most) >= 2**31


def search(
    grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any] | None:
    """Time the configurations, launch the fastest and return it.

    None, and the result is as it was, where a configuration fails to compile otherwise than
    the autotuner expects, or memory does not suffice: trials take a copy of the result.
    """
    try:
        with _searching:
            tuned_sddmm_kernel[grid](*arguments, **options)
            return dict(tuned_sddmm_kernel.best_config.all_kwargs())
    except Exception as failure:
        lacks_memory = isinstance(failure, torch.OutOfMemoryError)
        if lacks_memory or never_ran(failure, arguments[0].device):
            return None
        raise


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
        "FAR": is_far((dy, x), block_size),
        # The interpreter's products of bfloat16 are wrong.
        "WIDEN": INTERPRETED and dy.dtype == torch.bfloat16,
        "PRECISION": precision(),
    }
    tables = plan.members, plan.groups, plan.pairs, plan.slots
    sizes = tokens, dy.shape[1], x.shape[1], blocks, each
    strides = *dy.stride(), *x.stride()
    searched_for = tokens.bit_length(), device.index or 0
    arguments = (dy, x, parts, *tables, *sizes, *strides, *searched_for)
    key = (*options.values(), dy.dtype, tokens.bit_length(), device)
    chosen = _found.get(key)
    # Not searched again for: whatever is chosen, its steps span 128 tokens or a part.
    options["EVEN"] = tokens % 128 == each % 128 == 0
    is_fixed = INTERPRETED or not tune or torch.are_deterministic_algorithms_enabled()
    if is_fixed or (chosen is None and is_capturing(device)):  # trials wait for it
        chosen = untuned(arguments, options)
    found = None
    with torch.cuda.device_of(dy):
        if chosen is None:
            found = search((programs, count), arguments, options)
            chosen = _found[key] = found or untuned(arguments, options)
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
    """Return the largest error on small random problems, in units of what is allowed.

    Ragged edges, two stretches of several steps, even ones or not, and a gradient to add to.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * block_size + 3, 3 * block_size - 5)
    indices = torch.tensor([[0, 0], [0, 2], [1, 0], [2, 1]], device=device)
    plan = make_plan(indices, shape, block_size, dtype.itemsize)
    rounded = dtype == torch.float32 and precision() == "tf32"
    errors = []
    for tokens in (333, 384):
        dy, x = (
            torch.randn(tokens, n, generator=generator).to(device, dtype) for n in shape
        )
        out = torch.ones((4, block_size, block_size), device=device)
        run_plan(plan, dy, x, 4, block_size, out, splits=(2, 256), tune=False)
        exact = reference.block_sddmm(dy.double(), x.double(), indices, block_size) + 1
        # Sums of as many products of normal numbers have a size of about 20.
        errors.append(float((out - exact).abs().max()) / (0.2 if rounded else 2e-4))
    return max(errors)
