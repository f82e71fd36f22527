"""Metrics of classes, of tokens, of texts that a model writes and of chosen options."""

from .evaluate import check_prompts, evaluate
from .generation import write
from .labels import label_logits, number_metrics, prediction_metrics
from .texts import check_libraries, score_texts

__all__ = [
    "check_libraries",
    "check_prompts",
    "evaluate",
    "label_logits",
    "number_metrics",
    "prediction_metrics",
    "score_texts",
    "write",
]
