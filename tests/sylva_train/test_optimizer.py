"""Sparse AdamW against PyTorch's AdamW on the whole weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.layers import embed, embedded_layers
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from sylva_train.targets import weight_view
from tests.sylva_train.models import dense_blocks, make_batch, make_model, random_masks
from tests.sylva_train.pairs import (
    assert_same_blocks,
    loss_of,
    make_pair,
    random,
    train,
)


@settings(max_examples=12)
@given(
    block=st.integers(1, 4),
    seed=st.integers(0, 100),
    accumulate=st.integers(1, 3),
    clip=st.sampled_from([None, 0.05, 10.0]),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    schedule=st.sampled_from([None, "linear", "cosine"]),
    options=st.sampled_from(
        [
            {},
            {"betas": (0.7, 0.9)},
            {"eps": 1e-4},
            {"foreach": False},
            {"amsgrad": True},
            {"fused": True},
        ]
    ),
)
def test_equals_adamw_restricted_to_the_blocks(
    block, seed, accumulate, clip, decay, schedule, options
):
    steps = 8
    curve = {
        None: None,
        "linear": lambda t: min((t + 1) / 3, 1 - t / steps),
        "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps),
    }[schedule]
    model, dense, masks = make_pair(block, seed)
    sparse = SparseAdamW(model, lr=3e-3, weight_decay=decay, **options)
    weights = [p for p in dense.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(weights, lr=3e-3, weight_decay=decay, **options)
    first = train(model, sparse, steps, accumulate, clip, curve)
    second = train(dense, plain, steps, accumulate, clip, curve)
    assert first == second
    assert_same_blocks(model, dense, masks)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 100),
    decay=st.sampled_from([0.01, 0.5]),
    schedule=st.booleans(),
)
def test_decay_towards_the_base_follows_the_formula(seed, decay, schedule):
    curve = (lambda t: 1 / (1 + t)) if schedule else None
    model, dense, masks = make_pair(seed=seed)
    sparse = SparseAdamW(model, lr=0.02, weight_decay=decay, decay_towards="base")
    train(model, sparse, 6, schedule=curve)
    # v -= lr · wd · (v - base), then Adam without decay.
    weights = [p for p in dense.parameters() if p.requires_grad]
    starts = [w.detach().clone() for w in weights]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step in range(6):
        lr = 0.02 * (curve(step) if curve else 1)
        gradients = torch.autograd.grad(loss_of(dense, step), weights)
        with torch.no_grad():
            for w, g, start, (m, v) in zip(
                weights, gradients, starts, moments, strict=True
            ):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                w.sub_(lr * decay * (w - start))
                unbiased = m / (1 - 0.9 ** (step + 1))
                size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                w.sub_(lr * unbiased / size)
    assert_same_blocks(model, dense, masks, tolerance=3e-6)


def test_without_a_gradient_nothing_decays():
    model, _, _ = make_pair()
    values = [p for p in model.parameters() if p.requires_grad]
    before = [v.detach().clone() for v in values]
    for towards in ("zero", "base"):
        SparseAdamW(model, lr=0.1, weight_decay=1.0, decay_towards=towards).step()
    assert all(torch.equal(v, b) for v, b in zip(values, before, strict=True))


def test_a_thousand_tiny_steps_move_a_bfloat16_weight():
    # In bfloat16 one step of 1e-5 leaves a weight near 1 as it was.
    base = nn.Linear(4, 4, bias=False)
    base.weight.data = torch.ones(4, 4)
    reference = copy.deepcopy(base)
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0], [1, 1]]))
    embed(model := nn.Sequential(base.to(torch.bfloat16)), {"0": mask})
    sparse = SparseAdamW(model, lr=1e-5, weight_decay=0.0)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-5, weight_decay=0.0)
    x = torch.ones(1, 4)
    for _ in range(1000):
        for module, optimizer, data in (
            (model, sparse, x.bfloat16()),
            (reference, plain, x),
        ):
            optimizer.zero_grad()
            module(data).float().sum().backward()
            optimizer.step()
    values = model[0].sylva_values["default"].detach()
    expected = dense_blocks(reference.weight.detach(), mask)
    assert float((expected - 1).abs().min()) > 9e-3
    assert float((values - expected).abs().max()) < 1e-5
    shown = dense_blocks(weight_view(model[0].base_layer), mask)
    assert torch.equal(shown, values.bfloat16())
    assert bool((shown < 1).all())


def half_and_whole(dtype, **options):
    """A half-precision model with a head near 1, and the head in float32, with optimizers."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[1].weight.data.fill_(1.0)
    reference = copy.deepcopy(model[1])
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0]]))
    embed(model.to(dtype), {"0": mask}, modules_to_save=["1"])
    sparse = SparseAdamW(model, **options)
    return (
        model,
        sparse,
        reference,
        torch.optim.AdamW(reference.parameters(), **options),
    )


