"""Sparse AdamW copied, compiled, reloaded, and after its blocks are gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.layers import embed, merge, unload
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from tests.sylva_train.models import make_model, make_peft, random_masks
from tests.sylva_train.pairs import assert_same_blocks, loss_of, make_pair, train


def test_blocks_of_another_model_reach_its_dense_weights():
    """Of two models in one optimizer, as the towers of a retriever are."""
    model, _, _ = make_pair()
    other, dense, masks = make_pair(seed=5)
    values = [p for p in other.parameters() if p.requires_grad]
    optimizer = SparseAdamW(model, lr=0.01, weight_decay=0.1)
    optimizer.add_param_group({"params": values})
    plain = torch.optim.AdamW(
        [dense[0].weight, dense[2].weight], lr=0.01, weight_decay=0.1
    )
    for step in range(3):
        for each, optimizer_of in ((other, optimizer), (dense, plain)):
            loss_of(each, step).backward()
            optimizer_of.step()
            optimizer_of.zero_grad()
    assert_same_blocks(other, dense, masks)


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("moments", ["32bit", "8bit"])
def test_copies_of_model_and_optimizer_train_on_alike(how, moments):
    model, _, _ = make_pair()
    options = {"lr": 0.01, "decay_towards": "base", "max_grad_norm": 0.1}
    optimizer = SparseAdamW(model, moments=moments, **options)
    train(model, optimizer, 2)
    both = model, optimizer
    twin, other = (
        copy.deepcopy(both) if how == "copied" else pickle.loads(pickle.dumps(both))  # noqa: S301
    )
    for each, its in (both, (twin, other)):
        train(each, its, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="PyTorch 2.9 calls a compiled method that is not to be compiled without self",
)
def test_a_compiled_step_writes_as_any_other():
    model, _, _ = make_pair()
    twin = copy.deepcopy(model)
    optimizers = [SparseAdamW(m, lr=0.01) for m in (model, twin)]
    compiled = torch.compile(optimizers[0].step, backend="eager")
    for each, step in ((model, compiled), (twin, optimizers[1].step)):
        loss_of(each, 0).backward()
        step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
@pytest.mark.parametrize("kind", [torch.optim.AdamW, SparseAdamW])
def test_a_compiled_loop_is_the_plain_one(kind):
    model, _, _ = make_pair()
    twin = copy.deepcopy(model)

    def steps_of(each):
        values = [p for p in each.parameters() if p.requires_grad]
        optimizer = kind(each if kind is SparseAdamW else values, lr=0.01)

        def step(number):
            optimizer.zero_grad()
            loss_of(each, number).backward()
            optimizer.step()

        return step

    run, compiled = steps_of(twin), torch.compile(steps_of(model), backend="eager")
    for number in range(3):
        run(number)
        compiled(number)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_moments_in_8_bits_are_loaded_beside_others():
    """What no kernel updates has moments of its own dtype: vectors, float64 values."""
    model, _, _ = make_pair()
    model.head = nn.Parameter(torch.zeros(4))
    optimizer = SparseAdamW(model, moments="8bit")
    model.head.sum().backward()
    optimizer.step()  # no block has moments yet
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    wide, _, _ = make_pair(dtype=torch.float64)
    optimizer = SparseAdamW(wide, moments="8bit")
    loss_of(wide, 0, torch.float64).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("moments", ["32bit", "8bit"])
def test_an_adapter_that_is_not_active_takes_no_step_by_moments_in_8_bits(moments):
    model = make_peft()
    second = SylvaConfig(masks=random_masks(make_model(), seed=9))
    model.add_adapter("second", second)
    values = [p for n, p in model.named_parameters() if "sylva_values" in n]
    optimizer = SparseAdamW(model, values, lr=0.1, moments=moments)

    def step(name):
        model.set_adapter(name)
        for p in values:
            p.grad = torch.ones_like(p) if p.requires_grad else p.grad
        optimizer.step()

    step("default")
    before = [p.detach().clone() for p in values]
    if moments == "32bit":
        step("second")
        assert not any(torch.equal(p, b) for p, b in zip(values, before, strict=True))
        return
    with pytest.raises(ConfigError, match="not active have a gradient"):
        step("second")
    assert all(torch.equal(p, b) for p, b in zip(values, before, strict=True))
    optimizer.zero_grad()
    step("second")


@pytest.mark.parametrize("counts", [(1, 3), (3, 1)])
@pytest.mark.parametrize("moments", ["32bit", "8bit"])
def test_moments_of_other_blocks_are_refused(counts, moments):
    optimizers = []
    for count in counts:
        model = nn.Sequential(nn.Linear(16, 16))
        indices = torch.tensor([[0, 0], [0, 1], [1, 0]])[:count]
        embed(model, {"0": LayerMask((16, 16), 8, indices)})
        optimizers.append(SparseAdamW(model, moments=moments))
        model(torch.ones(2, 16)).sum().backward()
        optimizers[-1].step()
    old, new = optimizers
    with pytest.raises(ConfigError, match="other blocks"):
        new.load_state_dict(old.state_dict())


def test_hooks_run_once_a_step():
    """Also where PyTorch has wrapped the step of AdamW itself."""
    model, _, _ = make_pair()
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizer, calls = SparseAdamW(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 2)
    assert calls == ["pre", "post"] * 2


def test_decay_towards_a_float64_base_keeps_its_digits():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.fill_(1 / 3)
    embed(model, random_masks(model, block_size=4, fraction=1.0))
    values = model[0].sylva_values["default"]
    optimizer = SparseAdamW(model, lr=0.5, weight_decay=1.0, decay_towards="base")
    values.grad = torch.zeros_like(values)
    optimizer.step()
    torch.testing.assert_close(
        values.detach(), torch.full_like(values, 1 / 3), rtol=0, atol=1e-15
    )


def test_parameters_in_the_place_of_the_model_are_refused():
    model, _, _ = make_pair()
    with pytest.raises(TypeError, match=r"SparseAdamW\(model, params\)"):
        SparseAdamW([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("end", [merge, unload])
@pytest.mark.parametrize("tuner", [False, True])
def test_a_step_after_the_blocks_are_taken_out_touches_no_weight(end, tuner):
    """For another mask, say: the weights are the new layers' or the model's own then."""
    if tuner:
        model = make_peft()
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
    else:
        model, _, _ = make_pair()
        loss_of(model, 0).backward()
    optimizer = SparseAdamW(model, lr=0.1)
    optimizer.step()
    bare = end(model)
    before = {name: p.detach().clone() for name, p in bare.named_parameters()}
    with pytest.raises(ConfigError, match="new optimizer"):
        optimizer.step()
    for name, p in bare.named_parameters():
        assert torch.equal(p, before[name])
