"""Which kernel runs, and how compiled code sees it."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from sylva_train._checks import ConfigError
from sylva_train.kernels import block_sddmm, check_kernels, dispatch
from sylva_train.kernels.capture import never_ran
from tests.sylva_train.models import random

CPU = torch.device("cpu")
#: Stands for a GPU wherever nothing is computed on it.
GPU = torch.device("cuda")


@pytest.fixture
def problem():
    indices = torch.tensor([[0, 1], [1, 0], [2, 2]])
    return random((9, 40), seed=0), random((9, 35), seed=1), indices, 16


class Kernel:
    """Stands for a Triton module."""

    INTERPRETED = False

    def __init__(self, outcome=0.5):
        self.outcome, self.calls = outcome, 0

    def supports(self, *operands):
        return operands[1] == 16

    def self_check(self, *_):
        self.calls += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def use(monkeypatch):
    """Replace Triton, with nothing remembered from before."""

    def replace(module):
        monkeypatch.delenv(dispatch.VARIABLE, raising=False)
        monkeypatch.setattr(dispatch, "load", lambda _: module)
        monkeypatch.setattr(dispatch, "_problems", {})
        return module

    return replace


def find(device=GPU, dtype=torch.float32, block=16):
    return dispatch.find_kernel("sddmm", device, dtype, block)


def test_a_cpu_uses_the_reference_and_a_gpu_what_proved_right(use):
    kernel = use(Kernel())
    assert find(CPU) is None
    assert find(GPU) is kernel
    assert find(GPU) is kernel
    assert kernel.calls == 1
    assert find(GPU, torch.float16) is kernel
    assert kernel.calls == 2
    assert find(GPU, block=24) is None


def test_without_triton_the_reference_runs(use):
    use(None)
    assert find() is None


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (3.0, "error is 3 times"),
        (ValueError("no such chip"), "ValueError: no such chip"),
    ],
    ids=["wrong", "fails"],
)
def test_a_kernel_that_does_not_work_is_left_out_with_one_warning(use, outcome, said):
    kernel = use(Kernel(outcome))
    with pytest.warns(RuntimeWarning, match=said):
        assert find() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is None
    assert kernel.calls == 1


class Failing(Kernel):
    """A kernel that proved right, and then fails."""

    INTERPRETED = True

    def block_sddmm(self, *_, **__):
        raise self.outcome


@pytest.fixture
def use_failing(use, monkeypatch):
    def replace(failure):
        kernel = use(Failing(failure))
        found = "sylva_train.kernels.operators.find_kernel"
        monkeypatch.setattr(found, lambda *_: kernel)

    return replace


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("PassManager::run failed"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        IndexError("map::at"),
    ],
    ids=str,
)
@pytest.mark.parametrize("add", [False, True])
def test_a_tile_that_does_not_compile_is_replaced(
    use_failing, monkeypatch, problem, failure, add
):
    dy, x, indices, block = problem
    expected = block_sddmm(*problem) + add
    out = torch.ones_like(expected) if add else None
    use_failing(failure)
    with pytest.warns(RuntimeWarning, match=re.escape(str(failure))):
        assert torch.equal(block_sddmm(dy, x, indices, block, out=out), expected)
    assert str(failure) in dispatch.find_problem("sddmm", CPU, dy.dtype, block)
    monkeypatch.setenv("SYLVA_KERNELS", "triton")
    with pytest.raises(type(failure)):
        block_sddmm(dy, x, indices, block)


def test_no_memory_is_no_reason_to_leave_a_kernel(use_failing, problem):
    use_failing(torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        block_sddmm(*problem)
    assert not dispatch._problems


def test_a_fault_on_the_device_is_raised(monkeypatch):
    failure = RuntimeError("Triton Error [CUDA]: an illegal memory access")
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    assert never_ran(failure, GPU)
    assert waits == [GPU]

    def fault(_):
        raise failure

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        never_ran(ValueError("what came of it"), GPU)
    # To wait would end the capture, and the graph would lack the kernel.
    monkeypatch.setattr("sylva_train.kernels.capture.is_capturing", lambda _: True)
    assert not never_ran(failure, GPU)


def test_the_environment_overrides(use, monkeypatch):
    kernel = use(Kernel())
    monkeypatch.setenv("SYLVA_KERNELS", "torch")
    assert find() is None
    monkeypatch.setenv("SYLVA_KERNELS", "triton")
    assert find() is kernel
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        find(CPU)
    kernel.INTERPRETED = True
    assert find(CPU) is kernel
    monkeypatch.setenv("SYLVA_KERNELS", "fast")
    with pytest.raises(ConfigError, match="'auto', 'triton', 'torch'; got 'fast'"):
        find()


def test_triton_that_is_demanded_has_to_work(use, monkeypatch):
    use(Kernel(2.0))
    monkeypatch.setenv("SYLVA_KERNELS", "triton")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ConfigError, match="does not work for torch"),
    ):
        find()
    use(None)
    monkeypatch.setenv("SYLVA_KERNELS", "triton")
    with pytest.raises(ConfigError, match="pip install"):
        find()


def test_demanded_kernels_compute_the_same(monkeypatch, triton_device, problem):
    dy, x, indices, block = problem
    expected = block_sddmm(dy, x, indices, block)
    monkeypatch.setenv("SYLVA_KERNELS", "triton")
    arguments = [t.to(triton_device) for t in (dy, x, indices)]
    got = block_sddmm(*arguments, block).cpu()
    assert float((got - expected).abs().max()) < 1e-5


def test_every_kernel_can_be_tried(use):
    use(Kernel())
    # Of two kernels, of three dtypes each, for the one size of blocks that is supported.
    assert check_kernels() == 6 * [None]
    use(Kernel(ValueError("no such chip")))
    assert all("no such chip" in problem for problem in check_kernels())
    use(None)
    assert check_kernels() == []


def test_compiled_code_sees_the_operators(problem):
    dy, x, indices, block = problem
    out = torch.zeros((3, block, block))
    operators = torch.ops.sylva
    torch.library.opcheck(operators.block_sddmm.default, (dy, x, indices, block))
    torch.library.opcheck(operators.block_sddmm.default, (dy, x, indices.int(), block))
    arguments = (out, dy, x, indices, block)
    torch.library.opcheck(operators.add_block_sddmm.default, arguments)


@pytest.mark.parametrize("add", [False, True])
def test_compiling_breaks_no_graph(problem, add):
    dy, x, indices, block = problem
    before = torch.ones((3, block, block))

    def run(dy, x):
        out = before.clone() if add else None
        return 2 * block_sddmm(dy, x, indices, block, out=out)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(dy, x), run(dy, x))
