"""Pretrained models and tokenizers, and a classifier on top of bare ones."""

from .loading import DTYPES, POOLINGS, load_model, load_tokenizer, quiet, saved_labels
from .pooled import PooledClassifier, mean_pool, pooled_features

__all__ = [
    "DTYPES",
    "POOLINGS",
    "PooledClassifier",
    "load_model",
    "load_tokenizer",
    "mean_pool",
    "pooled_features",
    "quiet",
    "saved_labels",
]
