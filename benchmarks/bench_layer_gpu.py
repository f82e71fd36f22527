"""One layer on a GPU: the blocks' gradient, the optimizer, and a whole training step.

* ``gradient``: the Triton kernel, the product of active rows and columns, the dense
  product, and what `block_sddmm` chose; with the rate of useful products.
* ``optimizer``: all layers' blocks by the Triton kernel beside PyTorch's fused AdamW and
  a write into the dense weights; with the memory traffic, beside that of a copy.
* ``step``: forward, backward and optimizer of one layer beside full fine-tuning, LoRA
  with as many trainable weights, and a frozen layer.

Candidates take turns; a timing is of several runs in a row, divided by their number.
Kernels are tuned and compiled in the runs before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from _common import interleave, parser, setting, write
from torch import nn

from sylva_train import LayerMask, SparseAdamW, embed
from sylva_train.kernels import block_sddmm, check_kernels, reference, scatter_blocks_
from sylva_train.kernels.plan import find_plan

DEVICE = torch.device("cuda")
#: Runs in a row of one timing.
ROW = 20
Task = Callable[[], Any]


def measure(repeats: int, *tasks: Task) -> list[dict[str, float]]:
    """Time tasks in turn, each several times in a row, and wait for the device."""

    def in_a_row(task: Task) -> Task:
        def run() -> None:
            for _ in range(ROW):
                task()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return run

    found = interleave(repeats, *map(in_a_row, tasks), warmup=2)
    return [{name: t / ROW for name, t in times.items()} for times in found]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw_mask(
    shape: tuple[int, int], block: int, density: float, kind: str
) -> LayerMask:
    """Blocks anywhere, or those of some rows and columns alone."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (n // block for n in shape)
    if kind == "random":
        count = max(1, round(density * rows * columns))
        flat = torch.randperm(rows * columns, generator=generator)[:count]
        return LayerMask(
            shape, block, torch.stack([flat // columns, flat % columns], 1)
        )
    some = [
        torch.randperm(n, generator=generator)[: max(1, round(density**0.5 * n))]
        for n in (rows, columns)
    ]
    return LayerMask(shape, block, torch.cartesian_prod(*some))


def gradient(options: Any) -> list[dict[str, Any]]:
    from sylva_train.kernels import triton_sddmm

    rows = []
    for tokens, shape, block, density, kind in itertools.product(
        options.tokens,
        options.shapes,
        options.blocks,
        options.densities,
        ("random", "rectangle"),
    ):
        mask = draw_mask(shape, block, density, kind)
        dy, x = draw(tokens, shape[0]), draw(tokens, shape[1])
        indices = mask.indices.to(DEVICE)
        plan = find_plan(indices, shape, block, 2)
        dense, kernel, rectangle, chosen = measure(
            options.repeats,
            lambda: dy.T @ x,  # noqa: B023 - called before the next round
            lambda: triton_sddmm.run_plan(plan, dy, x, len(mask), block),  # noqa: B023
            lambda: reference.from_rectangle(dy, x, indices, block),  # noqa: B023
            lambda: block_sddmm(dy, x, indices, block),  # noqa: B023
        )
        useful = 2 * len(mask) * block**2 * tokens
        rows.append(
            {
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
                "useful_tflops": useful / kernel["median"] / 1e12,
                "dense_tflops": 2
                * shape[0]
                * shape[1]
                * tokens
                / dense["median"]
                / 1e12,
            }
        )
        print(rows[-1], flush=True)
    return rows


def embedded(shape: tuple[int, int], mask: LayerMask) -> nn.Sequential:
    layer = nn.Linear(shape[1], shape[0], bias=False, device=DEVICE).bfloat16()
    model = nn.Sequential(layer)
    embed(model, {"0": mask})
    return model


def optimizer(options: Any) -> dict[str, Any]:
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
    return {
        "layers": len(values),
        "values": count,
        "whole_step_seconds": step,
        "kernel_seconds": kernel,
        "torch_fused_and_write_seconds": theirs,
        "kernel_share_of_bandwidth": traffic / kernel["median"] / bandwidth,
        "copy_bytes_per_second": bandwidth,
    }


class LoRA(nn.Module):
    """The usual form, eager, without dropout."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        out, inputs = shape
        options: dict[str, Any] = {"bias": False, "device": DEVICE}
        self.base = nn.Linear(inputs, out, **options).bfloat16().requires_grad_(False)
        self.down = nn.Linear(inputs, rank, **options)
        self.up = nn.Linear(rank, out, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (tokens, in) to (tokens, out)."""
        down, up = self.down.weight.to(x.dtype), self.up.weight.to(x.dtype)
        return self.base(x) + (x @ down.T) @ up.T


def step(options: Any) -> list[dict[str, Any]]:
    rows = []
    for tokens, shape, block, density, kind in itertools.product(
        options.tokens,
        options.shapes,
        options.blocks,
        options.densities,
        ("random", "rectangle"),
    ):
        mask = draw_mask(shape, block, density, kind)
        x, dy = draw(tokens, shape[1]).requires_grad_(), draw(tokens, shape[0])
        rank = max(1, round(density * shape[0] * shape[1] / sum(shape)))
        full = nn.Linear(shape[1], shape[0], bias=False, device=DEVICE).bfloat16()
        frozen = nn.Linear(shape[1], shape[0], bias=False, device=DEVICE).bfloat16()
        lora, ours = LoRA(shape, rank), embedded(shape, mask)

        def stepper(model: nn.Module, optimizer: Any) -> Task:
            def run() -> None:
                model(x).backward(dy)  # noqa: B023
                x.grad = None  # noqa: B023
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()

            return run

        times = measure(
            options.repeats,
            stepper(full, torch.optim.AdamW(full.parameters(), fused=True)),
            stepper(frozen.requires_grad_(False), None),
            stepper(
                lora,
                torch.optim.AdamW(
                    [p for p in lora.parameters() if p.requires_grad], fused=True
                ),
            ),
            stepper(ours, SparseAdamW(ours)),
        )
        whole, least, low_rank, sparse = (t["median"] for t in times)
        rows.append(
            {
                "tokens": tokens,
                "shape": list(shape),
                "block_size": block,
                "density": density,
                "mask": kind,
                "lora_rank": rank,
                "over_full": sparse / whole,
                "over_lora": sparse / low_rank,
                "over_frozen": sparse / least,
            }
        )
        print(rows[-1], flush=True)
    return rows


def shape_of(text: str) -> tuple[int, int]:
    out, inputs = map(int, text.split("x"))
    return out, inputs


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(device="cuda")
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
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
    options.add_argument("--layers", type=int, default=32, help="of each shape")
    options.add_argument("--copy-bits", type=int, default=28, help="log2 of a copy")
    options.add_argument("--name", default="layer_gpu")
    chosen = options.parse_args()
    if chosen.device != "cuda" or not torch.cuda.is_available():
        raise SystemExit("bench_layer_gpu.py needs a CUDA device; there is none here.")
    os.environ.setdefault("SYLVA_KERNELS", "triton")
    problems = [check.problem for check in check_kernels(DEVICE) if check.problem]
    if problems:
        raise SystemExit(
            "\n".join(["Some kernels do not work on this device:", *problems])
        )
    results = {
        "setting": setting("cuda", ("triton",)),
        "gradient": gradient(chosen),
        "optimizer": optimizer(chosen),
        "step": step(chosen),
    }
    print(write(chosen.name, results))


if __name__ == "__main__":
    main()
