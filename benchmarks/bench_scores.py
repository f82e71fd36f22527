"""Scores by hierarchical factors beside those by exact K-FAC, on a real model.

For each layer of a model (MiniLM), scored with 256 samples of built-in data and the default
options otherwise: the rank correlation of its weights' scores (of those of blocks of 16,
where a rule keeps no others), the overlap of the best 5% of its blocks, the part of the best
blocks' exact score that the chosen ones have, and the bytes of its two factors as a fraction
of the exact ones. How much it matters is told by exact K-FAC on other examples of the same
data (``exact, other samples``), and how well as many bytes could do by what a factor keeps
instead of a hierarchy: its leading eigenvectors, and the diagonal of the rest (``eigenvectors``).
Processor time is that of one scoring each; rule ``gradient`` has the same forward and backward
pass and no factors.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import parser, setting, write

from sylva_train import Scores, SylvaConfig, TaskConfig, agreement, load_task, score
from sylva_train.curvature import Factor, collect_curvature, curvature_bytes
from sylva_train.importance.rules import RULES, Inputs
from sylva_train.targets import find_targets

#: Factors of every size, hierarchical from `SylvaConfig.exact_below` rows on or always.
KINDS = {
    "mlr": {"curvature": "mlr"},
    "hodlr": {"curvature": "hodlr"},
    "mlr, every size": {"curvature": "mlr", "exact_below": 0},
    "hodlr, every size": {"curvature": "hodlr", "exact_below": 0},
}
TOP = 0.05
#: Widths of layers whose factors' bytes are told from their size alone.
WIDTHS = (384, 768, 1024, 1536, 3072, 4096, 11008)


def against(exact: Scores, other: Scores, side: int) -> dict[str, dict[str, float]]:
    """Hold scores against exact ones: ranks of weights, or small blocks, and the best blocks."""
    ranks = agreement(exact, other, TOP, max(x.unit for x in exact.values()))["layers"]
    best = agreement(exact, other, TOP, side)["layers"]
    return {
        name: {
            "spearman": round(ranks[name]["spearman"], 4),
            "overlap": round(layer["overlap"], 3),
            "score_share": round(layer["score_share"], 4),
        }
        for name, layer in best.items()
    }


def summarised(
    name: str, layers: dict[str, dict[str, float]], bad: int
) -> dict[str, str | float]:
    """Return the least and the median over the layers."""
    row: dict[str, str | float] = {"factors": name}
    for part in ("spearman", "overlap", "score_share"):
        values = [layer[part] for layer in layers.values()]
        row |= {
            f"least_{part}": min(values),
            f"median_{part}": float(np.median(values)),
        }
    return row | {
        "layers_with_overlap_below_0.9": sum(
            layer["overlap"] < 0.9 for layer in layers.values()
        ),
        "not_positive_entries": bad,
    }


def scored(task: Any, config: SylvaConfig, seed: int = 0) -> tuple[Scores, float, int]:
    """Score, and return the processor seconds and the not positive entries as well."""
    loader = task.score_loader(config.samples, seed)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(task.model, loader, config)
    taken = time.process_time() - start
    return scores, float(f"{taken:.4g}"), scores.metadata["indefinite"]


def bytes_ratio(shape: tuple[int, int], config: SylvaConfig) -> float:
    """Return the bytes of a layer's two factors as a fraction of the exact ones."""
    size = sum(curvature_bytes(shape, config, ["factors"]).values())
    return float(f"{size / (4 * (shape[0] ** 2 + shape[1] ** 2)):.3g}")


def leading(factor: Factor, config: SylvaConfig) -> Factor:
    """Keep the leading eigenvectors of a large factor, and the diagonal of the rest.

    In as many bytes as its hierarchy takes; the best of low rank that there is.
    """
    matrix = factor.matrix.double()
    n = len(matrix)
    if n < config.exact_below:
        return factor
    rank = int(bytes_ratio((n, n), config) * n) - 1
    values, vectors = torch.linalg.eigh(matrix)
    kept = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return Factor(kept + (matrix - kept).diagonal().diag())


