"""Which metrics there are, and whether more of one is better."""

from __future__ import annotations

__all__ = ["CHOICE", "CLASSIFICATION", "GENERATION", "LANGUAGE", "METRICS"]

#: Metrics that can be the score, and whether more is better.
METRICS = {
    "accuracy": True,
    "f1": True,
    "mcc": True,
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
    "bleu": True,
    "nist": True,
    "meteor": True,
    "rouge-l": True,
    "cider": True,
    "exact-match": True,
    "answer": True,
    "choice": True,
}
#: Of classes; the first is the default.
CLASSIFICATION = ("accuracy", "f1", "mcc", "loss")
#: Of tokens.
LANGUAGE = ("perplexity", "loss", "token_accuracy")
#: Of the texts that a language model writes.
GENERATION = ("bleu", "nist", "meteor", "rouge-l", "cider", "exact-match", "answer")
#: Of the option that a language model finds likeliest.
CHOICE = "choice"
