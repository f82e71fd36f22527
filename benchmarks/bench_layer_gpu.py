"""One layer on a GPU: the blocks' gradient, the optimizer, and a whole training step.

* ``gradient``: the Triton kernel, the product of active rows and columns, the dense
  product, and what `block_sddmm` chose; with the rate of useful products; beside what
  PyTorch has for it: a stack of narrow products, `torch.sparse.sampled_addmm` (CSR, in
  float32) and its Triton kernel for BSR, where they run.
* ``optimizer``: all layers' blocks by the Triton kernel beside PyTorch's fused AdamW and
  a write into the dense weights; with the memory traffic, beside that of a copy.
* ``step``: forward, backward and optimizer of one layer beside full fine-tuning, PEFT's
  LoRA with as many trainable weights, eager and compiled, and a frozen layer
  (`sylva_train.reproduce.measure_layer`).

Candidates take turns; a timing is of several runs in a row, divided by their number:
fewer of those that take long. Kernels are tuned and compiled in the runs before. Kernels
are timed by the device's clock, with the host ahead of it; what is in its cache stays
there from one run to the next, for all candidates alike. What is measured is written
after every row. All of it takes hours; ``--parts``, ``--blocks``, ``--densities``,
``--masks``, ``--tokens`` and ``--name`` divide the work: a part with ``--blocks 64
--densities 0.05`` takes minutes. ``--tiny`` shows that it all runs, on a CPU with
Triton's interpreter (``TRITON_INTERPRET=1``), and writes nothing.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _common import parser, setting, summary, write
from torch import nn

from sylva_train import LayerMask, SparseAdamW, embed
from sylva_train.kernels import block_sddmm, check_kernels, reference, scatter_blocks_
from sylva_train.kernels.plan import find_plan
from sylva_train.reproduce import draw_masks, measure_layer
from sylva_train.reproduce.subjects import MASKS

DEVICE = torch.device("cuda")
#: Runs in a row of one timing, and the seconds that they may take if they are several.
ROW, ROW_SECONDS = 20, 0.1
#: Cycles for which the device is held up before it is timed, some milliseconds.
AHEAD = 10_000_000
#: What there is to measure.
PARTS = ("gradient", "optimizer", "step")
Task = Callable[[], Any]
#: Options of ``--tiny``.
TINY = {
    "tokens": [32], "shapes": [(64, 64), (96, 64)], "blocks": [16], "densities": [0.25],
    "masks": ["random", "staircase"], "layers": 1, "copy_bits": 10, "repeats": 1,
    "compiled": False, "parts": PARTS,
}  # fmt: skip


def seconds(task: Task, count: int) -> float:
    """Time of a task on the device, as the mean of several runs in a row.

    The device is held up first, so that the host is ahead of it, as it is in training:
    small kernels take less time than their launches.
    """
    start = time.perf_counter()
    if DEVICE.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
    for _ in range(count):
        task()
    if DEVICE.type != "cuda":
        return (time.perf_counter() - start) / count
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def measure(repeats: int, *tasks: Task) -> list[dict[str, float]]:
    """Time tasks in turn, each several times in a row."""
    for task in tasks:
        task()
    counts = [max(1, min(ROW, int(ROW_SECONDS / seconds(t, 1)))) for t in tasks]
    turns = [
        [seconds(task, n) for task, n in zip(tasks, counts, strict=True)]
        for _ in range(1 + repeats)
    ]
    return [summary(list(taken)) for taken in zip(*turns[1:], strict=True)]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw_mask(
    shape: tuple[int, int], block: int, density: float, kind: str
) -> LayerMask:
    return draw_masks({"": shape}, block, density, kind)[""]


def rivals(dy: torch.Tensor, x: torch.Tensor, mask: LayerMask) -> dict[str, Task]:
    """Return what PyTorch has for blocks of a product."""
    b = mask.block_size
    indices = mask.indices.to(DEVICE)
    left, right = dy.T.float().contiguous(), x.float()
    with warnings.catch_warnings():  # torch says once that its layouts are in beta
        warnings.simplefilter("ignore", UserWarning)
        csr = mask.dense().to(DEVICE, torch.float32).to_sparse_csr()
        bsr = mask.dense().to(DEVICE, dy.dtype).to_sparse_bsr(b)
    rows, columns = indices.unbind(1)

    def stack() -> torch.Tensor:
        blocks = [t.unflatten(1, (-1, b)).transpose(0, 1) for t in (dy, x)]
        return blocks[0][rows].transpose(1, 2) @ blocks[1][columns]

    def sampled() -> torch.Tensor:
        return torch.sparse.sampled_addmm(csr, left, right, beta=0.0)

    def sampled_bsr() -> torch.Tensor:
        from torch.sparse import _triton_ops

        return _triton_ops.sampled_addmm(bsr, dy.T, x, beta=0.0)

    return {"stack": stack, "sampled_addmm": sampled, "bsr_sampled_addmm": sampled_bsr}


def running(tasks: dict[str, Task]) -> tuple[dict[str, Task], dict[str, str]]:
    """Leave out what does not run here, and say why."""
    problems = {}
    for name, task in tasks.items():
        try:
            task()
        except Exception as error:  # noqa: BLE001 - whatever a library raises
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {n: t for n, t in tasks.items() if n not in problems}, problems


def settings(options: Any) -> Iterator[tuple[Any, ...]]:
    """Yield tokens, shape, block, density and kind of mask; the first options first."""
    for block, density, kind, shape, tokens in itertools.product(
        options.blocks,
        options.densities,
        options.masks,
        options.shapes,
        options.tokens,
    ):
        yield tokens, shape, block, density, kind


def gradient(options: Any) -> Iterator[dict[str, Any]]:
    from sylva_train.kernels import triton_sddmm

    for tokens, shape, block, density, kind in settings(options):
        mask = draw_mask(shape, block, density, kind)
        dy, x = draw(tokens, shape[0]), draw(tokens, shape[1])
        indices = mask.indices.to(DEVICE)
        plan = find_plan(indices, shape, block, 2)
        others, problems = running(rivals(dy, x, mask))
        dense, kernel, rectangle, chosen, *theirs = measure(
            options.repeats,
            lambda: dy.T @ x,  # noqa: B023 - called before the next round
            lambda: triton_sddmm.run_plan(plan, dy, x, len(mask), block),  # noqa: B023
            lambda: reference.from_rectangle(dy, x, indices, block),  # noqa: B023
            lambda: block_sddmm(dy, x, indices, block),  # noqa: B023
            *others.values(),
        )
        useful = 2 * len(mask) * block**2 * tokens
        row = {
            "tokens": tokens,
            "shape": list(shape),
            "block_size": block,
            "density": density,
            "mask": kind,
            "tile": [plan.rows, plan.columns],
            "way": plan.way(tokens),
            "kernel_over_dense": kernel["median"] / dense["median"],
            "rectangle_over_dense": rectangle["median"] / dense["median"],
            "chosen_over_dense": chosen["median"] / dense["median"],
            **{
                f"{name}_over_dense": times["median"] / dense["median"]
                for name, times in zip(others, theirs, strict=True)
            },
            **{f"{name}_over_dense": None for name in problems},
            "useful_tflops": useful / kernel["median"] / 1e12,
            "dense_tflops": 2 * shape[0] * shape[1] * tokens / dense["median"] / 1e12,
        }
        print(row, problems, flush=True)
        yield row


def embedded(shape: tuple[int, int], mask: LayerMask) -> nn.Sequential:
    layer = nn.Linear(shape[1], shape[0], bias=False, device=DEVICE).bfloat16()
    model = nn.Sequential(layer)
    embed(model, {"0": mask})
    return model


def optimizer(options: Any) -> Iterator[dict[str, Any]]:
    """Time steps of many layers, without a forward pass."""
    shapes = [shape for shape in options.shapes for _ in range(options.layers)]
    density, block = options.densities[0], options.blocks[0]
    models = [embedded(s, draw_mask(s, block, density, "random")) for s in shapes]
    model = nn.Sequential(*models)
    values = [p for p in model.parameters() if p.requires_grad]
    for p in values:
        p.grad = torch.randn_like(p)
    ours = SparseAdamW(model, lr=1e-4)
    masters = [nn.Parameter(p.detach().clone()) for p in values]
    for p in masters:
        p.grad = torch.randn_like(p)
    plain = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    weights = [m[0].base_layer.weight.detach() for m in models]
    tables = [m[0].sylva_indices["default"].long() for m in models]

    def torch_step() -> None:
        plain.step()
        for weight, indices, master in zip(weights, tables, masters, strict=True):
            scatter_blocks_(weight, indices, master.detach())

    ours.step()
    blocks = ours._kernel.blocks[0]
    options_table = ours._kernel.options_on(DEVICE)
    big = torch.empty(1 << options.copy_bits, device=DEVICE)
    other = torch.empty_like(big)
    step, kernel, theirs, copy = measure(
        options.repeats,
        ours.step,
        lambda: blocks.tables.update(options_table, blocks.one, blocks.zero),
        torch_step,
        lambda: other.copy_(big),
    )
    count = sum(p.numel() for p in values)
    # Four reads and three writes of float32, and a write of bfloat16.
    traffic = count * (7 * 4 + 2)
    bandwidth = 2 * big.nbytes / copy["median"]
    yield {
        "layers": len(values),
        "values": count,
        "whole_step_seconds": step,
        "kernel_seconds": kernel,
        "torch_fused_and_write_seconds": theirs,
        "kernel_share_of_bandwidth": traffic / kernel["median"] / bandwidth,
        "copy_bytes_per_second": bandwidth,
    }


def step(options: Any) -> Iterator[dict[str, Any]]:
    for tokens, shape, block, density, kind in settings(options):
        methods = ["full", "frozen", "lora", "sylva"]
        # Compiling takes long, and LoRA does not depend on the blocks.
        if options.compiled and (block, kind) == (options.blocks[0], options.masks[0]):
            methods.append("lora-compiled")
            torch._dynamo.reset()  # it leaves models after the eighth uncompiled
        found = measure_layer(
            {
                "out_features": shape[0],
                "in_features": shape[1],
                "sequence": tokens,
                "block_size": block,
                "density": density,
                "mask": kind,
                "methods": methods,
                "dtype": "bfloat16",
                "device": DEVICE.type,
                "repeats": options.repeats,
                "in_a_row": ROW,
            }
        )
        times = {r["method"]: r["seconds"] for r in found["rows"]}
        own = times["sylva"]["total"]["median"]
        row = {
            "tokens": tokens,
            "shape": list(shape),
            "block_size": block,
            "density": density,
            "mask": kind,
            **{
                f"over_{method}": own / seconds["total"]["median"]
                for method, seconds in times.items()
                if method != "sylva"
            },
            "optimizer_share": times["sylva"]["optimizer"]["median"] / own,
            **{part: times["sylva"][part] for part in ("forward", "backward")},
        }
        print(row, flush=True)
        yield row


def shape_of(text: str) -> tuple[int, int]:
    out, inputs = map(int, text.split("x"))
    return out, inputs


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(device="cuda")
    options.add_argument(
        "--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384]
    )
    options.add_argument(
        "--shapes",
        type=shape_of,
        nargs="+",
        metavar="OUTxIN",
        default=[(4096, 4096), (11008, 4096), (4096, 11008)],
    )
    options.add_argument("--blocks", type=int, nargs="+", default=[64, 16, 32, 128])
    options.add_argument(
        "--densities", type=float, nargs="+", default=[0.05, 0.01, 0.2]
    )
    options.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    options.add_argument("--layers", type=int, default=32, help="of each shape")
    options.add_argument("--copy-bits", type=int, default=28, help="log2 of a copy")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--name", default="layer_gpu")
    options.add_argument("--tiny", action="store_true", help="on a CPU, as a test")
    chosen = options.parse_args()
    chosen.compiled = True
    if chosen.tiny:
        global DEVICE, ROW
        DEVICE, ROW = torch.device("cpu"), 1
        vars(chosen).update(TINY)
    elif chosen.device != "cuda" or not torch.cuda.is_available():
        raise SystemExit("bench_layer_gpu.py needs a CUDA device, or --tiny.")
    os.environ.setdefault("SYLVA_KERNELS", "triton")
    problems = [*filter(None, check_kernels(DEVICE))]
    if problems:
        raise SystemExit(
            "\n".join(["Some kernels do not work on this device:", *problems])
        )
    results: dict[str, Any] = {"setting": setting(DEVICE.type, ("triton", "peft"))}
    measures = {"gradient": gradient, "optimizer": optimizer, "step": step}
    for part in chosen.parts:
        results[part] = []
        for row in measures[part](chosen):
            results[part].append(row)
            if not chosen.tiny:
                write(chosen.name, results)


if __name__ == "__main__":
    main()