def push(head, optimizer, dtype, steps=1):
    """Take steps that lower all of a head's weights, at gradients that dtypes hold."""
    for step in range(steps):
        gradient = torch.full_like(head.weight, 1 + step % 3, dtype=torch.float32)
        gradient[0] *= -0.5
        head.weight.grad = gradient.to(dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}, {"maximize": True}],
    ids=str,
)
def test_a_thousand_tiny_steps_move_a_half_precision_head(dtype, options):
    # One step of 1e-5 is less than half of the numbers' spacing near 1.
    model, sparse, head, plain = half_and_whole(dtype, lr=1e-5, **options)
    push(model[1], sparse, dtype, 1000)
    push(head, plain, torch.float32, 1000)
    expected = head.weight.detach()
    assert float((expected - 1).abs().min()) > 5e-3
    state = sparse.state[model[1].weight]
    torch.testing.assert_close(state["master"], expected, rtol=0, atol=1e-6)
    assert torch.equal(model[1].weight, state["master"].to(dtype))
    assert all(t.dtype == torch.float32 for t in state.values())


@pytest.mark.parametrize("gradient", [40.0, 3e4])
def test_gradients_in_float16_are_clipped_to_a_norm_beyond_its_numbers(gradient):
    # As a scaler leaves them: the norm's square is beyond 65504, or the norm itself.
    head = nn.Linear(64, 64).half()
    sparse = SparseAdamW(head, lr=1e-3, weight_decay=0, max_grad_norm=1.0)
    for p in head.parameters():
        p.grad = torch.full_like(p, gradient)
    sparse.step()
    # In a first step as much of the clipped gradient as Adam's first moment takes.
    moments = torch.cat(
        [sparse.state[p]["exp_avg"].flatten() for p in head.parameters()]
    )
    assert float(moments.norm()) == pytest.approx(0.1, rel=1e-3)


def test_a_master_follows_what_others_write():
    model, sparse, head, plain = half_and_whole(torch.bfloat16, lr=1e-4)
    push(model[1], sparse, torch.bfloat16, 3)
    push(head, plain, torch.float32, 3)
    with torch.no_grad():
        for layer in (model[1], head):
            layer.weight[:, 1] = 0.25
    push(model[1], sparse, torch.bfloat16, 3)
    push(head, plain, torch.float32, 3)
    master = sparse.state[model[1].weight]["master"]
    torch.testing.assert_close(master, head.weight.detach(), rtol=0, atol=1e-6)


def test_masters_go_on_from_a_saved_state():
    model, sparse, _, _ = half_and_whole(torch.bfloat16, lr=1e-5)
    push(model[1], sparse, torch.bfloat16, 5)
    twin = copy.deepcopy(model)
    resumed = SparseAdamW(twin, lr=1e-5)
    resumed.load_state_dict(copy.deepcopy(sparse.state_dict()))
    states = []
    for each, optimizer in ((model, sparse), (twin, resumed)):
        push(each[1], optimizer, torch.bfloat16, 5)
        states.append(optimizer.state[each[1].weight])
    for name in ("master", "exp_avg", "exp_avg_sq", "step"):
        assert states[0][name].dtype == torch.float32
        assert torch.equal(states[0][name], states[1][name])


def test_pytorch_s_adamw_goes_on_from_a_state_with_masters_and_back():
    model, sparse, _, _ = half_and_whole(torch.bfloat16, lr=1e-3)
    push(model[1], sparse, torch.bfloat16, 3)
    matrices = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW([{"params": matrices}], lr=1e-3)
    plain.load_state_dict(copy.deepcopy(sparse.state_dict()))
    push(model[1], plain, torch.bfloat16, 3)
    moved = model[1].weight.detach().clone()
    sparse.load_state_dict(copy.deepcopy(plain.state_dict()))
    push(model[1], sparse, torch.bfloat16)
    # From where PyTorch left it, not from the old master.
    assert float((model[1].weight.detach() - moved).abs().max()) < 5e-3
    assert float(sparse.state[model[1].weight]["step"]) == 7


