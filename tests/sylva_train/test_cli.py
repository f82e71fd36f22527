"""Every command does its job, with flags and files of options."""

from __future__ import annotations

import importlib
import io
import json
import shlex
import shutil
import sys
import warnings

import pytest
import torch

import sylva_train
from sylva_train.cli import main
from sylva_train.importance import Scores
from sylva_train.masks import Masks
from sylva_train.pretrained import load_model
from sylva_train.workflow import load_folder
from tests.sylva_train.jobs import (
    SHORT,
    SMALL,
    STEPS,
    contents,
    source,
    sylva,
    told,
    write_data,
)

diagnosis = importlib.import_module("sylva_train.workflow.diagnosis")


def test_score_writes_scores_and_shows_the_layers(home):
    scores = Scores.load(home / "scores.safetensors")
    assert scores.rule == "magnitude"
    assert scores.metadata["model"] == str(home / "model")
    shown = sylva("inspect", home / "scores.safetensors").stdout
    assert "layer in backbone.encoder.layer" in shown
    assert "1.attention.output.dense" in shown
    assert "48 × 32" in shown


def test_scores_say_how_to_train_with_them(home, tmp_path):
    rows = ["note,kind", *(f"{'a b ' * (i + 1)},{'xy'[i % 2]}" for i in range(10))]
    (tmp_path / "own.csv").write_text("\n".join(rows))
    columns = ["--text-column", "note", "--label-column", "kind", "--max-length", 16]
    data = ["--model", home / "model", "--data", tmp_path / "own.csv", *columns]
    shown = sylva("score", tmp_path / "s.safetensors", *data, *SMALL).stdout
    (line,) = [x for x in shown.splitlines() if x.startswith("next")]
    assert f"sylva finetune RUN --scores {tmp_path / 's.safetensors'} --model" in line
    again = shlex.split(line.partition(" RUN ")[2])
    sylva("finetune", tmp_path / "run", *again, *STEPS)


def test_scores_are_known_by_their_content(home, tmp_path):
    shutil.copy(home / "scores.safetensors", tmp_path / "scores")
    assert "layer in backbone" in sylva("inspect", tmp_path / "scores").stdout
    (tmp_path / "text").write_text("not scores")
    assert "is none of these" in told(sylva("inspect", tmp_path / "text", code=2))


def test_any_encoding_has_tables(home, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["sylva", "inspect", str(home / "run/adapter")])
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert end.value.code == 0
    assert b"48 ? 32" in shown.getvalue()


def test_score_by_curvature_shows_progress_apart_from_results(home, tmp_path):
    options = ["--importance", "kfac", "--block-size", 8, "--samples", 8, "--levels", 1]
    result = sylva("score", tmp_path / "s.safetensors", *source(home), *options)
    assert "Scoring by kfac (mlr) on 8 examples" in result.stderr
    assert "Scoring" not in result.stdout
    assert Scores.load(tmp_path / "s.safetensors").rule == "kfac"


def test_finetune_leaves_a_whole_run(home):
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {"adapter", "masks.safetensors", "scores.safetensors", "sylva.json"}
    run = json.loads((home / "run" / "sylva.json").read_text())
    assert run["finished"]
    assert len(run["history"]) == 4
    assert run["labels"] == ["bad", "good"]
    masks = Masks.load(home / "run" / "masks.safetensors")
    assert run["trainable"] == masks.trainable + run["head"]
    assert run["head"] == 32 * 2 + 2


def test_finetune_takes_scores_and_masks(home, tmp_path):
    options = [*source(home), "--steps", 1, "--batch-size", 8, "--quiet"]
    scores = ["--scores", home / "scores.safetensors", "--density", 0.1]
    sylva("finetune", tmp_path / "a", *options, *scores, "--block-size", 8)
    masks = ["--masks", tmp_path / "a" / "masks.safetensors"]
    sylva("finetune", tmp_path / "b", *options, *masks)
    same = [contents(tmp_path / run)["masks.safetensors"] for run in "ab"]
    assert same[0] == same[1]
    config = json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())
    assert (config["importance"], config["density"]) == ("magnitude", 0.1)
    both = sylva("finetune", tmp_path / "c", *options, *masks, *scores, code=2)
    assert "`--masks` and `--scores` must not both be given" in told(both)


def test_evaluate_repeats_the_runs_own_score(home):
    run = json.loads((home / "run" / "sylva.json").read_text())
    found = json.loads(sylva("evaluate", home / "run", "--json", "--quiet").stdout)
    assert found["score"] == run["metrics"]["score"]
    assert found["loss"] == pytest.approx(run["metrics"]["loss"], rel=1e-5)


