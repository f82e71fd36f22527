"""What is wrong is one line, an exit code and no trace; what is there is kept."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from sylva_train.importance import Scores
from tests.sylva_train.jobs import (
    SHORT,
    SMALL,
    contents,
    kill_when,
    source,
    start_process,
    sylva,
    told,
    write_data,
)
from tests.sylva_train.words import TINY, save_folder

finetuning = importlib.import_module("sylva_train.workflow.finetuning")


def test_a_row_that_cannot_be_read_is_named(home, tmp_path):
    data = write_data(tmp_path / "bad.jsonl", 9)
    with data.open("a") as file:
        file.write('{"text": "a b", "label": \n')
    result = sylva("finetune", tmp_path / "run", *source(home), "--data", data, code=1)
    assert f"{data}:10:" in told(result)
    assert not (tmp_path / "run").exists()


def test_lines_and_names_are_no_pictures(home, tmp_path):
    """Rich would print a hundred points for the line 100, and a cat for the folder."""
    (tmp_path / ":cat:").mkdir()
    path = tmp_path / ":cat:" / "a.csv"
    path.write_text("\n".join(["text,label", *["a,good"] * 98, "b,"]))
    command = ["score", tmp_path / "s.safetensors", *source(home)[:2], "--data", path]
    assert f"{path}:100: expected a label" in told(sylva(*command, code=1))
    data = path.with_name("new.csv")
    data.write_text("text\n[bold]a :100:\n")
    shown = sylva("predict", home / "run", "--data", data).stdout
    assert json.loads(shown)["text"] == "[bold]a :100:"


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_an_empty_data_set_is_refused(home, tmp_path, content):
    data = tmp_path / "empty.csv"
    data.write_text(content)
    options = [*source(home), "--data", data]
    for command in ("score", "finetune"):
        result = sylva(command, tmp_path / "out.safetensors", *options, code=1)
        assert str(data) in told(result)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_nan_while_scoring_writes_nothing(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    options = ["--model", tmp_path / "model", "--importance", "kfac", "--samples", 8]
    base = [*source(home), "--block-size", 8, *options]
    for command in ("score", "finetune"):
        result = sylva(command, tmp_path / "out.safetensors", *base, code=1)
        message = told(result)
        assert "the loss is nan in batch" in message
        assert "layer.0.output.dense.weight` itself has NaN" in message
    assert not (tmp_path / "out.safetensors").exists()


def test_a_loss_that_diverges_keeps_the_run_to_look_at(home, tmp_path):
    options = [*source(home), *SHORT, "--lr", "1e30", "--max-grad-norm", 0]
    result = sylva("finetune", tmp_path / "run", *options, code=1)
    assert "Lower `--lr`" in told(result)
    assert not (tmp_path / "run" / "adapter").exists()
    assert "interrupted" in sylva("inspect", tmp_path / "run").stdout
    for command in (["evaluate"], ["merge", tmp_path / "merged"]):
        arguments = [command[0], tmp_path / "run", *command[1:]]
        assert "was interrupted" in told(sylva(*arguments, code=1))


def test_training_from_weights_that_are_nan_says_so(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    options = [*source(home), *SHORT, "--model", tmp_path / "model"]
    message = told(sylva("finetune", tmp_path / "run", *options, code=1))
    assert "word_embeddings.weight` itself has NaN" in message


# Adapters


def broken(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home / "run", tmp_path / "run")
    return tmp_path / "run" / "adapter" / "adapter_model.safetensors"


def test_inspecting_a_run_verifies_its_adapter(home, tmp_path):
    file = broken(home, tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    assert "damaged" in told(sylva("inspect", tmp_path / "run", code=1))


def test_a_truncated_adapter_is_refused(home, tmp_path):
    file = broken(home, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, "is missing or damaged")


def test_a_tampered_adapter_is_refused(home, tmp_path):
    weights = load_file(file := broken(home, tmp_path))
    name = next(name for name in weights if name.endswith("sylva_values"))
    weights[name][0, 0, 0] += 1
    save_file(weights, file)
    refused(tmp_path, "was changed after it was written")


def test_an_adapter_with_a_flipped_bit_is_refused(home, tmp_path):
    file = broken(home, tmp_path)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refused(tmp_path, "damaged")


def refused(tmp_path: Path, words: str) -> None:
    run = tmp_path / "run"
    for arguments in (
        ["evaluate", run],
        ["merge", run, tmp_path / "merged"],
        ["inspect", run / "adapter"],
    ):
        assert words in told(sylva(*arguments, code=1))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(home, tmp_path):
    other = save_folder(tmp_path / "other", seed=1)
    result = sylva("evaluate", home / "run", "--model", other, code=1)
    assert "Its weights differ" in told(result)
    merged = ["merge", home / "run", tmp_path / "merged", "--model", other]
    told(sylva(*merged, code=1))
    assert not (tmp_path / "merged").exists()


def test_masks_of_another_model_are_refused(home, tmp_path):
    config = BertConfig(**(TINY | {"num_hidden_layers": 1, "intermediate_size": 40}))
    save_folder(tmp_path / "other", config)
    masks = ["--masks", home / "run" / "masks.safetensors"]
    options = [*source(home), "--model", tmp_path / "other", *masks]
    message = told(sylva("finetune", tmp_path / "run", *options, code=2))
    assert "intermediate.dense`, whose weight is (40, 32)" in message
    assert not (tmp_path / "run").exists()


def test_a_run_is_found_from_elsewhere(home, tmp_path, monkeypatch):
    shutil.copytree(home / "model", tmp_path / "model")
    write_data(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    sylva("finetune", "run", "--model", "model", "--data", "train.jsonl", *SHORT)
    monkeypatch.chdir(home)
    sylva("evaluate", tmp_path / "run")


# Outputs that exist


def test_a_folder_may_be_called_as_an_option(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    message = told(sylva("evaluate", "model", code=1))
    assert "`model` is not the folder of a fine-tuning" in message
    message = told(sylva("evaluate", "run", "--model", "data", code=1))
    assert "`data` cannot be loaded" in message


def test_an_output_that_exists_is_kept(home, tmp_path):
    before = contents(home / "run")
    for arguments in (
        ["finetune", home / "run", *source(home), *SHORT],
        ["score", home / "scores.safetensors", *source(home), *SMALL],
        ["merge", home / "run", home / "model"],
        ["compare", home / "run", "--methods", "full"],
        ["demo", home / "run"],
    ):
        message = told(sylva(*arguments, code=2))
        assert "exists" in message
        assert "--overwrite" in message
    assert contents(home / "run") == before


def test_overwrite_replaces_a_run_only_once_the_new_one_can_train(home, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    before = contents(tmp_path)
    base = ["finetune", tmp_path / "run", *source(home), *SHORT, "--overwrite"]
    sylva(*base, "--data", tmp_path / "missing.csv", code=1)
    sylva(*base, "--target-modules", "nothing", code=2)
    assert contents(tmp_path) == before
    sylva(*base, "--steps", 2)
    run = json.loads((tmp_path / "run" / "sylva.json").read_text())
    assert len(run["history"]) == 2


def test_overwrite_never_replaces_what_is_no_output(home, tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for arguments in (
        ["finetune", folder, *source(home), *SHORT],
        ["merge", home / "run", folder],
        ["compare", folder, "--methods", "full"],
        ["demo", folder],
    ):
        message = told(sylva(*arguments, "--overwrite", code=2))
        assert "is not what this command writes" in message
    assert contents(folder) == {"thesis.txt": b"years of work"}


# Interruption


def test_ctrl_c_says_how_to_go_on(home, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    base = ["finetune", tmp_path / "run", *source(home), *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", interrupted)
        message = told(sylva(*base, code=130))
    command = message.partition("Go on with: sylva ")[2].split()
    assert command[-1] == "--resume"
    sylva(*command)
    assert "finetune --resume" not in sylva("inspect", tmp_path / "run").stdout


def test_resume_refuses_other_options(home):
    base = ["finetune", home / "run", *source(home), *SHORT, "--resume"]
    assert "`--density` is 0.2 there and 0.3 here" in told(
        sylva(*base, "--density", 0.3, code=2)
    )
    sylva(*base)  # finished: nothing to do


def test_resume_tells_of_another_version(home, tmp_path):
    """An option that there was not when the run began is none that anybody changed."""
    shutil.copytree(home / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "sylva.json").read_text())
    del record["training"]["bucket"], record["task"]["metric"]
    (tmp_path / "run" / "sylva.json").write_text(json.dumps(record))
    base = ["finetune", tmp_path / "run", *source(home), *SHORT, "--resume"]
    message = told(sylva(*base, code=2))
    assert "`--bucket` is not told there: another version began it" in message
    assert "--metric" not in message


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_identical_adapter(home, tmp_path):
    options = [*source(home), *SHORT, "--steps", 60, "--save-every", 5]
    sylva("finetune", tmp_path / "whole", *options)
    base = ["finetune", tmp_path / "killed", *options]
    later = tmp_path / "killed" / "checkpoints" / "checkpoint-10"
    kill_when(start_process(*base), later.exists)
    assert not (tmp_path / "killed" / "adapter").exists()
    assert "go on with it" in told(sylva(*base, code=2))
    assert "Going on after step 1" in sylva(*base, "--resume").stderr
    name = "adapter/adapter_model.safetensors"
    whole, killed = (contents(tmp_path / run) for run in ("whole", "killed"))
    assert killed[name] == whole[name]
    assert killed.keys() == whole.keys()


def test_errors_that_were_not_foreseen_are_told_as_such(home, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr("sylva_train.workflow.evaluate_folder", broken)
    message = told(sylva("evaluate", home / "run", code=1))
    assert "RuntimeError: the sky fell" in message
    assert "--debug" in message


def test_a_full_disk_is_told_as_such(home, tmp_path):
    code = (
        "import resource, sys; from sylva_command import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); main()"
    )
    command = ["score", tmp_path / "s.safetensors", *source(home), *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert str(tmp_path / "s.safetensors") in done.stderr
    assert "not foreseen" not in done.stderr
    assert not (tmp_path / "s.safetensors").exists()


def test_seeds_and_rates_that_cannot_be_read(tmp_path):
    base = ["compare", tmp_path / "out"]
    assert "integers with commas" in told(sylva(*base, "--seeds", "a,b", code=2))
    wrong = ["--learning-rates", "full"]
    assert "like full=2e-4" in told(sylva(*base, *wrong, code=2))
    assert "at least one entry" in told(sylva(*base, "--seeds", "", code=2))


def test_finished_scores_are_not_made_again(home, tmp_path):
    output = tmp_path / "s.safetensors"
    command = ["score", output, *source(home), *SMALL]
    shown = sylva(*command)
    before = output.read_bytes(), output.stat().st_mtime_ns
    again = sylva(*command, "--resume", "--density", 0.5)
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
    assert "Scoring" not in again.stderr
    assert shown.stdout.count("\n") == again.stdout.count("\n")
    for option, value in (("--block-size", 16), ("--limit", 30), ("--seed", 1)):
        refused = told(sylva(*command, "--resume", option, value, code=2))
        assert f"`{option}` is" in refused
        assert "finished scores, but of other options" in refused
    shutil.copy(home / "run/masks.safetensors", output)
    assert "not a score file" in told(sylva(*command, "--resume", code=1))


def test_scoring_that_was_to_replace_a_file_goes_on_with_resume_alone(home, tmp_path):
    output = tmp_path / "s.safetensors"
    sylva("score", output, *source(home), *SMALL)
    Path(f"{output}.unfinished").mkdir()  # of a command with --overwrite
    other = ["score", output, *source(home), *SMALL, "--block-size", 16]
    sylva(*other, "--resume")
    assert Scores.load(output).metadata["asked"]["sylva"]["block_size"] == 16
    assert not Path(f"{output}.unfinished").exists()


@pytest.mark.parametrize("names", ["nothing", "query"])
def test_modules_to_save_are_looked_for_before_scoring(home, tmp_path, names):
    base = ["finetune", tmp_path / "run", *source(home), *SHORT]
    result = sylva(*base, "--modules-to-save", names, code=2)
    assert "`--modules-to-save`" in told(result)
    assert "Scoring" not in result.stderr


def test_a_seed_beyond_64_bits_is_refused(home, tmp_path):
    base = ["finetune", tmp_path / "run", *source(home), *SHORT]
    message = told(sylva(*base, "--seed", 10**20, code=2))
    assert "`--seed` must be below 2**63" in message
