"""How many samples are scored: by default few beside those of training, and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sylva_train import (
    ConfigError,
    Masks,
    Scores,
    SylvaConfig,
    finetune,
    options,
    score,
)
from sylva_train.comparison import Comparison, compare
from sylva_train.progress import Progress
from sylva_train.workflow import examples_seen, finetuning, load_task, score_file
from sylva_train.workflow.scoring import counted
from tests.sylva_train.jobs import (
    contents,
    new_home,
    sylva,
    sylva_config,
    task,
    training,
)
from tests.sylva_train.models import make_model
from tests.sylva_train.test_passes import config, data

QUIET = {"progress": False}
GRADIENT = {"importance": "gradient"}
#: 36 examples five times over.
FIVE = {"steps": 5, "batch_size": 36}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return new_home(tmp_path_factory)


@pytest.fixture
def few(monkeypatch):
    """Let trainings of a second be long enough for a thirtieth of theirs."""
    monkeypatch.setattr(options, "FEWEST", 2)


def run(home, output, *, steps=FIVE, resume=False, **changes):
    chosen = sylva_config(**GRADIENT | changes)
    return finetune(
        task(home), chosen, training(**steps), output, resume=resume, **QUIET
    )


def test_a_thirtieth_of_what_training_sees_is_scored(home, tmp_path, few):
    record = run(home, tmp_path / "run")
    assert record["scoring"]["samples"] == 36 * 5 // 30
    assert record["scoring"]["seconds"] > 0
    for kept in (Scores, Masks):
        path = tmp_path / "run" / f"{kept.__name__.lower()}.safetensors"
        assert kept.load(path).metadata["samples"] == 6
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    assert json.loads(path.read_text())["samples"] == 6
    shown = sylva("inspect", tmp_path / "run").stdout
    assert "scoring   6 examples in" in shown
    assert "of the training's time" in shown


def test_a_given_number_is_scored(home, tmp_path, few):
    record = run(home, tmp_path / "run", samples=9)
    assert record["scoring"]["samples"] == 9
    # Not the default's, and there are no more than 36.
    record = run(home, tmp_path / "more", samples=2000)
    assert record["scoring"]["samples"] == 36


def test_the_callers_options_stay_as_they_are(home, tmp_path, few):
    chosen = sylva_config(**GRADIENT)
    finetune(task(home), chosen, training(steps=1), tmp_path / "run", **QUIET)
    assert (chosen.samples, chosen.modules_to_save) == (None, None)


def test_what_scoring_took_is_kept_by_a_run_that_goes_on(
    home, tmp_path, few, monkeypatch
):
    def stopped(*_, **__):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", stopped)
        with pytest.raises(InterruptedError):
            run(home, tmp_path / "run", steps={"steps": 2})
    begun = json.loads((tmp_path / "run" / "sylva.json").read_text())
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    record = run(home, tmp_path / "run", steps={"steps": 2}, resume=True)
    assert record["scoring"] == begun["scoring"]
    # A run that was begun before this was kept.
    del begun["scoring"]
    (tmp_path / "old" / "sylva.json").write_text(json.dumps(begun))
    record = run(home, tmp_path / "old", steps={"steps": 2}, resume=True)
    assert record["scoring"] is None
    assert "scoring" not in sylva("inspect", tmp_path / "old").stdout


def test_what_was_scored_before_takes_no_time(home, tmp_path):
    scores = score_file(task(home), sylva_config(**GRADIENT), tmp_path / "s", **QUIET)
    steps = training(steps=1)
    chosen = sylva_config(**GRADIENT)
    record = finetune(
        task(home), chosen, steps, tmp_path / "run", scores=scores, **QUIET
    )
    assert record["scoring"] is None
    assert record["sylva"]["samples"] == 36


def test_scores_alone_are_of_1024(home, tmp_path):
    path = tmp_path / "scores.safetensors"
    made = score_file(task(home), sylva_config(**GRADIENT), path, **QUIET)
    assert made.metadata["asked"]["sylva"]["samples"] == 1024
    before = contents(tmp_path)
    for samples in (None, 1024):  # the same, asked for in two ways
        chosen = sylva_config(**GRADIENT, samples=samples)
        score_file(task(home), chosen, path, resume=True, **QUIET)
    assert contents(tmp_path) == before
    chosen = sylva_config(**GRADIENT, samples=128)
    with pytest.raises(ConfigError, match="`samples` is 1024 there and 128 here"):
        score_file(task(home), chosen, path, resume=True, **QUIET)


def test_unfinished_scoring_knows_the_default_by_its_number(tmp_path):
    score(make_model(), data("bert"), config(samples=1024), checkpoint=tmp_path)

    def loss(*_):
        raise AssertionError

    again = score(
        make_model(), data("bert"), config(samples=None), checkpoint=tmp_path, loss=loss
    )
    assert again.metadata["samples"] == sum(len(b["labels"]) for b in data("bert"))


def test_comparisons_score_as_many_as_a_fine_tuning(home, tmp_path, few, monkeypatch):
    from sylva_train.comparison import jobs, single

    def here(job, output, *_):
        row = single.run(job.spec)
        path, spec = job.files(output)
        spec.write_text(json.dumps(job.spec))
        path.write_text(json.dumps(row))
        return row

    monkeypatch.setattr(jobs, "start", here)
    plan = Comparison(
        task=task(home),
        sylva=sylva_config(**GRADIENT),
        training=training(**FIVE),
        methods=("sylva:gradient",),
        seeds=(0,),
    )
    results = compare(plan, tmp_path / "out")
    assert [row["scored"] for row in results["runs"]] == [6]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"steps": None, "epochs": 3}, 108),
        ({"steps": 4, "batch_size": 9}, 36),
        ({"steps": 3, "batch_size": 9, "accumulate": 2}, 54),
        ({"steps": 3, "batch_size": 100}, 108),
    ],
)
def test_examples_that_training_sees(home, options, seen):
    steps = training(**options)
    made = load_task(task(home), seed=0)
    assert examples_seen(made.loader(steps), steps) == seen


@pytest.mark.parametrize(
    ("asked", "seen", "there", "words"),
    [
        (None, None, 5000, "1,024 examples"),
        (None, None, 40, "40 examples"),
        (256, 2400, 5000, "256 examples; training sees 2,400"),
        (None, 6000, 5000, "200 examples, a thirtieth of the 6,000 that training sees"),
        (
            None, 2400, 5000,
            "128 examples, the fewest by default (`samples`); training sees 2,400",
        ),
        (
            None, 90_000, 5000,
            "1,024 examples, the most by default (`samples`); training sees 90,000",
        ),
        (None, 2400, 40, "40 examples, all that there are; training sees 2,400"),
    ],
)  # fmt: skip
def test_the_number_is_told_with_its_reason(asked, seen, there, words):
    assert counted(asked, seen, there) == words


def test_a_run_tells_before_it_scores_and_after(home, tmp_path, few, monkeypatch):
    lines = []
    monkeypatch.setattr(Progress, "say", lambda _, text: lines.append(text))
    run(home, tmp_path / "run")
    told = (
        "Scoring by gradient on 6 examples, a thirtieth of the 180 that training sees."
    )
    after = lines[lines.index(told) + 1 :]
    assert any(line.startswith("Scored in ") for line in after)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_a_number_that_is_none_is_refused(samples):
    with pytest.raises(ConfigError, match="`samples` must be an integer of at least 1"):
        SylvaConfig(samples=samples)


def test_saved_configurations_keep_their_number(tmp_path):
    SylvaConfig(samples=1024).save_pretrained(tmp_path)
    assert SylvaConfig.from_pretrained(str(tmp_path)).samples == 1024
    SylvaConfig().save_pretrained(tmp_path)
    assert SylvaConfig.from_pretrained(str(tmp_path)).samples is None
