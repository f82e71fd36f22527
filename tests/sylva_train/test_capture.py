"""What CUDA graphs need of the host, and a whole training step in one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import ConfigError
from sylva_train.kernels import Mirror, block_sddmm, capture
from sylva_train.layers import embed, embedded_layers, shown
from sylva_train.optimizer import SparseAdamW
from tests.sylva_train.models import random, random_masks

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """Say what `is_capturing` is to answer."""

    def answer(yes):
        monkeypatch.setattr(capture, "is_capturing", lambda _: yes)

    return answer


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_numbers_are_exact_and_uploaded_when_they_change(capturing, dtype):
    numbers = [2**47 + 1, 0, -3] if dtype == torch.int64 else [1e-300, 0.1, -3.5]
    mirror = Mirror((3,), dtype, CPU)
    mirror.update(numbers)
    assert mirror.tensor.tolist() == numbers
    mirror.tensor.zero_()
    mirror.update(numbers)  # they did not change
    assert mirror.tensor.tolist() == [0, 0, 0]
    mirror.update(numbers[::-1])
    assert mirror.tensor.tolist() == numbers[::-1]
    capturing(True)
    mirror.update(numbers)
    assert mirror.tensor.tolist() == numbers
    capturing(False)
    mirror.tensor.zero_()  # stands for a replay, which writes what it knows
    mirror.update(numbers)
    assert mirror.tensor.tolist() == numbers


def test_nothing_is_worked_out_for_the_first_time_in_a_graph(capturing):
    indices = torch.tensor([[0, 0], [1, 1]])
    x = torch.ones(4, 32)
    capturing(True)
    with pytest.raises(ConfigError, match="rows and columns are found"):
        block_sddmm(x, x, indices, 16)
    capturing(False)
    expected = block_sddmm(x, x, indices, 16)
    capturing(True)
    assert torch.equal(block_sddmm(x, x, indices, 16), expected)


def build(device, dtype):
    """Two layers with ragged edges and a head, and their optimizer."""
    layers = nn.Linear(70, 48), nn.GELU(), nn.Linear(48, 33), nn.Linear(33, 33)
    model = nn.Sequential(*layers)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, seed=seed) / 8
    masks = random_masks(model, ["0", "2"], block_size=16)
    embed(model.to(device, dtype), masks, modules_to_save=["3"])
    rate = torch.tensor(0.01, device=device)
    return model, SparseAdamW(model, lr=rate, capturable=True, max_grad_norm=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_step_in_a_graph_is_the_eager_one(monkeypatch, mode, dtype):
    monkeypatch.setenv("SYLVA_KERNELS", mode)
    device = torch.device("cuda")
    inputs = [random((40, 70), seed=s).to(device, dtype) for s in range(6)]
    goals = [random((40, 33), seed=s + 9).to(device) for s in range(6)]
    model, optimizer = build(device, dtype)
    twin, plain = build(device, dtype)
    x, goal = inputs[0].clone(), goals[0].clone()

    def run(model, optimizer, x, goal):
        loss = F.mse_loss(model(x).float(), goal)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            run(model, optimizer, x, goal)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        plain.zero_grad()
        run(twin, plain, x, goal)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(model, optimizer, x, goal)
    for some, wanted in zip(inputs, goals, strict=True):
        x.copy_(some)
        goal.copy_(wanted)
        graph.replay()
        plain.zero_grad()
        loss = run(twin, plain, some, wanted)
        assert torch.allclose(captured, loss, rtol=1e-3)
    for one, other in zip(model[3].parameters(), twin[3].parameters(), strict=True):
        assert float((one - other).detach().abs().mean()) < 1e-3
        states = optimizer.state[one], plain.state[other]
        assert states[0].keys() == states[1].keys()
        assert ("master" in states[0]) == (dtype == torch.bfloat16)
        assert float(states[0]["step"]) == float(states[1]["step"]) == 9
    pairs = zip(
        embedded_layers(model).values(), embedded_layers(twin).values(), strict=True
    )
    for one, other in pairs:
        values = one.sylva_values["default"], other.sylva_values["default"]
        # Steps of 0.01: a bfloat16 weight that is rounded the other way changes a few.
        assert float((values[0] - values[1]).detach().abs().mean()) < 1e-4
        assert torch.equal(one.weight, copy_of(one))


def copy_of(layer):
    """Return the weight after its values were written by force."""
    again = copy.deepcopy(layer)
    again.sync(force=True)
    return again.weight


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels")
def test_an_eager_step_between_replays_uses_its_own_gradients():
    device = torch.device("cuda")
    model, optimizer = build(device, torch.float32)
    twin, plain = build(device, torch.float32)
    ours, theirs = (
        [p for p in m.parameters() if p.requires_grad] for m in (model, twin)
    )

    def give(parameters, seed):
        for i, p in enumerate(parameters):
            p.grad = random(p.shape, seed=seed + i).to(p)

    for parameters, each in ((ours, optimizer), (theirs, plain)):
        give(parameters, 1)
        each.step()
    captured = [p.grad for p in ours]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    mine = [random(p.shape, seed=50 + i).to(p) for i, p in enumerate(ours)]
    for eager in (False, True, False, True):
        for p, g, old in zip(ours, mine, captured, strict=True):
            p.grad = g if eager else old
        for p, q in zip(theirs, ours, strict=True):
            p.grad = q.grad.clone()
        if eager:
            optimizer.step()
        else:
            graph.replay()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        assert float((p - q).detach().abs().max()) < 1e-5


@pytest.fixture
def triton_kernels(monkeypatch):
    monkeypatch.setenv("SYLVA_KERNELS", "triton")


def test_no_graph_waits_to_see_what_a_weight_holds(monkeypatch):
    indices, blocks = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 2)
    assert shown.holds_blocks(torch.zeros(4, 4), indices, blocks)
    monkeypatch.setattr(shown, "is_capturing", lambda _: True)
    assert not shown.holds_blocks(torch.zeros(4, 4), indices, blocks)
