"""Commands and training in two processes do what one process does."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sylva_train.checkpoint import checkpoints
from sylva_train.config import TrainingConfig
from sylva_train.importance import Scores
from sylva_train.training import train
from tests.sylva_train.jobs import contents, source, sylva

pytestmark = pytest.mark.slow

EXACT = ["--importance", "kfac-natural", "--block-size", 8, "--samples", 12]
STEPS = ["--steps", 6, "--batch-size", 5, "--lr", 0.01, "--accumulate", 2]
OPTIONS = [*EXACT, *STEPS, "--density", 0.2]


def start(*arguments, processes=2):
    """Start a command of ``sylva`` in several processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", processes, "--no-python"]
    run += [sys.executable, "-c", "from sylva_command import main; main()"]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [str(word) for word in (*run, *arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def torchrun(*arguments, fails=False):
    """Run one to its end, and return what is printed."""
    process = start(*arguments)
    try:
        told = process.communicate(timeout=240)[0]
    finally:
        process.terminate()
    assert bool(process.returncode) == fails, told
    return told


def trained(folder):
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def test_two_processes_fine_tune_as_one_does(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    config = tmp_path / "home" / "model" / "config.json"
    # What dropout draws differs from process to process.
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | calm))
    runs = one, two = tmp_path / "one", tmp_path / "two"
    sylva("finetune", one, *source(tmp_path / "home"), *OPTIONS)
    told = torchrun("finetune", two, *source(tmp_path / "home"), *OPTIONS)
    assert told.count("examples to train on") == told.count("sylva evaluate") == 1, told
    assert not (two / "checkpoints").exists()

    scores = [Scores.load(run / "scores.safetensors") for run in runs]
    for name, layer in scores[0].items():
        a, b = layer.blocks(8), scores[1][name].blocks(8)
        # Each adds up batches of its own, which rounds in another order.
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-3 * float(a.abs().max())), name
    records = [json.loads((run / "sylva.json").read_text()) for run in runs]
    for alone, both in zip(*(record["history"] for record in records), strict=True):
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    values, others = trained(one), trained(two)
    assert values.keys() == others.keys()
    for name in values:
        # Adam's first steps have the rate's size, whatever that of the gradient.
        assert torch.allclose(values[name], others[name], rtol=1e-3, atol=1e-4), name


def test_an_interrupted_run_of_two_goes_on_to_the_same_weights(home, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    torchrun("finetune", whole, *source(home), *OPTIONS)
    options = ["finetune", folder, *source(home), *OPTIONS, "--save-every", 1]
    process, end = start(*options), time.monotonic() + 240
    while max(checkpoints(folder / "checkpoints"), default=0) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)  # which torchrun passes on
    process.communicate(timeout=60)
    finished = json.loads((folder / "sylva.json").read_text())["finished"]
    told = torchrun(*options, "--resume")
    assert finished or "Going on after step" in told
    for name, values in trained(whole).items():
        assert torch.equal(values, trained(folder)[name]), name


def test_two_processes_score_into_one_file(home, tmp_path):
    file = tmp_path / "scores.safetensors"
    told = torchrun("score", file, *source(home), *EXACT)
    assert told.count("sylva finetune") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    before = contents(tmp_path)
    told = torchrun("score", file, *source(home), *EXACT, fails=True)
    assert "already" in told or "exists" in told, told
    assert contents(tmp_path) == before


class Batches:
    """Some samples of three features, of two classes."""

    def __init__(self, count=5, shift=0.0, nan=None, labelled=True):
        self.x = torch.arange(3.0 * count).reshape(count, 3) / 10 + shift
        if nan is not None:
            self.x[nan] = torch.nan
        self.labels = torch.arange(count)[:, None] % 2
        if not labelled:
            self.labels.fill_(-100)

    def __len__(self):
        return 1

    def epoch(self, *_, **__):
        yield {"x": self.x, "labels": self.labels}


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"][:, 0])


def little_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return model.append(nn.ParameterDict({"unused": nn.Parameter(torch.ones(2))}))


class WithoutTheLast(nn.Sequential):
    """Does not run what holds a parameter that nothing uses."""

    def forward(self, x):
        for module in list(self)[:-1]:
            x = module(x)
        return x


def attempt(rank, case):
    """Train in one of the processes; what came of it."""
    model = WithoutTheLast(*little_model())
    if case != "dropout":
        model[1] = nn.Identity()
    batches = Batches(count=2 if case == "few" else 5)
    if case == "other batches":
        batches = Batches(shift=float(rank))
    if case == "nan":
        batches = Batches(nan=1)  # of process 1 alone
    if case == "unlabelled":
        batches = Batches(labelled=False)
    if case == "wrapped":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    config = TrainingConfig(steps=3, lr=0.1, device="cpu", weight_decay=0.5)
    try:
        result = train(model, batches, config, loss=cross_entropy, progress=False)
    except Exception as error:  # noqa: BLE001 - what it is, is tested
        return f"{type(error).__name__}: {error}"
    return {
        "loss": [step["loss"] for step in result.history],
        "weights": [p.detach() for p in model.parameters()],
    }


def work(rank, size, folder):
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=size)
    cases = ("alike", "few", "dropout", "other batches", "nan", "unlabelled", "wrapped")
    torch.save({case: attempt(rank, case) for case in cases}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three processes found."""
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(work, (3, folder), nprocs=3)
    return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("case", ["alike", "few"])
def test_samples_are_shared_out_and_gradients_added_up(ranks, case):
    alone, found = attempt(0, case), ranks[0][case]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for ours, theirs in zip(found["weights"], alone["weights"], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # Weight decay leaves alone what has no gradient.
    assert torch.equal(found["weights"][-1], torch.ones(2))


@pytest.mark.parametrize("case", ["alike", "few", "dropout"])
def test_processes_hold_the_same_weights_to_the_bit(ranks, case):
    for found in ranks[1:]:
        pairs = zip(found[case]["weights"], ranks[0][case]["weights"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_fails_in_one_process_fails_in_all(ranks):
    for found in ranks:
        assert "the loss is nan in step 1" in found["nan"]
        assert "the loss is nan in step 1" in found["unlabelled"]
        assert "other batches than process 0" in found["other batches"]
        assert "must be the bare one" in found["wrapped"]
