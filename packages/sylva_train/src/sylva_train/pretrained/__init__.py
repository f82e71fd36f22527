"""Pretrained models and tokenizers, and a classifier on top of bare ones."""

from .loading import load_model, load_tokenizer, saved_labels
from .pooled import PooledClassifier, mean_pool, pooled_features
from .sources import quiet

__all__ = [
    "PooledClassifier",
    "load_model",
    "load_tokenizer",
    "mean_pool",
    "pooled_features",
    "quiet",
    "saved_labels",
]
