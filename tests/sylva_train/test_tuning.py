"""Learning rates that are chosen before a comparison runs."""

from __future__ import annotations

import pytest

from sylva_train import report
from sylva_train._checks import ConfigError, NonFiniteError
from sylva_train.comparison import TUNING_SEED, compare
from sylva_train.reproduce import reproduce
from tests.sylva_train import jobs
from tests.sylva_train.test_comparison import names, plan

pytestmark = pytest.mark.usefixtures("quick_collections")


def test_rates_are_chosen_before_on_data_and_a_seed_of_their_own(here, home, tmp_path):
    methods = ("frozen", "full", "sylva:random")
    options = {"methods": methods, "seeds": (0,), "training": jobs.training(steps=8)}
    comparison = plan(home, **options)
    results = compare(comparison, tmp_path / "out", tune=(1e30, 1e-6, 1.0))
    tuning, runs = here[:6], here[6:]
    assert {job.spec["training"]["seed"] for job in tuning} == {TUNING_SEED}
    assert {job.spec["task"]["eval_split"] for job in tuning} == {"held-out"}
    assert names(runs) == ["frozen-0", "full-0", "sylva-random-0"]
    scores = {(row["method"], row["lr"]): row["score"] for row in results["tuning"]}
    assert scores["full", 4e26] is None  # it diverged
    for row in results["runs"][1:]:
        of_method = {k[1]: s for k, s in scores.items() if k[0] == row["method"] and s}
        assert of_method[row["lr"]] == max(of_method.values())
    table = report.markdown_table(results)
    assert "the best of 1e+30, 1e-06, 1 times each method's own" in table
    again = compare(comparison, tmp_path / "out", tune=(1e30, 1e-6, 1.0), resume=True)
    assert len(here) == 9  # all kept
    assert again["tuning"] == results["tuning"]


def test_rates_that_all_diverge_are_told(here, home, tmp_path):
    comparison = plan(home, methods=("full",), seeds=(0,))
    with pytest.raises(
        NonFiniteError, match=r"Full fine-tuning diverged at every rate"
    ):
        compare(comparison, tmp_path / "out", tune=(1e30,))


def test_rates_are_not_chosen_with_a_seed_that_is_reported(home, tmp_path):
    comparison = plan(home, seeds=(0, TUNING_SEED))
    with pytest.raises(ConfigError, match=f"must not have {TUNING_SEED} beside `tune`"):
        compare(comparison, tmp_path / "out", tune=(1.0,))
    with pytest.raises(ConfigError, match=f"must not have {TUNING_SEED} beside `tune`"):
        reproduce("table3", {"tiny": comparison}, tmp_path / "out", tune=(1.0,))
    assert not (tmp_path / "out").exists()
