"""Scores by hierarchical factors beside those by exact K-FAC, on a real model.

For each layer of MiniLM, scored on the built-in data with the default options: the rank
correlation of its weights' scores, the overlap of the best 5% of its blocks, and the
bytes of its two factors as a fraction of the exact ones. Processor time is that of one
scoring each; rule ``gradient`` has the same forward and backward pass and no factors.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from _common import parser, setting, write
from scipy.stats import spearmanr

from sylva_train import LayerScores, Scores, SylvaConfig, TaskConfig, load_task, score
from sylva_train.curvature import curvature_bytes

KINDS = ("mlr", "hodlr")
TOP = 0.05
#: Widths of layers whose factors' bytes are told from their size alone.
WIDTHS = (384, 768, 1024, 1536, 3072, 4096, 11008)


def correlation(one: LayerScores, other: LayerScores) -> float:
    """Return the rank correlation of two scores of a layer's weights."""
    assert one.s_out is not None
    assert other.s_out is not None
    pair = [torch.outer(s.s_out, s.s_in).flatten().numpy() for s in (one, other)]  # type: ignore[arg-type]
    return float(spearmanr(*pair).statistic)


def overlap(one: LayerScores, other: LayerScores, side: int) -> float:
    """Return the part of the best blocks by one score that are the other's too."""
    first, second = one.blocks(side).flatten(), other.blocks(side).flatten()
    count = max(1, round(TOP * len(first)))
    chosen = set(first.topk(count).indices.tolist())
    return len(chosen & set(second.topk(count).indices.tolist())) / count


def scored(task: Any, config: SylvaConfig) -> tuple[Scores, float, int]:
    """Score, and return the processor seconds and the not positive entries as well."""
    loader = task.score_loader(config.samples, 0)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(task.model, loader, config)
    taken = time.process_time() - start
    return scores, float(f"{taken:.4g}"), scores.metadata["indefinite"]


def bytes_ratio(shape: tuple[int, int], kind: str, config: dict[str, Any]) -> float:
    """Return the bytes of a layer's two factors as a fraction of the exact ones."""
    sizes = [
        sum(
            curvature_bytes(
                shape, SylvaConfig(curvature=k, **config), ["factors"]
            ).values()
        )
        for k in (kind, "dense")
    ]
    return float(f"{sizes[0] / sizes[1]:.3g}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=SylvaConfig().samples)
    options.add_argument("--levels", type=int, default=SylvaConfig().levels)
    options.add_argument("--rank", type=int, default=SylvaConfig().rank)
    options.add_argument("--tokens", default=SylvaConfig().tokens)
    options.add_argument("--max-length", type=int, default=TaskConfig().max_length)
    options.add_argument("--name", default="scores")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    task = load_task(TaskConfig(max_length=options.max_length), evaluation=False)
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("levels", "rank", "samples", "tokens")
    }
    exact, dense_seconds, _ = scored(task, SylvaConfig(curvature="dense", **settings))
    _, plain_seconds, _ = scored(task, SylvaConfig(importance="gradient", **settings))
    seconds = {"gradient": plain_seconds, "dense": dense_seconds}
    side = SylvaConfig().block_size
    rows: dict[str, dict[str, Any]] = {
        name: {"layer": name, "shape": list(layer.shape)}
        for name, layer in exact.items()
    }
    summary = []
    for kind in KINDS:
        config = SylvaConfig(curvature=kind, **settings)
        scores, seconds[kind], bad = scored(task, config)
        for name, layer in exact.items():
            rows[name][kind] = {
                "spearman": round(correlation(layer, scores[name]), 4),
                "overlap": round(overlap(layer, scores[name], side), 3),
                "bytes": bytes_ratio(layer.shape, kind, settings),
            }
        found = [rows[name][kind] for name in exact]
        summary.append(
            {
                "factors": kind,
                "least_spearman": min(row["spearman"] for row in found),
                "median_spearman": float(np.median([row["spearman"] for row in found])),
                "least_overlap": min(row["overlap"] for row in found),
                "median_overlap": float(np.median([row["overlap"] for row in found])),
                "not_positive_entries": bad,
            }
        )
        print(summary[-1], flush=True)
    figures = {
        "setting": setting(packages=("transformers",)),
        "data": f"e2e-rating, texts of at most {options.max_length} tokens",
        **settings,
        "damping": SylvaConfig().damping,
        "block_size": side,
        "top_blocks": TOP,
        "summary": summary,
        "processor_seconds": [{"scoring": k, "seconds": v} for k, v in seconds.items()],
        "bytes_by_width": [
            {"width": n} | {kind: bytes_ratio((n, n), kind, settings) for kind in KINDS}
            for n in WIDTHS
        ],
        "layers": list(rows.values()),
    }
    print(write(options.name, figures))


if __name__ == "__main__":
    main()
