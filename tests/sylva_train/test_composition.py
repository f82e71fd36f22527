"""Embedded models under what users put around them: the same gradients, or a refusal."""

from __future__ import annotations

import copy
import faulthandler
import shutil

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sylva_train.layers import embed, embedded_layers, sync
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from tests.sylva_train.models import (
    dense_blocks,
    error,
    make_batch,
    make_model,
    make_peft,
    random,
    random_masks,
    two_layers,
)

NAMES = ["llama", "bert", "t5"]


def narrow_model(name="llama", seed=0, dtype=torch.float32):
    """A model with blocks in one column of each layer, so that inputs are narrowed."""
    model = make_model(name, seed).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    masks = random_masks(model, block_size=4, fraction=1.0)
    masks = {
        name: LayerMask(m.shape, 4, m.indices[m.indices[:, 1] == i % 2])
        for i, (name, m) in enumerate(masks.items())
    }
    return embed(model, masks)


def values_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, batch, runner=None):
    model.zero_grad()
    (model if runner is None else runner)(**batch).loss.backward()
    return [p.grad.clone() for p in values_of(model)]


def close(first, second, tolerance=1e-6):
    return all(error(a, b, b) <= tolerance for a, b in zip(first, second, strict=True))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, reentrant):
    batch, plain = make_batch(name), narrow_model(name, dtype=torch.float64)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    steps = [SparseAdamW(m, lr=1e-2) for m in (plain, model)]
    for _ in range(3):
        assert close(gradients(model, batch), gradients(plain, batch), 1e-11)
        for optimizer in steps:
            optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_to_bfloat16(name):
    batch, model = make_batch(name), narrow_model(name)
    optimizer = SparseAdamW(model, lr=1e-3)
    for _ in range(2):
        exact = gradients(model, batch)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        got = [p.grad for p in values_of(model)]
        assert all(g.dtype == torch.float32 for g in got)
        got, exact = (torch.cat([g.flatten() for g in some]) for some in (got, exact))
        assert float((got - exact).norm() / exact.norm()) < 0.05
        optimizer.step()