def test_evaluate_on_other_data(home, tmp_path):
    other = write_data(tmp_path / "new.jsonl", count=10, seed=5)
    shown = sylva("evaluate", home / "run", "--data", other, "--eval-limit", 6).stdout
    assert "6 examples" in shown
    assert "accuracy" in shown
    assert "f1 of '" in shown


def test_doctor_tells_what_is_here(monkeypatch):
    monkeypatch.delenv("SYLVA_KERNELS", raising=False)
    shown = sylva("doctor").stdout
    release = torch.__version__.partition("+")[0]
    for word in (release, "cpu: ", "kernels of PyTorch", "minilm: ", "java"):
        assert word in shown
    assert "Everything that is there works." in shown
    found = json.loads(sylva("doctor", "--json").stdout)
    assert found["problems"] == []
    assert found["devices"][0]["kernels"] == "torch"
    assert {o["name"] for o in found["optional"]} >= {"triton", "sacrebleu", "java"}


def test_doctor_fails_where_something_does(monkeypatch):
    monkeypatch.setenv("SYLVA_KERNELS", "fast")
    shown = sylva("doctor", code=1).stdout
    assert "problem  `SYLVA_KERNELS` must be one of" in shown
    monkeypatch.delenv("SYLVA_KERNELS")
    monkeypatch.setattr(diagnosis, "block_sddmm", lambda *_: torch.zeros(3, 16, 16))
    found = json.loads(sylva("doctor", "--json", code=1).stdout)
    (problem,) = found["problems"]
    assert "the gradient of a block on cpu is off" in problem


@pytest.mark.parametrize("command", ["evaluate", "finetune", "compare", "demo"])
def test_one_option_limits_what_is_evaluated_on(command):
    assert "--eval-limit" in sylva(command, "--help").stdout


@pytest.mark.parametrize("command", ["evaluate", "predict", "merge"])
def test_the_model_of_a_run_is_its_base(command):
    assert "run's base model" in sylva(command, "--help").stdout


def test_merge_writes_a_model_without_sylva(home, tmp_path):
    sylva("merge", home / "run", tmp_path / "merged")
    model, tokenizer = load_model(tmp_path / "merged")
    tuned = load_folder(home / "run")[0]
    batch = tokenizer(["a b good"], return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits, tuned(**batch).logits)


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_flags_win_over_the_file(home, tmp_path, suffix):
    options = {
        "model": str(home / "model"),
        "data": str(home / "train.jsonl"),
        "max-length": 16,
        "block_size": 8,
        "importance": "magnitude",
        "target-modules": ["query", "value"],
        "density": 0.25,
        "steps": 2,
        "quiet": True,
    }
    file = tmp_path / f"options.{suffix}"
    if suffix == "toml":
        lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
        file.write_text("\n".join(lines))
    else:
        file.write_text(json.dumps(options))  # which is YAML as well
    sylva("finetune", tmp_path / "run", "--config", file, "--density", 0.5)
    run = json.loads((tmp_path / "run" / "sylva.json").read_text())
    assert run["sylva"]["density"] == 0.5
    assert run["sylva"]["target_modules"] == ["query", "value"]
    assert run["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("densty: 0.1", "there is no option 'densty'; did you mean 'density'?"),
        ("density: much", "'density' must be a number; got 'much'"),
        ("steps: 1.5", "'steps' must be an integer; got 1.5"),
        ("quiet: 1", "'quiet' must be true or false; got 1"),
        ("steps: 1\nsteps: [", "not valid YAML"),
        ("- steps", "expected names and values; got a list"),
        ("block-size: 8\nblock_size: 8", "'block_size' stands twice"),
    ],
)
def test_a_files_errors_name_file_and_key(tmp_path, text, words):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    message = told(sylva("finetune", tmp_path / "run", "--config", file, code=2))
    assert str(file) in message
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_number_in_scientific_notation_is_a_number(home, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("lr: 1e-3\nsparsity: 0.5")  # YAML 1.1 reads 1e-3 as a text
    sylva(
        "finetune", tmp_path / "run", *source(home), *SMALL, "--steps", 1,
        "--config", file,
    )  # fmt: skip
    run = json.loads((tmp_path / "run" / "sylva.json").read_text())
    assert (run["training"]["lr"], run["sylva"]["density"]) == (1e-3, 0.5)


def test_sparsity_is_one_minus_density(home, tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"density": 0.4}')
    base = ["finetune", tmp_path / "run", *source(home), *SMALL, "--steps", 1]
    both = sylva(*base, "--density", 0.5, "--sparsity", 0.5, code=2)
    assert "must not both be given" in told(both)
    sylva(*base, "--config", file, "--sparsity", 0.9)
    run = json.loads((tmp_path / "run" / "sylva.json").read_text())
    assert run["sylva"]["density"] == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1"], "`--sparsity` must be at least 0 and below 1; got 1.0"),
        (["--sparsity", "-0.1"], "`--sparsity` must be at least 0 and below 1"),
        (["--density", "0"], "`--density`"),
        (["--importance", "luck"], "`--importance` must be one of 'kfac'"),
        (["--lr", "nan"], "`--lr` must be a finite number above 0"),
        (["--device", "abacus"], "`--device` must be"),
        (["--device", "meta"], "`--device` must be"),
        (["--target-modules", "nothing"], "its linear layers end in"),
        (["--target-modules", "("], "'(' is not a regular expression"),
        (["--exclude-modules", "attention"], "matches no linear layer"),
        (["--block-size", "64"], "`--block-size` 64 is larger than"),
        (["--density", "0.001"], "leaves no whole block to train"),
        (["--metric", "beauty"], "`--metric` must be one of"),
        (["--eval-split", "test"], "or `--eval-split held-out` to hold a tenth"),
    ],
)
def test_options_that_cannot_be_used(home, tmp_path, options, words):
    output = tmp_path / "deep" / "run"
    base = ["finetune", output, *source(home), *SMALL, *STEPS]
    assert words in told(sylva(*base, *options, code=2))
    assert contents(tmp_path) == {}


