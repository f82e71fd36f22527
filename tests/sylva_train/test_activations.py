"""What layers keep of their inputs for the backward pass, and for how long."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sylva_train.layers import embed, embedded_layers, inputs
from sylva_train.masks import LayerMask
from tests.sylva_train.models import dense_blocks, error, layer_masks, random


class Shared(nn.Module):
    """Three layers that read one tensor, as query, key and value do, and one more."""

    def __init__(self, features=16, held=False, bias=True):
        super().__init__()
        self.first = nn.Linear(features, features, bias=bias)
        self.readers = nn.ModuleList(nn.Linear(features, 12) for _ in range(3))
        self.last = nn.Linear(12, 8)
        self.held = held

    def forward(self, x):
        y = self.first(x)
        # The output of tanh is kept by tanh itself; that of gelu is not.
        h = torch.tanh(y) if self.held else nn.functional.gelu(y)
        q, k, v = (layer(h) for layer in self.readers)
        return self.last(nn.functional.gelu(q * k + v))


def shared_model(columns, held=False, dtype=torch.float32):
    """Blocks of 2 in the given block columns of each of the three readers."""
    model = Shared(held=held)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, dtype, seed)
    masks = {
        f"readers.{i}": LayerMask((12, 16), 2, torch.tensor([(i, c) for c in some]))
        for i, some in enumerate(columns)
    }
    return embed(model, masks), masks


def saved_shapes(model, x):
    """Shapes of what the blocks' gradients keep: each storage once."""
    found = {}

    def pack(t):
        found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return y, [tuple(t.shape) for p, t in found.items() if p not in own]


def step(model):
    """Count as a step of an optimizer, without changing a value."""
    for layer in embedded_layers(model).values():
        for values in layer.sylva_values.values():
            torch.autograd.graph.increment_version(values)


def test_layers_that_read_one_tensor_keep_the_union_of_their_columns_once():
    model, _ = shared_model([[0, 3], [3, 5], [0]])
    x = random((7, 16))
    y, first = saved_shapes(model, x)
    # Who reads what is not known yet: the input as it is, for all three.
    assert first.count((7, 16)) == 1
    y.sum().backward()
    step(model)
    _, later = saved_shapes(model, x)
    assert later.count((7, 6)) == 1
    assert (7, 16) not in later


def test_the_first_pass_over_a_step_is_the_same_as_every_other():
    # Or recomputing a checkpoint would not find what was saved.
    model, _ = shared_model([[0, 3], [3, 5], [0]])
    x = random((7, 16))
    shapes = [saved_shapes(model, x)[1] for _ in range(3)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_copy_of_nearly_all_columns_is_not_made():
    model, _ = shared_model([[0, 1, 2], [3, 4], [5, 6]])
    x = random((7, 16))
    saved_shapes(model, x)
    step(model)
    assert saved_shapes(model, x)[1].count((7, 16)) == 1


def test_an_input_that_is_kept_anyway_is_not_copied():
    for held in (False, True):
        model, _ = shared_model([[0], [0], [0]], held=held)
        model.first.weight.requires_grad_(True)
        x = random((7, 16))
        for _ in range(2):
            y, shapes = saved_shapes(model, x)
            y.sum().backward()
            step(model)
        assert ((7, 2) in shapes) is not held


def test_under_autocast_inputs_are_kept_in_the_dtype_of_the_product():
    model, _ = shared_model([[0, 3], [3, 5], [0]])
    x = random((7, 16))
    found = []
    for _ in range(2):
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: found.append((tuple(t.shape), t.dtype)) or t, lambda t: t
            ),
        ):
            # Autocast's own copies are of whole inputs; float32 ones would be ours.
            norm = nn.functional.layer_norm(x, (16,))
            for layer in model.readers:
                layer(norm)
        step(model)
    assert ((7, 6), torch.bfloat16) in found
    assert ((7, 16), torch.float32) not in found


def test_an_input_changed_between_two_readers_is_copied_again():
    mask = LayerMask((4, 8), 2, torch.tensor([[0, 1]]))
    model = embed(
        nn.ModuleList(nn.Linear(8, 4) for _ in range(2)), {"0": mask, "1": mask}
    )
    for _ in range(2):
        x = random((5, 8))
        first = model[0](x)  # alive, and its copy of the columns with it
        # Frozen weights do not need it: nothing of autograd's is in the way.
        x.mul_(2)
        (got,) = torch.autograd.grad(
            model[1](x).sum(), [model[1].sylva_values["default"]]
        )
        assert first.requires_grad
        step(model)
    expected = x.sum(0).expand(4, 8)
    assert error(got, dense_blocks(expected, mask), expected) < 1e-6


def test_nothing_of_an_input_outlives_the_pass():
    model, _ = shared_model([[0, 3], [3, 5], [0]])
    read, copies = [], []

    def note(_layer, args, _y):
        read.append(weakref.ref(args[0]))
        copies.extend(inputs._inputs.get(args[0]).copies.values())

    for layer in model.readers:
        layer.register_forward_hook(note)
    for _ in range(2):
        model(random((7, 16))).sum().backward()
        gc.collect()
        assert all(ref() is None for ref in [*read, *copies])
        assert not len(inputs._inputs)
        step(model)
    assert len(copies) == 3


