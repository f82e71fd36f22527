"""Scoring that was interrupted goes on to the same scores, bit for bit."""

from __future__ import annotations

import itertools
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sylva_train._artifacts import read_tensors
from sylva_train._checks import AdapterError, ConfigError
from sylva_train._files import atomic_write
from sylva_train.curvature.hooks import Collector
from sylva_train.importance import score
from tests.sylva_train.models import make_model
from tests.sylva_train.test_passes import (
    assert_same,
    config,
    data,
    smallest_budget,
)

ROOT = Path(__file__).parents[2]


def stop_after(count):
    """Progress that stops the scoring after so many batches."""
    told = []

    def progress(*_):
        told.append(1)
        if len(told) == count:
            raise InterruptedError

    return progress


def resumed(name, folder, options, stop, minutes=0.0):
    """Stop after some batches, then go on as a new process would; batches run then."""
    with pytest.raises(InterruptedError):
        score(
            make_model(name), data(name), options, checkpoint=folder,
            checkpoint_minutes=minutes, progress=stop_after(stop),
        )  # fmt: skip
    ran = []

    def loss(model, batch):
        ran.append(batch)
        return model(**batch).loss

    scores = score(
        make_model(name), data(name), options, checkpoint=folder,
        checkpoint_minutes=minutes, loss=loss,
    )  # fmt: skip
    return scores, len(ran)


@pytest.mark.filterwarnings("ignore:.*not positive")
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("curvature", ["mlr", "hodlr", "dense"])
def test_stopped_in_a_pass(curvature, stop, tmp_path):
    options = config(curvature=curvature)
    whole = score(make_model("llama"), data("llama"), options)
    scores, ran = resumed("llama", tmp_path, options, stop)
    assert_same(whole, scores)
    assert scores.metadata == whole.metadata
    assert ran == 3 - stop


INDEFINITE = {"curvature": "hodlr", "damping": 1e-3}


@pytest.mark.filterwarnings("ignore:.*not positive")
@pytest.mark.parametrize(("stop", "kind"), [(3, {}), (4, {}), (13, INDEFINITE)])
def test_stopped_between_passes_or_in_a_later_one(stop, kind, tmp_path):
    options = config(**kind, memory_budget=smallest_budget("llama", config(**kind)))
    whole = score(make_model("llama"), data("llama"), config(**kind))
    scores, _ = resumed("llama", tmp_path, options, stop)
    assert_same(whole, scores)
    assert scores.metadata == whole.metadata
    assert bool(scores.metadata["indefinite"]) == bool(kind)


def test_a_later_pass_does_not_repeat_the_ones_before(tmp_path):
    options = config(memory_budget=smallest_budget("llama", config()))
    calls = []
    score(
        make_model("llama"), data("llama"), options, progress=lambda *a: calls.append(a)
    )
    # Stopped a batch before the end: one look at shared inputs and that batch are left.
    _, ran = resumed("llama", tmp_path, options, len(calls) - 1)
    assert ran <= 2


