"""Weights that are used in more ways than a product, against autograd in a dense twin."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import AdapterError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, sync, unload
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from sylva_train.targets import find_targets, is_supported, weight_view
from tests.sylva_train.models import (
    dense_blocks,
    error,
    random,
    random_masks,
    two_layers,
)


class Squashed(nn.Linear):
    """A linear layer by its class, which computes something else."""

    def forward(self, x):
        return 3 * torch.tanh(super().forward(x))


class Turned(Conv1D):
    """As `Squashed`, of a weight that is stored the other way."""

    def forward(self, x):
        return F.softplus(super().forward(x))


class Reader(nn.Module):
    """Computes with a layer's weight, calls it, and penalizes the weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(10, 10)

    def forward(self, x):
        x = F.linear(self.inner(x), self.inner.weight, self.inner.bias)
        return x + self.inner.weight.square().mean()


def doubled_input(layer):
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def doubled_output(layer):
    layer.register_forward_hook(lambda _, __, y: 2 * y)


def doubled_gradient(layer):
    layer.register_full_backward_pre_hook(lambda _, gradients: (2 * gradients[0],))


def patched(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x).square()


CASES = {
    "subclass": (lambda: Squashed(10, 10), None),
    "turned subclass": (lambda: Turned(10, 10), None),
    "read": (Reader, None),
    "input": (lambda: nn.Linear(10, 10), doubled_input),
    "output": (lambda: nn.Linear(10, 10), doubled_output),
    "gradient": (lambda: nn.Linear(10, 10), doubled_gradient),
    "patched": (lambda: nn.Linear(10, 10), patched),
}


def twins(name):
    """A float64 model with blocks in every layer, and the same dense."""
    make, change = CASES[name]
    models = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(10, 10), make(), nn.Tanh(), nn.Linear(10, 3))
        for seed, parameter in enumerate(model.parameters()):
            parameter.data = random(parameter.shape, torch.float64, seed)
        if change:
            change(model[1])
        models.append(model)
    layers = [n for n, m in models[0].named_modules() if is_supported(m)]
    masks = random_masks(models[0], layers, block_size=4)
    return embed(models[0], masks), models[1], masks


def assert_same_gradients(model, dense, masks):
    for name, layer in embedded_layers(model).items():
        own = dense.get_submodule(name)
        whole = own.weight.grad.T if isinstance(own, Conv1D) else own.weight.grad
        expected = dense_blocks(whole, masks[name])
        assert error(layer.sylva_values["default"].grad, expected, whole) < 1e-12, name


@pytest.mark.parametrize("name", CASES)
def test_every_use_of_a_weight_has_autograds_gradient(name):
    model, dense, masks = twins(name)
    x, y = (random((2, 5, 10), torch.float64, seed).requires_grad_() for seed in (7, 7))
    for each, inputs in ((model, x), (dense, y)):
        each(inputs).square().sum().backward()
    assert_same_gradients(model, dense, masks)
    assert torch.equal(x.grad, y.grad)
    # With other values in the weight, and under checkpointing.
    for reentrant in (False, True):
        with torch.no_grad():
            for layer in embedded_layers(model).values():
                layer.sylva_values["default"].mul_(1.5)
            for layer_name, mask in masks.items():
                own = weight_view(dense.get_submodule(layer_name))
                own[mask.dense()] *= 1.5
        model.zero_grad()
        dense.zero_grad()
        for each, inputs in ((model, x), (dense, y)):
            checkpoint(each, inputs, use_reentrant=reentrant).sum().backward()
        assert_same_gradients(model, dense, masks)


def test_layers_with_a_forward_pass_of_their_own_are_left_to_choice():
    model = nn.Sequential(nn.Linear(8, 8), Squashed(8, 8), nn.Linear(8, 2))
    assert list(find_targets(model)) == ["0", "2"]
    named = SylvaConfig(importance="magnitude", target_modules=["1"], block_size=4)
    assert list(score(model, config=named)) == ["1"]
    batches = [{"input": torch.ones(2, 8), "labels": torch.tensor([0, 1])}]
    needy = SylvaConfig(importance="wanda", target_modules=["1"], block_size=4)
    with pytest.raises(TargetError, match="forward pass of its own"):
        score(model, batches, needy)


