"""Fixtures that several of the package's test files share."""

from __future__ import annotations

import gc

import peft
import pytest
import torch

from sylva_train.config import SylvaConfig
from sylva_train.training import train
from sylva_train.tuner import save_adapter
from tests.sylva_train.jobs import SHORT, SMALL, new_home, run_here, source, sylva
from tests.sylva_train.models import (
    logits,
    make_batch,
    make_model,
    make_trained,
    random_masks,
    train_step,
)
from tests.sylva_train.results import METHODS, fake_results
from tests.sylva_train.toy import CONFIG, ToyLoader, toy_model, weights


# Session scope, since hypothesis runs many examples with one fixture.
@pytest.fixture(
    scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def triton_device(request):
    """Where Triton's kernels run: compiled on a GPU, or interpreted on the CPU."""
    triton = pytest.importorskip("triton")
    if request.param == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is for machines without a GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained BERT adapter's folder and the outputs of the model it came from."""
    path = tmp_path_factory.mktemp("adapter") / "a"
    model = make_trained()
    model.save_pretrained(path)
    return path, logits(model, make_batch())


@pytest.fixture
def pair(tmp_path):
    """A model with adapters ``default`` (blocks of 8) and ``other`` (of 4)."""
    one = make_trained()
    base = make_model()
    config = SylvaConfig(
        masks=random_masks(base, ["query", "pooler.dense"], 0.3, 4, seed=7),
        modules_to_save=["classifier"],
    )
    two = peft.get_peft_model(base, config).eval()
    train_step(two, make_batch(seed=3), steps=2)
    save_adapter(two, tmp_path / "other")
    batch = make_batch()
    expected = {
        None: logits(make_model(), batch),
        "default": logits(one, batch),
        "other": logits(two, batch),
    }
    one.load_adapter(tmp_path / "other", "other")
    return one, expected, tmp_path


@pytest.fixture(scope="module")
def whole():
    """Weights and history of the run without an interruption."""
    model = toy_model()
    result = train(model, ToyLoader(), CONFIG)
    return weights(model), result


@pytest.fixture(scope="module")
def every_method():
    """Results of all methods; not to be changed."""
    return fake_results(tuple(METHODS), seeds=5, steps=120, depth=3)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A small model, data in one file, scores and a finished run; not to be changed."""
    path = new_home(tmp_path_factory)
    sylva("finetune", path / "run", *source(path), *SHORT)
    sylva("score", path / "scores.safetensors", *source(path), *SMALL)
    return path


@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process: their own ones take seconds to start. Keeps them."""
    done = []
    monkeypatch.setattr("sylva_train.comparison.jobs.start", run_here(done))
    return done


@pytest.fixture(scope="module")
def quick_collections():
    """Collections of all that was imported would take most of the time of a run."""
    gc.freeze()
    yield
    gc.unfreeze()
