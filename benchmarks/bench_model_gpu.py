"""Training steps of whole models on a GPU: speed and memory beside the rivals.

Models of LLaMA's architecture with random bfloat16 weights, with and without gradient
checkpointing: full fine-tuning, LoRA of PEFT with as many trainable weights, and Sylva
with blocks anywhere in the columns and in few of them, at several densities; each in a
process of its own (`sylva_train.reproduce.measure_step`). Where memory does not suffice,
a row says so. ``--models``, ``--densities``, ``--checkpointing`` and ``--name`` divide the
work. ``--tiny`` shows that it all runs, on a CPU, and writes nothing.
"""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from _common import parser, setting, write

from sylva_train.reproduce import measure_step

#: Options of ``--tiny``.
TINY = {
    "models": ["llama-tiny"], "sequence": 32, "repeats": 1, "densities": [0.1],
    "block": 16, "device": "cpu",
}  # fmt: skip


def specs(options: Any) -> list[dict[str, Any]]:
    """Return every measurement."""
    common = {
        "batch": options.batch,
        "sequence": options.sequence,
        "dtype": "bfloat16",
        "block_size": options.block,
        "repeats": options.repeats,
        "device": options.device,
    }
    found = []
    choices = [choice == "on" for choice in options.checkpointing]
    for model, checkpointing in itertools.product(options.models, choices):
        own = common | {"model": model, "checkpointing": checkpointing}
        found.append(own | {"method": "full"})
        for density in options.densities:
            few = max(0.25, density)
            for method in (
                {"method": "lora"},
                {"method": "sylva"},
                {"method": "sylva", "max_columns": few},
            ):
                found.append(own | {"density": density} | method)
    return found


def row(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a table shows of a measurement."""
    spec, seconds = found["spec"], found["seconds"]
    name = found["label"] + (", few columns" if spec["max_columns"] < 1 else "")
    shown = {
        "model": spec["model"],
        "checkpointing": spec["checkpointing"],
        "method": name,
        "density": 1.0 if spec["method"] == "full" else spec["density"],
        "trainable": found["trainable"],
        "out_of_memory": found["out_of_memory"],
    }
    if seconds is not None:
        shown |= {part: seconds[part] for part in seconds}
        shown["tokens_per_second"] = round(found["tokens_per_second"], 1)
        shown["peak_memory_GB"] = round(found["peak_memory_bytes"] / 1e9, 3)
    return shown


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(device="cuda")
    options.add_argument("--models", nargs="+", default=["llama-1b", "llama-7b"])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--sequence", type=int, default=2048)
    options.add_argument("--block", type=int, default=64)
    options.add_argument(
        "--densities", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2]
    )
    options.add_argument(
        "--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"]
    )
    options.add_argument("--name", default="model_gpu")
    options.add_argument("--tiny", action="store_true", help="on a CPU, as a test")
    chosen = options.parse_args()
    if chosen.tiny:
        vars(chosen).update(TINY)
    elif chosen.device != "cuda" or not torch.cuda.is_available():
        raise SystemExit("bench_model_gpu.py needs a CUDA device, or --tiny.")
    results: dict[str, Any] = {
        "setting": setting(chosen.device, ("transformers", "peft")),
        "batch": [chosen.batch, chosen.sequence],
        "rows": [],
    }
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, max_tasks_per_child=None if chosen.tiny else 1
    ) as pool:
        for found in pool.map(measure_step, specs(chosen)):
            results["rows"].append(row(found))
            print(results["rows"][-1], flush=True)
            if not chosen.tiny:
                write(chosen.name, results)


if __name__ == "__main__":
    main()
