"""Which rule chooses weights worth training? Rules against each other at equal budget.

Every rule of a cell (task, density, block size and the like) trains exactly as many
weights, from the same model, on the same batches. Its peak learning rate is chosen on the
validation split with a seed that no reported figure uses; the other seeds then train with
it, and are scored on the test split. One JSON line a run is appended to the output: a
study that was stopped goes on where it was, and more cells can be added at any time.

``python examples/pretrain_llama.py llama`` makes the language model that
``--llama llama`` names; those of `docs/benchmarks.md` that others have pretrained install
as packages. ``report_rules.py`` makes tables and pictures of the runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from _common import RESULTS, setting
from sklearn.linear_model import LogisticRegression
from torch import nn

from sylva_train import (
    Loader,
    Scores,
    SylvaConfig,
    TrainingConfig,
    embed,
    evaluate,
    load_data,
    load_model,
    select,
    train,
)
from sylva_train.baselines import lora_config
from sylva_train.curvature import block_sums, collect_curvature, loss_units
from sylva_train.importance import LayerScores, score_rules
from sylva_train.pretrained import pooled_features
from sylva_train.targets import find_targets

#: The rules, and what they stand between: the head alone, LoRA and every weight.
RULES = (
    "random", "magnitude", "wanda", "gradient", "weight-gradient", "fisher-diag",
    "kfac", "kfac-diag", "kfac-element", "kfac-natural", "kfac-block",
)  # fmt: skip
#: Random blocks, in layers that share the budget as `kfac-natural` shares it out: what
#: choosing layers is worth by itself. In general, `a@b` has blocks by `a` in `b`'s layers.
LAYERS_ALONE = "kfac-natural-layers"
#: `kfac-natural` without the gradient's noise, and by all training sentences with exact
#: factors.
UNBIASED, MANY = "kfac-natural-unbiased", "kfac-natural-many"
ANCHORS = ("frozen", "lora", "full")
#: Models that are adapted to text; the others tell classes apart.
LANGUAGE_MODELS = frozenset({"llama", "smollm2", "gemma3"})
#: Peak learning rates to choose from: of blocks, and of what they stand between.
RATES = {
    "llama": (2e-2, 6e-2, 2e-1, 6e-1),
    "smollm2": (3e-3, 1e-2, 3e-2),
    "gemma3": (1e-3, 3e-3, 1e-2, 3e-2),
    "minilm": (3e-3, 1e-2, 3e-2, 1e-1),
}
ANCHOR_RATES = {
    ("frozen", "llama"): (0.0,),  # nothing is trained
    ("frozen", "smollm2"): (0.0,),
    ("frozen", "gemma3"): (0.0,),
    ("frozen", "minilm"): (3e-3,),
    ("lora", "llama"): (6e-3, 2e-2, 6e-2),
    ("lora", "smollm2"): (1e-3, 3e-3, 1e-2),
    ("lora", "gemma3"): (1e-3, 3e-3, 1e-2),
    ("lora", "minilm"): (3e-3, 1e-2, 3e-2),
    ("full", "llama"): (1e-3, 4e-3),
    ("full", "smollm2"): (3e-4, 1e-3),
    ("full", "gemma3"): (1e-4, 3e-4, 1e-3),
    ("full", "minilm"): (2e-4, 6e-4),
}
#: Seed to choose them with.
TUNING_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the runs of a comparison have in common."""

    task: str
    density: float
    block: int = 16
    scope: str = "layer"
    spread: float | None = None
    allocation: float = 0.0
    damping: float = 1e-2
    head: str = "fitted"
    steps: int = 60
    batch: int = 8

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.task.partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """On how many sentences runs are scored, trained and evaluated."""

    samples: int
    train: int
    validation: int
    test: int


