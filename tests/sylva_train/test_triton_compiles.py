"""The kernels compile for a GPU, also where there is none: the interpreter forgives more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """PTX and shared memory of each kernel, for compute capability 9.0."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))
    }
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    # A process of its own: the interpreter cannot be left once Triton is imported.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.sylva_train.compile_kernels"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "kernel", ["sddmm", "sddmm_large", "sddmm_largest", "sddmm_half"]
)
def test_products_use_tensor_cores_and_copies_of_16_bytes(compiled, kernel):
    ptx = compiled[kernel]["ptx"]
    assert "wgmma.mma_async" in ptx
    copies = [line for line in ptx.splitlines() if "shared.global" in line]
    assert copies
    assert all("cp.async.cg" in line and "0x10" in line for line in copies)


def test_tensor_cores_read_no_operand_from_registers(compiled):
    """Which assemblers of CUDA 12 give away before it is read, on a Hopper.

    As https://github.com/triton-lang/triton/pull/11781 tells; operands lie in shared
    memory, or the results would have to be looked at for every tile.
    """
    for kernel, made in compiled.items():
        products = re.findall(r"wgmma\.mma_async[^;]*;", made["ptx"])
        assert bool(products) == kernel.startswith("sddmm")
        assert not [p for p in products if re.search(r"\}\s*,\s*\{", p)]


def test_all_is_kept_in_registers(compiled):
    assert {name: made["stack"] for name, made in compiled.items()} == dict.fromkeys(
        compiled, 0
    )


def test_the_search_knows_the_shared_memory_of_a_configuration(compiled):
    # (rows + columns) · block · tokens · bytes · stages, as `triton_sddmm.prune` has it
    for kernel, sides in (
        ("sddmm", 1 + 2),
        ("sddmm_large", 2 + 2),
        ("sddmm_largest", 6),
    ):
        assert compiled[kernel]["shared"] == sides * 64 * 64 * 2 * 3


@pytest.mark.parametrize("kernel", ["adamw", "adamw_of_8_bits", "square", "add_splits"])
def test_values_are_read_and_written_in_wide_pieces(compiled, kernel):
    lines = compiled[kernel]["ptx"].splitlines()
    assert any("ld.global.v4" in line for line in lines)
    # Neither codes nor weights of 16 bits one at a time.
    moves = [line for line in lines if "ld.global" in line or "st.global" in line]
    narrow = (".b8", ".b16", ".u8", ".u16")
    assert not [line for line in moves if any(kind in line for kind in narrow)]
    if kernel == "adamw":
        assert sum("ld.global.v4" in line for line in lines) >= 8
        assert sum("st.global.v4" in line for line in lines) >= 8


def test_steps_are_counted_in_float64(compiled):
    ptx = compiled["prepare"]["ptx"]
    assert "fma.rn.f64" in ptx
    assert compiled["add_splits"]["shared"] == 0