def test_threads_that_share_a_layer_do_not_meet_its_other_weight():
    model, dense, masks = twins("output")
    inputs = [random((4, 10), torch.float64, seed) for seed in range(4)]

    def work(x):
        for _ in range(10):
            model(x).square().sum().backward()

    with ThreadPoolExecutor(len(inputs)) as threads:
        list(threads.map(work, inputs))
    for x in inputs * 10:
        dense(x).square().sum().backward()
    assert_same_gradients(model, dense, masks)
    assert isinstance(model[1].base_layer.weight, nn.Parameter)


@pytest.mark.parametrize("name", ["subclass", "read"])
def test_other_uses_compile(name):
    model, dense, masks = twins(name)
    x = random((5, 10), torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (compiled, dense):
        each(x).square().sum().backward()
    assert_same_gradients(model, dense, masks)


@pytest.mark.parametrize("between", ["mode", "state"])
def test_looking_at_a_model_before_the_backward_pass_changes_nothing(between):
    model, masks = two_layers()
    dense = copy.deepcopy(model)
    embed(model, masks)
    x = random((4, 10))
    for each in (model, dense):
        y = each(x)
        if between == "mode":
            each.eval()
            with torch.no_grad():
                target = each(x + 1)
            y = y - target
            each.train()
        else:
            each.state_dict()
        y.square().sum().backward()
    for name, layer in embedded_layers(model).items():
        whole = dense.get_submodule(name).weight.grad
        expected = dense_blocks(whole, masks[name])
        assert error(layer.sylva_values["default"].grad, expected, whole) < 1e-6


@pytest.fixture(params=["none", "another"])
def reference(request):
    """A model with an adapter, what shows another one for a while, and dense twins."""
    bare, masks = two_layers()
    dense, other = copy.deepcopy(bare), copy.deepcopy(bare)
    model = peft.get_peft_model(bare, SylvaConfig(masks=masks))
    if request.param == "none":
        return model, model.disable_adapter, dense, other, masks
    model.add_adapter("other", SylvaConfig(masks=masks))
    with torch.no_grad():
        for name, mask in masks.items():
            layer = model.base_model.model.get_submodule(name)
            layer.sylva_values["other"].mul_(2)
            other.get_submodule(name).weight[mask.dense()] *= 2

    @contextlib.contextmanager
    def shown():
        model.set_adapter("other")
        yield
        model.set_adapter("default")

    return model, shown, dense, other, masks


def test_a_reference_between_a_forward_and_its_backward_pass(reference):
    """Preference optimization computes it there."""
    model, shown, dense, other, masks = reference
    x = random((4, 10))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        y = model(x)
        with shown(), torch.no_grad():
            target = model(x)
        (y - target - 1).square().mean().backward()
        (dense(x) - other(x).detach() - 1).square().mean().backward()
        for name, mask in masks.items():
            whole = dense.get_submodule(name).weight.grad
            layer = model.base_model.model.get_submodule(name)
            got = layer.sylva_values["default"].grad
            assert error(got, dense_blocks(whole, mask), whole) < 1e-5
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                weight = dense.get_submodule(name).weight
                weight -= 0.1 * weight.grad * mask.dense()
        dense.zero_grad()


def test_a_backward_pass_over_other_weights_than_the_forward_pass(reference):
    model, shown = reference[:2]
    x = random((4, 10))
    y = model(x)
    with shown(), pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()
    with shown():
        y = model(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_backward_pass_over_values_changed_while_another_was_shown(reference, change):
    """Changed through ``.data``, which leaves their version as it is."""
    model, shown = reference[:2]
    y = model(random((4, 10)))
    with shown():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.data.add_(change)
    if change:
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            y.sum().backward()
    else:
        y.sum().backward()


def test_a_changed_weight_has_no_version_of_another_adapter(reference):
    model, shown = reference[:2]
    with shown():
        y = model(random((4, 10)).requires_grad_())
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data.add_(1)
    sync(model)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_functional_calls_with_computed_values():
    model, masks = two_layers()
    embed(model, masks)
    x, before = random((4, 10)), model(random((4, 10)))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    doubled = {name: 2 * p for name, p in own.items()}
    torch.func.functional_call(model, doubled, (x,)).sum().backward()
    found = {name: p.grad for name, p in own.items()}
    assert torch.equal(model(x), before)
    model.zero_grad()
    with torch.no_grad():
        for p in own.values():
            p.mul_(2)
    model(x).sum().backward()
    for name, p in own.items():
        torch.testing.assert_close(found[name], 2 * p.grad)


@pytest.mark.parametrize("how", ["pruned", "parametrized", "wrapped"])
def test_a_base_layer_that_lost_its_weight_is_named(how):
    model, masks = two_layers()
    embed(model, masks)
    base, x = model[0].base_layer, random((4, 10))
    if how == "pruned":
        prune.random_unstructured(base, "weight", 0.5)
    elif how == "parametrized":
        parametrizations.weight_norm(base)
    else:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0.base_layer"]))
    with pytest.raises(TargetError, match="merge"):
        model(x)


def shard(model, version):
    mesh = init_device_mesh("cpu", (1,))
    if version == 2:
        return fully_shard(model, mesh=mesh)
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)


@pytest.mark.filterwarnings("ignore")  # of a group of one process
@pytest.mark.parametrize("version", [1, 2])
def test_sharding_is_refused(version, tmp_path):
    model, masks = two_layers()
    embed(model, masks)
    where = f"file://{tmp_path / 'group'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        with pytest.raises(TargetError, match="FSDP"):
            shard(model, version)(random((4, 10)))
    finally:
        dist.destroy_process_group()


def test_the_base_of_a_lora_layer_is_refused():
    model = two_layers()[0]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    masks = {"0.base_layer": LayerMask((12, 10), 4, torch.tensor([[0, 0]]))}
    with pytest.raises(TargetError, match="merge_and_unload"):
        embed(model, masks)


def test_an_average_of_the_indices_is_noticed():
    model = nn.Sequential(nn.Linear(64, 64))
    base = model[0].weight.detach().clone()
    mask = LayerMask((64, 64), 1, torch.tensor([[i, i] for i in range(64)]))
    embed(model, {"0": mask})
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(3):
        with torch.no_grad():
            model[0].sylva_values["default"].add_(1)
        average.update_parameters(model)
    with pytest.raises(AdapterError, match="use_buffers"):
        average(random((2, 64)))
    assert torch.equal(unload(model)[0].weight, base)


@pytest.fixture
def accelerator():
    """An accelerator that makes one step of two batches; its state is the process's own."""
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_loop_of_accelerate_trains_blocks_and_keeps_their_state(
    accelerator, tmp_path
):
    xs = [random((5, 10), seed=n) for n in range(4)]
    model, masks = two_layers()
    plain = embed(copy.deepcopy(model), masks)
    optimizer = SparseAdamW(plain, lr=0.1)
    for pair in (xs[:2], xs[2:]):
        optimizer.zero_grad()
        sum(plain(x).square().mean() / 2 for x in pair).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    embed(model, masks)
    model, optimizer = accelerator.prepare(model, SparseAdamW(model, lr=0.1))

    def step(x):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    for x in xs:
        step(x)
    for (name, own), other in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(own, other, msg=name)
    accelerator.save_state(tmp_path)
    before = model(xs[0])
    for x in xs:
        step(x)
    assert not torch.equal(model(xs[0]), before)
    accelerator.load_state(tmp_path)
    assert torch.equal(model(xs[0]), before)
