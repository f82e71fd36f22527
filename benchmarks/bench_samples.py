"""How many samples choosing blocks takes: what is chosen, how well it trains, how long it takes.

Agreement, in the settings of ``--configs``: blocks that the natural gradient chooses by few
samples are held against those chosen by thousands of others, which the few are no part of:
rank correlation of the blocks' scores, least and median over the layers; part of the chosen
blocks that are the same; and half the sum of the differences between the layers' shares of
them. Beside it the part of all scores that is signal: a predicted decrease is a square of the
mean gradient, so that the gradient's noise adds to it; the gradients of two halves of the
samples have noise of their own, which their product does not add up. "Unbiased" has the
budget shared out among the layers by that product. Mean over draws.

Demo: processor seconds of scoring beside those of the fine-tuning that it precedes, run by
run, and the accuracy that comes of it, by the same rule in the setting of ``sylva demo``.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from _common import parser, setting, write
from study_rules import in_layers, unbiased

from sylva_train import (
    Masks,
    Scores,
    SylvaConfig,
    TaskConfig,
    TrainingConfig,
    agreement,
    evaluate,
    load_task,
    score,
    train,
)
from sylva_train.baselines import adapt, parse_method
from sylva_train.comparison import demonstration
from sylva_train.reproduce import load_settings
from sylva_train.selection import select_as
from sylva_train.workflow import Task, heads

METHOD = "sylva:kfac-natural"
#: Examples that small samples are drawn from, and the most that the others are.
POOL, MOST = 1536, 4096


def chosen(task: Task, config: SylvaConfig, seed: int) -> tuple[Scores, Masks]:
    """Score and choose, on as many examples as the options say."""
    scores = score(task.model, task.score_loader(config.samples, seed), config)
    return scores, select_as(config, scores)


def shares(masks: Masks) -> np.ndarray[Any, Any]:
    """Return which part of all chosen blocks each layer has."""
    counts = np.array([len(mask) for mask in masks.values()])
    return counts / counts.sum()


def total(scores: Scores, block_size: int) -> float:
    """Return the sum of all blocks' scores."""
    return sum(float(layer.blocks(block_size).sum()) for layer in scores.values())


def agreed_with(
    name: str,
    task: Task,
    counts: list[int],
    draws: int,
    config: SylvaConfig,
    most: int,
) -> list[dict[str, Any]]:
    """Hold what few samples choose against what many others do."""
    order = np.random.default_rng(0).permutation(len(task.train)).tolist()
    many, few = (
        dataclasses.replace(task, train=task.train.subset(part))
        for part in (order[POOL : POOL + most], order[:POOL])
    )
    truth, best = chosen(many, dataclasses.replace(config, samples=most), 0)
    rows = []
    for count in counts:
        found = []
        for draw in range(draws):
            options = dataclasses.replace(config, samples=count)
            scores, masks = chosen(few, options, draw)
            batches = few.score_loader(count, draw, batch_size=min(32, count // 2))
            clean = unbiased(few.model, list(batches), options)
            cleaned = select_as(
                options, in_layers(scores, clean, config.block_size), few.model
            )
            ranks = agreement(truth, scores, block_size=config.block_size)
            least, median = (ranks[part]["spearman"] for part in ("least", "median"))
            moved, still = (
                float(np.abs(shares(m) - shares(best)).sum() / 2)
                for m in (masks, cleaned)
            )
            signal = total(clean, config.block_size) / total(scores, config.block_size)
            agreed = (least, median, masks.overlap(best), moved)
            found.append((*agreed, signal, cleaned.overlap(best), still))
        names = (
            "least_spearman",
            "median_spearman",
            "overlap",
            "shares_moved",
            "signal",
            "overlap_unbiased",
            "shares_moved_unbiased",
        )
        means = np.mean(found, axis=0)
        rows.append(
            {
                "setting": name,
                "samples": count,
                "of": len(many.train),
            }
            | {n: round(float(m), 3) for n, m in zip(names, means, strict=True)}
        )
        print(rows[-1], flush=True)
    return rows


def demo_run(changes: dict[str, Any], seed: int) -> tuple[float, float, float]:
    """Return processor seconds of scoring and of fine-tuning, and the accuracy."""
    spec = demonstration().spec(METHOD, seed)
    training = TrainingConfig(**spec["training"])
    config = SylvaConfig(**spec["sylva"] | changes, seed=seed)
    task = load_task(TaskConfig(**spec["task"]), seed=seed)
    config.modules_to_save = heads(task.model, task.config.task)
    loader = task.loader(training)
    samples = task.score_loader(config.samples, seed)
    begin = time.process_time()
    adapted = adapt(parse_method(METHOD), task.model, config, samples)
    between = time.process_time()
    train(adapted.model, loader, training, progress=False)
    end = time.process_time()
    accuracy = evaluate(adapted.model, task.eval_loader(training))["score"]
    return between - begin, end - between, accuracy


def demo(variants: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Run the demo's method with other options, seed by seed."""
    found: list[list[tuple[float, float, float]]] = [[] for _ in variants]
    for seed in range(seeds):
        for changes, runs in zip(variants, found, strict=True):
            runs.append(demo_run(changes, seed))
            print(changes, seed, runs[-1], flush=True)
    rows = []
    for changes, runs in zip(variants, found, strict=True):
        scoring, tuning, accuracy = np.array(runs).T
        rows.append(
            changes
            | {
                "scoring_seconds": round(float(np.median(scoring)), 2),
                "fine_tuning_seconds": round(float(np.median(tuning)), 1),
                "ratio": round(float(np.median(scoring / tuning)), 3),
                "accuracy": round(float(accuracy.mean()), 4),
                "standard_deviation": round(float(accuracy.std(ddof=1)), 4),
                "seeds": seeds,
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--configs", default="minilm-e2e-rating")
    options.add_argument("--counts", default="32,64,128,256,512")
    options.add_argument("--most", type=int, default=MOST, help="of the others")
    options.add_argument("--draws", type=int, default=2)
    options.add_argument("--seeds", type=int, default=3, help="of the demo; 0: none")
    options.add_argument("--name", default="samples", help="of the file of results")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    begun = setting(packages=("transformers",))
    counts = [int(count) for count in options.counts.split(",")]
    rows = []
    for name, setup in load_settings(options.configs.split(",")).items():
        whole = dataclasses.replace(setup.task, limit=None)
        task = load_task(whole, evaluation=False)
        rows += agreed_with(
            name, task, counts, options.draws, setup.sylva, options.most
        )
    levels = SylvaConfig().levels
    variants = [{"samples": n, "levels": levels} for n in (32, 64, 128)]
    variants.append({"samples": 64, "levels": levels - 1})
    figures = {
        "setting": begun,
        "rule": SylvaConfig().importance,
        "draws": options.draws,
        "agreement": rows,
        "demo": demo(variants, options.seeds) if options.seeds else [],
    }
    print(write(options.name, figures))


if __name__ == "__main__":
    main()
