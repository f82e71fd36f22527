"""How blocks share tiles, and which way to a product is the cheapest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylva_train._checks import ConfigError
from sylva_train.kernels import plan as plans
from sylva_train.kernels.plan import find_plan, make_plan
from tests.sylva_train.models import plans_of


@st.composite
def tables(draw):
    """Indices in any order, and the block size that they are for."""
    grid = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    seed, share = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.05, 0.4, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(grid, generator=generator) < share
    chosen.view(-1)[seed % chosen.numel()] = True
    indices = chosen.nonzero()
    shuffled = indices[torch.randperm(len(indices), generator=generator)]
    return shuffled, draw(st.sampled_from([16, 32, 64, 128]))


@given(tables(), st.data())
def test_programs_cover_each_block_once_and_in_its_place(case, data):
    indices, block = case
    tile = data.draw(st.sampled_from([None, *plans.tiles(block, 2)]))
    with plans_of(tile):
        plan = make_plan(indices, (2560, 2560), block)
    if tile:
        assert (plan.rows, plan.columns) == tile
    found = []
    for super_row, first, end in plan.groups.tolist():
        assert 0 < end - first <= plan.columns
        for pair in range(first, end):
            for row, block_number in enumerate(plan.slots[pair].tolist()):
                place = [int(plan.members[super_row, row]), int(plan.pairs[pair])]
                if block_number >= 0:
                    found.append(block_number)
                    assert indices[block_number].tolist() == place
    assert sorted(found) == list(range(len(indices)))


@given(tables())
def test_a_tile_fits_into_registers_and_into_tensor_cores(case):
    indices, block = case
    plan = make_plan(indices, (2560, 2560), block)
    assert 16 <= plan.rows * block <= 128
    assert plan.rows * plan.columns * block**2 <= 128 * 256


def test_small_blocks_of_a_full_mask_share_large_tiles():
    full = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    plan = make_plan(full, (256, 256), 16)
    assert plan.rows * plan.columns >= 32
    assert len(plan.groups) * plan.rows * plan.columns == len(full)


def test_lone_blocks_are_not_padded_to_large_tiles():
    lone = torch.arange(0, 64, 8)[:, None].expand(-1, 2)
    plan = make_plan(lone, (64 * 64, 64 * 64), 64)
    assert (plan.rows, plan.columns) == (1, 1)


def test_rows_with_the_same_columns_share_tiles_wherever_they_are():
    generator = torch.Generator().manual_seed(0)
    some = [torch.randperm(64, generator=generator)[:16] for _ in range(2)]
    rectangle = torch.cartesian_prod(*some)
    plan = make_plan(rectangle, (4096, 4096), 64)
    assert len(plan.groups) * plan.rows * plan.columns == len(rectangle)
    assert (plan.rows * 64, plan.columns * 64) == (128, 256)
    # Of rank one: a row's columns are some of those of a row with more.
    scores = [torch.randn(64, generator=generator).exp() for _ in range(2)]
    nested = (scores[0][:, None] * scores[1] > 2).nonzero()
    with plans_of((2, 2)):
        plan = make_plan(nested, (4096, 4096), 64)
    assert len(plan.groups) * plan.rows * plan.columns <= 1.3 * len(nested)


def random_mask(grid, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(grid, grid, generator=generator) < share).nonzero()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [2048, 16384])
def test_the_cheapest_way_follows_the_mask(tokens, itemsize):
    shape, block = (4096, 4096), 64
    few = random_mask(64, 0.05)
    full = random_mask(64, 1.0)
    some = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20]
    rectangle = torch.cartesian_prod(some, some)
    assert make_plan(few, shape, block, itemsize).way(tokens) == "blocks"
    assert make_plan(full, shape, block, itemsize).way(16 * tokens) == "dense"
    assert make_plan(rectangle, shape, block, itemsize).way(tokens) != "dense"


def test_a_costlier_cache_makes_the_rectangle_worth_it(monkeypatch):
    some = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:32]
    rectangle = torch.cartesian_prod(some, some)
    monkeypatch.setattr(plans, "CACHE", 1e12)
    assert make_plan(rectangle, (4096, 4096), 64).way(8192) == "rectangle"


def test_a_way_costs_more_with_more_tokens_and_with_more_blocks():
    def seconds(share, tokens):
        plan = make_plan(random_mask(32, share), (2048, 2048), 64)
        constant, each = plan.seconds["blocks"]
        return constant + tokens * each

    assert seconds(0.1, 1000) < seconds(0.1, 2000) < seconds(0.5, 2000)


def test_a_plan_is_kept_while_its_table_stays_as_it_is():
    indices = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32)
    first = find_plan(indices, (64, 96), 32, 2)
    assert find_plan(indices, (64, 96), 32, 2) is first
    assert find_plan(indices, (64, 96), 32, 4) is not first
    indices[1, 1] = 1
    second = find_plan(indices, (64, 96), 32, 2)
    assert second is not first
    assert sorted(second.pairs.tolist()) == [0, 1]


def test_while_a_graph_is_captured_only_a_plan_that_is_there_is_used(monkeypatch):
    indices = torch.tensor([[0, 0], [1, 2]])
    capturing = True
    where = "sylva_train.kernels.capture.is_capturing"
    monkeypatch.setattr(where, lambda _: capturing)
    with pytest.raises(ConfigError, match="three whole training steps"):
        find_plan(indices, (64, 96), 32, 2)
    capturing = False
    plan = find_plan(indices, (64, 96), 32, 2)
    capturing = True
    assert find_plan(indices, (64, 96), 32, 2) is plan