@pytest.fixture
def compiler():
    """A fresh compiler that counts what it compiles."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    yield count
    torch._dynamo.reset()


def compiles(name):
    """Whether the model without blocks is one graph: T5 is not in transformers 5.17."""
    plain = torch.compile(make_model(name), fullgraph=True, backend="eager")
    try:
        plain(**make_batch(name))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "known"), [("llama", False), ("llama", True), ("bert", True), ("t5", True)]
)
def test_compiling_without_a_graph_break(name, known, compiler):
    batch, model = make_batch(name), narrow_model(name)
    if known:
        gradients(model, batch)
        sync(model)
    narrowed = [
        reader.columns is not None
        for layer in embedded_layers(model).values()
        for reader in layer._readers.values()
    ]
    assert any(narrowed) is known
    if not compiles(name):
        pytest.skip("this transformers' own model has graph breaks")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    optimizer = SparseAdamW(model, lr=1e-2)
    for _ in range(3):
        got = gradients(model, batch, compiled)
        assert close(got, gradients(copy.deepcopy(model), batch))
        optimizer.step()
    assert compiler.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiling_to_native_code():
    torch._dynamo.reset()
    model, masks = two_layers()
    embed(model, masks)
    x = random((4, 10))
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            got = torch.autograd.grad(compiled(x).square().sum(), values_of(model))
            right = torch.autograd.grad(model(x).square().sum(), values_of(model))
            assert close(got, right, 1e-5)
            sync(model)
    torch._dynamo.reset()


def test_compiling_a_peft_model(compiler):
    batch, model = make_batch("llama"), make_peft("llama")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert close(gradients(model, batch, compiled), gradients(model, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiling_with_checkpoints(reentrant, compiler):
    model, masks = two_layers()
    embed(model, masks)

    def run(x):
        return checkpoint(model, x, use_reentrant=reentrant).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    x = random((4, 10)).requires_grad_()
    for _ in range(2):
        found = []
        for function in (compiled, run):
            model.zero_grad()
            function(x).backward()
            found.append([p.grad for p in values_of(model)])
        assert close(*found)
        sync(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {}), (torch.optim.AdamW, {"fused": True}), (SparseAdamW, {})],
)
def test_a_compiled_forward_pass_sees_every_step(kind, options, compiler):
    model, masks = two_layers()
    embed(model, masks)
    parameters = model if kind is SparseAdamW else values_of(model)
    optimizer = kind(parameters, lr=0.05, **options)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = random((4, 10))
    for _ in range(3):
        y = compiled(x)
        assert torch.allclose(y, model(x), atol=1e-6)
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
    assert compiler.frame_count == 1


def test_a_compiled_forward_pass_with_stale_weights_is_found_out(compiler):
    model, masks = two_layers()
    embed(model, masks)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = random((4, 10))
    compiled(x).sum().backward()
    with torch.no_grad():
        for p in values_of(model):
            p.sub_(0.1 * p.grad)
    with pytest.raises(RuntimeError, match="never between a forward"):
        compiled(x).sum().backward()
    sync(model)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    compiled(x).sum().backward()
    # A change of mode writes as well.
    with torch.no_grad():
        for p in values_of(model):
            p.mul_(2)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(x), copy.deepcopy(model)(x), atol=1e-6)


@pytest.mark.parametrize("part", ["all", "trained"])
def test_a_compiled_forward_pass_sees_a_loaded_state(part, compiler):
    """As `Trainer` loads one when it resumes; it compiles before that, and traces after."""
    model, masks = two_layers()
    embed(model, masks)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for p in values_of(trained):
            p.mul_(2)
    state = trained.state_dict()
    if part == "trained":
        state = {name: t for name, t in state.items() if "sylva_values" in name}
    x = random((4, 10))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(2):
        model.load_state_dict(state, strict=part == "all")
        assert torch.allclose(compiled(x), trained(x), atol=1e-6)
    compiled(x).sum().backward()


def test_a_step_inside_the_backward_pass():
    model, masks = two_layers()
    embed(model, masks)
    expected = copy.deepcopy(model)
    x = random((4, 10))
    for p in values_of(model):
        optimizer = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
    plain = torch.optim.SGD(values_of(expected), lr=0.1)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        plain.zero_grad()
        expected(x).square().sum().backward()
        plain.step()
    assert equal(values_of(model), values_of(expected))
    assert torch.equal(model(x), expected(x))


def test_a_layer_used_twice_in_a_pass():
    model, masks = two_layers()
    embed(model, masks)
    layer, dense = model[0], nn.Linear(10, 12)
    dense.load_state_dict(layer.base_layer.state_dict())
    mask = layer.mask()
    first, second = random((3, 10)), random((5, 10), seed=1)
    for module in (layer, dense):
        (module(first).square().sum() + module(second).tanh().sum()).backward()
    expected = dense_blocks(dense.weight.grad, mask)
    got = layer.sylva_values["default"].grad
    assert error(got, expected, dense.weight.grad) < 1e-5


@pytest.mark.parametrize("of", ["values", "input"])
@pytest.mark.parametrize("embedded", [["0", "2"], ["2"]])
def test_second_derivatives_are_refused(of, embedded):
    model, masks = two_layers()
    embed(model, {name: masks[name] for name in embedded})
    model[0].requires_grad_(True)
    x = random((4, 10)).requires_grad_()
    # The output's gradient is a constant: the last layer's share is the weight's alone.
    source = x if of == "input" else model[2].sylva_values["default"]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(model(x).sum(), source, create_graph=True)


def test_a_hessian_beside_a_trained_head_is_refused():
    """The head's part of it is there, and autograd asks no node for the blocks' part."""
    model, masks = two_layers()
    embed(model, {"0": masks["0"]})
    model[2].requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(random((4, 10))).square().sum()

    def hessian_times_ones():
        grads = torch.autograd.grad(loss, trained, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in grads), trained)

    with pytest.raises(RuntimeError, match="second derivatives"):
        hessian_times_ones()


def test_second_derivatives_of_the_head_alone():
    model, masks = two_layers()
    embed(model, {"0": masks["0"]})
    model[2].requires_grad_(True)
    head, x = model[2].weight, random((4, 10))
    (g,) = torch.autograd.grad(model(x).square().sum(), head, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), head)
    inner = model[:2](x).detach()
    assert torch.allclose(h, 2 * (inner.T @ inner.sum(1))[None].expand_as(h), atol=1e-4)


@pytest.mark.parametrize("what", ["input", "values", "all", "samples", "models"])
def test_transforms_of_functions_are_refused(what):
    model, masks = two_layers()
    embed(model, masks)
    x = random((4, 10))
    before = model(x)
    own = {n: p.detach() for n, p in model.named_parameters()}
    values = {n: p for n, p in own.items() if "values" in n}

    def loss(own, x):
        return torch.func.functional_call(model, own, (x,)).sum()

    transform, first = {
        "input": (torch.func.grad(loss, 1), {}),
        "values": (torch.func.grad(loss), values),
        "all": (torch.func.grad(loss), own),
        "samples": (torch.vmap(torch.func.grad(loss), (None, 0)), own),
        "models": (
            torch.no_grad()(torch.vmap(loss, (0, None))),
            {n: p[None] for n, p in own.items()},
        ),
    }[what]
    with pytest.raises(RuntimeError, match="transforms cannot go through"):
        transform(first, x)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        assert torch.allclose(torch.vmap(model)(x), before)


def test_gradients_of_micro_batches_add_up():
    model = narrow_model("llama", dtype=torch.float64)
    optimizer = SparseAdamW(model, lr=1e-2)
    x = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        whole = gradients(model, {"input_ids": x, "labels": x})
        model.zero_grad()
        for part in x.split(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        assert close([p.grad for p in values_of(model)], whole, 1e-12)
        optimizer.step()


def test_frozen_values_and_passes_without_gradients():
    model = narrow_model("llama")
    batch = make_batch("llama")
    expected = model(**batch).logits.detach()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, expected)
    frozen = next(iter(embedded_layers(model).values()))
    frozen.sylva_values.requires_grad_(False)
    got = gradients(model, batch)
    assert frozen.sylva_values["default"].grad is None
    frozen.sylva_values.requires_grad_(True)
    assert close(got, gradients(model, batch)[1:])
    model.requires_grad_(False)
    assert not model(**batch).loss.requires_grad


def train_rank(rank, ranks, port, path):
    """Three steps on a rank's part of a batch; rank 0 saves the values."""
    faulthandler.dump_traceback_later(120, exit=ranks > 1)
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
        )
    model = narrow_model("llama", dtype=torch.float64)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = SparseAdamW(model, lr=1e-2)
    x = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    x = x.chunk(ranks)[rank]
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    if rank == 0:
        torch.save([p.detach() for p in values_of(model)], path)
    if ranks > 1:
        # What is left of DDP would wait for ranks that have gone.
        torch.distributed.barrier()
        del wrapped
        torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_rank, (2, port, tmp_path / "two"), nprocs=2)
    train_rank(0, 1, port, tmp_path / "one")
    two, one = (torch.load(tmp_path / name) for name in ("two", "one"))
    assert close(two, one, 1e-7)


