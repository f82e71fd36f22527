"""Room for improvement: what fine-tuning adds to a frozen MiniLM.

Compares the best linear head on frozen mean-pooled features with full fine-tuning, on the
built-in task and on any others: ``--task NAME=TRAIN,EVALUATION`` takes two files that
`sylva_train.load_data` can read. Writes ``results/headroom.json``.
"""

from __future__ import annotations

import math
import time

import torch
from _common import parser, setting, write

import sylva_train as sylva
from sylva_train.baselines import probe
from sylva_train.pretrained import pooled_features

BUILTIN = "e2e-rating"
MAX_LENGTH = 64


def load(task: str, examples: int) -> tuple[str, sylva.TextDataset, sylva.TextDataset]:
    """Return a task's name, its training and its evaluation sentences."""
    if task == BUILTIN:
        training = sylva.load_data(task, limit=examples)
        return task, training, sylva.load_data(task, split="test")
    name, _, paths = task.partition("=")
    train, _, test = paths.partition(",")
    training = sylva.load_data(train, limit=examples)
    return name, training, sylva.load_data(test, labels=training.label_names)


def measure(training, evaluation, config, dropout) -> dict:
    """Return the scores of the frozen and of the fine-tuned model."""
    model, tokenizer = sylva.load_model(
        "minilm", labels=training.label_names, dropout=dropout, seed=config.seed
    )
    model.to(config.device)

    def loader(data, **options):
        return sylva.Loader(
            data, tokenizer, config.batch_size, max_length=MAX_LENGTH, **options
        )

    # Batches of like lengths: the features and scores come back in the data's order.
    test = loader(evaluation, bucket=16)
    features, labels = pooled_features(model, loader(training, bucket=16))
    test_features, truth = pooled_features(model, test)
    guess, _ = probe(features, labels, test_features, seed=config.seed)
    frozen = float((guess == truth).mean())

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    start = time.perf_counter()
    result = sylva.train(
        model,
        loader(training, shuffle=True, seed=config.seed),
        config,
        optimizer=optimizer,
        eval_loader=test,
        progress=False,
    )
    counts = torch.tensor(evaluation.labels).bincount()
    full = result.metrics["accuracy"]
    return {
        "seed": config.seed,
        "majority": float(counts.max() / counts.sum()),
        "frozen": frozen,
        "full": full,
        "headroom": full - frozen,
        "standard_error": math.sqrt(full * (1 - full) / len(evaluation)),
        "full_f1": result.metrics["f1"],
        "course": {r["step"]: r["score"] for r in result.history if "score" in r},
        "seconds_per_step": result.seconds_per_step,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--task", action="append", metavar="NAME=TRAIN,EVALUATION")
    options.add_argument("--examples", type=int, default=4000)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--lr", type=float, default=1e-4)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--dropout", type=float, help="default: MiniLM's own, 0.1")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    found = {"setting": setting(chosen.device, ("transformers", "scikit-learn"))}
    names = ("examples", "steps", "lr", "dropout")
    found["options"] = {name: getattr(chosen, name) for name in names}
    found["options"] |= {"batch_size": 32, "max_length": MAX_LENGTH, "model": "minilm"}
    found["tasks"] = {}
    for task in [BUILTIN, *(chosen.task or [])]:
        name, training, evaluation = load(task, chosen.examples)
        runs = []
        for seed in range(chosen.seeds):
            config = sylva.TrainingConfig(
                steps=chosen.steps, batch_size=32, lr=chosen.lr,
                eval_every=50, device=chosen.device, seed=seed,
            )  # fmt: skip
            run = measure(training, evaluation, config, chosen.dropout)
            runs.append(run)
            print(
                f"{name} seed {seed}: majority {run['majority']:.3f}, frozen"
                f" {run['frozen']:.3f}, full {run['full']:.3f} ± {run['standard_error']:.3f}"
                f" ({run['seconds_per_step']:.2f} s a step)",
                flush=True,
            )
            found["tasks"][name] = {
                "train_examples": len(training),
                "eval_examples": len(evaluation),
                "classes": training.label_names,
                "runs": runs,
            }
            write("headroom", found)


if __name__ == "__main__":
    main()
