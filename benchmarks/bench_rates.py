"""Peak learning rate of each method, chosen on the validation split.

Short runs of the comparison, one for each method and rate, scored on sentences that no
reported figure uses. `sylva_train.comparison.LEARNING_RATES` are the best of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import parser, setting, write

from sylva_train import Comparison, SylvaConfig, TaskConfig, TrainingConfig, compare

RATES = {
    "full": (1e-4, 2e-4, 4e-4),
    "lora": (1e-3, 2e-3, 4e-3),
    "sylva:random": (1e-3, 2e-3, 4e-3),
    "sylva:kfac:mlr": (1e-3, 2e-3, 4e-3),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--seed", type=int, default=100)
    options = options.parse_args()
    scores: dict[str, dict[str, float]] = {}
    for method, rates in RATES.items():
        for rate in rates:
            comparison = Comparison(
                task=TaskConfig(eval_split="validation", max_length=64),
                sylva=SylvaConfig(samples=128),
                training=TrainingConfig(steps=options.steps),
                methods=(method,),
                seeds=(options.seed,),
                learning_rates={method: rate},
            )
            with tempfile.TemporaryDirectory() as folder:
                results = compare(comparison, Path(folder) / "rates")
            scores.setdefault(method, {})[f"{rate:g}"] = results["runs"][0]["score"]
            print(method, rate, results["runs"][0]["score"], flush=True)
    figures = {
        "setting": setting(packages=("transformers", "peft")),
        "data": "e2e-rating, validation split",
        "steps": options.steps,
        "seed": options.seed,
        "accuracy": scores,
        "best": {m: max(s, key=lambda rate: s[rate]) for m, s in scores.items()},
    }
    print(write("rates", figures))


if __name__ == "__main__":
    main()