def by_eigenvectors(task: Any, config: SylvaConfig) -> Scores:
    """Score with factors that `leading` has cut, of the size of ``config``'s."""
    rule, wanted = RULES[config.importance]
    targets = find_targets(task.model, config.target_modules)
    loader = task.score_loader(config.samples, 0)
    exact = replace(config, curvature="dense")
    layers = collect_curvature(task.model, targets, loader, exact, wanted)
    found = {}
    for name, module in targets.items():
        layer = layers[name]
        assert layer.A is not None
        assert layer.G is not None
        cut = replace(layer, A=leading(layer.A, config), G=leading(layer.G, config))
        weight = module.weight.detach()
        found[name] = rule(Inputs(weight, cut, exact, torch.Generator()))
    return Scores(found, {"importance": config.importance})


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=TaskConfig().model)
    options.add_argument("--task", default=TaskConfig().task)
    options.add_argument("--data", default=TaskConfig().data)
    options.add_argument("--target-modules", default=SylvaConfig().target_modules)
    options.add_argument("--factors", nargs="+", choices=[*KINDS], default=[*KINDS])
    options.add_argument("--importance", default="kfac")
    options.add_argument("--samples", type=int, default=256)
    options.add_argument("--levels", type=int, default=SylvaConfig().levels)
    options.add_argument("--rank", type=int, default=SylvaConfig().rank)
    options.add_argument("--tokens", default=SylvaConfig().tokens)
    options.add_argument("--damping", type=float, default=SylvaConfig().damping)
    options.add_argument("--max-length", type=int, default=TaskConfig().max_length)
    options.add_argument("--name", default="scores")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    begun = setting(packages=("transformers",))
    about = TaskConfig(
        **{n: getattr(options, n) for n in ("model", "task", "data", "max_length")}
    )
    task = load_task(about, evaluation=False)
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "target_modules",
            "importance",
            "levels",
            "rank",
            "samples",
            "tokens",
            "damping",
        )
    }
    configs = {k: SylvaConfig(**KINDS[k], **settings) for k in options.factors}
    mlr = SylvaConfig(curvature="mlr", **settings)
    exact, dense_seconds, _ = scored(task, SylvaConfig(curvature="dense", **settings))
    _, plain_seconds, _ = scored(
        task, SylvaConfig(**settings | {"importance": "gradient"})
    )
    seconds = {"gradient": plain_seconds, "dense": dense_seconds}
    side = SylvaConfig().block_size
    rows: dict[str, dict[str, Any]] = {
        name: {
            "layer": name,
            "shape": list(layer.shape),
            "bytes": bytes_ratio(layer.shape, mlr),
        }
        for name, layer in exact.items()
    }
    other, _, _ = scored(task, SylvaConfig(curvature="dense", **settings), seed=1)
    noise = against(exact, other, side)
    summary = [summarised("exact, other samples", noise, 0)]
    cuts = against(exact, by_eigenvectors(task, mlr), side)
    summary.append(summarised("eigenvectors", cuts, 0))
    for kind, config in configs.items():
        scores, seconds[kind], bad = scored(task, config)
        found = against(exact, scores, side)
        for name, layer in found.items():
            for part in ("spearman", "overlap"):
                rows[name][f"{kind}: {part}"] = layer[part]
        summary.append(summarised(kind, found, bad))
        print(summary[-1], flush=True)
    figures = {
        "setting": begun,
        "model": Path(options.model).stem,
        "data": f"{options.data}, texts of at most {options.max_length} tokens",
        **settings,
        "block_size": side,
        "top_blocks": TOP,
        "summary": summary,
        "processor_seconds": [{"scoring": k, "seconds": v} for k, v in seconds.items()],
        "bytes_by_width": [
            {"width": n} | {k: bytes_ratio((n, n), c) for k, c in configs.items()}
            for n in WIDTHS
        ],
        "layers": list(rows.values()),
    }
    print(write(options.name, figures))


if __name__ == "__main__":
    main()
