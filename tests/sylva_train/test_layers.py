"""An embedded layer against a dense one: forward, gradients, writing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sylva_train.kernels import block_sddmm
from sylva_train.layers import (
    SparseEmbeddedLinear,
    accumulating,
    embed,
    embedded_layers,
    sync,
)
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from sylva_train.targets import weight_view
from tests.sylva_train.models import (
    DTYPES,
    dense_blocks,
    error,
    layer_masks,
    random,
    two_layers,
)

#: largest error over the size of the gradient: the inputs' own rounding
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 0.2,
    torch.float16: 0.03,
}
INPUTS = [(), (5,), (2, 3), (2, 1, 3), (0,)]


def make_layer(mask, kind=nn.Linear, bias=True, dtype=torch.float32, seed=0):
    """A base layer and the embedded one."""
    out, inputs = mask.shape
    generator = torch.Generator().manual_seed(seed)
    linear = kind is nn.Linear
    base = nn.Linear(inputs, out, bias=bias) if linear else Conv1D(out, inputs)
    for parameter in base.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values.to(dtype)
    layer = SparseEmbeddedLinear(copy.deepcopy(base))
    layer.add("default", mask)
    layer.embedded = "default"
    return base, layer


cases = st.tuples(
    layer_masks(largest=20),
    st.sampled_from(DTYPES),
    st.sampled_from([nn.Linear, Conv1D]),
    st.booleans(),
    st.sampled_from(INPUTS),
    st.integers(0, 2**31),
)


@given(cases)
def test_block_gradient_is_the_dense_gradient_at_the_blocks(case):
    mask, dtype, kind, bias, batch, seed = case
    base, layer = make_layer(mask, kind, bias, dtype, seed)
    x = random((*batch, mask.shape[1]), dtype, seed)
    dy = random((*batch, mask.shape[0]), dtype, seed + 1)
    y = layer(x)
    if not len(mask):
        assert y.grad_fn is None
        return
    y.backward(dy)
    got = layer.sylva_values["default"].grad
    exact = copy.deepcopy(base).double()
    exact(x.double()).backward(dy.double())
    dense = weight_view(exact).new_zeros(mask.shape)
    gradient = exact.weight.grad
    dense += gradient.t() if kind is Conv1D else gradient
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert error(got, dense_blocks(dense, mask), dense) <= TOLERANCE[dtype]


@given(cases)
def test_output_and_input_gradient_are_the_base_layers_bit_for_bit(case):
    mask, dtype, kind, bias, batch, seed = case
    base, layer = make_layer(mask, kind, bias, dtype, seed)
    results = []
    for module in (base, layer):
        x = random((*batch, mask.shape[1]), dtype, seed).requires_grad_()
        y = module(x)
        y.backward(random(y.shape, dtype, seed + 1))
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(cases)
def test_new_values_are_what_the_layer_computes_with(case):
    mask, dtype, kind, bias, batch, seed = case
    base, layer = make_layer(mask, kind, bias, dtype, seed)
    new = random((len(mask), mask.block_size, mask.block_size), seed=seed + 2)
    with torch.no_grad():
        layer.sylva_values["default"].copy_(new)
        expected = weight_view(base).clone()
        for block, (row, column) in zip(new, mask.indices.tolist(), strict=True):
            b = mask.block_size
            piece = expected[row * b : (row + 1) * b, column * b : (column + 1) * b]
            piece.copy_(block[: piece.shape[0], : piece.shape[1]])
        weight_view(base).copy_(expected)
        x = random((*batch, mask.shape[1]), dtype, seed)
        assert torch.equal(layer(x), base(x))
        assert torch.equal(weight_view(layer.base_layer), weight_view(base))


@given(cases)
def test_restore_brings_back_every_bit(case):
    mask, dtype, kind, bias, _, seed = case
    base, layer = make_layer(mask, kind, bias, dtype, seed)
    with torch.no_grad():
        layer.sylva_values["default"].add_(1.7)
    layer.sync()
    layer.restore_()
    assert torch.equal(layer.base_layer.weight, base.weight)


def test_what_is_not_finite_is_restored_as_well():
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0], [1, 1]]))
    base, _ = make_layer(mask)
    base.weight.data[0, 0], base.weight.data[3, 3] = float("nan"), -0.0
    layer = SparseEmbeddedLinear(copy.deepcopy(base))
    layer.add("default", mask)
    layer.embedded = "default"
    with torch.no_grad():
        layer.sylva_values["default"].fill_(3)
    layer.sync()
    layer.restore_()
    bits = [m.weight.detach().view(torch.int32) for m in (layer.base_layer, base)]
    assert torch.equal(*bits)


def test_a_layer_used_twice_adds_its_gradients():
    mask = LayerMask((6, 6), 4, torch.tensor([[0, 0], [1, 0]]))
    base, layer = make_layer(mask)
    x = random((3, 6))
    layer(torch.tanh(layer(x))).square().sum().backward()
    base(torch.tanh(base(x))).square().sum().backward()
    got = layer.sylva_values["default"].grad
    assert error(got, dense_blocks(base.weight.grad, mask), base.weight.grad) < 1e-5


@pytest.mark.parametrize(
    "activate", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), lambda y: y.mul_(2)]
)
def test_an_activation_in_place_after_the_layer(activate):
    mask = LayerMask((6, 5), 4, torch.tensor([[0, 1], [1, 0]]))
    base, layer = make_layer(mask)
    gradients = []
    for module in (base, layer):
        x = random((3, 5)).requires_grad_()
        activate(module(x)).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    got = layer.sylva_values["default"].grad
    assert error(got, dense_blocks(base.weight.grad, mask), base.weight.grad) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    mask = LayerMask((6, 5), 4, torch.tensor([[0, 1], [1, 0]]))
    gradients = []
    for wrapped in (False, True):
        _, layer = make_layer(mask)
        x = random((3, 5)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.square().sum().backward()
        gradients.append(layer.sylva_values["default"].grad)
    assert torch.equal(*gradients)


def test_under_autocast_the_gradient_is_float32():
    mask = LayerMask((6, 5), 4, torch.tensor([[0, 1], [1, 0]]))
    base, layer = make_layer(mask)
    x = random((30, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    base(x).square().sum().backward()
    got = layer.sylva_values["default"].grad
    assert got.dtype == torch.float32
    assert error(got, dense_blocks(base.weight.grad, mask), base.weight.grad) < 0.05


class Operations(TorchDispatchMode):
    """Notes the operations that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [torch.no_grad, torch.inference_mode])
