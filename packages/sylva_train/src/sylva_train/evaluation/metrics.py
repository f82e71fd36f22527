"""Which metrics suit what a model does; `sylva_train.options.METRICS` has them all."""

from __future__ import annotations

__all__ = [
    "CHOICE",
    "CLASSIFICATION",
    "GENERATION",
    "LANGUAGE",
    "REGRESSION",
    "key_of",
    "known_metrics",
]

#: Of classes; the first is the default.
CLASSIFICATION = ("accuracy", "f1", "f1-binary", "mcc", "loss")
#: Of numbers.
REGRESSION = ("pearson", "spearman", "mse")
#: Of tokens.
LANGUAGE = ("perplexity", "loss", "token_accuracy")
#: Of the texts that a language model writes.
GENERATION = (
    "bleu", "nist", "meteor", "rouge-l", "rouge-l-coco", "cider", "exact-match", "answer",
)  # fmt: skip
#: Of the option that a language model finds likeliest.
CHOICE = "choice"


def key_of(metric: str) -> str:
    """Return the name that a metric has among the results of `evaluate`."""
    return metric.replace("-", "_")


def known_metrics(task: str) -> tuple[str, ...]:
    """Return the metrics of a task, the default one first."""
    known = {"classification": CLASSIFICATION, "regression": REGRESSION}
    return known.get(task, (*LANGUAGE, *GENERATION, CHOICE))
