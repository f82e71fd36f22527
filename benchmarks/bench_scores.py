"""Scores by hierarchical factors beside those by exact K-FAC, on a real model.

For each layer of MiniLM, scored with 256 samples of the built-in data and the default
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
from typing import Any

import numpy as np
import torch
from _common import parser, setting, write
from scipy.stats import spearmanr

from sylva_train import LayerScores, Scores, SylvaConfig, TaskConfig, load_task, score
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


def correlation(one: LayerScores, other: LayerScores) -> float:
    """Return the rank correlation of two scores of a layer's weights, or small blocks."""
    pair = [s.blocks(s.unit).flatten().numpy() for s in (one, other)]
    return float(spearmanr(*pair).statistic)


def overlap(one: LayerScores, other: LayerScores, side: int) -> tuple[float, float]:
    """Return which part of the best blocks the other score finds, and of their score."""
    first, second = one.blocks(side).flatten(), other.blocks(side).flatten()
    count = max(1, round(TOP * len(first)))
    best, found = first.topk(count), second.topk(count).indices
    common = len(set(best.indices.tolist()) & set(found.tolist()))
    return common / count, float(first[found].sum() / best.values.sum())


def against(exact: LayerScores, other: LayerScores, side: int) -> dict[str, float]:
    """Hold a layer's scores against exact ones."""
    part, share = overlap(exact, other, side)
    return {
        "spearman": round(correlation(exact, other), 4),
        "overlap": round(part, 3),
        "score_share": round(share, 4),
    }


def summarised(
    name: str, layers: list[dict[str, float]], bad: int
) -> dict[str, str | float]:
    """Return the least and the median over the layers."""
    row: dict[str, str | float] = {"factors": name}
    for part in ("spearman", "overlap", "score_share"):
        values = [layer[part] for layer in layers]
        row |= {
            f"least_{part}": min(values),
            f"median_{part}": float(np.median(values)),
        }
    return row | {
        "layers_with_overlap_below_0.9": sum(
            layer["overlap"] < 0.9 for layer in layers
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


def by_eigenvectors(task: Any, config: SylvaConfig) -> dict[str, LayerScores]:
    """Score with factors that `leading` has cut, of the size of ``config``'s."""
    rule, wanted = RULES[config.importance]
    targets = find_targets(task.model)
    loader = task.score_loader(config.samples, 0)
    exact = replace(config, curvature="dense")
    layers, _ = collect_curvature(task.model, targets, loader, exact, wanted)
    found = {}
    for name, module in targets.items():
        layer = layers[name]
        assert layer.A is not None
        assert layer.G is not None
        cut = replace(layer, A=leading(layer.A, config), G=leading(layer.G, config))
        weight = module.weight.detach()
        found[name] = rule(Inputs(weight, cut, exact, torch.Generator()))
    return found


def main() -> None:
    options = parser(__doc__)
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
    task = load_task(TaskConfig(max_length=options.max_length), evaluation=False)
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("importance", "levels", "rank", "samples", "tokens", "damping")
    }
    configs = {k: SylvaConfig(**kind, **settings) for k, kind in KINDS.items()}
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
            "bytes": bytes_ratio(layer.shape, configs["mlr"]),
        }
        for name, layer in exact.items()
    }
    other, _, _ = scored(task, SylvaConfig(curvature="dense", **settings), seed=1)
    noise = [against(layer, other[name], side) for name, layer in exact.items()]
    summary = [summarised("exact, other samples", noise, 0)]
    cut = by_eigenvectors(task, configs["mlr"])
    cuts = [against(layer, cut[name], side) for name, layer in exact.items()]
    summary.append(summarised("eigenvectors", cuts, 0))
    for kind, config in configs.items():
        scores, seconds[kind], bad = scored(task, config)
        found = {}
        for name, layer in exact.items():
            found[name] = against(layer, scores[name], side)
            for part in ("spearman", "overlap"):
                rows[name][f"{kind}: {part}"] = found[name][part]
        summary.append(summarised(kind, list(found.values()), bad))
        print(summary[-1], flush=True)
    figures = {
        "setting": begun,
        "data": f"e2e-rating, texts of at most {options.max_length} tokens",
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