def test_inference_runs_the_base_layers_operations_and_no_other(change):
    base, layer = make_layer(LayerMask((6, 5), 4, torch.tensor([[0, 1], [1, 0]])))
    x = random((2, 3, 5))
    layer(x)
    with change(), Operations() as of_base:
        base(x)
    with change(), Operations() as of_layer:
        layer(x)
    assert of_layer.names == of_base.names


@pytest.mark.parametrize("shape", [(8, 8), (6, 5)])
def test_what_is_known_of_a_mask_is_not_worked_out_again_in_each_step(shape):
    _, layer = make_layer(LayerMask(shape, 4, torch.tensor([[0, 1], [1, 0]])))
    model, x = nn.Sequential(layer), random((3, shape[1]))
    optimizer = SparseAdamW(model, lr=0.1)
    for _ in range(3):
        with Operations() as noted:
            model(x).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()
    made = {"arange", "unique_dim", "_unique2", "nonzero", "index", "index_put_"}
    assert not made.intersection(noted.names)
    assert noted.names.count("mm") == 1
    assert noted.names.count("index_copy_") <= 4


def test_nothing_is_kept_for_backward_without_gradients():
    mask = LayerMask((6, 5), 4, torch.tensor([[0, 1]]))
    _, layer = make_layer(mask)
    with torch.no_grad():
        assert layer(random((3, 5))).grad_fn is None
    layer.sylva_values.requires_grad_(False)
    assert layer(random((3, 5))).grad_fn is None


