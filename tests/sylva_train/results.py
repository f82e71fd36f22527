"""Made-up results of comparisons, and pages read for what they are made of."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np

from sylva_train import report

# label, trainable fraction (None: all), accuracy, step seconds, scoring seconds
METHODS = {
    "frozen": ("Frozen features + head", 0.0, 0.812, None, None),
    "full": ("Full fine-tuning", None, 0.903, 0.412, None),
    "lora": ("LoRA", 0.013, 0.896, 0.367, None),
    "kfac-pruner": ("K-FAC pruner", 0.05, 0.879, 0.349, 14.8),
    "sylva:kfac:mlr": ("Sylva, K-FAC (MLR)", 0.05, 0.897, 0.341, 12.3),
    "sylva:kfac:hodlr": ("Sylva, K-FAC (HODLR)", 0.05, 0.887, 0.342, 15.1),
    "sylva:kfac:dense": ("Sylva, K-FAC (exact factors)", 0.05, 0.898, 0.340, 19.9),
    "sylva:fisher-diag": ("Sylva, diagonal Fisher", 0.05, 0.893, 0.341, 8.2),
    "sylva:weight-gradient": ("Sylva, weight × gradient", 0.05, 0.891, 0.339, 8.0),
    "sylva:gradient": ("Sylva, gradient", 0.05, 0.894, 0.343, 8.1),
    "sylva:magnitude": ("Sylva, magnitude", 0.05, 0.883, 0.341, 0.1),
    "sylva:random": ("Sylva, random blocks", 0.05, 0.886, 0.344, None),
}
DEMO = ("frozen", "full", "lora", "sylva:kfac:mlr", "sylva:random")
TOTAL = 22_713_986
HEAD = 770


def layer_shapes(depth, width=384, inner=1536):
    """Names and shapes of a BERT-like encoder's linear layers."""
    parts = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    return {
        f"encoder.layer.{i}.{part}": shape
        for i in range(depth)
        for part, shape in parts.items()
    }


