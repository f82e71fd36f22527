"""Block operations against plain slices of dense matrices."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylva_train.kernels import (
    block_sddmm,
    cost,
    gather_blocks,
    places,
    reference,
    scatter_blocks_,
)
from sylva_train.masks import LayerMask
from tests.sylva_train.models import dense_blocks, error, layer_masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["rows", "columns", "strided", "offset"]
#: of the products of a few hundred tokens, relative to the product's size
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same matrix in other strides."""
    if layout == "columns":
        return values.t().contiguous().t()
    if layout == "strided":
        return torch.stack([values, -values], 2)[:, :, 0]
    if layout == "offset":
        return torch.nn.functional.pad(values, (3, 2, 1, 1))[1:-1, 3:-2]
    return values


def random(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


weights = st.tuples(
    layer_masks(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**31),
)


@given(weights)
def test_gather_is_slicing(case):
    mask, dtype, layout, seed = case
    weight = lay_out(random(mask.shape, dtype, seed), layout)
    blocks = gather_blocks(weight, mask.indices, mask.block_size)
    assert blocks.dtype == dtype
    assert torch.equal(blocks, dense_blocks(weight, mask))


@given(weights)
def test_scatter_sets_the_blocks_and_nothing_else(case):
    mask, dtype, layout, seed = case
    weight = lay_out(random(mask.shape, dtype, seed), layout)
    before = weight.clone()
    new = random((len(mask), mask.block_size, mask.block_size), torch.float32, seed + 1)
    scatter_blocks_(weight, mask.indices, new)
    inside = mask.dense()
    assert torch.equal(weight[~inside], before[~inside])
    ones = dense_blocks(inside, mask)
    got = dense_blocks(weight, mask)
    assert torch.equal(got[ones], new.to(dtype)[ones])


@given(weights)
def test_scatter_of_what_was_gathered_changes_no_bit(case):
    mask, dtype, layout, seed = case
    weight = lay_out(random(mask.shape, dtype, seed), layout)
    before = weight.clone()
    blocks = gather_blocks(weight, mask.indices, mask.block_size)
    weight.zero_()
    weight[~mask.dense()] = before[~mask.dense()]
    scatter_blocks_(weight, mask.indices, blocks)
    assert torch.equal(weight, before)


def check_sddmm(mask, dtype, tokens, seed):
    dy = random((tokens, mask.shape[0]), dtype, seed)
    x = random((tokens, mask.shape[1]), dtype, seed + 1)
    got = block_sddmm(dy, x, mask.indices, mask.block_size)
    dense = dy.double().T @ x.double()
    expected = dense_blocks(dense, mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide
    assert got.shape == expected.shape
    off = (got - expected).abs()
    if cost.product_dtype(dtype, "cpu") == torch.bfloat16:
        # Rounded once: by half the spacing of bfloat16 numbers at most.
        off = (off - 2**-8 * expected.abs()).clamp(min=0)
    assert error(off, torch.zeros_like(off), dense) <= TOLERANCE[dtype]
    outside = ~dense_blocks(torch.ones(mask.shape, dtype=torch.bool), mask)
    assert not got[outside].any()


@given(
    layer_masks(), st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 2**31)
)
def test_sddmm_is_the_dense_product_at_the_blocks(mask, dtype, tokens, seed):
    check_sddmm(mask, dtype, tokens, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("way", "elements"),
    [
        ("rows", 1 << 20),
        ("rows", 64),
        ("cartesian", 0),
        ("dense", 0),
        ("stack", 1 << 17),
        ("stack", 300),
    ],
    ids=[
        "rows",
        "rows in pieces",
        "cartesian",
        "dense",
        "stack",
        "stack in pieces",
    ],
)
def test_every_way_to_a_product_is_right(monkeypatch, dtype, way, elements):
    monkeypatch.setattr(reference, "choose_way", lambda *_: way)
    monkeypatch.setattr(reference, "_PIECE_ELEMENTS", elements)
    monkeypatch.setattr(reference, "_STACK_ELEMENTS", elements)
    for block, shape in [(4, (12, 20)), (4, (13, 22)), (5, (5, 5)), (1, (3, 4))]:
        grid = torch.rand(
            [-(-n // block) for n in shape], generator=torch.Generator().manual_seed(0)
        )
        mask = LayerMask(shape, block, (grid < 0.6).nonzero())
        check_sddmm(mask, dtype, 33, 5)
        object.__setattr__(mask, "indices", mask.indices.flip(0))  # sorted no more
        check_sddmm(mask, dtype, 33, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["cartesian", "dense"])
@pytest.mark.parametrize("elements", [0, 256])
def test_a_product_in_panels_is_right(monkeypatch, dtype, way, elements):
    monkeypatch.setattr(reference, "choose_way", lambda *_: way)
    monkeypatch.setattr(reference, "_PANEL_ELEMENTS", elements)
    rows = torch.tensor([0, 2, 3, 3, 6, 8])  # none in some panels, one cut off
    for shape in [(36, 20), (33, 18)]:
        columns = torch.tensor([0, 4, 1, 2, 4, 0])
        mask = LayerMask(shape, 4, torch.stack([rows, columns], 1))
        check_sddmm(mask, dtype, 3, 5)
        object.__setattr__(mask, "indices", mask.indices.flip(0))
        check_sddmm(mask, dtype, 3, 5)


@pytest.mark.parametrize(
    ("blocks", "active", "way"),
    [
        (10, (10, 10), "rows"),  # few and apart
        (100, (10, 10), "cartesian"),  # a rectangle
        (3500, (64, 64), "dense"),  # most
        (4096, (64, 64), "dense"),  # all
    ],
)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_the_way_is_chosen_by_the_mask(blocks, active, way, block_size):
    assert cost.choose_way(blocks, active, (64, 64), block_size, 512) == way


def test_few_tokens_make_the_dense_product_likelier():
    ways = [
        cost.choose_way(60, (20, 16), (24, 24), 16, tokens) for tokens in (1, 64, 512)
    ]
    assert ways == ["dense", "cartesian", "rows"]


def test_few_tokens_make_a_stack_of_products_likelier():
    def way(blocks, tokens):
        return cost.choose_way(
            blocks, (24, 24), (24, 24), 16, tokens, stacked=float(tokens > 1)
        )

    assert [way(60, tokens) for tokens in (1, 2, 64)] == ["dense", "stack", "stack"]
    assert [way(120, tokens) for tokens in (8, 2048)] == ["stack", "rows"]
    assert way(576, 8) == "dense"


@pytest.mark.parametrize(("block_size", "way"), [(16, "dense"), (64, "rows")])
def test_runs_out_of_a_large_input_are_dear(block_size, way):
    grid = 1024 // block_size, 4096 // block_size
    blocks = grid[0] * grid[1] // 5
    ways = [
        cost.choose_way(blocks, grid, grid, block_size, tokens)
        for tokens in (512, 2048)
    ]
    assert ways == ["rows", way]


def test_threads_make_the_dense_product_likelier():
    def way(threads):
        return cost.choose_way(800, (64, 64), (64, 64), 32, 512, threads)

    assert [way(threads) for threads in (1, 2, 4)] == ["rows", "dense", "dense"]


def test_fast_products_make_the_dense_one_likelier():
    def way(speed, copying):
        return cost.choose_way(115, (24, 24), (24, 24), 16, 512, 1, speed, copying)

    assert [way(*each) for each in ((1, 1), (2.5, 2.5), (16, 8))] == [
        "rows", "dense", "dense"
    ]  # fmt: skip


@pytest.mark.parametrize("amx", [False, True])
def test_halves_are_copied_at_half_the_cost_where_there_are_products_of_them(
    monkeypatch, amx
):
    monkeypatch.setattr(cost, "has_amx", lambda: amx)
    for dtype in (torch.float32, torch.float16, torch.float64):
        speed, copying, stacked = cost.speeds_of(torch.zeros(1, dtype=dtype))
        assert speed == copying
        assert stacked == 1
    monkeypatch.setattr(cost, "product_dtype", lambda dtype, _: dtype)
    speed, copying, stacked = cost.speeds_of(torch.zeros(1, dtype=torch.bfloat16))
    assert speed == 2 * copying > cost.speeds_of(torch.zeros(1))[0]
    assert stacked == speed / cost.speeds_of(torch.zeros(1))[0]


@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_another_way_is_taken_only_with_a_margin(rows, columns, data):
    grid = data.draw(st.integers(rows, 64)), data.draw(st.integers(columns, 64))
    blocks = data.draw(st.integers(max(rows, columns), rows * columns))
    b = data.draw(st.sampled_from([1, 16, 64]))
    way = cost.choose_way(blocks, (rows, columns), grid, b, 512)
    work = {"rows": blocks, "cartesian": rows * columns}
    assert way == "dense" or work[way] <= cost.MARGIN * grid[0] * grid[1]


def test_indices_that_change_in_place_are_looked_at_again():
    dy, x = random((5, 8), torch.float64, 0), random((5, 8), torch.float64, 1)
    indices = torch.tensor([[0, 0], [1, 1]])
    for _ in range(2):
        got = block_sddmm(dy, x, indices, 4)
        expected = dense_blocks(dy.T @ x, LayerMask((8, 8), 4, indices))
        assert torch.allclose(got, expected, rtol=1e-12)
        indices[:, 1] = torch.tensor([1, 1])


def test_one_table_of_indices_may_serve_blocks_of_several_sizes():
    indices = torch.tensor([[0, 1], [1, 0]])
    for size in (4, 8):
        mask = LayerMask((2 * size, 2 * size), size, indices)
        object.__setattr__(mask, "indices", indices)
        check_sddmm(mask, torch.float64, 5, 0)
        weight = random(mask.shape, torch.float64, 1)
        blocks = gather_blocks(weight, indices, size)
        assert torch.equal(blocks, dense_blocks(weight, mask))


@pytest.mark.parametrize("way", ["rows", "cartesian", "dense"])
def test_what_is_known_of_a_mask_is_forgotten_with_its_table(monkeypatch, way):
    monkeypatch.setattr(reference, "choose_way", lambda *_: way)
    indices = torch.tensor([[0, 1], [1, 0]])
    dy, x = random((5, 8), torch.float32, 0), random((5, 7), torch.float32, 1)
    block_sddmm(dy, x, indices, 4)
    scatter_blocks_(dy.T @ x, indices, torch.zeros(2, 4, 4))
    known = len(places._places)
    del indices
    gc.collect()
    assert len(places._places) < known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_products_accumulate_in_float32(dtype):
    # 4096 products of 1: a half-precision sum would stop at 256 (or at 2048).
    ones = torch.ones((4096, 4), dtype=dtype)
    got = block_sddmm(ones, ones, torch.zeros((1, 2), dtype=torch.long), 4)
    assert torch.equal(got, torch.full((1, 4, 4), 4096.0))


def test_operands_of_a_product_stay_as_they_were():
    mask = LayerMask((6, 7), 4, torch.tensor([[0, 1], [1, 0]]))
    dy, x = random((5, 6), torch.float32, 0), random((5, 7), torch.float32, 1)
    copies = dy.clone(), x.clone()
    block_sddmm(dy, x, mask.indices, 4)
    assert torch.equal(dy, copies[0])
    assert torch.equal(x, copies[1])