def test_hooks_of_the_base_layer_still_run():
    mask = LayerMask((6, 5), 4, torch.tensor([[0, 1]]))
    _, layer = make_layer(mask)
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    layer(random((3, 5)))
    assert seen == [1]


def test_the_weight_is_up_to_date_whenever_it_is_looked_at():
    mask = LayerMask((4, 4), 4, torch.tensor([[0, 0]]))
    _, layer = make_layer(mask)
    values = layer.sylva_values["default"]
    with torch.no_grad():
        values.fill_(2)
    assert bool((layer.weight == 2).all())
    with torch.no_grad():
        values.fill_(3)
    assert bool((layer.state_dict()["base_layer.weight"] == 3).all())
    # A change that autograd does not count is seen by a forced write.
    values.data.fill_(4)
    layer.sync(force=True)
    assert bool((layer.base_layer.weight == 4).all())
    values.data = torch.full((1, 4, 4), 5.0)
    assert bool((layer.weight == 5).all())
    layer.sylva_values["default"] = nn.Parameter(torch.full((1, 4, 4), 6.0))
    assert bool((layer.weight == 6).all())
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    assert bool((layer.weight == 6).all())


@pytest.mark.parametrize("how", ["trained from the start", "frozen first", "copied"])
def test_values_changed_before_the_backward_pass_are_noticed(how):
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0], [1, 1]]))
    _, layer = make_layer(mask)
    values = layer.sylva_values["default"]
    values.requires_grad_(how != "frozen first")
    x = random((3, 4), torch.float32, 1)
    layer(x)
    values.requires_grad_(True)
    if how == "copied":
        layer = copy.deepcopy(layer)
        values = layer.sylva_values["default"]
    y = layer(x)
    with torch.no_grad():
        values.add_(1)
    with pytest.raises(RuntimeError, match="without being written"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["force", "mode"])
def test_writing_uncounted_changes_before_the_backward_pass_is_noticed(how):
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0], [1, 1]]))
    _, layer = make_layer(mask)
    y = layer(random((3, 4)).requires_grad_())
    layer.sylva_values["default"].data.add_(1)
    if how == "mode":
        layer.eval()
    layer.sync(force=how == "force")
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_writing_in_inference_mode():
    mask = LayerMask((4, 4), 2, torch.tensor([[0, 0], [1, 1]]))
    base, layer = make_layer(mask)
    with torch.no_grad():
        layer.sylva_values["default"].add_(1)
    with torch.inference_mode():
        layer(random((2, 4)))
    layer(random((2, 4))).sum().backward()
    layer.restore_()
    assert torch.equal(layer.base_layer.weight, base.weight)


def test_several_adapters_share_a_layer():
    a = LayerMask((6, 6), 2, torch.tensor([[0, 0], [1, 1]]))
    b = LayerMask((6, 6), 3, torch.tensor([[0, 0], [0, 1], [1, 1]]))
    base, layer = make_layer(a)
    layer.add("other", b)
    shown = {}
    for name in ("default", "other"):
        with torch.no_grad():
            layer.sylva_values[name].add_(1.0)
        layer.embedded = name
        layer.sync()
        shown[name] = layer.base_layer.weight.detach().clone()
        changed = shown[name] != base.weight
        assert torch.equal(changed, layer.mask(name).dense())
    for name in ("default", "other", None, "other", None):
        layer.embedded = name
        layer.sync()
        assert torch.equal(layer.base_layer.weight, shown.get(name, base.weight))


