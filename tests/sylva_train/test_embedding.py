"""Models with embedded layers: embedding, merging, taking out; their state."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from sylva_train._checks import AdapterError, ConfigError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, merge, unload
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from sylva_train.targets import weight_view
from sylva_train.tuner import load_adapter
from tests.sylva_train.models import (
    ARCHITECTURES,
    DTYPES,
    dense_blocks,
    logits,
    make_batch,
    make_model,
    random,
    random_masks,
    same,
    snapshot,
    train_step,
    two_layers,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_the_model_leaves_values_in_float32(dtype):
    model, masks = two_layers()
    embed(model, masks)
    with torch.no_grad():
        for layer in embedded_layers(model).values():
            layer.sylva_values["default"].mul_(1.0001)
    kept = [v.clone() for v in model.parameters() if v.requires_grad]
    model.to(dtype)
    values = [p for p in model.parameters() if p.requires_grad]
    for old, new in zip(kept, values, strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(old, new)
    x = random((4, 10), dtype)
    assert model(x).dtype == dtype
    model(x).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in values)
    for layer in embedded_layers(model).values():
        blocks = dense_blocks(weight_view(layer), layer.mask())
        assert blocks.dtype == dtype
        assert torch.equal(blocks, layer.sylva_values["default"].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unload_restores_and_merge_keeps(dtype):
    model, masks = two_layers()
    model.to(dtype)
    before = snapshot(model)
    x = random((4, 10), dtype)
    unloaded = embed(copy.deepcopy(model), masks)
    with torch.no_grad():
        for layer in embedded_layers(unloaded).values():
            layer.sylva_values["default"].mul_(1.5)
    trained = unloaded(x)
    merged = merge(copy.deepcopy(unloaded))
    assert torch.equal(merged(x), trained)
    assert merged.state_dict().keys() == before.keys()
    assert same(snapshot(unload(unloaded)), before)
    assert not embedded_layers(unloaded)


def test_merging_keeps_the_last_step_of_any_optimizer():
    model, masks = two_layers()
    embed(model, masks)
    train_values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(train_values, lr=0.1)
    model(random((4, 10))).square().sum().backward()
    optimizer.step()
    expected = [v.detach().clone() for v in train_values]
    layers = list(embedded_layers(model).values())
    masks_of = [layer.mask() for layer in layers]
    merge(model)
    for layer, mask, values in zip(layers, masks_of, expected, strict=True):
        assert torch.equal(dense_blocks(weight_view(layer.base_layer), mask), values)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"foreach": False}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_steps_of_any_optimizer_reach_the_next_forward_pass(kind, options):
    # Fused steps do not count up the values' version.
    model, masks = two_layers()
    embed(model, masks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=0.05, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(random((4, 10))).square().sum().backward()
        optimizer.step()
        expected = merge(copy.deepcopy(model))(random((2, 10)))
        assert torch.equal(model(random((2, 10))), expected)


def test_values_that_were_set_behind_autograd_show_in_evaluation():
    model, masks = two_layers()
    embed(model, masks)
    x = random((2, 10))
    before = model(x)
    for layer in embedded_layers(model).values():
        layer.sylva_values["default"].data.mul_(2)
    after = model.eval()(x)
    assert not torch.equal(before, after)
    assert torch.equal(merge(copy.deepcopy(model))(x), after)


def test_a_saved_state_has_the_last_step_and_loads_into_the_same_embedding():
    model, masks = two_layers()
    before = snapshot(model)
    fresh = embed(copy.deepcopy(model), masks)
    embed(model, masks)
    for _ in range(2):
        train = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(random((4, 10))).square().sum().backward()
        train.step()
    state = snapshot(model)
    x = random((3, 10), seed=9)
    expected = model(x)
    for target in (fresh, embed(two_layers()[0], masks)):
        target(x)  # so that there is something written already
        target.load_state_dict(state)
        assert torch.equal(target(x), expected)
        # The saved weight shows trained values; the base is this model's own.
        assert same(snapshot(unload(target)), before)


def test_loading_a_base_weight_alone_makes_it_the_base():
    model, masks = two_layers()
    other = {k: v + 1 for k, v in snapshot(model).items()}
    embed(model, masks)
    model(random((1, 10)))
    named = {f"{k[:1]}.base_layer.{k[2:]}": v for k, v in other.items()}
    model.load_state_dict(named, strict=False)
    model(random((1, 10)))
    assert same(snapshot(unload(model)), other)


def test_loading_other_indices_while_a_layer_is_written():
    model, masks = two_layers()
    before = snapshot(model)
    moved = {
        name: LayerMask(
            m.shape, m.block_size, torch.tensor(m.grid_shape) - 1 - m.indices
        )
        for name, m in masks.items()
    }
    other = embed(copy.deepcopy(model), moved)
    with torch.no_grad():
        for layer in embedded_layers(other).values():
            layer.sylva_values["default"].add_(1)
    embed(model, masks)
    x = random((3, 10))
    model(x)
    model.load_state_dict(snapshot(other))
    assert torch.equal(model(x), other(x))
    assert same(snapshot(unload(model)), before)


def test_damaged_indices_are_found_before_they_are_used():
    model, masks = two_layers()
    embed(model, masks)
    state = snapshot(model)
    state["0.sylva_indices.default"][0, 0] = 99
    model.load_state_dict(state)
    before = snapshot(model[2])
    with pytest.raises(AdapterError, match="damaged"):
        model(random((1, 10)))
    assert same(snapshot(model[2]), before)


def test_a_copy_is_independent():
    model, masks = two_layers()
    embed(model, masks)
    x = random((3, 10))
    before = model(x)
    twin = copy.deepcopy(model)
    train = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in train:
            parameter.add_(1)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert torch.equal(unload(twin)(x), unload(model)(x))


def test_a_model_survives_being_pickled_whole():
    model, masks = two_layers()
    embed(model, masks)
    x = random((3, 10))
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(unload(loaded)(x), unload(model)(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["all-linear", "some"])
def test_every_architecture_trains_its_blocks_and_head_alone(name, pattern):
    model, batch = make_model(name), make_batch(name)
    _, _, head, some = ARCHITECTURES[name]
    before = snapshot(model)
    untouched = logits(model, batch)
    masks = random_masks(model, pattern if pattern == "all-linear" else some)
    embed(model, masks, modules_to_save=[head])
    assert torch.equal(logits(model, batch), untouched)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    values = {f"{layer}.sylva_values.default" for layer in masks}
    heads = {n for n in trainable if n.startswith(f"{head}.")}
    assert trainable == values | heads
    assert heads
    train_step(model, batch)
    assert not torch.equal(logits(model, batch), untouched)
    for key, value in merge(copy.deepcopy(model)).state_dict().items():
        layer = key.removesuffix(".weight")
        if layer in masks:
            inside = masks[layer].dense()
            inside = inside.t() if name.startswith("gpt2") else inside
            assert not bool((value != before[key])[~inside].any())
            assert bool((value != before[key])[inside].any())
        elif not key.startswith(f"{head}."):
            assert torch.equal(value, before[key])
    restored = snapshot(unload(model))
    assert same(
        {k: v for k, v in restored.items() if not k.startswith(f"{head}.")},
        {k: v for k, v in before.items() if not k.startswith(f"{head}.")},
    )


def test_layers_without_a_block_are_left_alone():
    model, masks = two_layers()
    empty = LayerMask(masks["0"].shape, 4, torch.zeros((0, 2)))
    embed(model, {"0": empty, "2": masks["2"]})
    assert list(embedded_layers(model)) == ["2"]
    assert type(model[0]) is nn.Linear


def test_the_mode_of_a_layer_is_kept():
    model, masks = two_layers()
    model.eval()
    assert not any(layer.training for layer in embed(model, masks).modules())


def refused(error_type, text, model, masks, **options):
    before = snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error_type, match=text):
        embed(model, masks, **options)
    assert same(snapshot(model), before), "a refused call changes nothing"
    assert [p.requires_grad for p in model.parameters()] == flags
    return True


def test_masks_that_do_not_fit_are_refused_before_anything_is_changed():
    model, masks = two_layers()
    one = masks["0"]
    refused(TargetError, "`nowhere`", model, masks | {"nowhere": one})
    refused(ConfigError, r"\(7, 12\)", model, masks | {"2": one})
    refused(TargetError, "Tanh", model, masks | {"1": one})
    empty = LayerMask(one.shape, 4, torch.zeros((0, 2)))
    refused(ConfigError, "nothing to train", model, {"0": empty})
    scores = score(model, config=SylvaConfig(importance="magnitude", block_size=4))
    refused(ConfigError, "got a LayerScores for `0`.*select", model, scores)
    refused(TargetError, "`modules_to_save`", model, masks, modules_to_save=["head"])
    refused(ConfigError, "trains whole", model, masks, modules_to_save=["0"])


def test_float64_weights_keep_float64_values():
    model, masks = two_layers()
    model.double()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    embed(model, masks)
    x = random((5, 10), torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(x).square().sum().backward()
    optimizer.step()
    model.float().double()  # values only move: float32 would round them
    values = model[0].sylva_values["default"]
    assert values.dtype == torch.float64
    assert not torch.equal(values, values.float().double())
    model.double()
    unload(model)
    # The base itself went through float32, as it would have without blocks.
    expected = {name: p.float().double() for name, p in before.items()}
    assert all(torch.equal(expected[n], p) for n, p in model.state_dict().items())


def test_what_cannot_hold_values_is_refused():
    model, masks = two_layers()
    packed = copy.deepcopy(model)
    packed[0].weight = nn.Parameter(torch.ones(12, 10).to(torch.int8), False)
    refused(TargetError, "int8", packed, masks)
    embedding = nn.Sequential(nn.Embedding(12, 10))
    mask = LayerMask((12, 10), 4, torch.tensor([[0, 0]]))
    refused(TargetError, "Embedding", embedding, {"0": mask})


def test_offloaded_weights_are_refused(saved):
    model, masks = two_layers()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(TargetError, match="offloaded"):
        embed(model, masks)
    assert not embedded_layers(model)
    base = cpu_offload(make_model(), execution_device=torch.device("cpu"))
    for door in (load_adapter, peft.PeftModel.from_pretrained):
        with pytest.raises(TargetError, match="offloaded"):
            door(base, saved[0])


def test_tied_weights_are_refused():
    model, masks = two_layers()
    tied = nn.ModuleDict({"body": model, "twin": nn.Linear(10, 12)})
    tied["twin"].weight = model[0].weight
    refused(TargetError, "`twin.weight`", tied, {"body.0": masks["0"]})
    refused(
        TargetError,
        "`body.0.weight`",
        tied,
        {"body.2": masks["2"]},
        modules_to_save=["twin"],
    )


def test_a_model_is_embedded_once():
    model, masks = two_layers()
    embed(model, masks)
    with pytest.raises(TargetError, match="already"):
        embed(model, masks)


def test_sparse_steps_reach_the_dense_weights_at_once():
    model, masks = two_layers()
    embed(model, masks)
    optimizer = SparseAdamW(model, lr=0.1)
    model(random((4, 10))).square().sum().backward()
    optimizer.step()
    for layer in embedded_layers(model).values():
        blocks = dense_blocks(weight_view(layer.base_layer), layer.mask())
        assert torch.equal(blocks, layer.sylva_values["default"])
