"""Scores and masks held against others."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import spearmanr

from sylva_train import (
    ConfigError,
    LayerMask,
    LayerScores,
    Masks,
    NonFiniteError,
    Scores,
    agreement,
    select,
)


def layer(grid, unit=2, **options):
    values = torch.as_tensor(grid, dtype=torch.float64)
    rows, columns = values.shape
    return LayerScores((rows * unit, columns * unit), grid=values, unit=unit, **options)


def drawn(seed, shapes=((8, 12), (16, 4)), unit=2):
    generator = torch.Generator().manual_seed(seed)
    grids = [torch.rand(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return Scores({f"l{i}": layer(grid, unit) for i, grid in enumerate(grids)}, {})


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_scores_agree_as_counted_one_by_one(density):
    one, other = drawn(0), drawn(1)
    found = agreement(one, other, density, 2)
    common = chosen = 0
    for name, about in found["layers"].items():
        mine, theirs = one[name].grid.flatten(), other[name].grid.flatten()
        count = max(1, math.floor(density * len(mine)))
        best = set(mine.argsort(descending=True)[:count].tolist())
        taken = set(theirs.argsort(descending=True)[:count].tolist())
        assert about["blocks"] == count
        assert about["overlap"] == len(best & taken) / count
        share = sum(mine[i] for i in taken) / sum(mine[i] for i in best)
        assert about["score_share"] == pytest.approx(float(share))
        rank = spearmanr(mine.numpy(), theirs.numpy()).statistic
        assert about["spearman"] == pytest.approx(rank)
        common, chosen = common + len(best & taken), chosen + count
    assert found["overlap"] == common / chosen
    assert found["least"]["overlap"] == min(
        x["overlap"] for x in found["layers"].values()
    )
    json.dumps(found)


def test_scores_agree_with_themselves():
    found = agreement(drawn(0), drawn(0), 0.2)
    assert found["least"]["spearman"] == pytest.approx(1.0)
    assert found["least"]["overlap"] == found["least"]["score_share"] == 1.0


def test_random_choices_agree_as_much_as_chance_says():
    pairs = [agreement(drawn(2 * i), drawn(2 * i + 1), 0.25, 2) for i in range(60)]
    chance = pairs[0]["chance"]
    assert chance == pytest.approx(0.25)
    assert sum(p["overlap"] for p in pairs) / 60 == pytest.approx(chance, abs=0.03)


def test_masks_bring_their_blocks():
    scores = drawn(0)
    masks = select(scores, density=0.25, block_size=2)
    exact = agreement(scores, masks)
    assert exact["least"]["overlap"] == exact["least"]["score_share"] == 1.0
    assert exact["density"] is None
    assert exact["least"]["spearman"] is None
    assert agreement(masks, scores)["overlap"] == 1.0
    few = select(scores, density=0.125, block_size=2)
    assert agreement(masks, few)["overlap"] == masks.overlap(few) == 0.5
    assert agreement(few, masks)["overlap"] == few.overlap(masks) == 1.0


def test_no_blocks_and_scores_all_alike_tell_nothing():
    alike = Scores({"a": layer(torch.zeros(2, 2))}, {})
    about = agreement(alike, alike)["layers"]["a"]
    assert (about["spearman"], about["score_share"]) == (None, None)
    none = Masks({"a": LayerMask((4, 4), 2, torch.zeros(0, 2))})
    found = agreement(none, alike)
    assert found["overlap"] is None
    assert found["layers"]["a"]["overlap"] is None


def test_layers_that_one_lacks_are_named():
    one, other = drawn(0), drawn(1)
    one.layers["only"] = other.layers["else"] = layer(torch.ones(2, 2))
    found = agreement(one, other)
    assert (found["only_reference"], found["only_other"]) == (["only"], ["else"])
    assert set(found["layers"]) == {"l0", "l1"}


def test_blocks_are_as_scores_allow():
    fine, coarse = drawn(0, ((64, 64),), 16), drawn(1, ((32, 32),), 32)
    assert agreement(fine, fine)["block_size"] == 32
    assert agreement(fine, coarse)["block_size"] == 32
    odd = drawn(2, ((64, 64),), 12)
    assert agreement(odd, odd)["block_size"] == 12
    whole = Scores({"l0": layer(torch.ones(64, 64), 16, additive=False)}, {})
    assert agreement(whole, fine)["block_size"] == 16
    ranked = Scores(
        {"l0": LayerScores((20, 60), s_out=torch.rand(20), s_in=torch.rand(60))}, {}
    )
    assert agreement(ranked, ranked)["block_size"] == 20


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (drawn(0), Scores({"x": layer([[1.0]])}, {})), "no layer in common"),
        (lambda: (drawn(0), drawn(0, ((8, 8),))), r"of shape \(16, 24\) in one"),
        (lambda: (drawn(0), drawn(0), 0.0), "density"),
        (lambda: (drawn(0), drawn(0), 0.1, 3), "must be a multiple of 2"),
        (lambda: (drawn(0), drawn(0), 0.1, 0), "block_size"),
        (lambda: (drawn(0), "scores"), "`other` must be Scores or Masks; got a str"),
        (
            lambda: (drawn(0), select(drawn(0), 0.5, 2), 0.1),
            "beside masks it is theirs",
        ),
        (
            lambda: (select(drawn(0), 0.5, 2), select(drawn(0), 0.5, 4)),
            "side 2 cannot be held against blocks of side 4",
        ),
        (
            lambda: (select(drawn(0), 0.5, 2), drawn(0), None, 4),
            "side 2 cannot be held against blocks of side 4",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        agreement(*make())


def test_scores_that_are_not_finite_are_refused():
    bad = drawn(0)
    bad["l1"].grid[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="`l1`"):
        agreement(bad, drawn(0))
