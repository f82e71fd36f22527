"""The fused optimizer, on a GPU or interpreted, against PyTorch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch

from sylva_train.kernels import BlockState, adamw
from sylva_train.optimizer import SparseAdamW, fused
from tests.sylva_train.mixed_layers import (
    MODES,
    TOLERANCE,
    assert_weights_show_values,
    dense_weights,
    largest_difference,
    make,
    set_gradients,
    trained,
    twin_of,
)
from tests.sylva_train.models import (
    logits,
    make_batch,
    random,
)

pytest.importorskip("triton")
from sylva_train.kernels import triton_adamw


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("SYLVA_KERNELS", "triton")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, (16, 4, 4)),
        ({"weight_decay": 0.3}, (4, 4, 4)),
        ({"maximize": True, "eps": 1e-3}, (16, 5, 7)),
        ({"betas": (0.0, 0.5), "weight_decay": 0.0}, (16, 16, 16)),
    ],
    ids=["plain", "decay", "maximize", "betas"],
)
def test_is_adamw_on_every_layer(triton_device, options, blocks):
    model, masks = make(triton_device, blocks)
    before = dense_weights(model)
    ours, theirs = trained(model), twin_of(trained(model))
    optimizers = (
        SparseAdamW(model, ours, lr=0.01, **options),
        torch.optim.AdamW(theirs, lr=0.01, **{"weight_decay": 0.01} | options),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in optimizers
    ]
    for step in range(12):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert len(optimizers[0]._kernel.blocks[0].chosen) == 3
    assert largest_difference(ours, theirs) <= TOLERANCE
    for a, b in zip(ours, theirs, strict=True):
        mine, other = optimizers[0].state[a], optimizers[1].state[b]
        assert float(mine["step"]) == float(other["step"]) == 8
        for name in ("exp_avg", "exp_avg_sq"):
            assert largest_difference([mine[name]], [other[name]]) <= TOLERANCE
    assert_weights_show_values(model, masks, before)


@pytest.mark.usefixtures("triton")
def test_groups_and_tensors_as_rates(triton_device):
    model, _ = make(triton_device)
    ours, theirs = trained(model), twin_of(trained(model))

    def groups(parameters, rate):
        first = {"params": parameters[:1], "lr": rate, "weight_decay": 0.5}
        return [first, {"params": parameters[1:], "betas": (0.5, 0.9), "eps": 1e-4}]

    rate = torch.tensor(0.02, device=triton_device)
    optimizers = (
        SparseAdamW(model, groups(ours, rate), lr=0.01),
        torch.optim.AdamW(groups(theirs, 0.02), lr=0.01),
    )
    for step in range(6):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
        rate.mul_(0.5)
        optimizers[1].param_groups[0]["lr"] *= 0.5
    assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_that_of_all_parameters_together(
    triton_device, monkeypatch, mode, limit
):
    monkeypatch.setenv("SYLVA_KERNELS", mode)
    model, _ = make(triton_device)
    ours, theirs = trained(model), twin_of(trained(model))
    sparse = SparseAdamW(model, ours, lr=0.01, eps=0.1, max_grad_norm=limit)
    plain = torch.optim.AdamW(theirs, lr=0.01, eps=0.1)
    for step in range(4):
        set_gradients(ours, step)
        sparse.step()
        set_gradients(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs, limit)
        plain.step()
    assert largest_difference(ours, theirs) <= TOLERANCE
    for parameter in ours:
        parameter.grad = None
    sparse.step()  # nothing to clip


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("limit", [None, 0.5])
def test_gradients_are_unscaled_and_an_infinite_one_skips_the_step(
    triton_device, limit
):
    model, _ = make(triton_device)
    twin = copy.deepcopy(model)
    ours, theirs = trained(model), trained(twin)
    options = {"lr": 0.01, "eps": 0.1, "max_grad_norm": limit}
    scaled = SparseAdamW(model, ours, decay_towards="base", **options)
    plain = SparseAdamW(twin, theirs, decay_towards="base", **options)
    scaled.grad_scale = torch.tensor(1024.0, device=triton_device)
    scaled.found_inf = torch.tensor(0.0, device=triton_device)
    for step in range(3):
        set_gradients(ours, step, scale=1024.0)
        scaled.step()
        set_gradients(theirs, step)
        plain.step()
    assert largest_difference(ours, theirs) <= TOLERANCE
    kept = copy.deepcopy((dense_weights(model), ours, scaled.state_dict()))
    scaled.found_inf.fill_(1.0)
    scaled.step()
    now = dense_weights(model), ours, scaled.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(now[1], kept[1], strict=True))
    assert all(torch.equal(now[0][name], kept[0][name]) for name in now[0])
    for number, state in kept[2]["state"].items():
        assert all(torch.equal(t, now[2]["state"][number][n]) for n, t in state.items())


@pytest.mark.usefixtures("triton")
def test_a_gradient_scaler_steps_without_being_waited_for(triton_device):
    model, _ = make(triton_device)
    optimizer = SparseAdamW(model, lr=0.01)
    scaler = torch.amp.GradScaler(triton_device.type, init_scale=2.0**10)
    before = [p.detach().clone() for p in trained(model)]
    scaler.scale(torch.zeros((), device=triton_device))  # makes its scale
    set_gradients(trained(model), 1, missing=False)
    trained(model)[0].grad[0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert largest_difference(trained(model), before) == 0
    set_gradients(trained(model), 1, missing=False)
    scaler.step(optimizer)
    assert largest_difference(trained(model), before) > 1e-3


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_state_of_either_path_goes_on_in_the_other(
    triton_device, monkeypatch, first, second
):
    def build(mode, lr):
        monkeypatch.setenv("SYLVA_KERNELS", mode)
        model, _ = make(triton_device)
        optimizer = SparseAdamW(model, lr=lr, decay_towards="base", weight_decay=0.2)
        return model, optimizer

    def run(model, optimizer, steps):
        for step in steps:
            set_gradients(trained(model), step)
            optimizer.step()

    whole, optimizer = build("torch", 0.01)
    run(whole, optimizer, range(6))
    model, optimizer = build(first, 0.01)
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(
        s.keys() == {"step", "exp_avg", "exp_avg_sq"} for s in saved["state"].values()
    )
    other, resumed = build(second, 0.5)
    with torch.no_grad():
        for a, b in zip(trained(other), trained(model), strict=True):
            a.copy_(b)
    resumed.load_state_dict(saved)
    run(other, resumed, range(3, 6))
    assert largest_difference(trained(other), trained(whole)) <= TOLERANCE
    plain = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    plain.load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("triton")
def test_tables_are_made_once_and_anew_when_memory_moves(triton_device):
    model, masks = make(triton_device)
    before = dense_weights(model)
    optimizer = SparseAdamW(model, lr=0.01)
    made = []
    for step in range(5):
        set_gradients(trained(model), step)
        optimizer.step()
        made.append(optimizer._kernel.blocks[0])
    assert all(blocks is made[0] for blocks in made)
    model[0].base_layer.weight.data = model[0].base_layer.weight.data.clone()
    set_gradients(trained(model), 9)
    optimizer.step()
    assert optimizer._kernel.blocks[0] is not made[0]
    assert_weights_show_values(model, masks, before)


@pytest.mark.usefixtures("triton")
def test_a_run_that_goes_back_to_a_saved_state_takes_the_same_steps(triton_device):
    model, _ = make(triton_device)
    ours = trained(model)
    optimizer = SparseAdamW(model, ours, lr=0.01)

    def run(steps, turned=False):
        for step in steps:
            set_gradients(ours, step)
            for p in ours[:3]:
                if turned and p.grad is not None:
                    p.grad = p.grad.mT.contiguous().mT
            optimizer.step()
        return [p.detach().clone() for p in ours]

    start = run(range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    first = run(range(2, 4))
    with torch.no_grad():
        for p, old in zip(ours, start, strict=True):
            p.copy_(old)
    optimizer.load_state_dict(saved)
    # Nor does it matter how gradients lie in memory.
    assert largest_difference(run(range(2, 4), turned=True), first) == 0


@pytest.mark.usefixtures("triton")
def test_blocks_of_another_model_join_in_the_middle_of_a_run(triton_device):
    model, _ = make(triton_device)
    other, masks = make(triton_device)
    before, ours, theirs = (
        dense_weights(other),
        trained(other),
        twin_of(trained(other)),
    )
    optimizer = SparseAdamW(model, lr=0.01)
    set_gradients(trained(model), 1)
    optimizer.step()
    optimizer.add_param_group({"params": ours, "lr": 0.02, "weight_decay": 0.3})
    plain = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.3)
    for step in range(2):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        plain.step()
    assert len(optimizer._kernel.blocks[0].chosen) == 6
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert_weights_show_values(other, masks, before)


@pytest.mark.usefixtures("triton")
def test_a_forward_pass_after_a_step_writes_nothing(triton_device):
    model, _ = make(triton_device)
    optimizer = SparseAdamW(model, lr=0.01)
    set_gradients(trained(model), 1, missing=False)
    optimizer.step()
    weight = model[0].base_layer.weight
    version = weight._version
    model[0](torch.zeros(2, 70, device=triton_device))
    assert weight._version == version


@pytest.mark.usefixtures("triton")
def test_a_step_between_forward_and_backward_is_noticed(triton_device):
    model, _ = make(triton_device)
    optimizer = SparseAdamW(model, lr=0.01)
    x = torch.zeros(2, 70, device=triton_device, requires_grad=True)
    y = model[0](x).sum()
    set_gradients(trained(model), 1, missing=False)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.usefixtures("triton")
def test_an_adapter_that_is_not_shown_is_updated_without_being_shown(
    triton_device, pair
):
    model, expected, _ = pair
    model.to(triton_device)
    parameters = trained(model)
    optimizer = SparseAdamW(model, parameters, lr=0.1)
    set_gradients(parameters, 1, missing=False)
    before = [p.detach().clone() for p in parameters]
    model.set_adapter("other")
    optimizer.step()
    assert largest_difference(parameters[:1], before[:1]) > 0.01
    batch = {name: tensor.to(triton_device) for name, tensor in make_batch().items()}
    assert torch.allclose(logits(model, batch).cpu(), expected["other"], atol=1e-5)


@pytest.mark.usefixtures("triton")
def test_more_values_than_the_kernel_counts_are_left_to_pytorch(
    triton_device, monkeypatch
):
    model, _ = make(triton_device)
    values = model[0].sylva_values["default"]
    for most, found in ((values.numel(), triton_adamw), (values.numel() - 1, None)):
        monkeypatch.setattr(fused, "MOST_VALUES", most)
        assert fused.kernel_of(model[0]) is found


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "option", [{"amsgrad": True}, {"foreach": True}, {"fused": False}]
)
def test_what_the_kernel_does_not_do_is_left_to_pytorch(triton_device, option):
    model, masks = make(triton_device)
    before = dense_weights(model)
    ours, theirs = trained(model), twin_of(trained(model))
    sparse = SparseAdamW(model, ours, lr=0.01, **option)
    plain = torch.optim.AdamW(theirs, lr=0.01, **option)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        sparse.step()
        plain.step()
    assert not sparse._kernel.blocks
    assert largest_difference(ours, theirs) == 0
    assert_weights_show_values(model, masks, before)


# The interpreter's NumPy warns of what infinite weights come to.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rounding_to_bfloat16_is_pytorchs(triton_device):
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40])
    ties = torch.arange(-64, 64) / 256 + 1.5
    values = torch.cat([ends, ties, random((121,), seed=3)]).reshape(1, 16, 16)
    values = values.to(triton_device)
    weight = torch.zeros((16, 16), dtype=torch.bfloat16, device=triton_device)
    moments = torch.zeros_like(values), torch.ones_like(values)
    indices = torch.zeros((1, 2), dtype=torch.int32, device=triton_device)
    layer = BlockState(values, *moments, indices, weight)
    tables = triton_adamw.Tables([layer], torch.zeros(1, device=triton_device))
    tables.set_gradients([torch.zeros_like(values)])
    options = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.0, 1.0]], dtype=torch.float64)
    one = torch.ones((), device=triton_device)
    tables.update(options.to(triton_device), one, 0 * one)
    assert len(options[0]) == len(adamw.OPTIONS)
    assert torch.equal(weight.isnan(), values[0].isnan())
    assert torch.equal(weight.nan_to_num(1.0), values[0].bfloat16().nan_to_num(1.0))


@pytest.mark.parametrize("dtype", triton_adamw.DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32])
def test_the_self_check_finds_a_wrong_kernel(triton_device, monkeypatch, dtype, block):
    made, update = [], triton_adamw.Tables.update

    def watched(tables, *args):
        made.append((tables.eight_bit, tables.lines))
        update(tables, *args)

    monkeypatch.setattr(triton_adamw.Tables, "update", watched)
    assert triton_adamw.self_check(triton_device, dtype, block) < 1
    assert set(made) == {(False, False), (False, True), (True, True)}
    monkeypatch.setattr(triton_adamw.Tables, "update", lambda *_: None)
    assert triton_adamw.self_check(triton_device, dtype, block) > 1
    assert not triton_adamw.supports(torch.float64, 16)


def test_the_self_check_allows_a_gpus_quick_quotients(triton_device, monkeypatch):
    update = triton_adamw.Tables.update

    def quick(tables, *args):
        before = [layer.values.clone() for layer in tables.layers]
        update(tables, *args)
        for layer, old in zip(tables.layers, before, strict=True):
            # A square root and two quotients, each off by two of its last bits.
            step = layer.values - old
            layer.values.add_(step, alpha=6e-7)
            if bool(step.any()):
                adamw.scatter_blocks_(layer.weight, layer.indices, layer.values)

    monkeypatch.setattr(triton_adamw.Tables, "update", quick)
    # Some elements have a tiny second moment, and so a step of 30.
    assert triton_adamw.self_check(triton_device, torch.float32, 128) < 1


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_a_captured_step_follows_gradients_and_rates():
    device = torch.device("cuda")
    model, masks = make(device)
    before = dense_weights(model)
    ours, theirs = trained(model), twin_of(trained(model))
    rate = torch.tensor(0.01, device=device)
    sparse = SparseAdamW(model, ours, lr=rate, capturable=True)
    plain = torch.optim.AdamW(theirs, lr=0.01)
    for parameters in (ours, theirs):
        set_gradients(parameters, 0, missing=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sparse.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse.step()
    for step in range(1, 5):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = random(b.shape, seed=step).to(b)
            a.grad.copy_(b.grad)
        rate.mul_(0.5)
        plain.param_groups[0]["lr"] *= 0.5
        graph.replay()
        plain.step()
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert_weights_show_values(model, masks, before)
