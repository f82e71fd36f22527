"""Scores and masks in numbers, as `sylva inspect` tells them."""

from __future__ import annotations

import json

import pytest
import torch

from sylva_train import ConfigError, LayerScores, Scores, select
from sylva_train.workflow import describe_masks, describe_scores


def layer(grid: list[list[float]]) -> LayerScores:
    values = torch.tensor(grid, dtype=torch.float64)
    rows, columns = values.shape
    return LayerScores((rows * 2, columns * 2), grid=values, unit=2)


def test_scores_that_are_all_alike_use_every_block():
    scores = Scores({"a": layer([[3.0, 3.0], [3.0, 3.0]])}, {"importance": "magnitude"})
    about = describe_scores(scores, density=0.25)["layers"]["a"]
    assert about["effective"] == pytest.approx(1.0)
    assert about["top_share"] == pytest.approx(0.25)


def test_scores_in_one_block_use_one():
    scores = Scores(
        {"a": layer([[0.0, 0.0], [5.0, -1.0]])}, {"importance": "magnitude"}
    )
    about = describe_scores(scores, density=0.25)["layers"]["a"]
    assert about["effective"] == pytest.approx(0.25)
    assert about["top_share"] == 1.0


def test_scores_of_zero_say_nothing():
    scores = Scores({"a": layer([[0.0, 0.0]])}, {"importance": "magnitude"})
    about = describe_scores(scores, density=0.5)["layers"]["a"]
    assert (about["effective"], about["top_share"]) == (1.0, 0.5)


def test_no_block_is_shown_where_none_would_be_trained():
    scores = Scores({"a": layer([[4.0, 0.0], [0.0, 0.0]])}, {"importance": "magnitude"})
    about = describe_scores(scores, density=0.2)["layers"]["a"]
    assert (about["top"], about["top_share"]) == (0, 0.0)
    with pytest.raises(ConfigError, match="leaves no whole block"):
        select(scores, density=0.2, block_size=2)


def test_masks_are_described_by_their_own_numbers():
    masks = select(Scores({"a": layer([[1.0, 2.0]])}, {}), density=0.5, block_size=2)
    about = describe_masks(masks)
    assert about["trainable"] == sum(x["trainable"] for x in about["layers"].values())
    assert about["density"] == masks.density
    json.dumps(about)
