"""The Triton kernel for blocks of a product, on a GPU or interpreted.

Errors are relative to the root mean square of the dense product: sums of a few hundred
products in float32, in any order.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_train.kernels import cost
from sylva_train.kernels.plan import make_plan, tiles
from sylva_train.masks import LayerMask
from tests.sylva_train.models import dense_blocks, error, plans_of
from tests.sylva_train.operands import DTYPES, LAYOUTS, make_mask, operand

pytest.importorskip("triton")
from sylva_train.kernels import triton_sddmm

TOLERANCE = 1e-4


def check(got, dy, x, mask, before=0.0):
    dense = (dy.double().T @ x.double()).cpu()
    inside = dense_blocks(torch.ones(mask.shape, dtype=torch.bool), mask)
    expected = dense_blocks(dense, mask) + before
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert got.device == dy.device
    off = (got.cpu() - expected).abs()
    if cost.product_dtype(dy.dtype, dy.device.type) == torch.bfloat16:
        # Blocks out of a dense product on a CPU are rounded once.
        off = (off - 2**-8 * (expected - before).abs()).clamp(min=0)
    assert error(off, torch.zeros_like(off), dense) <= TOLERANCE
    assert bool((got.cpu()[~inside] == before).all())


@settings(max_examples=20)
@given(
    block=st.sampled_from([16, 16, 32]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    tokens=st.sampled_from([1, 2, 31, 67, 128]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_blocks_are_those_of_the_dense_product(
    triton_device, block, sizes, share, tokens, dtype, layouts, seed, data
):
    mask = make_mask(sizes, block, share, seed)
    dy, x = (
        operand(tokens, n, dtype, layout, seed + i, triton_device)
        for i, (n, layout) in enumerate(zip(sizes, layouts, strict=True))
    )
    indices = mask.indices.to(triton_device)
    if not len(mask):
        assert triton_sddmm.block_sddmm(dy, x, indices, block).shape == (
            0,
            block,
            block,
        )
        return
    tile = data.draw(st.sampled_from([None, *tiles(block, dtype.itemsize)]))
    each = data.draw(st.sampled_from([tokens, 17, 64]))
    with plans_of(tile):
        plan = make_plan(indices, mask.shape, block, dtype.itemsize)
    splits = (-(-tokens // each), each)

    def run(out=None):
        # Without the search, which would compile each of these kernels several times.
        return triton_sddmm.run_plan(
            plan, dy, x, len(mask), block, out, splits, tune=False
        )

    got = run()
    check(got, dy, x, mask)
    assert torch.equal(got, run())
    check(run(torch.ones_like(got)), dy, x, mask, before=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_every_block_size_is_right_as_it_is_called(triton_device, block, dtype):
    shape = (2 * block + 7, block + 1)
    mask = LayerMask(shape, block, torch.tensor([[0, 0], [1, 1], [2, 0]]))
    dy, x = (operand(41, n, dtype, "rows", n, triton_device) for n in shape)
    indices = mask.indices.to(triton_device, torch.int32)
    got = triton_sddmm.block_sddmm(dy, x, indices, block)
    check(got, dy, x, mask)
    out = torch.ones_like(got)
    assert triton_sddmm.block_sddmm(dy, x, indices, block, out=out) is out
    check(out, dy, x, mask, before=1.0)


@pytest.mark.parametrize("splits", [None, (2, 128), (4, 64)])
@pytest.mark.parametrize("tokens", [255, 256])
def test_a_multiple_of_a_step_is_no_special_case(triton_device, tokens, splits):
    mask = make_mask((70, 90), 16, 0.3, 3)
    indices = mask.indices.to(triton_device)
    plan = make_plan(indices, mask.shape, 16)
    dy, x = (
        operand(tokens, n, torch.float16, layout, n, triton_device)
        for n, layout in zip(mask.shape, ("columns", "offset"), strict=True)
    )
    got = triton_sddmm.run_plan(plan, dy, x, len(mask), 16, None, splits, tune=False)
    check(got, dy, x, mask)


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["few", "full"])
@pytest.mark.parametrize("way", ["blocks", "rectangle", "dense"])
def test_every_way_is_right(triton_device, monkeypatch, share, way):
    monkeypatch.setattr("sylva_train.kernels.plan.Plan.way", lambda *_: way)
    mask = make_mask((70, 90), 16, share, 3)
    dy, x = (
        operand(41, n, torch.float32, "rows", n, triton_device) for n in mask.shape
    )
    got = triton_sddmm.block_sddmm(dy, x, mask.indices.to(triton_device), 16)
    check(got, dy, x, mask)


@pytest.mark.parametrize(("tokens", "count"), [(0, 3), (5, 0), (0, 0)])
def test_without_tokens_or_blocks_nothing_is_added(triton_device, tokens, count):
    dy, x = (torch.ones((tokens, 32), device=triton_device) for _ in range(2))
    indices = torch.tensor([[0, 0], [0, 1], [1, 1]], device=triton_device)[:count]
    got = triton_sddmm.block_sddmm(dy, x, indices, 16)
    assert torch.equal(got, torch.zeros((count, 16, 16), device=triton_device))
    out = torch.ones((count, 16, 16), device=triton_device)
    assert triton_sddmm.block_sddmm(dy, x, indices, 16, out=out) is out
    assert bool((out == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_up_in_float32(triton_device, dtype):
    # 4096 products of 1: a half-precision sum would stop at 256 (or at 2048).
    ones = torch.ones((4096, 16), dtype=dtype, device=triton_device)
    indices = torch.zeros((1, 2), dtype=torch.int32, device=triton_device)
    plan = make_plan(indices, (16, 16), 16)
    got = triton_sddmm.run_plan(plan, ones, ones, 1, 16)
    assert bool((got == 4096).all())


@pytest.mark.parametrize("programs", [1, 7, 1000])
@pytest.mark.parametrize("tokens", [1, 100, 2048, 100_003])
def test_stretches_cover_all_tokens_and_none_is_empty(triton_device, programs, tokens):
    count, each = triton_sddmm.split(programs, tokens, triton_device)
    assert (count - 1) * each < tokens <= count * each
    assert count <= triton_sddmm.MOST_SPLITS


@pytest.mark.parametrize("programs", [13, 52, 131, 132, 138, 264, 265, 1000])
def test_no_processor_is_left_with_much_more_than_the_others(monkeypatch, programs):
    monkeypatch.setattr(triton_sddmm, "processors", lambda _: 132)
    tokens, device = 16_384, torch.device("cuda", 7)
    count, each = triton_sddmm.split(programs, tokens, device)
    most = -(-programs * count // 132)
    assert most * each * 132 / (programs * tokens) < 1.3  # of a perfect division
    if programs == 1000:
        assert count == 1


def given_to_prune(tile, block, dtype, precision="ieee", tokens=4096):
    rows, columns = tile
    given = {"ROWS": rows, "COLUMNS": columns, "BLOCK": block, "PRECISION": precision}
    return given | {"tokens_per_split": tokens, "dy_ptr": torch.zeros(1, dtype=dtype)}


@pytest.fixture
def card(monkeypatch):
    """Let configurations be for a GPU with so much shared memory, Hopper or another."""

    def install(memory, hopper=False):
        monkeypatch.setattr(triton_sddmm, "shared_memory", lambda _: memory)
        monkeypatch.setattr(triton_sddmm, "is_hopper", lambda _: hopper)
        triton_sddmm.candidates.cache_clear()

    yield install
    triton_sddmm.candidates.cache_clear()


def test_the_search_leaves_what_fits(card):
    card(232_448)
    given = given_to_prune((1, 1), 128, torch.bfloat16, tokens=64)
    left = triton_sddmm.prune([], given)
    assert 1 < len(left) <= 5
    assert all(c.kwargs["TOKENS"] <= 64 for c in left)
    # Four warps would keep a tile of 128 × 128 in memory in part.
    assert {c.num_warps for c in left} == {8}
    given["dy_ptr"] = given["dy_ptr"].float()
    assert {c.kwargs["TOKENS"] for c in triton_sddmm.prune([], given)} == {32}
    # Twice the bytes: 128 tokens would not stay in registers.
    for dtype, longest in ((torch.bfloat16, 128), (torch.float32, 64)):
        half = given_to_prune((1, 2), 64, dtype, "tf32")
        tried = {c.kwargs["TOKENS"] for c in triton_sddmm.prune([], half)}
        assert max(tried) == longest
    # Where nothing fits, the smallest is tried all the same.
    given["COLUMNS"] = 1000
    assert len(triton_sddmm.prune([], given)) == 1


def test_two_programs_share_a_processor_where_their_registers_allow_it(card):
    card(232_448, hopper=True)
    few = triton_sddmm.prune([], given_to_prune((2, 2), 64, torch.bfloat16))
    assert [c.maxnreg for c in few] == [128] + 5 * [None]
    size = 4 * 64 * few[0].kwargs["TOKENS"] * few[0].num_stages * 2
    assert 2 * size <= 232_448
    # Others would keep their sums in memory, and the largest with long steps as well.
    large = triton_sddmm.prune([], given_to_prune((2, 4), 64, torch.bfloat16))
    assert max(c.kwargs["TOKENS"] for c in large) == 64
    for tile, dtype in (
        ((2, 4), torch.bfloat16),
        ((1, 4), torch.bfloat16),
        ((2, 2), torch.float32),
    ):
        some = triton_sddmm.prune([], given_to_prune(tile, 64, dtype))
        assert {c.maxnreg for c in some} == {None}
    card(166_912)
    some = triton_sddmm.prune([], given_to_prune((2, 2), 64, torch.bfloat16))
    assert {c.maxnreg for c in some} == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("block", triton_sddmm.BLOCKS)
def test_every_tile_fits_into_a_small_gpu(card, block, dtype, precision):
    memory = 101_376  # of compute capability 8.6, 8.9 and 12.0
    card(memory)
    for rows, columns in tiles(block, dtype.itemsize):
        given = given_to_prune((rows, columns), block, dtype, precision)
        for c in triton_sddmm.prune([], given):
            depth = c.kwargs["TOKENS"] * c.num_stages
            assert (rows + columns) * block * depth * dtype.itemsize <= memory


def test_places_are_counted_in_64_bits_where_32_do_not_suffice(monkeypatch):
    def side(n, strides):
        return torch.empty(0).as_strided((0, n), strides)

    near = side(4096, (4096, 1))
    assert not triton_sddmm.is_far((near, near), 64)
    vocabulary = side(128_256, (1, 32_768))  # a transposed gradient of as many tokens
    assert not triton_sddmm.is_far((side(128_256, (128_256, 1)), near), 64)
    assert triton_sddmm.is_far((vocabulary, near), 64)
    assert triton_sddmm.is_far((near, side(64, (1 << 24, 1))), 64)
    # Either way the kernel computes the same.
    mask = make_mask((70, 90), 16, 0.4, 3)
    dy, x = (operand(41, n, torch.float32, "columns", n, "cpu") for n in mask.shape)
    plan = make_plan(mask.indices, mask.shape, 16)
    if triton_sddmm.INTERPRETED:
        monkeypatch.setattr(triton_sddmm, "is_far", lambda *_: True)
        got = triton_sddmm.run_plan(plan, dy, x, len(mask), 16)
        check(got, dy, x, mask)


def search_with(timer, monkeypatch):
    """Search configurations by a timer, as on a GPU, for which the interpreter stands in."""
    if not triton_sddmm.INTERPRETED:
        pytest.skip("needs the interpreter")
    tuned = triton_sddmm.searched(triton_sddmm.sddmm_kernel, do_bench=timer)
    monkeypatch.setattr(triton_sddmm, "tuned_sddmm_kernel", tuned)
    monkeypatch.setattr(triton_sddmm, "INTERPRETED", False)
    monkeypatch.setattr(triton_sddmm, "_found", {})


def test_a_search_is_made_once_and_never_in_a_graph(monkeypatch):
    timed = []

    def timer(_, quantiles):
        timed.append(quantiles)
        return [1.0 if len(timed) == 2 else 2.0] * 3

    search_with(timer, monkeypatch)
    mask = make_mask((70, 90), 16, 0.3, 3)
    dy, x = (torch.randn(300, n).half() for n in mask.shape)
    plan = make_plan(mask.indices, mask.shape, 16)

    def run(tokens):
        operands = dy[:tokens], x[:tokens]
        got = triton_sddmm.run_plan(plan, *operands, len(mask), 16)
        check(got, *operands, mask)

    monkeypatch.setattr(triton_sddmm, "is_capturing", lambda _: True)
    run(300)
    assert not timed
    monkeypatch.setattr(triton_sddmm, "is_capturing", lambda _: False)
    run(300)
    tried = len(timed)
    assert 1 < tried <= len(triton_sddmm.configurations())
    (found,) = triton_sddmm._found.values()
    best = triton_sddmm.prune(
        [], given_to_prune((plan.rows, plan.columns), 16, dy.dtype)
    )[1]
    assert (found["TOKENS"], found["num_stages"]) == (
        best.kwargs["TOKENS"],
        best.num_stages,
    )
    run(290)  # the same power of two
    assert len(timed) == tried
    run(100)
    assert len(triton_sddmm._found) == 2
    torch.use_deterministic_algorithms(True)
    try:
        run(30)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(triton_sddmm._found) == 2


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError(), RuntimeError("PassManager::run failed")],
    ids=["no memory", "no compiler"],
)
def test_after_a_search_that_failed_the_kernel_runs_all_the_same(monkeypatch, failure):
    asked = []

    def timer(call, quantiles):
        call()
        asked.append(quantiles)
        raise failure

    search_with(timer, monkeypatch)
    mask = make_mask((70, 90), 16, 0.3, 3)
    dy, x = (torch.randn(40, n).half() for n in mask.shape)
    plan = make_plan(mask.indices, mask.shape, 16)
    for _ in range(2):
        out = torch.ones((len(mask), 16, 16))
        triton_sddmm.run_plan(plan, dy, x, len(mask), 16, out)
        check(out, dy, x, mask, before=1.0)
    assert len(asked) == 1


def test_the_self_check_finds_a_wrong_kernel(triton_device, monkeypatch):
    assert triton_sddmm.self_check(triton_device, torch.bfloat16, 32) < 1
    monkeypatch.setattr(triton_sddmm, "run_plan", lambda *_, **__: None)
    assert triton_sddmm.self_check(triton_device, torch.bfloat16, 32) > 1


def test_what_the_kernel_does_not_take_is_told():
    assert triton_sddmm.supports(torch.bfloat16, 64)
    assert not triton_sddmm.supports(torch.float64, 64)
    assert not triton_sddmm.supports(torch.float32, 8)