def test_commands_that_write_are_refused_to_several_processes(
    home, tmp_path, monkeypatch
):
    """As under torchrun, where each would write the same output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "out"
    result = sylva("compare", output, *source(home), code=2)
    assert "(WORLD_SIZE is 2)" in told(result)
    for command in ("finetune", "score"):
        result = sylva(command, output, *source(home), code=2)
        assert "start the processes by torchrun" in told(result)
    for command in (
        ["evaluate", home / "run"],
        ["merge", home / "run", output],
        ["inspect", home / "run", "--draw", output],
    ):
        assert "without torchrun" in told(sylva(*command, code=2))
    assert not list(tmp_path.iterdir())
    assert "trained" in sylva("inspect", home / "run").stdout


def test_a_single_process_may_come_from_torchrun(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    sylva("score", tmp_path / "s.safetensors", *source(home), *SMALL)
    assert (tmp_path / "s.safetensors").exists()


def test_an_unknown_flag_is_an_error_of_usage(tmp_path):
    result = sylva("finetune", tmp_path / "run", "--densty", "0.5", code=2)
    assert "--density" in result.stderr


def test_warnings_are_lines(home, tmp_path):
    options = ["--importance", "kfac", "--block-size", 8, "--samples", 8]
    rough = ["--curvature", "hodlr", "--levels", 1, "--rank", 4, "--exact-below", 0]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        output = tmp_path / "s.safetensors"
        result = sylva("score", output, *source(home), *options, *rough)
    lines = [x for x in result.stderr.splitlines() if x.startswith("Warning: ")]
    assert len(lines) == 1
    assert "importance.py" not in result.stderr


def test_a_warning_is_told_once(home, tmp_path):
    few = ["--target-modules", "query,valeu", *SHORT]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = sylva("finetune", tmp_path / "run", *source(home), *few)
    assert result.stderr.count("'valeu'") == 1


def test_pairs_of_texts(home, tmp_path):
    data = tmp_path / "pairs.csv"
    rows = [f"{a},{b},{'same' if a == b else 'other'}" for a in "abcd" for b in "abcd"]
    data.write_text("\n".join(["first,second,label", *rows]))
    options = [*source(home), "--data", data, "--text-column", "first,second", *SHORT]
    sylva("finetune", tmp_path / "run", *options)
    sylva("evaluate", tmp_path / "run")


def test_layers_without_a_block_are_told(home, tmp_path):
    density = ["--density", "0.05"]  # of 16 blocks in the smaller layers
    options = [*source(home), *SMALL, *STEPS, *density]
    result = sylva("finetune", tmp_path / "run", *options)
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    none = sum(not len(mask) for mask in masks.values())
    assert 0 < none < len(masks)
    share = f"{masks.density:.1%} of the weights of {len(masks)} layers"
    assert f"{share} ({none} without a block)" in result.stderr
    assert f"{masks.density:.1%} of the layers" in result.stdout


def test_a_switch_takes_no_value():
    shown = sylva("finetune", "--help").stdout
    line = next(x for x in shown.splitlines() if "--overwrite" in x)
    assert "bool" not in line.lower()


def test_values_are_told_as_options(home, tmp_path):
    options = [*source(home), *SMALL, *STEPS, "--density", "0.0001"]
    message = told(sylva("finetune", tmp_path / "run", *options, code=2))
    assert "share a budget with `--scope model`" in message


def test_version():
    assert sylva("--version").stdout.split() == ["sylva-train", sylva_train.__version__]


def test_debug_shows_where_an_error_arose(tmp_path):
    result = sylva("inspect", tmp_path / "nothing", "--debug", code=2, trace=True)
    assert "Traceback" in result.stderr
    assert told(result)
