"""What a GPU is spared and must not meet, on a stand-in for one: no waiting, no mixing."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sylva_train import load_adapter, merge, save_adapter, unload
from sylva_train._torch import on_device
from sylva_train.comparison import PeakMemory
from sylva_train.config import SylvaConfig, TrainingConfig
from sylva_train.curvature import collect_curvature, factors
from sylva_train.importance import score
from sylva_train.kernels import dispatch
from sylva_train.layers import embed
from sylva_train.optimizer import SparseAdamW
from sylva_train.reproduce import timing
from sylva_train.selection import select
from sylva_train.training import train
from tests import cuda_like
from tests.sylva_train.models import (
    logits,
    make_batch,
    make_model,
    random,
    random_masks,
)
from tests.sylva_train.toy import ToyLoader, toy_model

pytestmark = pytest.mark.skipif(not cuda_like.usable, reason="no stand-in for CUDA")


@pytest.fixture
def waits():
    with cuda_like.installed() as seen:
        yield seen


def build(device, **options):
    """Two layers with ragged edges and a bfloat16 head, on another device than the current."""
    layers = nn.Linear(70, 48), nn.GELU(), nn.Linear(48, 33), nn.Linear(33, 4)
    model = nn.Sequential(*layers)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, seed=seed) / 8
    model[3].bfloat16()
    masks = random_masks(model, ["0", "2"], block_size=16)
    embed(model.to(device), masks, modules_to_save=["3"])
    return model, SparseAdamW(model, lr=0.01, **options)


def test_the_host_waits_for_what_it_is_to_read(waits):
    x = torch.ones(3, device="cuda")
    waits.clear()
    on_device({"x": x, "parts": [x]}, torch.device("cpu"))
    assert waits.total() == 2


def test_a_peak_can_be_forgotten_before_the_first_tensor(monkeypatch, waits):
    calls = []
    for name in ("init", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    PeakMemory(torch.device("cuda:0")).reset()
    assert calls == ["init", "reset_peak_memory_stats"]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("torch", {}),
        ("torch", {"decay_towards": "base", "max_grad_norm": 1.0}),
        ("triton", {"moments": "8bit", "max_grad_norm": 1.0}),
    ],
    ids=["torch", "torch-clip", "triton"],
)
def test_the_host_waits_for_no_step(monkeypatch, waits, mode, options):
    if mode == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(dispatch, "find_problem", lambda *_: None)
    monkeypatch.setenv("SYLVA_KERNELS", mode)
    model, optimizer = build("cuda:1", **options)
    x = random((8, 70), seed=9).to("cuda:1")
    before = [p.detach().cpu() for p in model.parameters()]
    for _ in range(4):
        waits.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not waits
    after = [p.detach().cpu() for p in model.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [p.requires_grad or p.dim() == 2 for p in model.parameters()]


class Classifier(nn.Module):
    """Three layers, the last of which may be on another device."""

    def __init__(self, devices):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(24, 24, device=device) for device in devices
        )
        self.devices = devices

    def forward(self, x, labels):
        for layer, device in zip(self.layers, self.devices, strict=True):
            x = torch.tanh(layer(x.to(device)))
        loss = nn.functional.cross_entropy(x, labels.to(x.device))
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("last", ["cuda:0", "cuda:1"])
def test_scoring_waits_a_few_times_for_each_layer_and_batch(waits, last):
    torch.manual_seed(0)
    model = Classifier(["cuda:0", "cuda:0", last])
    samples = [{"x": torch.randn(24), "labels": torch.tensor(i)} for i in range(24)]
    options = SylvaConfig(block_size=8, exact_below=4096)
    score(model, DataLoader(samples[:6], 6), options)
    once = waits.total()
    waits.clear()
    score(model, DataLoader(samples, 6), options)
    # whether all numbers are finite, and how many rows are no padding; the loss
    each = (waits.total() - once) / 3
    assert each <= 2 * len(model.layers) + 3, waits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("waits")
def test_products_are_summed_of_16_bits_as_they_are(monkeypatch, dtype):
    monkeypatch.setattr(factors, "LARGEST_PART", 1 << 10)
    shapes, mm = [], torch.mm

    def watched(a, b, **options):
        if a.is_cuda:
            shapes.append(a.shape)
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", watched)
    batch = {"x": random((2, 9, 24), seed=0), "labels": torch.tensor([1, 0])}

    def statistics(device):
        layer = nn.Linear(24, 300, bias=False)
        layer.weight.data = random((300, 24), seed=1)
        model = nn.Sequential(layer).to(device, dtype)

        def loss(model, batch):
            return model(batch["x"].to(dtype)).float().square().mean()

        wanted = ["gradient", "factors"]
        found = collect_curvature(
            model, {"0": layer}, [batch], SylvaConfig(), wanted, loss=loss
        )["0"]
        return [x.cpu() for x in (found.gradient, found.G.matrix, found.A.matrix)]

    expected = statistics("cpu")
    assert not shapes
    found = statistics("cuda:1")
    rows = [128, 128, 44]  # of the gradient and of G
    assert [tuple(shape) for shape in shapes] == [(n, 18) for n in [*rows, *rows, 24]]
    assert {x.dtype for x in found} == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("waits")
def test_an_adapter_is_made_kept_and_taken_out_on_another_device(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVA_KERNELS", "torch")
    device = "cuda:1"
    model, batch = make_model().to(device), make_batch()
    there = {name: tensor.to(device) for name, tensor in batch.items()}
    scores = score(model, [batch, make_batch(seed=1)], SylvaConfig(block_size=4))
    embed(model, select(scores, 0.2, 4))
    optimizer = SparseAdamW(model, lr=1.0)
    for _ in range(2):
        model(**there).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, base = logits(model, there).cpu(), logits(make_model(), batch)
    assert not torch.allclose(trained, base, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(make_model().to(device), tmp_path / "adapter")
    moved = copy.deepcopy(loaded).to("cuda:0")
    first = {name: tensor.to("cuda:0") for name, tensor in batch.items()}

    def is_near(model, inputs, wanted):
        return torch.allclose(logits(model, inputs).cpu(), wanted, atol=1e-5)

    assert is_near(loaded, there, trained)
    assert is_near(merge(copy.deepcopy(loaded)), there, trained)
    assert is_near(unload(loaded), there, base)
    assert is_near(moved, first, trained)
    assert is_near(moved.to("cpu"), batch, trained)


@pytest.mark.usefixtures("waits")
def test_training_takes_place_on_its_device(monkeypatch):
    monkeypatch.setenv("SYLVA_KERNELS", "torch")
    config = TrainingConfig(steps=2, device="cuda:1", lr=0.01)
    model, twin = toy_model(dropout=0.0), toy_model(dropout=0.0)
    result = train(model, ToyLoader(), config)
    assert {p.device for p in model.parameters()} == {torch.device("cuda:1")}
    expected = train(twin, ToyLoader(), dataclasses.replace(config, device="cpu"))
    losses = [[row["loss"] for row in r.history] for r in (result, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("waits")
def test_time_is_taken_on_the_device_that_computes():
    assert timing.mark(torch.device("cuda:1")).device == torch.device("cuda:1")