class Setup:
    """A task's model and batches for one seed; scores are computed once."""

    def __init__(
        self,
        cell: Cell,
        seed: int,
        sizes: Sizes,
        paths: argparse.Namespace,
        rules: frozenset[str],
    ):
        language = cell.model in LANGUAGE_MODELS
        source = paths.sst2 if cell.task.endswith("sst2") else "e2e-rating"
        task = "causal-lm" if language else "classification"
        limits = {"train": sizes.train, "validation": sizes.validation}
        limits["test"] = sizes.test
        data, labels = {}, None
        for split, limit in limits.items():
            # Held-out sentences are the same ones for all seeds.
            data[split] = load_data(
                source,
                task=task,
                split=split,
                limit=limit,
                labels=labels,
                seed=seed if split == "train" else 0,
            )
            labels = data[split].label_names or None
        name = getattr(paths, cell.model) if language else "minilm"
        self.model, tokenizer = load_model(name, task=task, labels=labels, seed=seed)
        self.modules_to_save = None if language else ["classifier"]
        self.seed, self.sizes, self.rules = seed, sizes, rules
        options = {"max_length": 64}
        self.loader = Loader(
            data["train"], tokenizer, cell.batch, shuffle=True, seed=seed, bucket=8,
            **options,
        )  # fmt: skip
        self.held_out = {
            split: Loader(data[split], tokenizer, 64, bucket=16, **options)
            for split in ("validation", "test")
        }
        self.samples = Loader(
            data["train"].subset(range(sizes.samples)), tokenizer, 32, bucket=16,
            **options,
        )  # fmt: skip
        # Not sorted by length: two halves that are alike.
        self.halves, self.everything = (
            Loader(data["train"].subset(range(count)), tokenizer, batch, **options)
            for count, batch in (
                (sizes.samples, sizes.samples // 2),
                (len(data["train"]), 128),
            )
        )
        if cell.head == "fitted" and not language:
            self.fit_head()

    def fit_head(self) -> None:
        """Give the new head the weights of a logistic regression on frozen features.

        On all training sentences: on those that are scored alone it would leave hardly a
        gradient to score by.
        """
        X, y = pooled_features(self.model, self.loader)
        found = LogisticRegression(C=1.0, max_iter=2000).fit(X, y)
        head = self.model.classifier
        with torch.no_grad():
            # Two classes have one row: the difference of the logits.
            sign = [1.0] if len(found.coef_) > 1 else [-0.5, 0.5]
            weight, bias = (
                torch.cat([s * torch.as_tensor(part).float() for s in sign])
                for part in (found.coef_, found.intercept_)
            )
            head.weight.zero_()[found.classes_] = weight
            head.bias.fill_(-10.0)[found.classes_] = bias

    @functools.cache  # noqa: B019 (a setup lives as long as its runs)
    def scores(self, block: int, damping: float) -> dict[str, Scores]:
        """Score by all rules."""
        config = SylvaConfig(
            block_size=block,
            damping=damping,
            samples=self.sizes.samples,
            seed=self.seed,
        )
        found = score_rules(
            self.model, self.samples, config, [r for r in RULES if r in self.rules]
        )
        if UNBIASED in self.rules:
            found[UNBIASED] = unbiased(self.model, list(self.halves), config)
        if MANY in self.rules:
            more = dataclasses.replace(
                config, samples=self.sizes.train, curvature="dense"
            )
            by_all = score_rules(self.model, self.everything, more, ["kfac-natural"])
            found[MANY] = by_all["kfac-natural"]
        return found

    def chosen(self, cell: Cell, rule: str) -> Scores:
        """Return the scores that a rule, or one in the layers of another, chooses by."""
        found = self.scores(cell.block, cell.damping)
        blocks, _, layers = parts(rule)
        return in_layers(found[blocks], found[layers or blocks], cell.block)

    def run(self, cell: Cell, rule: str, rate: float) -> dict[str, Any]:
        """Train what a rule chooses and evaluate it."""
        model = copy.deepcopy(self.model)
        targets = find_targets(model)
        row: dict[str, Any] = {}
        if rule == "lora":
            torch.manual_seed(self.seed)
            options = lora_config(targets, cell.density, self.modules_to_save)
            model = peft.get_peft_model(model, options)
        elif rule == "full":
            model.requires_grad_(False)
            for module in targets.values():
                module.weight.requires_grad_(True)
            for name in self.modules_to_save or []:
                model.get_submodule(name).requires_grad_(True)
        elif rule == "frozen":
            model.requires_grad_(False)
            for name in self.modules_to_save or []:
                model.get_submodule(name).requires_grad_(True)
        else:
            masks, reference = (
                select(
                    self.chosen(cell, name),
                    cell.density,
                    cell.block,
                    cell.scope,
                    cell.spread or 0.0,
                    allocation=cell.allocation,
                )
                for name in (rule, "gradient")
            )
            # How many rows and columns the blocks lie on, of those they could.
            lines = [
                len(mask.indices[:, side].unique()) / min(len(mask), size)
                for mask in masks.values()
                if len(mask)
                for side, size in enumerate(mask.grid_shape)
            ]
            row["lines"] = sum(lines) / len(lines)
            row["layers"] = sum(len(mask) > 0 for mask in masks.values())
            row["overlap_with_gradient"] = masks.overlap(reference)
            embed(model, masks, modules_to_save=self.modules_to_save)
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        begin = time.process_time()
        if row["trainable"]:
            training = TrainingConfig(
                steps=cell.steps,
                batch_size=cell.batch,
                lr=rate,
                seed=self.seed,
                device="cpu",
            )
            result = train(model, self.loader, training, progress=False)
            row["train_loss"] = sum(r["loss"] for r in result.history[-10:]) / 10
        row["seconds"] = round(time.process_time() - begin, 2)
        split = "validation" if self.seed == TUNING_SEED else "test"
        found = evaluate(model, self.held_out[split])
        names = ("loss", "accuracy", "token_accuracy")
        return row | {split: {name: found[name] for name in names if name in found}}


def parts(rule: str) -> tuple[str, str, str]:
    """Return the rule that blocks are chosen by, and after an `@` the layers' own one."""
    return ("random@kfac-natural" if rule == LAYERS_ALONE else rule).partition("@")


def in_layers(blocks: Scores, layers: Scores, size: int) -> Scores:
    """Give the blocks of a layer the order of the one, and the mean of the other."""
    made = {}
    for name, other in layers.items():
        grid = blocks[name].blocks(size)
        grid += other.blocks(size).mean() - grid.mean()
        made[name] = LayerScores(other.shape, grid=grid, unit=size)
    return Scores(made, blocks.metadata)


def unbiased(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], config: SylvaConfig
) -> Scores:
    """Score as `kfac-natural` does, without what the gradient's noise adds to it.

    By ``(Γ₁ ∘ G⁻¹ Γ₂ A⁻¹ + Γ₂ ∘ G⁻¹ Γ₁ A⁻¹) / 2``: the gradients of every other batch and
    of the rest have noise of their own, which their product does not add up as a square.
    """
    targets = find_targets(model)
    whole = collect_curvature(model, targets, batches, config, ["factors", "gradient"])
    half = collect_curvature(model, targets, batches[::2], config, ["gradient"])
    terms, others = (
        sum(loss_units(model, batch) for batch in part)
        for part in (batches[::2], batches[1::2])
    )
    scores = {}
    for name in targets:
        A, G = whole[name].A, whole[name].G
        λ_A, λ_G = (config.damping * factor.mean_eigenvalue() for factor in (A, G))
        total, first = (part[name].gradient.double() for part in (whole, half))
        second = ((terms + others) * total - terms * first) / others
        products = (
            one * G.solve(A.solve(other.T, λ_A).T, λ_G)
            for one, other in ((first, second), (second, first))
        )
        grid = block_sums(sum(products) / 2, config.block_size)
        scores[name] = LayerScores(
            tuple(total.shape), grid=grid, unit=config.block_size
        )
    return Scores(scores, {"importance": UNBIASED})


