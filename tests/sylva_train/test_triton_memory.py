"""Kernels touch their tensors' elements alone, and programs keep out of each other's way.

In Triton's interpreter: see `memory_check`. What it finds is tried on kernels with faults.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_train.kernels import BlockState
from sylva_train.kernels.plan import make_plan, tiles
from tests.sylva_train.models import plans_of, random
from tests.sylva_train.operands import DTYPES, LAYOUTS, make_mask, operand

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton.language as tl

from sylva_train.kernels import triton_adamw, triton_sddmm
from tests.sylva_train.memory_check import AccessError, checked

CPU = torch.device("cpu")


@triton.jit
def copy_kernel(source_ptr, target_ptr, size, begin, step, count):
    """Copy ``count`` of four numbers from ``begin + 4 i`` to ``step · i`` in program i."""
    i = tl.program_id(0)
    n = tl.arange(0, 4)
    inside = (n < count) & (4 * i + n < size)
    values = tl.load(source_ptr + begin + 4 * i + n, mask=inside, other=0.0)
    tl.store(target_ptr + step * i + n, values, mask=inside)


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ((7, 0, 4, 4), None),
        ((7, 0, 5, 4), "writes 4 bytes outside"),
        ((8, 0, 4, 4), "reads 4 bytes outside"),
        ((7, -1, 4, 4), "reads 4 bytes outside"),
        ((7, 0, 3, 4), r"program \(1, 0, 0\) writes what .*\(0, 0, 0\)"),
    ],
    ids=["none", "beyond target", "beyond source", "before source", "overlap"],
)
def test_faults_are_found(numbers, fault):
    source, target = torch.arange(9.0)[1:8], torch.zeros(7)
    with checked(source) as memory:
        if fault is None:
            copy_kernel[(2,)](source, target, *numbers)
            assert memory.has_written(target)
        else:
            with pytest.raises(AccessError, match=fault):
                copy_kernel[(2,)](source, target, *numbers)


@pytest.mark.parametrize(
    ("begin", "to", "fault"),
    [(0, 0, None), (0, 4, "reads what"), (4, 0, "writes what")],
)
def test_programs_may_run_in_any_order(begin, to, fault):
    line = torch.arange(12.0)
    with checked(line):
        arguments = line[begin : begin + 8], line[to : to + 8], 8, 0, 4, 4
        if fault is None:
            copy_kernel[(2,)](*arguments)
        else:
            with pytest.raises(AccessError, match=fault):
                copy_kernel[(2,)](*arguments)


def test_memory_without_values_is_not_read():
    scratch, target = torch.empty(8), torch.empty(8)
    with checked(torch.zeros(1)), pytest.raises(AccessError, match="nothing has"):
        copy_kernel[(2,)](scratch, target, 8, 0, 4, 4)
    source = torch.ones(8)
    with checked(source) as memory:
        copy_kernel[(2,)](source, scratch, 8, 0, 4, 3)
        assert not memory.has_written(scratch)
        copy_kernel[(2,)](scratch, target, 8, 0, 4, 3)
        with pytest.raises(AccessError, match="nothing has"):
            copy_kernel[(2,)](scratch, target, 8, 0, 4, 4)


@settings(max_examples=15)
@given(
    block=st.sampled_from([16, 16, 32]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    tokens=st.sampled_from([1, 2, 31, 67]),
    each=st.sampled_from([None, 17, 64]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    add=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_products(block, sizes, share, tokens, each, dtype, layouts, add, seed, data):
    mask = make_mask(sizes, block, share, seed)
    if not len(mask):
        return
    tile = data.draw(st.sampled_from([None, *tiles(block, dtype.itemsize)]))
    with plans_of(tile):
        plan = make_plan(mask.indices, mask.shape, block, dtype.itemsize)
    dy, x = (
        operand(tokens, n, dtype, layout, seed + i, CPU)
        for i, (n, layout) in enumerate(zip(sizes, layouts, strict=True))
    )
    out = torch.ones((len(mask), block, block)) if add else None
    tables = plan.members, plan.groups, plan.pairs, plan.slots
    splits = (-(-tokens // each), each) if each else None
    with checked(dy, x, *tables, *([out] if add else [])) as memory:
        got = triton_sddmm.run_plan(
            plan, dy, x, len(mask), block, out, splits, tune=False
        )
        assert memory.has_written(got)
        assert memory.launches == (2 if splits and splits[0] > 1 else 1)


def make_layer(shape, block, dtype, share, transposed, eight_bit, to_base, seed):
    """A layer of the optimizer, and what it may touch: of the weight, the blocks alone."""
    mask = make_mask(shape, block, share, seed)
    weight = random(shape, seed=seed).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    values, m, v, base = (
        random((len(mask), block, block), seed=seed + i) for i in range(4)
    )
    layer = BlockState(
        values,
        m,
        v.square(),
        mask.indices.int(),
        weight,
        base.to(dtype) if to_base else None,
    )
    if eight_bit:
        layer = triton_adamw.in_8_bits(layer)
    parts = [
        weight[r : r + block, c : c + block] for r, c in (block * mask.indices).tolist()
    ]
    state = [layer.values, layer.exp_avg, layer.exp_avg_sq, layer.base]
    state += [layer.exp_avg_scale, layer.exp_avg_sq_scale, layer.indices, *parts]
    return layer, [tensor for tensor in state if tensor is not None]


@settings(max_examples=15)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3
    ),
    blocks=st.sampled_from([(4,), (16,), (32,), (4, 16, 5)]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    transposed=st.booleans(),
    eight_bit=st.booleans(),
    to_base=st.booleans(),
    missing=st.sampled_from([None, 0, 2]),
    seed=st.integers(0, 2**31),
)
def test_optimizer(
    shapes, blocks, dtypes, transposed, eight_bit, to_base, missing, seed
):
    made = [
        make_layer(
            shape, blocks[i % len(blocks)], dtypes[i], 0.9, transposed, eight_bit, to_base, seed + i
        )
        for i, shape in enumerate(shapes)
    ]  # fmt: skip
    made = [(layer, known) for layer, known in made if len(layer.values)]
    if not made:
        return
    layers = [layer for layer, _ in made]
    gradients = [
        None if i == missing else random(layer.values.shape, seed=seed + i)
        for i, layer in enumerate(layers)
    ]
    steps, one, zero = torch.zeros(len(layers)), torch.ones(()), torch.zeros(())
    options = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1, 1.0]], dtype=torch.float64)
    tables = triton_adamw.Tables(layers, steps)
    tables.set_gradients(gradients)
    known = [tensor for _, state in made for tensor in state]
    known += [g for g in gradients if g is not None]
    known += [tables.table, tables.owners, tables.groups, tables.gradients.tensor]
    with checked(*known, steps, one, zero, options) as memory:
        total = tables.square_norm()
        expected = sum(
            float(g.double().square().sum()) for g in gradients if g is not None
        )
        assert float(total) == pytest.approx(expected, rel=1e-5)
        tables.update(options, one, zero)
        assert memory.launches == 3
