"""Compile the kernels for a GPU that need not be there: run by `test_triton_compiles`.

Arguments are as a layer of 4096 × 4096 in bfloat16 passes them: addresses, sizes and
token strides are multiples of 16, columns stand side by side.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sylva_train.kernels import triton_adamw, triton_programs, triton_sddmm

TARGET = GPUTarget("cuda", 90, 32)


def compile_for_gpu(kernel, types, constants, **options):
    """Return what the compiler made: PTX, and the shared memory and stack it needs."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    even = [name for name, kind in types.items() if kind[0] == "*" or "stride" in name]
    even += [n for n in ("outputs", "inputs", "tokens_per_split", "size") if n in types]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, signature, constants, hints)
    made = compile_kernel(source, target=TARGET, options=options)
    return {
        "ptx": made.asm["ptx"],
        "shared": made.metadata.shared,
        "stack": stack(made.asm["cubin"]),
    }


def stack(binary):
    """Return the bytes of each thread that are not in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


def sddmm(
    rows=1,
    columns=2,
    even=True,
    contiguous="dy_column x_column",
    kind="bf16",
    precision="ieee",
    **options,
):
    tensors = ["dy", "x", "result", "members", "groups", "pairs", "slots"]
    kinds = 2 * [f"*{kind}"] + ["*fp32"] + 4 * ["*i32"]
    types = {f"{name}_ptr": kind for name, kind in zip(tensors, kinds, strict=True)}
    ones = {f"{name}_stride": 1 for name in contiguous.split()}
    numbers = triton_sddmm.sddmm_kernel.arg_names[len(types) :]
    types |= {n: "i32" for n in numbers if n.islower() and n not in ones}
    constants = ones | {"BLOCK": 64, "ROWS": rows, "COLUMNS": columns, "TOKENS": 64}
    constants |= {"ADD": True, "FAR": False, "EVEN": even, "WIDEN": False}
    constants |= {"PRECISION": precision}
    options |= {"num_warps": triton_sddmm.warps(rows, columns, 64), "num_stages": 3}
    return compile_for_gpu(triton_sddmm.sddmm_kernel, types, constants, **options)


def sddmm_large():
    return sddmm(rows=2, even=False, maxnreg=triton_sddmm.FEW)


def sddmm_largest():
    return sddmm(rows=2, columns=4, contiguous="dy_token x_column")


def sddmm_half():
    return sddmm(rows=2, kind="fp16")


def sddmm_tf32():
    return sddmm(columns=1, kind="fp32", precision="tf32")


def add_splits():
    types = {
        "parts_ptr": "*fp32",
        "result_ptr": "*fp32",
        "size": "i32",
        "splits": "i32",
    }
    kernel = triton_sddmm.add_splits_kernel
    return compile_for_gpu(kernel, types, {"ADD": True, "CHUNK": 1024})


def prepare():
    types = dict.fromkeys(["steps_ptr", "factor_ptr", "found_inf_ptr"], "*fp32")
    types |= {"group_ptr": "*i32", "gradients_ptr": "*i64", "options_ptr": "*fp64"}
    types |= {"scalars_ptr": "*fp32", "layers": "i32"}
    sizes = {"LAYERS": triton_adamw.LAYERS, "SCALARS": triton_adamw.SCALARS}
    return compile_for_gpu(triton_programs.prepare_kernel, types, sizes)


TABLES = {"table_ptr": "*i64", "owners_ptr": "*i32", "gradients_ptr": "*i64"}
SIZES = {"CHUNK": triton_adamw.CHUNK, "FIELDS": triton_adamw.FIELDS, "ALIGNED": True}


def adamw(eight_bit=False):
    constants = SIZES | {"BLOCK": 64, "TO_BASE": True, "SCALARS": triton_adamw.SCALARS}
    constants |= {"EIGHT_BIT": eight_bit, "GROUP": triton_adamw.GROUP, "LINES": True}
    types = TABLES | {"scalars_ptr": "*fp32"}
    return compile_for_gpu(triton_programs.adamw_kernel, types, constants)


def adamw_of_8_bits():
    return adamw(eight_bit=True)


def square():
    types = TABLES | {"sums_ptr": "*fp32"}
    return compile_for_gpu(triton_programs.square_kernel, types, SIZES)


if __name__ == "__main__":
    kernels = [sddmm, sddmm_large, sddmm_largest, sddmm_half, sddmm_tf32]
    kernels += [add_splits, prepare]
    kernels += [adamw, adamw_of_8_bits, square]
    json.dump({kernel.__name__: kernel() for kernel in kernels}, sys.stdout)