def test_a_static_batch_does_not_hold_copies():
    model = embed(
        nn.Sequential(nn.Linear(8, 4)),
        {"0": LayerMask((4, 8), 2, torch.tensor([[0, 1]]))},
    )
    x = random((5, 8))
    for _ in range(3):
        model(x).sum().backward()
        step(model)
        assert all(c() is None for c in inputs._inputs.get(x).copies.values())


def test_layers_without_trainable_blocks_add_nothing_to_the_graph():
    model, _ = shared_model([[0], [0], [0]])
    layer = model.readers[0]
    x = random((3, 16))
    assert layer(x).requires_grad
    layer.sylva_values.requires_grad_(False)
    assert layer(x).grad_fn is None
    y = layer(x.requires_grad_())
    assert "BlockGradient" not in type(y.grad_fn).__name__
    layer.sylva_values.requires_grad_(True)
    empty = embed_one(LayerMask((4, 8), 2, torch.zeros((0, 2))))
    assert empty(random((3, 8))).grad_fn is None


def embed_one(mask, dtype=torch.float32):
    from sylva_train.layers import SparseEmbeddedLinear

    layer = SparseEmbeddedLinear(nn.Linear(mask.shape[1], mask.shape[0]).to(dtype))
    layer.add("default", mask)
    layer.embedded = "default"
    return layer


def test_no_input_gradient_is_computed_below_the_first_trained_layer(monkeypatch):
    model, _ = shared_model([[0], [0], [0]])
    seen = []
    model.first.register_full_backward_hook(lambda *_: seen.append("first"))
    y = model(random((3, 16)))
    y.sum().backward()
    assert seen == []
    names, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        names.add(node.name())
        queue += [n for n, _ in node.next_functions if n is not None]
    # The readers' own products have no gradient to compute; the last layer's has.
    assert sum(n.startswith("AddmmBackward") for n in names) == 1


@given(
    st.lists(layer_masks(largest=20, fitting=True), min_size=2, max_size=4),
    st.sampled_from([(5,), (2, 3), ()]),
    st.integers(0, 2**31),
)
def test_gradients_of_layers_with_one_input_are_autograds_at_the_blocks(
    masks, batch, seed
):
    columns = masks[0].shape[1]
    masks = [
        LayerMask(
            (m.shape[0], columns),
            m.block_size,
            m.indices[m.indices[:, 1] * m.block_size < columns],
        )
        for m in masks
    ]
    layers = [embed_one(mask, torch.float64) for mask in masks]
    # The first step keeps whole inputs, the later ones what the group uses.
    for step_ in range(3):
        x = random((*batch, columns), torch.float64, seed + step_)
        weights = [layer.weight.detach().clone().requires_grad_() for layer in layers]
        for layer, weight in zip(layers, weights, strict=True):
            (nn.functional.linear(x, weight, layer.bias) ** 3).sum().backward()
        outputs = [layer(x) for layer in layers]
        for y in outputs:
            if y.requires_grad:
                (y**3).sum().backward()
        for layer, mask, weight in zip(layers, masks, weights, strict=True):
            values = layer.sylva_values["default"]
            if not len(mask):
                assert values.grad is None
                continue
            blocks = dense_blocks(weight.grad, mask)
            assert error(values.grad, blocks, weight.grad) < 1e-12
            values.grad = None
            with torch.no_grad():
                values.mul_(1.1)


def test_threads_that_share_a_model_do_not_mix_up_their_inputs():
    model, _ = shared_model([[0, 3], [3, 5], [0]], dtype=torch.float64)
    values = [layer.sylva_values["default"] for layer in model.readers]

    def gradients(seed):
        x = random((50, 16), torch.float64, seed)
        return torch.autograd.grad(model(x).square().sum(), values)

    expected = [gradients(seed) for seed in range(4)]
    step(model)
    found = [None] * 4

    def work(seed):
        for _ in range(20):
            found[seed] = gradients(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, right in zip(found, expected, strict=True):
        assert all(
            torch.allclose(a, b, rtol=1e-12, atol=1e-12)
            for a, b in zip(got, right, strict=True)
        )


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 2)])
def test_readers_with_other_block_sizes_keep_their_own(sizes):
    model = Shared()
    masks = {
        f"readers.{i}": LayerMask((12, 16), b, torch.tensor([[0, 1]]))
        for i, b in enumerate(sizes)
    }
    embed(model, masks)
    x = random((7, 16))
    dense = Shared()
    dense.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if "sylva" not in k}
    )  # fmt: skip
    dense(x).square().sum().backward()
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        step(model)
    for i, mask in enumerate(masks.values()):
        got = model.readers[i].sylva_values["default"].grad
        weight = dense.readers[i].weight.grad
        assert error(got, dense_blocks(weight, mask), weight) < 1e-5
