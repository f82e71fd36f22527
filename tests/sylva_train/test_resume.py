"""An interrupted run ends where the whole one does, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from sylva_train._checks import OutputExistsError
from sylva_train.checkpoint import claimed, state
from sylva_train.config import TrainingConfig
from sylva_train.curvature import default_loss
from sylva_train.optimizer import SparseAdamW
from sylva_train.training import train
from tests.sylva_train.jobs import contents
from tests.sylva_train.models import same
from tests.sylva_train.toy import (
    CONFIG,
    HaltError,
    ToyLoader,
    interrupt,
    resume,
    stop_at,
    toy_base,
    toy_model,
    weights,
)


def same_course(first, second):
    keys = ("step", "loss", "lr", "grad_norm")
    return [[r[k] for k in keys] for r in first.history] == [
        [r[k] for k in keys] for r in second.history
    ]


@pytest.mark.parametrize("step", [1, 3, 5, 6, 7, 12])
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, whole, step):
    interrupt(tmp_path, step)
    model, result = resume(tmp_path)
    assert same(weights(model), whole[0])
    assert same_course(result, whole[1])


@pytest.mark.parametrize("every", [None, 3])
def test_an_evaluation_that_fails_loses_no_step(tmp_path, whole, every):
    config = replace(CONFIG, eval_every=every, save_every=3)
    steps = []

    def failing(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        train(toy_model(), ToyLoader(), config, output=tmp_path, evaluate=failing)
    for _ in "ab":  # as it is, and after the end
        model, result = resume(
            tmp_path, config, evaluate=lambda _: {"score": 0.5},
            callbacks=[lambda record: steps.append(record["step"])],
        )  # fmt: skip
        assert same(weights(model), whole[0])
        assert result.metrics == {"score": 0.5}
        scored = [r["step"] for r in result.history if "score" in r]
        assert scored == list(range(every or 12, 13, every or 12))
    assert steps == list(range(4, 13) if every else [])


def test_two_runs_do_not_share_a_folder(tmp_path, whole):
    interrupt(tmp_path, 5)
    before = contents(tmp_path)
    words = "another process is training"
    with claimed(tmp_path), pytest.raises(OutputExistsError, match=words):
        resume(tmp_path)
    assert contents(tmp_path) == before
    assert same(weights(resume(tmp_path)[0]), whole[0])


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_number_of_interruptions_changes_nothing(tmp_path_factory, data):
    config = TrainingConfig(
        lr=1e-2,
        epochs=3,
        accumulate=data.draw(st.integers(1, 4)),
        save_every=data.draw(st.none() | st.integers(1, 9)),
    )
    model = toy_model()
    total = train(model, ToyLoader(), config).steps
    folder = tmp_path_factory.mktemp("run")
    for step in sorted(data.draw(st.lists(st.integers(1, total), max_size=3))):
        try:
            resume(folder, config, callbacks=[stop_at(step)])
        except HaltError:
            continue
    assert same(weights(resume(folder, config)[0]), weights(model))


def test_the_same_model_goes_on_after_an_interruption(tmp_path, whole):
    model = toy_model()
    interrupt(tmp_path, 5, model=model)
    resume(tmp_path, model=model)
    assert same(weights(model), whole[0])


def test_a_head_drawn_at_random_is_part_of_the_first_checkpoint(tmp_path, whole):
    interrupt(tmp_path, 1)
    model = toy_model()
    torch.nn.init.normal_(model.classifier.weight)
    assert same(weights(resume(tmp_path, model=model)[0]), whole[0])


def test_adapters_of_peft_go_on_from_another_random_start(tmp_path):
    def build(seed):
        config = LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier"]
        )
        model = toy_base()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight)
        return get_peft_model(model, config)

    def trained(model):
        return {name: p for name, p in weights(model).items() if "original" not in name}

    first, second = build(1), build(2)
    train(first, ToyLoader(), CONFIG)
    interrupt(tmp_path, 8, model=build(1))
    resume(tmp_path, model=second)
    assert same(trained(first), trained(second))


def test_a_finished_run_has_nothing_left_to_do(tmp_path, whole):
    of_groups = {"groups": {"law": 0.25, "history": 0.75}}
    metrics = {"accuracy": 0.5, "logits": np.ones(3), "each": {"x": np.ones(3)}}
    metrics |= of_groups
    train(toy_model(), ToyLoader(), CONFIG, output=tmp_path, evaluate=lambda _: metrics)
    model, result = resume(tmp_path, callbacks=[stop_at(1)], evaluate=lambda _: 0.25)
    assert same(weights(model), whole[0])
    assert result.metrics == {"accuracy": 0.5} | of_groups
    assert len(result.history) == 12


def test_resuming_in_an_empty_folder_starts(tmp_path, whole):
    assert same(weights(resume(tmp_path / "new")[0]), whole[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("Adagrad", {}),
        ("Adafactor", {}),
        ("RMSprop", {"centered": True, "momentum": 0.5}),
        ("NAdam", {}),
        ("Rprop", {}),
        ("ASGD", {}),
        ("AdamW", {"foreach": False, "capturable": False}),
    ],
)
def test_the_state_of_any_optimizer_is_kept(tmp_path, name, options):
    def build():
        model = toy_model()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = getattr(torch.optim, name)(trained, **({"lr": 1e-2} | options))
        return {"model": model, "optimizer": optimizer}

    first, second = build(), build()
    train(loader=ToyLoader(), config=CONFIG, **first)
    interrupt(tmp_path, 7, **build())
    resume(tmp_path, **second)
    assert same(weights(first["model"]), weights(second["model"]))


def test_the_state_of_a_scheduler_that_is_passed_in_is_kept(tmp_path):
    def build():
        model = toy_model()
        optimizer = SparseAdamW(model, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=13)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    first, second = build(), build()
    train(loader=ToyLoader(), config=CONFIG, **first)
    interrupt(tmp_path, 7, **build())
    resume(tmp_path, **second)
    assert same(weights(first["model"]), weights(second["model"]))


def test_every_random_generator_goes_on(tmp_path):
    def loss(model, batch):
        weight = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return default_loss(model, batch) * weight

    model = toy_model()
    train(model, ToyLoader(), CONFIG, loss=loss)
    interrupt(tmp_path, 8, loss=loss)
    assert same(weights(resume(tmp_path, loss=loss)[0]), weights(model))


def test_running_statistics_are_kept(tmp_path):
    def build():
        model = toy_base()
        torch.manual_seed(0)
        model.classifier = torch.nn.Sequential(
            torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2)
        )
        return model

    first, second = build(), build()
    train(first, ToyLoader(), CONFIG)
    interrupt(tmp_path, 8, model=build())
    resume(tmp_path, model=second)
    assert same(weights(first), weights(second))
    assert torch.equal(
        first.classifier[0].running_var, second.classifier[0].running_var
    )


def test_float32_moments_of_bfloat16_parameters_keep_their_bits():
    def build():
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        return torch.optim.Adam([parameter])

    first, second = build(), build()
    (parameter,) = first.param_groups[0]["params"]
    exact = torch.tensor([1.0, 2.0, 3.0]) / 3
    first.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": exact}
    saved = first.state_dict()
    second.load_state_dict(saved)
    state.keep_dtypes(second, saved)
    (loaded,) = second.state.values()
    assert loaded["exp_avg"].dtype == torch.float32
    assert torch.equal(loaded["exp_avg"], exact)


# -- killed at any moment --------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import torch
from safetensors.torch import load_file, save_file
import sylva_train.checkpoint.files as files
from sylva_train.config import TrainingConfig
from sylva_train.training import train
from tests.sylva_train.models import same
from tests.sylva_train.toy import ToyLoader, toy_model, weights

torch.set_num_threads(1)  # no threads that a fork would lose
folder, seed = sys.argv[1], int(sys.argv[2])
config = TrainingConfig(lr=1e-2, steps=60, save_every=1)

def child(name, fatal_save):
    saves = 0
    def save_half(tensors, path, **options):
        nonlocal saves
        saves += 1
        save_file(tensors, path, **options)
        if saves == fatal_save:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    files.save_file = save_half
    model = toy_model()
    train(model, ToyLoader(), config, output=f"{folder}/{name}", resume=True)
    save_file(weights(model), f"{folder}/{name}.safetensors")

def start(name, fatal_save=0):
    pid = os.fork()
    if pid == 0:
        try:
            child(name, fatal_save)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

assert os.waitpid(start("whole"), 0)[1] == 0
draw = random.Random(seed)
deaths = writing = 0
while True:
    last = deaths >= 8
    in_save = draw.randint(2, 6) if deaths == 0 or draw.random() < 0.3 else 0
    in_save = 0 if last else in_save
    pid = start("killed", in_save)
    if not in_save and not last:
        time.sleep(draw.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    deaths += 1
    writing += in_save > 0
ends = [load_file(f"{folder}/{name}.safetensors") for name in ("whole", "killed")]
print(deaths, writing, same(*ends))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_that_is_killed_again_and_again_ends_where_the_whole_one_does(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "0"],
        capture_output=True, text=True, check=False, timeout=300, cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    deaths, writing, same = done.stdout.split()
    assert int(deaths) >= int(writing) >= 1
    assert same == "True"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_checkpoints_as_they_were(
    tmp_path, monkeypatch, error
):
    from sylva_train.checkpoint import files

    def fail(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    interrupt(tmp_path, 4)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fail)
        with pytest.raises(error):
            resume(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
