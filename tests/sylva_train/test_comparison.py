"""Comparisons: fair runs, kept runs, results that reports can be made of."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from sylva_train import report
from sylva_train._checks import (
    ConfigError,
    DataError,
    OutputExistsError,
    SylvaError,
)
from sylva_train.comparison import (
    Comparison,
    Job,
    compare,
    demonstration,
    load_results,
)
from sylva_train.comparison.process import Processes, start
from sylva_train.comparison.single import run
from sylva_train.options import METHODS
from tests.sylva_train import jobs
from tests.sylva_train.jobs import (
    children,
    contents,
    kill_when,
    start_process,
    sylva,
    told,
    write_pairs,
)
from tests.sylva_train.words import save_folder

pytestmark = pytest.mark.usefixtures("quick_collections")

module = importlib.import_module("sylva_train.comparison.jobs")
ROW = {
    "method", "label", "seed", "score", "metrics", "trainable", "trainable_head",
    "trainable_fraction", "seconds_per_step", "step_seconds_iqr", "score_seconds",
    "score_memory_bytes", "train_seconds", "peak_memory_bytes", "adapter_bytes", "lr",
    "history", "scored",
}  # fmt: skip
SETUP = {
    "model", "data", "task", "labels", "metric", "higher_is_better", "train_examples",
    "eval_examples", "steps", "batch_size", "density", "block_size", "seeds", "device",
    "threads", "versions", "commit", "date", "total_weights", "command",
}  # fmt: skip


def names(done: list[Job]) -> list[str]:
    return [job.name for job in done]


def plan(home: Path, **options) -> Comparison:
    values = {
        "task": jobs.task(home),
        "sylva": jobs.sylva_config(samples=8, levels=1, rank=4),
        "training": jobs.training(steps=3),
        "methods": ("full", "sylva:random"),
        "seeds": (0, 1),
    }
    return Comparison(**(values | options))


@pytest.fixture(scope="module")
def everything(home, tmp_path_factory) -> Path:
    """The results of every method with one seed."""
    output = tmp_path_factory.mktemp("all") / "compared"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # HODLR factors of such small layers are truncated to nothing good.
        warnings.filterwarnings("ignore", message=".*truncated HODLR")

        patch.setattr(module, "start", jobs.run_here([]))
        compare(plan(home, methods=METHODS, seeds=(0,)), output, command="sylva x")
    return output


def test_results_have_what_reports_read(everything):
    results = load_results(everything / "results.json")
    assert results.keys() == {
        "format", "setup", "runs", "masks", "scores", "factor", "tune", "tuning",
    }  # fmt: skip
    assert results["setup"].keys() == SETUP
    assert [row["method"] for row in results["runs"]] == list(METHODS)
    assert all(row.keys() == ROW for row in results["runs"])
    sylvas = {name for name in METHODS if name.startswith("sylva")}
    assert results["masks"].keys() == results["scores"].keys() == sylvas
    assert results["factor"]["n"] == 32
    assert results["setup"]["total_weights"] > 1000
    assert results["setup"]["train_examples"] == 36
    assert results["setup"]["eval_examples"] == 4


def test_reports_are_made_of_results(everything, tmp_path):
    results = load_results(everything / "results.json")
    page = report.write_report(results, tmp_path / "report.html").read_text()
    table = report.markdown_table(results)
    for row in results["runs"]:
        assert row["label"].replace("×", "×") in page
        assert row["label"] in table


def test_budgets_are_the_same_but_for_rounding(everything):
    rows = {r["method"]: r for r in load_results(everything / "results.json")["runs"]}
    assert rows["frozen"]["trainable"] == 0
    assert rows["full"]["trainable_fraction"] > 0.9
    sizes = {r["trainable"] for name, r in rows.items() if name.startswith("sylva")}
    assert sizes == {rows["kfac-pruner"]["trainable"]}
    # A rank is at least 1, which is coarse for layers of 32 weights.
    size = sizes.pop()
    for rival in ("lora", "adapter", "shira", "supertuning"):
        assert 0.3 < rows[rival]["trainable"] / size < 3
    heads = {row["trainable_head"] for name, row in rows.items() if name != "frozen"}
    assert heads == {32 * 2 + 2}


def test_every_trained_run_has_its_history_and_costs(everything):
    for row in load_results(everything / "results.json")["runs"]:
        assert row["peak_memory_bytes"] > 0
        assert row["adapter_bytes"] > 0
        scored = row["method"].startswith(("sylva", "kfac"))
        assert (row["score_seconds"] is not None) == scored
        if row["method"] != "frozen":
            assert [step["step"] for step in row["history"]] == [1, 2, 3]
            assert row["score"] == row["history"][-1]["score"]


def test_masks_are_those_of_the_first_seed(here, home, tmp_path):
    results = compare(plan(home, methods=("sylva:random",)), tmp_path / "out")
    specs = sorted((tmp_path / "out" / "runs").glob("*.spec.json"))
    assert [json.loads(s.read_text())["describe"] for s in specs] == [True, False]
    assert list(results["masks"]) == ["sylva:random"]


@pytest.mark.parametrize("rule", ["magnitude", "gradient"])
def test_a_run_does_what_finetune_does(here, home, tmp_path, rule):
    from sylva_train import finetune

    training = jobs.training(steps=3)
    name = f"sylva:{rule}"
    rates = {name: training.lr}
    methods = {"methods": (name,), "seeds": (0,), "learning_rates": rates}
    results = compare(plan(home, **methods), tmp_path / "out")
    config = jobs.sylva_config(samples=8, levels=1, rank=4, importance=rule)
    record = finetune(
        jobs.task(home), config, training, tmp_path / "run", progress=False
    )
    losses = [
        [step["loss"] for step in history]
        for history in (record["history"], results["runs"][0]["history"])
    ]
    assert losses[0] == losses[1]


def test_finished_runs_are_kept_and_seeds_may_be_added(here, home, tmp_path):
    output = tmp_path / "out"
    compare(plan(home, seeds=(0,)), output)
    assert names(here) == ["full-0", "sylva-random-0"]
    (output / "runs" / "sylva-random-0.json").unlink()
    kinds = []
    results = compare(
        plan(home), output, resume=True, watch=lambda event: kinds.append(event.kind)
    )
    assert names(here)[2:] == ["sylva-random-0", "full-1", "sylva-random-1"]
    assert [kind for kind in kinds if kind != "stage"] == [
        "kept", *["begin", "end"] * 3,
    ]  # fmt: skip
    assert len(results["runs"]) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": jobs.training(steps=2)}, "`steps` is 3 there and 2 here"),
        ({"sylva": jobs.sylva_config(density=0.5)}, "`density` is 0.2 there"),
        ({"seeds": (1, 0)}, "another first seed"),
    ],
)
def test_other_options_are_refused(here, home, tmp_path, changes, words):
    output = tmp_path / "out"
    compare(plan(home), output)
    before = contents(output)
    if "sylva" in changes:
        sylva_config = dataclasses.replace(plan(home).sylva, density=0.5)
        changes = {"sylva": sylva_config}
    with pytest.raises(ConfigError, match=words):
        compare(plan(home, **changes), output, resume=True)
    assert contents(output) == before
    assert len(here) == 4


def test_a_damaged_row_is_named(here, home, tmp_path):
    compare(plan(home), tmp_path / "out")
    row = tmp_path / "out" / "runs" / "full-1.json"
    row.write_text(row.read_text()[:-10])
    with pytest.raises(ConfigError, match=r"full-1\.json.*delete it"):
        compare(plan(home), tmp_path / "out", resume=True)


def test_a_comparison_is_not_overwritten_unless_told(here, home, tmp_path):
    output = tmp_path / "out"
    compare(plan(home, seeds=(0,)), output)
    before = contents(output)
    with pytest.raises(OutputExistsError, match="--resume"):
        compare(plan(home), output)
    bad = plan(home, task=jobs.task(home, data=str(home / "missing.csv")))
    with pytest.raises(DataError, match="there is no such file"):
        compare(bad, output, overwrite=True)
    assert contents(output) == before
    compare(plan(home, seeds=(5,)), output, overwrite=True)
    assert {row["seed"] for row in load_results(output / "results.json")["runs"]} == {5}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_keeps_what_is_finished_and_leaves_nothing_else(
    home, tmp_path, monkeypatch
):
    start_here = jobs.run_here([])

    def start_once(job, *arguments):
        if job.kind == "sylva:random":
            msg = "no luck"
            raise SylvaError(msg)
        return start_here(job, *arguments)

    monkeypatch.setattr(module, "start", start_once)
    with pytest.raises(SylvaError, match="no luck"):
        compare(plan(home), tmp_path / "some")
    assert (tmp_path / "some" / "runs" / "full-0.json").exists()
    with pytest.raises(SylvaError, match="no luck"):
        compare(plan(home, methods=("sylva:random",)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_frozen_features_are_scored_by_the_metric(here, home, tmp_path):
    methods = {"methods": ("frozen",), "seeds": (0,)}
    by_f1 = plan(home, task=jobs.task(home, metric="f1"), **methods)
    row = compare(by_f1, tmp_path / "f1")["runs"][0]
    assert row["score"] == row["metrics"]["f1"]
    with pytest.raises(ConfigError, match="leave the method out"):
        plan(home, task=jobs.task(home, metric="loss"), **methods)


def test_methods_are_compared_on_a_regression(here, home, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    options = [
        "--model", home / "model", "--data", pairs, "--text-column", "one,two",
        "--task", "regression", "--max-length", 16, "--block-size", 8, "--steps", 2,
        "--density", 0.2, "--samples", 8, "--batch-size", 8, "--seeds", 0,
        "--methods", "frozen,full,lora,sylva:kfac",
    ]  # fmt: skip
    result = sylva("compare", tmp_path / "out", *options)
    assert "pearson" in result.stderr
    results = load_results(tmp_path / "out" / "results.json")
    assert (results["setup"]["metric"], results["setup"]["labels"]) == ("pearson", [])
    for row in results["runs"]:
        assert set(row["metrics"]) >= {"pearson", "spearman", "mse"}
        assert row["score"] == row["metrics"]["pearson"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_methods_rate_goes_before_its_kinds(home):
    rates = {"sylva": 1.0, "sylva:random": 2.0, "lora": 3.0}
    found = plan(home, learning_rates=rates)
    names = ("sylva:kfac:mlr", "sylva:random", "lora")
    assert [found.rate(name) for name in names] == [1.0, 2.0, 3.0]


def test_rates_are_of_methods_that_there_are(home):
    assert plan(home, learning_rates={"sylva:kfac": 2.0}).rate("sylva:kfac:mlr") == 2.0
    with pytest.raises(ConfigError, match="got 'lorra'"):
        plan(home, learning_rates={"lorra": 1.0})
    with pytest.raises(ConfigError, match="`learning_rates` must be a finite number"):
        plan(home, learning_rates={"lora": 0.0})


@pytest.mark.parametrize("method", ["full", "lora", "sylva:magnitude", "kfac-pruner"])
def test_a_run_depends_on_its_seed_alone(home, method):
    spec = plan(home, methods=(method,)).spec(method, 0)
    losses = []
    for number in (1, 2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        losses.append([record["loss"] for record in run(spec)["history"]])
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]


def test_no_run_counts_twice(home):
    found = plan(home, methods=("lora", "lora"), seeds=(1, 0, 1))
    assert (found.methods, found.seeds) == (("lora",), (1, 0))
    assert len({job.name for job in found.jobs()}) == len(found.jobs()) == 2


def test_names_are_made_whole_and_unknown_ones_refused(home):
    assert plan(home, methods=("sylva:kfac", "sylva:kfac:mlr")).methods == (
        "sylva:kfac:mlr",
    )
    for name in ("sylva:luck", "sylva:random:mlr", "sylva:kfac:lu", "lorra", None):
        with pytest.raises(ConfigError, match="method"):
            plan(home, methods=(name,) if name else ())
    with pytest.raises(ConfigError, match="leave it out for 'causal-lm'"):
        plan(home, task=jobs.task(home, task="causal-lm"), methods=METHODS)


def test_a_spec_is_what_its_file_says(home):
    for method in METHODS:
        spec = plan(home, methods=(method,)).spec(method, 0)
        assert json.loads(json.dumps(spec)) == spec


def test_a_run_has_the_options_of_choosing_blocks(home):
    given = jobs.sylva_config(max_columns=0.5, scope="model", spread=0.0)
    spec = plan(home, sylva=given).spec("sylva:random", 0)["sylva"]
    assert spec == {name: getattr(given, name) for name in spec}
    assert spec["max_columns"] == 0.5


def test_the_demonstration_is_a_comparison_of_the_test_split():
    found = demonstration(steps=7)
    assert found.task.eval_split == "test"
    assert found.training.steps == 7
    assert found.seeds == (0, 1, 2)


# Processes


@pytest.mark.slow
def test_a_process_tells_its_error_and_ends(home, tmp_path):
    job = plan(home).jobs()[0]
    job.spec["task"]["data"] = str(tmp_path / "missing.csv")
    words = r"Full fine-tuning, seed 0: .*missing\.csv: there is no such file"
    with pytest.raises(DataError, match=words):
        start(job, tmp_path, lambda *_: None, Processes())
    assert [path.exists() for path in job.files(tmp_path)] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_comparison_goes_on(home, here, tmp_path):
    output = tmp_path / "out"
    arguments = [
        "compare", output, "--model", home / "model", "--data", home / "train.jsonl",
        *jobs.SMALL[:2], "--density", 0.2, "--steps", 3, "--batch-size", 8,
        "--methods", "full,sylva:random", "--seeds", 0,
    ]  # fmt: skip
    process = start_process(*arguments)
    second = output / "runs" / "sylva-random-0.spec.json"
    kill_when(process, second.exists)
    orphans = [pid for pid in children(str(output)) if pid != process.pid]
    assert (output / "runs" / "full-0.json").exists()
    assert not (output / "results.json").exists()
    kept = contents(output)["runs/full-0.json"]
    assert "go on with it" in told(sylva(*arguments, code=2))
    shown = sylva(*arguments, "--resume")
    assert "finished before" in shown.stderr
    assert names(here) == ["sylva-random-0"]
    assert contents(output)["runs/full-0.json"] == kept
    assert {"results.json", "report.html", "table.md"} <= contents(output).keys()
    end = time.monotonic() + 120
    while set(orphans) & set(children(str(output))):
        assert time.monotonic() < end, "a run outlived its parent"
        time.sleep(0.1)


# Commands


def test_compare_and_report_only(here, home, tmp_path):
    output = tmp_path / "out"
    options = [
        "--model", home / "model", "--data", home / "train.jsonl", "--max-length", 16,
        "--block-size", 8, "--density", 0.2, "--steps", 2, "--batch-size", 8,
        "--methods", "full,sylva:magnitude", "--seeds", "0,1",
        "--learning-rates", "full=1e-3,sylva=0.01",
    ]  # fmt: skip
    result = sylva("compare", output, *options)
    assert "4/4" in result.stderr
    assert "Full fine-tuning" in result.stdout
    assert str(output / "report.html") in result.stdout
    results = load_results(output / "results.json")
    assert {r["lr"] for r in results["runs"]} == {1e-3, 0.01}
    for name in ("report.html", "table.md"):
        (output / name).unlink()
    sylva("compare", output, "--report-only")
    assert (output / "table.md").read_text() == report.markdown_table(results)
    assert (output / "report.html").exists()
    assert "Full fine-tuning" in sylva("inspect", output).stdout
    refused = sylva("compare", output, *options, "--steps", 5, "--resume", code=2)
    assert "`--steps` is 2 there and 5 here" in told(refused)


def test_cut_texts_are_told_once(here, home, tmp_path):
    task = jobs.task(home, max_length=4)  # of four words, and two marks around them
    with pytest.warns(UserWarning, match="texts lose their end") as caught:
        compare(plan(home, task=task), tmp_path / "out")
    # Those to train on, and those to evaluate on.
    assert len(caught) == 2


def test_demo_tells_its_story(here, home, tmp_path):
    output = tmp_path / "demo"
    base = [
        "demo", output, "--model", home / "model", "--steps", 2, "--seeds", 0,
        "--methods", "full,sylva:random", "--limit", 40, "--eval-limit", 20,
    ]  # fmt: skip
    # 5% of a 32 × 32 layer is less than one block of the demo's size.
    assert "leaves no whole block" in told(sylva(*base, code=2))
    assert not output.exists()
    wide = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1}
    shutil.rmtree(home / "wide", ignore_errors=True)
    from transformers import BertConfig

    from tests.sylva_train.words import TINY

    base[3] = save_folder(home / "wide", BertConfig(**(TINY | wide)))
    shown = sylva(*base).stdout
    for words in ("1. Compare", "2. Keep", "3. Use", "on disk", "a reader says"):
        assert words in shown
    assert str(output / "report.html") in shown
    assert (output / "finetuned" / "adapter" / "adapter_config.json").exists()
    assert "exists" in told(sylva(*base, code=2))
    again = sylva(*base, "--resume").stdout
    assert "3. Use" in again
    assert len(here) == 2


def test_seconds_left_are_finite_in_events(here, home, tmp_path):
    events = []
    compare(plan(home), tmp_path / "out", watch=events.append)
    left = [event.left for event in events if event.left is not None]
    assert left
    assert all(math.isfinite(value) and value >= 0 for value in left)
    assert {"scoring", "training", "evaluating"} >= {
        event.stage for event in events if event.kind == "stage"
    }