def rates(cell: Cell, rule: str) -> tuple[float, ...]:
    """Return the peak learning rates to choose from."""
    return ANCHOR_RATES.get((rule, cell.model), RATES[cell.model])


def best_rate(
    runs: dict[str, dict[str, Any]], cell: Cell, rule: str, among: Sequence[float]
) -> float:
    """Return the rate with the least validation loss under the tuning seed."""
    if len(among) == 1:
        return among[0]
    losses = {
        rate: runs[key(cell, rule, rate, TUNING_SEED)]["validation"]["loss"]
        for rate in among
    }
    return min(losses, key=losses.__getitem__)


def key(cell: Cell, rule: str, rate: float, seed: int) -> str:
    """Identify a run."""
    about = dataclasses.asdict(cell) | {"rule": rule, "lr": rate, "seed": seed}
    if not cell.allocation:
        del about["allocation"]  # which runs of before it was an option do not name
    if "kfac" not in rule:
        about["damping"] = None  # which no other rule knows
    return json.dumps(about, sort_keys=True)


def plan(
    runs: dict[str, dict[str, Any]],
    cell: Cell,
    tuned: Cell,
    rules: tuple[str, ...],
    seeds: int,
    given: Sequence[float] = (),
) -> Iterator[tuple[Cell, str, float, int]]:
    """Yield the runs that are still to be done: those that choose the rates first.

    ``tuned`` is the cell to choose them in, which a variation may share with another.
    They are ``given`` or the usual ones; nothing is to be chosen from one.
    """
    among = {rule: given or rates(tuned, rule) for rule in rules}
    for rule, several in among.items():
        for rate in several if len(several) > 1 else ():
            if key(tuned, rule, rate, TUNING_SEED) not in runs:
                yield tuned, rule, rate, TUNING_SEED
    for seed in range(seeds):
        for rule in rules:
            rate = best_rate(runs, tuned, rule, among[rule])
            if key(cell, rule, rate, seed) not in runs:
                yield cell, rule, rate, seed


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "cells",
        help="JSON file: a list of cells, each with rules, seeds, and in `tuned` what is"
        " different where their rates are chosen, or in `lr` the rate or a list to choose from",
    )
    options.add_argument(
        "--output", type=Path, default=RESULTS / "rules" / "runs.jsonl"
    )
    options.add_argument("--llama", type=Path, help="folder of the language model")
    options.add_argument("--smollm2", type=Path, help="GGUF file or folder of SmolLM2")
    options.add_argument("--gemma3", type=Path, help="GGUF file or folder of Gemma 3")
    options.add_argument("--sst2", type=Path, help="folder of SST-2")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--train", type=int, default=1000)
    options.add_argument("--validation", type=int, default=256)
    options.add_argument("--test", type=int, default=400)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    sizes = Sizes(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)}
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    runs = {}
    if options.output.exists():
        for line in options.output.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            runs[row["key"]] = row
    made = setting(packages=("transformers", "peft"))
    setups: dict[Any, Setup] = {}
    groups = json.loads(Path(options.cells).read_text(encoding="utf-8"))
    # Those that are to be scored by; what is chosen is held against the gradient's choice.
    named = {part for g in groups for r in g.get("rules", RULES) for part in parts(r)}
    needed = frozenset(named | {"gradient"})
    with options.output.open("a", encoding="utf-8") as file:
        for group in groups:
            rules, seeds = tuple(group.pop("rules", RULES)), group.pop("seeds", 3)
            elsewhere, given = group.pop("tuned", {}), group.pop("lr", [])
            given = given if isinstance(given, list) else [given]
            tuned = Cell(**(group | elsewhere))
            for cell, rule, rate, seed in plan(
                runs, Cell(**group), tuned, rules, seeds, given
            ):
                which = (cell.task, cell.head, cell.batch, seed)
                if which not in setups:
                    setups[which] = Setup(cell, seed, sizes, options, needed)
                row = {"key": key(cell, rule, rate, seed), **dataclasses.asdict(cell)}
                row |= {"rule": rule, "lr": rate, "seed": seed}
                row |= setups[which].run(cell, rule, rate)
                row |= {"sizes": dataclasses.asdict(sizes), "setting": made}
                runs[row["key"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                scored = row.get("test") or row["validation"]
                print(
                    f"{cell.task} {cell.density:g} {rule:16} lr {rate:g} seed {seed:3}"
                    f"  loss {scored['loss']:.4f}  {row['seconds']} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