def test_a_thousand_steps_in_bfloat16_stay_beside_those_in_float32():
    # The weights that forward uses are bfloat16 in both; the reference keeps a dense
    # float32 master of the whole weight and rounds it before each pass.
    base = nn.Linear(32, 24)
    base.weight.data = random((24, 32)) / 8
    mask = LayerMask((24, 32), 8, torch.tensor([[0, 1], [1, 3], [2, 0]]))
    inside = mask.dense()
    truth = base.weight.detach() + 0.1 * random((24, 32), seed=9) * inside
    master = base.weight.detach().to(torch.bfloat16).float().requires_grad_()
    bias = base.bias.detach().to(torch.bfloat16)
    frozen = master.detach().clone()
    model = embed(nn.Sequential(base).to(torch.bfloat16), {"0": mask})
    ours = SparseAdamW(model, lr=1e-4, weight_decay=0.0)
    reference = torch.optim.AdamW([master], lr=1e-4, weight_decay=0.0)
    for step in range(1000):
        x = random((64, 32), torch.bfloat16, step)
        target = nn.functional.linear(x.float(), truth, bias.float())
        (model(x).float() - target).square().mean().backward()
        weight = torch.where(inside, master, frozen)
        rounded = weight + (weight.to(torch.bfloat16).float() - weight).detach()
        y = nn.functional.linear(x, rounded.to(torch.bfloat16), bias)
        (y.float() - target).square().mean().backward()
        for optimizer in (ours, reference):
            optimizer.step()
            optimizer.zero_grad()
    values = model[0].sylva_values["default"].detach()
    expected = dense_blocks(master.detach(), mask)
    moved = expected - dense_blocks(frozen, mask)
    # Steps of 1e-4 are below bfloat16's spacing of most weights, and add up all the same.
    assert float(moved.abs().median()) > 0.01
    assert error(values, expected, moved) < 0.05
