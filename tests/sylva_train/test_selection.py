"""Which blocks a budget buys: by layer, across the model, spread out, in few columns."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sylva_train import SylvaConfig
from sylva_train._checks import ConfigError, NonFiniteError
from sylva_train.importance import LayerScores, Scores
from sylva_train.options import SCOPES, SUITABLE
from sylva_train.selection import select, select_as, share_out, spread_out


def make_scores(*grids, unit=1, **metadata):
    layers = {
        f"layer.{i}": LayerScores(
            tuple(n * unit for n in grid.shape), grid=grid, unit=unit
        )
        for i, grid in enumerate(grids)
    }
    return Scores(layers, {"importance": "magnitude"} | metadata)


# Few different values, so that there are ties.
grids = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31)).map(
    lambda t: torch.randint(
        0, 4, t[:2], generator=torch.Generator().manual_seed(t[2])
    ).double()
)


def best(flat, count):
    """The plain rule: by score, then by position."""
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    return set(order[:count])


def chosen(mask):
    columns = mask.grid_shape[1]
    return {r * columns + c for r, c in mask.indices.tolist()}


@given(grids, grids, st.floats(0.01, 1))
def test_each_layer_keeps_exactly_its_best_blocks(first, second, density):
    scores = make_scores(first, second)
    counts = [math.floor(density * grid.numel() + 1e-9) for grid in (first, second)]
    assume(any(counts))
    masks = select(scores, density, 1)
    for mask, grid, count in zip(masks.values(), (first, second), counts, strict=True):
        assert chosen(mask) == best(grid.flatten().tolist(), count)


@given(grids, grids, st.floats(0.01, 1))
def test_the_whole_model_keeps_exactly_its_best_blocks(first, second, density):
    assume(first.any() and second.any())
    assume(density * (first.numel() + second.numel()) >= 1)
    masks = select(make_scores(first, second), density, 1, scope="model")
    flat = torch.cat([(g / g.mean()).flatten() for g in (first, second)]).tolist()
    expected = best(flat, math.floor(density * len(flat) + 1e-9))
    columns = len(first.flatten())
    got = chosen(masks["layer.0"]) | {i + columns for i in chosen(masks["layer.1"])}
    assert got == expected


@given(grids, st.integers(1, 4), st.floats(0.05, 1))
def test_a_denser_choice_contains_a_sparser_one(grid, block, density):
    assume(block <= min(grid.shape))
    rows, columns = (-(-n // block) for n in grid.shape)
    count = math.floor(density * rows * columns + 1e-9)
    assume(count)
    full = select(make_scores(grid), 1.0, block)
    some = select(make_scores(grid), density, block)
    assert full.density == 1
    assert len(some["layer.0"]) == count
    assert some.overlap(full) == 1


def test_exact_budgets_survive_rounding_of_the_product():
    # 0.29 · 100 is 28.999999999999996 in floating point.
    masks = select(make_scores(torch.rand(10, 10)), 0.29, 1)
    assert len(masks["layer.0"]) == 29


def test_a_model_of_zero_scores_is_still_chosen_from():
    masks = select(make_scores(torch.zeros(3, 3), torch.zeros(3, 3)), 0.5, 1, "model")
    assert sum(map(len, masks.values())) == 9
    assert chosen(masks["layer.0"]) == set(range(9))


def test_one_huge_layer_cannot_take_the_whole_budget():
    small = torch.arange(1.0, 10).reshape(3, 3)
    masks = select(make_scores(small, 1e6 * small), 0.5, 1, scope="model")
    assert chosen(masks["layer.0"]) == {5, 6, 7, 8} | ({4} & chosen(masks["layer.0"]))
    assert len(masks["layer.1"]) in (4, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(NonFiniteError, match=r"`layer\.1` are NaN or infinite"):
        select(make_scores(torch.ones(2, 2), torch.tensor([[1.0, bad]])), 0.5, 1)


def test_absolute_scores_share_the_budget_out_by_what_they_are():
    small = torch.arange(1.0, 10).reshape(3, 3)
    masks = select(make_scores(small, 100 * small), 0.5, 1, scope="absolute")
    assert len(masks["layer.0"]) == 0
    assert len(masks["layer.1"]) == 9


def test_a_layer_whose_scores_are_below_zero_on_average_keeps_their_order():
    low = torch.tensor([[-8.0, 1.0], [-4.0, -2.0]])
    high = torch.tensor([[4.0, 3.0], [2.0, 0.0]])
    masks = select(make_scores(low, high), 0.5, 1, scope="model")
    assert chosen(masks["layer.0"]) == {1}
    assert chosen(masks["layer.1"]) == {0, 1, 2}
    masks = select(make_scores(low, high), 0.5, 1, scope="model", max_columns=0.5)
    for mask in masks.values():
        assert len(mask.indices[:, 1].unique()) == 1


def greedy(grid, row_cap, column_cap):
    """The plain rule: the best block first, then the next that has room."""
    columns = grid.shape[1]
    in_row, in_column, taken = Counter(), Counter(), set()
    flat = grid.flatten().tolist()
    for i in sorted(range(len(flat)), key=lambda i: (-flat[i], i)):
        row, column = divmod(i, columns)
        if in_row[row] < row_cap and in_column[column] < column_cap:
            in_row[row] += 1
            in_column[column] += 1
            taken.add(i)
    return taken


@given(grids, st.integers(1, 4), st.integers(1, 4))
def test_spreading_is_the_greedy_choice(grid, row_cap, column_cap):
    marked = spread_out(grid, row_cap, column_cap)
    flat = marked.flatten().nonzero()[:, 0].tolist()
    assert set(flat) == greedy(grid, row_cap, column_cap)


def test_blocks_are_sorted_once_however_many_rounds_spread_them(monkeypatch):
    sorts = []

    def counting(tensor, *args):
        sorts.append(args)
        return argsort(tensor, *args)

    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", counting)
    spread_out(torch.rand(32, 32, generator=torch.Generator().manual_seed(0)), 2, 2)
    assert len(sorts) == 2


@given(grids, st.floats(0.05, 1), st.floats(1, 3))
def test_a_spread_choice_keeps_its_caps_and_its_budget(grid, density, spread):
    count = math.floor(density * grid.numel() + 1e-9)
    assume(count)
    mask = select(make_scores(grid), density, 1, spread=spread)["layer.0"]
    rows, columns = grid.shape
    row_cap, column_cap = (
        math.ceil(spread * density * n - 1e-9) for n in (columns, rows)
    )
    alone = greedy(grid, row_cap, column_cap)
    assert len(mask) == count
    # The caps give way only where no other block has room.
    assert len(chosen(mask) & alone) == min(count, len(alone))
    if count <= len(alone):
        assert mask.dense().sum(1).max() <= row_cap
        assert mask.dense().sum(0).max() <= column_cap


def test_a_rank_one_score_is_spread_over_rows_and_columns():
    grid = torch.outer(torch.arange(8.0, 0, -1), torch.arange(8.0, 0, -1))
    heaped, spread = (
        select(make_scores(grid), 0.125, 1, spread=s)["layer.0"] for s in (None, 1)
    )
    assert len(heaped.indices[:, 0].unique()) < 5
    assert len(spread.indices[:, 0].unique()) == len(spread.indices[:, 1].unique()) == 8


@pytest.mark.parametrize("scope", ["model", "absolute"])
def test_a_model_wide_choice_is_spread_as_well(scope):
    grid = torch.outer(torch.arange(8.0, 0, -1), torch.arange(8.0, 0, -1))
    masks = select(make_scores(grid, 2 * grid), 0.125, 1, scope=scope, spread=1)
    assert sum(map(len, masks.values())) == 16
    for mask in masks.values():
        assert all(n <= 1 for n in mask.dense().sum(0).tolist())


@pytest.mark.parametrize("spread", [0.5, float("inf"), float("nan"), "wide"])
def test_spreads_below_one_are_refused(spread):
    with pytest.raises(ConfigError, match="`spread`"):
        select(make_scores(torch.rand(4, 4)), 0.5, 1, spread=spread)


def test_selection_is_recorded():
    masks = select(make_scores(torch.rand(4, 4), samples=7), 0.5, 2)
    assert masks.metadata == {
        "importance": "magnitude",
        "samples": 7,
        "density": 0.5,
        "block_size": 2,
        "scope": "layer",
        "max_columns": 1.0,
        "spread": 0.0,
        "allocation": 0.0,
    }
    assert "2 blocks" in repr(masks)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "half", None])
def test_densities_outside_0_to_1_are_refused(density):
    with pytest.raises(ConfigError, match="`density`"):
        select(make_scores(torch.rand(4, 4)), density, 1)


def test_a_density_below_one_block_says_so():
    scores = make_scores(torch.rand(4, 4))
    with pytest.raises(ConfigError, match=r"layer has 16 blocks.*scope=.model"):
        select(scores, 0.05, 1)
    with pytest.raises(ConfigError, match=r"model has 16 blocks of side 1"):
        select(scores, 0.05, 1, scope="model")
    with pytest.raises(ConfigError, match="`scope`"):
        select(scores, 0.5, 1, scope="everything")
    with pytest.raises(ConfigError, match="`block_size` 5"):
        select(scores, 0.5, 5)


def columns_of(mask):
    return set(mask.indices[:, 1].tolist())


@given(grids, grids, st.floats(0.01, 1), st.floats(0, 1), st.sampled_from(SCOPES))
def test_few_columns_hold_the_whole_budget(first, second, density, share, scope):
    scores = make_scores(first, second)
    max_columns = density + share * (1 - density)
    counts = [math.floor(density * grid.numel() + 1e-9) for grid in (first, second)]
    assume(any(counts) and (scope == "layer" or (first.any() and second.any())))
    masks = select(scores, density, 1, scope, max_columns=max_columns)
    for mask, grid in zip(masks.values(), (first, second), strict=True):
        columns = grid.shape[1]
        limit = max(
            math.floor(max_columns * columns + 1e-9), math.ceil(density * columns)
        )
        assert len(columns_of(mask)) <= limit
    total = sum(grid.numel() for grid in (first, second))
    whole = sum(counts) if scope == "layer" else math.floor(density * total + 1e-9)
    assert sum(map(len, masks.values())) == whole


@given(grids, st.floats(0.05, 1), st.floats(0, 1))
def test_columns_are_chosen_by_what_they_can_give(grid, density, share):
    rows, columns = grid.shape
    count = math.floor(density * rows * columns + 1e-9)
    assume(count)
    max_columns = density + share * (1 - density)
    mask = select(make_scores(grid), density, 1, max_columns=max_columns)["layer.0"]
    limit = max(math.floor(max_columns * columns + 1e-9), math.ceil(density * columns))
    each = min(rows, math.ceil(density * rows * columns / limit))
    worth = [sum(sorted(grid[:, j].tolist())[-each:]) for j in range(columns)]
    allowed = best(worth, limit)
    flat = [
        float(grid[i, j]) if j in allowed else -1.0
        for i in range(rows)
        for j in range(columns)
    ]
    assert chosen(mask) == best(flat, count)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5), st.floats(0.1, 0.9))
def test_no_other_columns_are_better_for_a_score_of_rank_one(
    seed, rows, columns, density
):
    generator = torch.Generator().manual_seed(seed)
    s_out = torch.rand(rows, generator=generator, dtype=torch.float64)
    s_in = torch.rand(columns, generator=generator, dtype=torch.float64)
    grid = torch.outer(s_out, s_in)
    count = math.floor(density * grid.numel() + 1e-9)
    assume(count)
    scores = Scores({"a": LayerScores(grid.shape, s_out=s_out, s_in=s_in)}, {})
    mask = select(scores, density, 1, max_columns=density)["a"]
    got = float(grid[mask.indices[:, 0], mask.indices[:, 1]].sum())
    best_sum = max(
        float(grid[:, list(some)].flatten().topk(count).values.sum())
        for some in itertools.combinations(
            range(columns), math.ceil(density * columns - 1e-9)
        )
    )
    assert got == pytest.approx(best_sum, rel=1e-12)


def test_all_columns_allowed_changes_nothing():
    scores = make_scores(torch.rand(6, 9), torch.rand(4, 5))
    for scope in SCOPES:
        plain = select(scores, 0.3, 1, scope)
        assert select(scores, 0.3, 1, scope, max_columns=1.0).digest() == plain.digest()


@pytest.mark.parametrize("scale", [1, 1e9])
def test_layers_together_have_blocks_in_the_same_columns(scale):
    # Scores count relative to their layer: huge ones do not decide for both.
    weak, strong = torch.ones(8, 10).double(), torch.ones(8, 10).double()
    weak[:, :2], strong[:, 2:4] = 2, 10
    scores = make_scores(scale * weak, weak, strong)
    apart = select(scores, 0.1, 1, max_columns=0.2)
    assert [columns_of(mask) for mask in apart.values()] == [{0, 1}, {0, 1}, {2, 3}]
    groups = [["layer.0", "layer.2", "elsewhere"]]
    masks = select(scores, 0.1, 1, max_columns=0.2, together=groups)
    assert [columns_of(mask) for mask in masks.values()] == [{2, 3}, {0, 1}, {2, 3}]


def test_limits_on_columns_that_cannot_be_kept():
    scores = make_scores(torch.rand(4, 4), torch.rand(4, 5))
    for wrong in (0.4, 1.1, 0, "few", float("nan")):
        with pytest.raises(ConfigError, match="`max_columns`"):
            select(scores, 0.5, 1, max_columns=wrong)
    with pytest.raises(ConfigError, match="`together`"):
        select(scores, 0.5, 1, max_columns=0.5, together=[["layer.0", "layer.1"]])


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(-1, 9)), min_size=1, max_size=9),
    st.floats(0, 1),
    st.floats(0, 30),
)
def test_a_shared_budget_is_spent_to_the_block(layers, fraction, exponent):
    sizes = torch.tensor([size for size, _ in layers])
    means = torch.tensor([mean / 3 for _, mean in layers], dtype=torch.float64)
    budget = math.floor(fraction * int(sizes.sum()))
    counts = share_out(means, sizes, budget, exponent)
    assert int(counts.sum()) == budget
    assert bool(((counts >= 0) & (counts <= sizes)).all())
    # Those with room left have densities in the ratio of their mean scores' powers.
    worth = (means.clamp(min=0) / means.clamp(min=1e-300).max()) ** exponent
    for i, j in itertools.permutations(range(len(layers)), 2):
        if counts[i] + 1 <= sizes[i] and means.max() > 0 and worth[i] >= worth[j] > 0:
            assert (counts[i] + 1) * worth[j] * sizes[j] >= (
                (counts[j] - 1) * worth[i] * sizes[i]
            ) * (1 - 1e-9)


def test_the_budget_goes_to_the_layers_that_score_high():
    grid = torch.rand(10, 10, dtype=torch.float64) + 0.5
    scores = make_scores(grid, 2 * grid, -grid)
    even = select(scores, 0.09, 1, allocation=0)
    assert [len(mask) for mask in even.values()] == [9, 9, 9]
    assert [len(m) for m in select(scores, 0.09, 1, allocation=1).values()] == [
        9,
        18,
        0,
    ]
    assert [len(m) for m in select(scores, 0.09, 1, allocation=3).values()] == [
        3,
        24,
        0,
    ]
    # A layer has no more blocks than it has; the best of each are chosen.
    full = select(scores, 0.5, 1, allocation=50)
    assert [len(mask) for mask in full.values()] == [50, 100, 0]
    assert chosen(full["layer.0"]) == best(grid.flatten().tolist(), 50)


def test_a_shared_budget_is_spread_and_kept_to_columns():
    grid = torch.rand(8, 8, dtype=torch.float64)
    scores = make_scores(grid, 3 * grid)
    masks = select(scores, 0.25, 1, spread=1, allocation=1)
    assert [len(mask) for mask in masks.values()] == [8, 24]
    for mask, block, cap in zip(masks.values(), (grid, 3 * grid), (1, 3), strict=True):
        # The caps are of the layer's own density; few blocks find no room under them.
        marked = set(spread_out(block, cap, cap).flatten().nonzero()[:, 0].tolist())
        assert marked <= chosen(mask)
    masks = select(scores, 0.25, 1, allocation=9, max_columns=0.25)
    assert [len(mask) for mask in masks.values()] == [16, 16]
    assert all(len(columns_of(mask)) == 2 for mask in masks.values())


def test_layers_compete_where_the_rule_makes_them_comparable():
    grid = torch.rand(10, 10, dtype=torch.float64) + 0.5
    for rule in ("kfac-natural", "kfac", "random", "gradient"):
        scores = make_scores(grid, 2 * grid, importance=rule)
        wanted = SUITABLE.get(rule, (0, 0))
        masks = select(scores, 0.1, 1)
        assert (masks.metadata["allocation"], masks.metadata["spread"]) == wanted
        assert (masks["layer.1"].trainable > 10) == bool(wanted[0])
        assert select(scores, 0.1, 1, max_columns=0.5).metadata["spread"] == 0
        config = SylvaConfig(density=0.1, block_size=1, allocation=0)
        assert select_as(config, scores).digest() == (
            select(scores, 0.1, 1, allocation=0).digest()
        )


def test_a_budget_of_each_layer_is_none_of_all():
    scores = make_scores(torch.rand(8, 8) + 1, importance="kfac-natural")
    for scope in ("model", "absolute"):
        with pytest.raises(ConfigError, match="`allocation` gives each layer"):
            select(scores, 0.5, 1, scope, allocation=2)
        assert select(scores, 0.5, 1, scope).metadata["allocation"] == 0


def test_layers_without_a_score_share_what_is_left():
    scores = make_scores(torch.zeros(4, 4), torch.zeros(4, 8))
    assert [len(m) for m in select(scores, 0.5, 1, allocation=2).values()] == [8, 16]
    scores = make_scores(torch.zeros(4, 4), torch.ones(4, 8), torch.zeros(4, 4))
    masks = select(scores, 0.75, 1, allocation=2)
    assert [len(mask) for mask in masks.values()] == [8, 32, 8]


@pytest.mark.parametrize("allocation", [-1, float("inf"), float("nan"), "much"])
def test_powers_below_zero_are_refused(allocation):
    with pytest.raises(ConfigError, match="`allocation`"):
        select(make_scores(torch.rand(4, 4)), 0.5, 1, allocation=allocation)
    with pytest.raises(ConfigError, match="`allocation`"):
        SylvaConfig(allocation=allocation)


def test_what_is_no_scores_is_refused():
    masks = select(make_scores(torch.ones(4, 4)), 0.5, 1)
    for other in (masks, "scores.safetensors"):
        with pytest.raises(ConfigError, match=f"Scores.*got a {type(other).__name__}"):
            select(other)