def test_state_exists_for_active_blocks_and_head_alone():
    model = make_model("bert")
    masks = random_masks(model)
    embed(model, masks, modules_to_save=["classifier"])
    optimizer = SparseAdamW(model, lr=1e-3)
    model(**make_batch("bert")).loss.backward()
    optimizer.step()
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) == trainable
    kept = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    b = 8
    blocks = sum(len(mask) for mask in masks.values()) * b * b
    assert kept == blocks + sum(p.numel() for p in model.classifier.parameters())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_vectors_are_not_decayed_unless_asked_for():
    model = make_model("bert")
    embed(model, random_masks(model), modules_to_save=["classifier"])
    groups = SparseAdamW(model, weight_decay=0.2).param_groups
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0]
    assert groups[1]["params"] == [model.classifier.bias]
    everything = [p for p in model.parameters() if p.requires_grad]
    groups = SparseAdamW(model, everything, weight_decay=0.2).param_groups
    assert [g["weight_decay"] for g in groups] == [0.2]


def test_groups_may_have_rates_of_their_own():
    model, _, _ = make_pair()
    first, second = (p for p in model.parameters() if p.requires_grad)
    before = first.detach().clone(), second.detach().clone()
    groups = [{"params": [first], "lr": 0.0}, {"params": [second]}]
    optimizer = SparseAdamW(model, groups, lr=0.1)
    train(model, optimizer, 2)
    assert torch.equal(first, before[0])
    assert not torch.equal(second, before[1])


def test_training_goes_on_from_a_saved_state():
    model, _, _ = make_pair()
    optimizer = SparseAdamW(model, lr=0.01)
    train(model, optimizer, 4)
    twin = copy.deepcopy(model)
    resumed = SparseAdamW(twin, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, opt in ((model, optimizer), (twin, resumed)):
        train(each, opt, 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def turned(tensor):
    """The same numbers, in memory in another order."""
    return tensor.mT.contiguous().mT


def test_strides_do_not_matter():
    model, _, _ = make_pair()
    twin = copy.deepcopy(model)
    plain, other = (SparseAdamW(m, lr=0.01) for m in (model, twin))
    train(model, plain, 3)
    train(twin, other, 3)
    saved = copy.deepcopy(other.state_dict())
    for state in saved["state"].values():
        state |= {name: turned(state[name]) for name in ("exp_avg", "exp_avg_sq")}
    other.load_state_dict(saved)
    for each, optimizer in ((model, plain), (twin, other)):
        loss_of(each, 3).backward()
        if each is twin:
            for parameter in optimizer.state:
                parameter.grad = turned(parameter.grad)
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_may_have_gaps_in_memory():
    model, _, _ = make_pair()
    memory = random((6, 4))
    before = memory.clone()
    model.extra = nn.Parameter(memory[:, :2])
    optimizer = SparseAdamW(model, lr=0.1, weight_decay=0.0)
    model.extra.square().sum().backward()
    optimizer.step()
    moved = before[:, :2] - 0.1 * before[:, :2].sign()
    assert torch.equal(memory[:, 2:], before[:, 2:])
    torch.testing.assert_close(memory[:, :2], moved, rtol=0, atol=1e-6)


def test_a_closure_is_evaluated_once():
    model, _, _ = make_pair()
    optimizer = SparseAdamW(model, lr=0.01)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure).detach()
    assert torch.equal(loss, loss_of(make_pair()[0], 0).detach())
    assert calls == [True]


def test_a_step_that_the_scaler_skips_changes_nothing():
    model, _, _ = make_pair()
    optimizer = SparseAdamW(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, 0)).backward()
    next(p for p in model.parameters() if p.requires_grad).grad[0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)
    )
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    after = zip(model.parameters(), before, strict=True)
    assert not all(torch.equal(a, b) for a, b in after)


def test_blocks_over_the_edge_stay_zero_outside():
    model, _, masks = make_pair(block=4)
    train(model, SparseAdamW(model, lr=0.1, weight_decay=0.5), 5)
    for name, layer in embedded_layers(model).items():
        inside = dense_blocks(
            torch.ones(masks[name].shape, dtype=torch.bool), masks[name]
        )
        values = layer.sylva_values["default"]
        assert not values[~inside].any()
        assert bool((values[inside] != 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_follow_their_float32_masters(dtype):
    model, _, masks = make_pair(dtype=dtype)
    optimizer = SparseAdamW(model, lr=1e-2)
    for step in range(3):
        loss_of(model, step, dtype).backward()
        optimizer.step()
    for name, layer in embedded_layers(model).items():
        values = layer.sylva_values["default"]
        assert values.dtype == torch.float32
        shown = dense_blocks(weight_view(layer.base_layer), masks[name])
        assert torch.equal(shown, values.detach().to(dtype))


def test_what_cannot_be_trained_is_said():
    model, _, _ = make_pair()
    with pytest.raises(ConfigError, match="`decay_towards`"):
        SparseAdamW(model, decay_towards="origin")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires a gradient"):
        SparseAdamW(model)
