"""Which measurements make up table 2, figure 4 and figure 5, small and as in the paper.

Each job is the specification of one call: `measure_memory` for table 2, `measure_step`
for figure 4, `measure_layer` for figure 5. The paper states neither its batch sizes nor
the lengths of its texts for these; they are chosen here.
"""

from __future__ import annotations

from typing import Any

import torch

from sylva_train._checks import check_choice

__all__ = ["fig4_jobs", "fig5_jobs", "table2_jobs"]

#: ``"small"``: a machine without a GPU, in minutes; ``"paper"``: one with GPUs.
SCALES = ("small", "paper")
SMALL = {"dtype": "float32", "device": "cpu", "block_size": 32}
PAPER = {"dtype": "bfloat16", "device": "cuda", "block_size": 64}
#: Methods of the paper's columns. It ran full fine-tuning by ZeRO.
COLUMNS = ("zero", "lora", "sylva", "kfac-pruner")
#: LoRA's rank and the density beside it, by model: the rows of the paper's table 2.
PAIRS = {
    "gpt2-large": ((32, 0.05), (128, 0.2), (512, 0.5)),
    "llama-3b": ((96, 0.05), (192, 0.1), (384, 0.2)),
    "llama-7b": ((64, 0.02), (128, 0.05), (256, 0.1)),
}
#: Likewise for the small models: as many weights in a square layer.
SMALL_PAIRS = dict.fromkeys(
    ("gpt2-15m", "llama-15m"), ((13, 0.05), (51, 0.2), (128, 0.5))
)


def table2_jobs(scale: str) -> list[dict[str, Any]]:
    """Return the cells of table 2: peak memory by model, budget and method.

    Full fine-tuning has no budget, and one cell a model. At the paper's scale a cell is
    out of memory beyond the 24 GB of the paper's GPUs.
    """
    check_choice("scale", scale, SCALES)
    small = scale == "small"
    texts = {"batch": 4, "sequence": 128} if small else {"batch": 1, "sequence": 512}
    common = SMALL | texts if small else PAPER | texts | {"memory_limit": "24GB"}
    jobs = []
    for model, pairs in (SMALL_PAIRS if small else PAIRS).items():
        for number, (rank, density) in enumerate(pairs):
            for method in COLUMNS:
                if method != "zero":
                    budget = {"method": method, "rank": rank, "density": density}
                    jobs.append(common | {"model": model} | budget)
                elif number == 0:
                    full = {"method": "full", "rank": rank, "density": density}
                    jobs.append(common | {"model": model} | full)
    return jobs


def fig4_jobs(scale: str) -> list[dict[str, Any]]:
    """Return the bars of figure 4: seconds of a step by model, method and processes.

    On GPUs there are as many processes as there are GPUs, up to 8 on one machine; the
    paper has 4 to 16 on several.
    """
    check_choice("scale", scale, SCALES)
    if scale == "small":
        common = SMALL | {"batch": 2, "sequence": 64, "repeats": 3}
        models, processes = tuple(SMALL_PAIRS), [1, 2]
    else:
        common = PAPER | {"batch": 2, "sequence": 512, "repeats": 9}
        most = max(1, torch.cuda.device_count())
        models, processes = tuple(PAIRS), [n for n in (1, 2, 4, 8) if n <= most]
    return [
        common | {"model": model, "method": method, "processes": n, "density": 0.05}
        for model in models
        for n in processes
        for method in COLUMNS
    ]


def fig5_jobs(scale: str) -> list[dict[str, Any]]:
    """Return the panels of figure 5: a layer's latency by its size and the tokens."""
    check_choice("scale", scale, SCALES)
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    lengths: tuple[int, ...] = (128, 512)
    common = SMALL | {"repeats": 15, "threads": 1}
    if scale == "paper":
        common = PAPER | {"repeats": 15, "in_a_row": 10}
        sizes, lengths = (1024, 2048, 4096, 8192), (512, 1024, 2048, 4096)
    return [
        common
        | {"in_features": size, "out_features": size, "sequence": length}
        | {"density": 0.05}
        for size in sizes
        for length in lengths
    ]
