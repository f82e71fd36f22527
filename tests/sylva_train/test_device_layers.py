"""Embedded layers with Triton's kernels, on a GPU or interpreted, against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sylva_train.layers import accumulating, embed
from sylva_train.optimizer import SparseAdamW
from tests import cuda_like
from tests.sylva_train.models import dense_blocks, error, random, random_masks

#: Of gradients, relative to the dense one: float32 sums, and operands of 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def triton_kernels(triton_device, monkeypatch):
    monkeypatch.setenv("SYLVA_KERNELS", "triton")


def build(device, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(70, 48), nn.Tanh(), nn.Linear(48, 33))
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, seed=seed) / 8
    masks = random_masks(model, ["0", "2"], block_size=16)
    dense = nn.Sequential(nn.Linear(70, 48), nn.Tanh(), nn.Linear(48, 33))
    dense.load_state_dict(model.state_dict())
    embed(model.to(device, dtype), masks)
    return model, dense.to(device, dtype), masks


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def check(model, dense, masks, tolerance):
    for name, values in zip("02", gradients(model), strict=True):
        whole = dense[int(name)].weight.grad.cpu()
        assert values.dtype == torch.float32
        blocks = dense_blocks(whole, masks[name])
        assert error(values.cpu(), blocks, whole) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_are_those_of_the_dense_layer(triton_device, dtype):
    model, dense, masks = build(triton_device, dtype)
    for _ in range(2):  # the second keeps some columns alone
        x = random((2, 20, 70), seed=9).to(triton_device, dtype)
        for each in (model, dense):
            each.zero_grad()
            checkpoint(each, x, use_reentrant=False).square().sum().backward()
        check(model, dense, masks, TOLERANCES[dtype])
        SparseAdamW(model, lr=0.0).step()


def test_gradients_under_autocast(triton_device):
    model, dense, masks = build(triton_device)
    x = random((40, 70), seed=9).to(triton_device)
    for each in (model, dense):
        with torch.autocast(triton_device.type, torch.bfloat16):
            loss = each(x).square().sum()
        loss.backward()
    check(model, dense, masks, TOLERANCES[torch.bfloat16])


def test_gradients_are_added_to_those_that_are_there(triton_device):
    model, dense, masks = build(triton_device)
    kept = []
    for seed in range(3):
        x = random((40, 70), seed=seed).to(triton_device)
        with accumulating():
            loss = model(x).square().sum()
        loss.backward()
        dense(x).square().sum().backward()
        kept.append([g.data_ptr() for g in gradients(model)])
    check(model, dense, masks, TOLERANCES[torch.float32])
    assert kept[0] == kept[1] == kept[2]


def test_compiled_steps_are_the_eager_ones(triton_device):
    if triton_device.type == "cuda" and cuda_like.usable:
        pytest.skip("the stand-in has no compiler")
    backend = "inductor" if triton_device.type == "cuda" else "aot_eager"
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, _, _ = build(triton_device)
        run = torch.compile(model, backend=backend, fullgraph=True)
        optimizer = SparseAdamW(model, lr=0.01)
        for seed in range(3):
            x = random((40, 70), seed=seed).to(triton_device)
            (run if compiled else model)(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_gpu_than_the_current_one():
    model, dense, masks = build(torch.device("cuda:1"))
    x = random((40, 70), seed=9).to("cuda:1")
    for each in (model, dense):
        each(x).square().sum().backward()
    check(model, dense, masks, TOLERANCES[torch.float32])
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    SparseAdamW(model, lr=0.01).step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(bool((a != b).any()) for a, b in zip(before, after, strict=True))