def test_a_pass_does_not_read_the_sums_of_the_one_before(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("sylva_train.curvature.state.read_tensors", read.append)
    options = config(memory_budget=smallest_budget("llama", config()))
    score(
        make_model("llama"), data("llama"), options, checkpoint=tmp_path,
        checkpoint_minutes=0.0,
    )  # fmt: skip
    assert not read


@pytest.mark.parametrize("rule", ["gradient", "fisher-diag", "kfac-pruner"])
def test_other_rules_go_on_as_well(rule, tmp_path):
    options = config(importance=rule)
    whole = score(make_model(), data("bert"), options)
    assert_same(whole, resumed("bert", tmp_path, options, 2)[0])


def test_sums_go_on_in_memory_that_is_aligned_as_before(tmp_path, monkeypatch):
    # Products of numbers where a file's header ends differed from the others in a bit.
    def read(*args):
        tensors, header = read_tensors(*args)
        for name, tensor in tensors.items():
            bytes_ = torch.empty(tensor.nbytes + 72, dtype=torch.uint8)
            start = -bytes_.data_ptr() % 64 + 8
            odd = bytes_[start : start + tensor.nbytes].view(tensor.dtype)
            tensors[name] = odd.view(tensor.shape).copy_(tensor)
        return tensors, header

    found = []
    start = Collector.start

    def look(self, *args, **options):
        for sums in self.sums.values():
            found.extend(x.data_ptr() % 64 for x in (sums.gradient, sums.G.sum))
        start(self, *args, **options)

    monkeypatch.setattr("sylva_train.curvature.state.read_tensors", read)
    monkeypatch.setattr(Collector, "start", look)
    resumed("llama", tmp_path, config(curvature="dense"), 2)
    assert found
    assert set(found) == {0}


def test_sums_are_taken_away_once_all_is_scored(tmp_path):
    resumed("bert", tmp_path, config(), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize(("seconds", "left"), [(29.9, 3), (30.0, 1)])
def test_sums_are_saved_once_a_minute_is_over(seconds, left, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=itertools.count(0, seconds).__next__)
    monkeypatch.setattr("sylva_train.curvature.state.time", clock)
    _, ran = resumed("bert", tmp_path, config(), 2, minutes=1.0)
    assert ran == left


def test_what_a_killed_process_was_writing_goes(tmp_path):
    killed = atomic_write(tmp_path / "sums-0.safetensors")
    # safetensors writes to a file of another name first.
    left = killed.__enter__().with_name("another")
    left.write_bytes(b"")
    score(make_model(), data("bert"), config(), checkpoint=tmp_path)
    assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_finished_scoring_is_read_back(tmp_path):
    options = config()
    whole = score(make_model(), data("bert"), options, checkpoint=tmp_path)

    def loss(*_):
        raise AssertionError

    again = score(make_model(), data("bert"), options, checkpoint=tmp_path, loss=loss)
    assert_same(whole, again)
    assert again.metadata == whole.metadata


@pytest.mark.parametrize("change", ["rank", "samples", "model", "data", "layers"])
def test_scoring_with_other_settings_does_not_go_on(change, tmp_path):
    with pytest.raises(InterruptedError):
        score(
            make_model(), data("bert"), config(), checkpoint=tmp_path,
            checkpoint_minutes=0.0, progress=stop_after(2),
        )  # fmt: skip
    model, batches, options = make_model(), data("bert"), {}
    if change == "model":
        model.classifier.weight.data.mul_(2)  # a new head has other gradients
    elif change == "data":
        batches[0]["labels"] = batches[0]["labels"].flip(0)
    else:
        options = {"rank": 2} if change == "rank" else {"samples": 7}
        options = {"target_modules": ["query"]} if change == "layers" else options
    words = "other batches" if change == "data" else change
    with pytest.raises(ConfigError, match=words):
        score(
            model, batches, config(**options), checkpoint=tmp_path,
            checkpoint_minutes=0.0,
        )  # fmt: skip


def test_another_budget_may_go_on(tmp_path):
    options = config(memory_budget=smallest_budget("llama", config()))
    with pytest.raises(InterruptedError):
        score(
            make_model("llama"), data("llama"), options, checkpoint=tmp_path,
            checkpoint_minutes=0.0, progress=stop_after(5),
        )  # fmt: skip
    scores = score(make_model("llama"), data("llama"), config(), checkpoint=tmp_path)
    assert_same(score(make_model("llama"), data("llama"), config()), scores)


def test_damaged_sums_are_refused(tmp_path):
    with pytest.raises(InterruptedError):
        score(
            make_model(), data("bert"), config(), checkpoint=tmp_path,
            checkpoint_minutes=0.0, progress=stop_after(2),
        )  # fmt: skip
    path = tmp_path / "sums-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="changed"):
        score(make_model(), data("bert"), config(), checkpoint=tmp_path)


KILLED = """
import os, signal, sys
from sylva_train._artifacts import save_file
from sylva_train import _artifacts, score
from tests.sylva_train.models import make_model
from tests.sylva_train.test_passes import config, data

saved = []
def dying(tensors, path, metadata):
    saved.append(path)
    save_file(tensors, path, metadata)
    if len(saved) == 2:  # the second file is written, and not yet in its place
        os.kill(os.getpid(), signal.SIGKILL)

_artifacts.save_file = dying
score(make_model(), data("bert"), config(), checkpoint=sys.argv[1], checkpoint_minutes=0.0)
"""


def test_killed_while_it_saved(tmp_path):
    folder = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    ran = []

    def loss(model, batch):
        ran.append(1)
        return model(**batch).loss

    scores = score(make_model(), data("bert"), config(), checkpoint=folder, loss=loss)
    assert_same(score(make_model(), data("bert"), config()), scores)
    assert len(ran) == 2
