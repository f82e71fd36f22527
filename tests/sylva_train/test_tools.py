"""What other libraries' trainers, averages and quantizers do to embedded models."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import RwkvConfig, RwkvForCausalLM

from sylva_train._checks import AdapterError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, merge
from sylva_train.masks import LayerMask
from sylva_train.selection import select
from sylva_train.targets import find_targets, fingerprint
from sylva_train.tuner import load_adapter, save_adapter
from tests.sylva_train.models import (
    dense_blocks,
    error,
    logits,
    make_batch,
    make_peft,
    make_trained,
    random,
    two_layers,
)


def blocks_of(model):
    """The values that are trained."""
    return [layer.sylva_values["default"] for layer in embedded_layers(model).values()]


def follow(dense, masks, x, rate):
    """A step of SGD of a dense model on the blocks alone, on the sum of squares."""
    dense.zero_grad()
    dense(x).square().sum().backward()
    with torch.no_grad():
        for name, mask in masks.items():
            weight = dense.get_submodule(name).weight
            weight -= rate * weight.grad * mask.dense()


def flatten(parameters):
    """Put parameters into one memory, as DeepSpeed ZeRO does; return it and a master."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    return flat, nn.Parameter(flat.clone())


def test_values_in_one_memory_are_stepped_without_a_trace():
    model, masks = two_layers()
    dense = copy.deepcopy(model)
    embed(model, masks)
    values = blocks_of(model)
    flat, master = flatten(values)
    optimizer = torch.optim.SGD([master], lr=0.001)

    def advance():
        master.grad = torch.cat([v.grad.flatten() for v in values])
        optimizer.step()
        flat.copy_(master.detach())
        model.zero_grad()

    for seed in range(4):
        x = random((4, 10), seed=seed)
        model(x).square().sum().backward()
        advance()
        follow(dense, masks, x, 0.001)
    y = model(random((4, 10)))
    y.square().sum().backward(retain_graph=True)
    advance()
    # Compiled, a forward pass does not look and is in this place.
    with pytest.raises(RuntimeError, match="sync"):
        y.square().sum().backward()
    follow(dense, masks, random((4, 10)), 0.001)
    merge(model)
    for own, expected in zip(model.parameters(), dense.parameters(), strict=True):
        assert error(own.detach(), expected.detach(), expected.detach()) < 1e-6


@pytest.mark.parametrize("between", ["none", "another", "mode", "state"])
def test_what_is_recomputed_keeps_what_the_forward_pass_kept(between):
    """Layers that read one tensor have been seen to, but another copy is of the next step."""
    bare = nn.ModuleDict({name: nn.Linear(32, 8, bias=False) for name in "qk"})
    for seed, parameter in enumerate(bare.parameters()):
        parameter.data = random(parameter.shape, seed=seed)
    dense = copy.deepcopy(bare)
    masks = {name: LayerMask((8, 32), 4, torch.tensor([[0, 1]])) for name in "qk"}
    model = peft.get_peft_model(bare, SylvaConfig(masks=masks))
    model.add_adapter("other", model.peft_config["default"])
    inner, x = model.base_model.model, random((6, 32)).requires_grad_()
    y = checkpoint(lambda x: inner["q"](x) * inner["k"](x), x, use_reentrant=False)
    with torch.no_grad():
        if between == "none":
            with model.disable_adapter():
                inner["q"](x)
        elif between == "another":
            model.set_adapter("other")
            inner["q"](x)
            model.set_adapter("default")
        elif between == "mode":
            inner["q"].eval()(x)
            model.train()
        else:
            model.state_dict()
    y.square().sum().backward()
    (dense["q"](x) * dense["k"](x)).square().sum().backward()
    for name, mask in masks.items():
        whole = dense[name].weight.grad
        found = inner[name].sylva_values["default"].grad
        assert error(found, dense_blocks(whole, mask), whole) < 1e-5


def test_an_adapters_own_configuration_makes_a_copy_of_it(tmp_path):
    """So trainers of preferences keep the adapter that they start from."""
    model = make_trained()
    expected = logits(model, make_batch())
    model.add_adapter("start", model.peft_config["default"])
    for name, module in model.named_parameters():  # as they copy what is trained whole
        if ".default." in name:
            start = model.get_parameter(name.replace(".default.", ".start."))
            start.data.copy_(module.data)
    assert torch.equal(logits(model, make_batch()), expected)
    with torch.no_grad():
        for values in blocks_of(model):
            values.mul_(2)
    assert not torch.equal(logits(model, make_batch()), expected)
    model.set_adapter("start")
    assert torch.equal(logits(model, make_batch()), expected)
    model.save_pretrained(tmp_path, selected_adapters=["start"])
    loaded = load_adapter(make_peft().unload(), tmp_path / "start")
    assert torch.equal(logits(loaded, make_batch()), expected)


