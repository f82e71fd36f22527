"""Metrics of classes, of tokens, of texts that a model writes and of chosen options."""

from .evaluate import check_prompts, evaluate
from .metrics import CHOICE, CLASSIFICATION, GENERATION, LANGUAGE, METRICS
from .texts import check_libraries, score_texts

__all__ = [
    "CHOICE",
    "CLASSIFICATION",
    "GENERATION",
    "LANGUAGE",
    "METRICS",
    "check_libraries",
    "check_prompts",
    "evaluate",
    "score_texts",
]
