"""What second-order statistics add to a layer's forward and backward pass.

For a linear layer and batches of its tokens, beside forward and backward as in full
fine-tuning (``x Wᵀ``, ``g W`` and ``gᵀ x``): the statistics of the rule ``gradient``; the
factors' diagonals, all that ``kfac-diag`` needs; and gradient and factors, exact and
hierarchical, as scoring gathers them. Both of the layer's factors are its own; in a model,
layers that share an input share one. The aim is 15% on a GPU for 4096 × 4096 with 4096
tokens. Candidates take turns; on a CPU the clock is that of the process.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _common import interleave, parser, setting, write
from torch import nn

from sylva_train import SylvaConfig
from sylva_train.curvature import collect_curvature

#: Outputs and inputs of the layers.
SHAPES = [*((n, n) for n in (768, 1024, 1536, 2048, 4096)), (4096, 11008)]
#: Batches of one timing: what is done once for all of them is spread over so many, of
#: which a GPU takes more in the time that the host takes for that.
BATCHES = {"cpu": 2, "cuda": 16}
Batch = Mapping[str, Any]


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return a loss whose gradient by the layer's output is the batch's ``g``."""
    layer = batch["layer"]
    return (model(layer["x"]) * layer["g"]).sum(dtype=torch.float32)


def make_batches(
    shape: tuple[int, int], tokens: int, like: torch.Tensor
) -> list[Batch]:
    """Draw inputs and output gradients of texts, with spectra that decay.

    Scoring makes a digest of the samples, of which a model has a few bytes: what a layer
    in it sees is kept from that.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        values = torch.randn(1, tokens, n, generator=generator)
        return (values / torch.arange(1.0, n + 1).sqrt()).to(like)

    return [
        {"samples": torch.zeros(1), "layer": {"x": draw(shape[1]), "g": draw(shape[0])}}
        for _ in range(BATCHES[like.device.type])
    ]


def train(model: nn.Module, batches: list[Batch]) -> None:
    """Run forward and backward as full fine-tuning does."""
    model.requires_grad_(True)
    for batch in batches:
        layer = batch["layer"]
        x = layer["x"].detach().requires_grad_(True)
        loss(model, {"layer": layer | {"x": x}}).backward()
        model.zero_grad()


def gather(
    model: nn.Module, batches: list[Batch], wanted: list[str], options: dict[str, Any]
) -> None:
    """Gather a layer's statistics as scoring does."""
    config = SylvaConfig(samples=len(batches), **options)
    collect_curvature(model, {"0": model[0]}, batches, config, wanted, loss=loss)


def measure(shape: tuple[int, int], options: Any) -> dict[str, Any]:
    """Time all candidates on one layer."""
    like = torch.empty(0, device=options.device, dtype=getattr(torch, options.dtype))
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(like)
    batches = make_batches(shape, options.tokens, like)
    both, diagonals = ["factors", "gradient"], ["inputs", "outputs"]
    tasks: dict[str, Callable[[], None]] = {
        "forward and backward": functools.partial(train, model, batches),
        "gradient": functools.partial(gather, model, batches, ["gradient"], {}),
        "diagonals": functools.partial(gather, model, batches, diagonals, {}),
    } | {
        kind: functools.partial(
            gather, model, batches, both, {"curvature": kind, "exact_below": 0}
        )
        for kind in options.factors
    }
    on_gpu = like.device.type == "cuda"

    def waited(task: Callable[[], None]) -> None:
        task()
        if on_gpu:
            torch.cuda.synchronize()

    clock = time.perf_counter if on_gpu else time.process_time
    turns = [functools.partial(waited, task) for task in tasks.values()]
    found = interleave(options.repeats, *turns, clock=clock)
    row: dict[str, Any] = {"shape": shape}
    whole = found[0]["min"]
    for name, one in zip(tasks, found, strict=True):
        extra = (
            {}
            if name == "forward and backward"
            else {"added": round(one["min"] / whole - 1, 3)}
        )
        row[name] = {"ms": round(1e3 * one["min"] / len(batches), 2), **extra}
    print(row, flush=True)
    return row


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    options.add_argument("--factors", nargs="+", default=["dense", "mlr"])
    options = options.parse_args()
    gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    torch.set_num_threads(options.threads)
    begun = setting(options.device)
    rows = [measure(shape, options) for shape in SHAPES]
    config = SylvaConfig()
    results = {
        "setting": begun,
        "dtype": options.dtype,
        "tokens of a batch": options.tokens,
        "levels": config.levels,
        "rank": config.rank,
        "a batch": rows,
    }
    print(write("scoring_gpu" if gpu else "scoring", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