def test_a_layer_says_what_it_holds():
    _, layer = make_layer(LayerMask((8, 8), 4, torch.tensor([[0, 0], [1, 1]])))
    assert "2 blocks of 4×4 (50.0%)" in repr(layer)
    assert (layer.out_features, layer.in_features) == (8, 8)
    assert layer.bias is layer.base_layer.bias


def test_original_blocks_are_known_only_while_values_are_written():
    _, layer = make_layer(LayerMask((8, 8), 4, torch.tensor([[0, 0]])))
    with pytest.raises(RuntimeError, match="sync"):
        layer.original()
    sync(layer)
    assert torch.equal(layer.original(), layer.sylva_values["default"])


def test_only_the_tables_are_buffers():
    # DDP would send anything else to every rank before each forward pass.
    _, layer = make_layer(LayerMask((8, 8), 4, torch.tensor([[0, 0]])))
    layer(random((2, 8)))
    assert [name for name, _ in layer.named_buffers()] == ["sylva_indices.default"]


def test_a_gradient_that_is_there_is_added_to_in_place(monkeypatch):
    mask = LayerMask((40, 40), 16, torch.tensor([[0, 1], [2, 0], [2, 2]]))
    layer, twin = (make_layer(mask)[1] for _ in range(2))
    values, others = (each.sylva_values["default"] for each in (layer, twin))
    targets = []

    def note(*operands, out):
        targets.append(out)
        return block_sddmm(*operands, out=out)

    for seed in range(3):
        x = random((9, 40), seed=seed)
        twin(twin(x)).square().sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr("sylva_train.layers.gradient.block_sddmm", note)
            with accumulating():
                loss = layer(layer(x)).square().sum()
            loss.backward()
        assert error(values.grad, others.grad, others.grad) <= 1e-6
    # Both of the layer's uses, but for the first pass.
    assert targets[:2] == [None, None]
    assert len(targets) == 6
    assert all(target is values.grad for target in targets[2:])


def test_a_gradient_that_a_hook_looks_at_is_left_to_autograd():
    mask = LayerMask((40, 40), 16, torch.tensor([[0, 1], [2, 0], [2, 2]]))
    base, layer = make_layer(mask)
    values, x = layer.sylva_values["default"], random((9, 40))
    seen = []
    for _ in range(2):
        with accumulating():
            loss = layer(x).square().sum()
        hook = values.register_hook(seen.append)
        loss.backward()
        hook.remove()
    base(x).square().sum().backward()
    for gradient in seen:
        expected = dense_blocks(base.weight.grad, mask)
        assert error(gradient, expected, base.weight.grad) <= TOLERANCE[torch.float32]
    # What sees to it that the weight showed the values is not left out.
    with accumulating():
        loss = layer(x).square().sum()
    with torch.no_grad():
        values += 1
    with pytest.raises(RuntimeError, match="without being written"):
        loss.backward()


@pytest.mark.parametrize("hooked", [False, True])
def test_replicas_of_data_parallel_show_the_values_and_give_their_gradient(hooked):
    model, masks = two_layers()
    embed(model, masks)
    layer = next(iter(embedded_layers(model).values()))
    if hooked:
        layer.base_layer.register_forward_hook(lambda _, __, y: 2 * y)
    values = layer.sylva_values["default"]
    # As `torch.nn.parallel.replicate` does: tensors are copied first, values by autograd.
    weight, copied = layer.base_layer.weight.detach().clone(), values * 1
    with torch.no_grad():
        values += 1.0
        copied += 1.0
    replica = layer._replicate_for_data_parallel()
    for name in ("base_layer", "sylva_values", "sylva_indices"):
        setattr(replica, name, getattr(layer, name)._replicate_for_data_parallel())
    replica.base_layer.weight, replica.base_layer.bias = weight, layer.bias
    replica.sylva_values.default = copied
    x = random((5, layer.in_features))
    y = replica(x)
    assert torch.equal(y, layer(x))
    (found,) = torch.autograd.grad(y.square().sum(), values)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), values)
    assert torch.equal(found, expected)
