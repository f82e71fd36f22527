"""Which metrics there are, of what, and whether more of one is better; needs no PyTorch."""

from __future__ import annotations

__all__ = [
    "ANSWERS",
    "CHOICE",
    "CLASSIFICATION",
    "FRACTIONS",
    "GENERATION",
    "LANGUAGE",
    "MEANS",
    "METRICS",
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
#: Those that are means over the texts, of a part of the data as well as of all.
MEANS = ("rouge-l", "rouge-l-coco", "exact-match", "answer")
#: Of the option that a language model finds likeliest.
CHOICE = "choice"
#: Of what a language model answers: it writes, or chooses.
ANSWERS = (*GENERATION, CHOICE)
#: Metrics that can be the score, and whether more is better.
METRICS = {
    name: name not in {"loss", "mse", "perplexity"}
    for name in (*CLASSIFICATION, *REGRESSION, *LANGUAGE, *ANSWERS)
}
#: Those between 0 and 1, which readers expect in percent, by their names in results.
FRACTIONS = {
    "accuracy", "f1", "f1_binary", "token_accuracy", "meteor", "rouge_l", "rouge_l_coco",
    "exact_match", "answer", "choice",
}  # fmt: skip


def key_of(metric: str) -> str:
    """Return the name that a metric has among the results of `evaluate`."""
    return metric.replace("-", "_")


def known_metrics(task: str) -> tuple[str, ...]:
    """Return the metrics of a task, the default one first."""
    known = {"classification": CLASSIFICATION, "regression": REGRESSION}
    return known.get(task, (*LANGUAGE, *ANSWERS))