def step(model, *_):
    """One step of SGD."""
    optimizer = torch.optim.SGD(blocks_of(model), 0.1)
    model(random((4, 10))).sum().backward()
    optimizer.step()


#: Ways into the package, of a model, masks, and the path of an adapter.
DOORS = {
    "embed": lambda model, masks, _: embed(model, masks),
    "load": lambda model, _, path: load_adapter(model, path),
    "score": lambda model, *_: score(
        model, config=SylvaConfig(importance="magnitude", block_size=4)
    ),
    "step": step,
    "evaluation": lambda model, *_: model.eval()(random((4, 10))),
    "state": lambda model, *_: model.state_dict(),
    "save": lambda model, _, path: save_adapter(model, path),
}


@pytest.mark.parametrize("door", ["evaluation", "state", "save"])
def test_indices_that_were_changed_without_a_trace(door, tmp_path):
    """Lightning's average of weights takes buffers along and rounds integers down."""
    model, masks = two_layers()
    embed(model, masks)
    model(random((4, 10)))
    for layer in embedded_layers(model).values():
        layer.sylva_indices["default"].data.sub_(1).clamp_(min=0)
    with pytest.raises(AdapterError, match="use_buffers"):
        DOORS[door](model, masks, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")  # of a group of one process
@pytest.mark.parametrize("door", ["step", "embed", "load", "score"])
def test_sharded_weights_are_refused(door, tmp_path):
    model, masks = two_layers()
    save_adapter(embed(copy.deepcopy(model), masks), tmp_path / "adapter")
    where = f"file://{tmp_path / 'group'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        mesh, kept = init_device_mesh("cpu", (1,)), set()
        if door == "step":
            kept = set(blocks_of(embed(model, masks)))
        fully_shard(model, mesh=mesh, ignored_params=kept)
        with pytest.raises(TargetError, match="sharded"):
            DOORS[door](model, masks, tmp_path / "adapter")
    finally:
        dist.destroy_process_group()


class Packed(torch.Tensor):
    """Says it is of float32 and stands for integers, as torchao's quantized weights do."""

    def __tensor_flatten__(self):
        return [], None


def quantize(layer):
    packed = layer.weight.detach().clone().as_subclass(Packed)
    layer.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("door", ["embed", "load", "score", "step"])
def test_quantized_weights_that_say_they_are_floats_are_refused(door, tmp_path):
    model, masks = two_layers()
    save_adapter(embed(copy.deepcopy(model), masks), tmp_path / "adapter")
    quantize(embed(model, masks)[0].base_layer if door == "step" else model[0])
    with pytest.raises(TargetError, match="quantized"):
        DOORS[door](model, masks, tmp_path / "adapter")
    if door != "step":
        assert list(find_targets(model)) == ["2"]


def test_weights_that_a_model_rescales_in_place_are_refused(tmp_path):
    def rwkv(every):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "context_length": 8}
        model = RwkvForCausalLM(RwkvConfig(vocab_size=24, rescale_every=every, **sizes))
        for seed, parameter in enumerate(model.parameters()):
            parameter.data += 0.2 * random(parameter.shape, seed=seed)
        return model

    options = SylvaConfig(importance="magnitude", block_size=8)
    batch = {"input_ids": torch.arange(8)[None]}
    model = rwkv(0)
    masks = select(score(model, config=options), 0.25, 8)
    embed(model, masks)
    torch.testing.assert_close(logits(model, batch), logits(rwkv(1), batch))
    save_adapter(model, tmp_path / "a")
    for door in (
        lambda model: score(model, config=options),
        lambda model: embed(model, masks),
        lambda model: peft.get_peft_model(model, SylvaConfig(masks=masks)),
        lambda model: load_adapter(model, tmp_path / "a"),
        lambda model: peft.PeftModel.from_pretrained(model, tmp_path / "a"),
    ):
        with pytest.raises(TargetError, match="rescale_every=0"):
            door(rwkv(1))


def test_extra_state_of_a_module_is_no_weight():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return "a note"

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(Noted(4, 4))
    assert len(fingerprint(model)) == 64


def test_masks_for_a_wrapped_model_say_where_the_layer_is():
    model, masks = two_layers()
    with pytest.raises(TargetError, match=r"`module\.0` is inside a wrapping"):
        embed(nn.DataParallel(model), masks)