def fake_run(method, seed, steps, rng, shift=0.0):
    """One run whose curves bend as those of a real fine-tuning do."""
    label, fraction, score, step, scoring = METHODS[method]
    end = score + shift + rng.normal(0, 0.004)
    trainable = TOTAL if fraction is None else int(fraction * TOTAL)
    logged = np.arange(1, steps + 1) if step else []
    history = [
        {
            "step": int(i),
            "loss": float(
                0.69 * np.exp(-3 * i / steps) + 0.22 + abs(rng.normal(0, 0.06))
            ),
            "score": float(end - 0.38 * np.exp(-5 * i / steps) + rng.normal(0, 0.002))
            if i % (steps // 8) == 0
            else None,
            "lr": 2e-4 * (1 - float(i) / steps),
        }
        for i in logged
    ]
    return {
        "method": method,
        "label": label,
        "seed": seed,
        "score": round(end * 872) / 872,
        "metrics": {},
        "trainable": trainable,
        "trainable_head": HEAD,
        "trainable_fraction": trainable / TOTAL,
        "seconds_per_step": step and step * float(rng.normal(1, 0.01)),
        "step_seconds_iqr": step and [step * 0.96, step * 1.07],
        "score_seconds": scoring,
        "score_memory_bytes": scoring and int(9e8 + 2e7 * scoring),
        "train_seconds": (step or 0) * steps,
        "peak_memory_bytes": int(7e8 + 16 * trainable + (0.4e9 if step else 0)),
        "adapter_bytes": (trainable + HEAD) * 4,
        "lr": 2e-4 if step else None,
        "history": history,
    }


def fake_scores(method, shapes, block, density, rng):
    """Rank-one block scores and the blocks that they choose in each layer."""
    masks, scores = {}, {}
    for depth, (name, (out, width)) in enumerate(shapes.items()):
        rows, columns = -(-out // block), -(-width // block)
        grid = np.outer(rng.lognormal(0, 0.8, rows), rng.lognormal(0, 1.1, columns))
        grid *= 1e-6 * np.exp(-0.02 * depth)
        if method == "sylva:random":
            grid = rng.random((rows, columns))
        keep = max(1, round(density * rows * columns))
        threshold = np.sort(grid, axis=None)[-keep]
        masks[name] = {
            "shape": [out, width],
            "block_size": block,
            "indices": np.argwhere(grid >= threshold).tolist(),
        }
        scores[name] = {
            "block_scores_quantiles": np.quantile(
                grid, np.linspace(0, 1, 101)
            ).tolist(),
            "threshold": float(threshold),
            "grid": grid.tolist(),
        }
    return masks, scores


def fake_factor(rng, n=96, levels=3, rank=6):
    """A covariance and its multilevel low rank form, by eigenvectors of each level."""
    mix = rng.normal(size=(n, n)) * np.arange(1, n + 1) ** -0.8
    near = np.exp(-np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / 6)
    dense = mix @ mix.T / n + 0.4 * near
    rest, spectra = dense.copy(), []
    for level in range(levels):
        size, values = n >> level, []
        for start in range(0, n, size):
            part = slice(start, start + size)
            w, v = np.linalg.eigh(rest[part, part])
            values += w[-rank:].tolist()
            rest[part, part] -= (v[:, -rank:] * w[-rank:]) @ v[:, -rank:].T
        spectra.append(sorted(values, reverse=True))
    leaf = n >> levels
    where = np.arange(n) // leaf
    leaves = [
        np.linalg.eigvalsh(rest[i : i + leaf, i : i + leaf]) for i in range(0, n, leaf)
    ]
    spectra.append(np.sort(np.abs(leaves), axis=None)[::-1].tolist())
    lost = np.where(np.equal.outer(where, where), 0, rest)
    sizes = [8 * n * rank] * levels + [8 * n * leaf]
    return {
        "layer": "encoder.layer.0.attention.self.query",
        "side": "in",
        "kind": "MLR",
        "n": n,
        "levels": levels,
        "rank": rank,
        "level_ranks": [rank] * levels,
        "level_bytes": sizes,
        "singular_values": spectra,
        "spectrum_dense": np.linalg.eigvalsh(dense)[::-1].tolist(),
        "magnitude": np.abs(dense).tolist(),
        "approximation": np.abs(dense - lost).tolist(),
        "bytes": sum(sizes),
        "dense_bytes": 8 * n * n,
        "error": float(np.linalg.norm(lost) / np.linalg.norm(dense)),
    }


def fake_results(
    methods=DEMO, seeds=3, depth=6, steps=48, block=32, shapes=None, shift=None
):
    """Results of a comparison, as realistic as numbers from a generator can be."""
    rng = np.random.default_rng(0)
    shapes = layer_shapes(depth) if shapes is None else shapes
    chosen = {
        method: fake_scores(method, shapes, block, 0.05, rng)
        for method in methods
        if method.startswith("sylva")
    }
    shift = shift or {}
    return {
        "format": "sylva-comparison/1",
        "setup": {
            "model": "minilm",
            "data": "sst2 (validation)",
            "task": "classification",
            "labels": ["negative", "positive"],
            "metric": "accuracy",
            "train_examples": 2000,
            "eval_examples": 872,
            "steps": steps,
            "batch_size": 32,
            "density": 0.05,
            "block_size": block,
            "seeds": list(range(seeds)),
            "device": "AMD EPYC 7B13",
            "threads": 2,
            "versions": {"sylva_train": "0.1.0", "torch": "2.13.0"},
            "commit": "3947c39",
            "date": "2026-11-24T20:19:00+00:00",
            "total_weights": TOTAL,
            "command": "sylva compare --data sst2 --seeds 3",
        },
        "runs": [
            fake_run(method, seed, steps, rng, shift.get(method, 0.0))
            for method in methods
            for seed in range(seeds)
        ],
        "masks": {method: masks for method, (masks, _) in chosen.items()},
        "scores": {method: scores for method, (_, scores) in chosen.items()},
        "factor": fake_factor(rng),
    }


class Outline(HTMLParser):
    """What a page is made of: tags, their nesting, ids, references and text."""

    VOID = frozenset({"meta", "br", "wbr", "img", "path", "use", "rect", "image"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"href", "src", "xlink:href"}:
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


RUNS = {m: fake_run(m, 0, 8, np.random.default_rng(0)) for m in METHODS}
SMALL = {
    "encoder.layer.0.attention.query": (40, 96),
    "encoder.layer.1.attention.query": (40, 96),
}


def small_results(methods=("full", "sylva:kfac:mlr", "sylva:random"), seeds=2):
    """Results that are quick to draw."""
    return fake_results(methods, seeds, steps=8, block=16, shapes=SMALL)


def written(results, tmp_path):
    return report.write_report(results, tmp_path / "report.html").read_text("utf-8")


def scored(scores, **setup):
    """Results with the given scores by method and seed, and nothing else."""
    runs = [
        RUNS[method] | {"seed": seed, "score": score}
        for method, found in scores.items()
        for seed, score in enumerate(found)
    ]
    return {
        "format": "sylva-comparison/1",
        "setup": {"metric": "accuracy", "eval_examples": 872} | setup,
        "runs": runs,
    }
