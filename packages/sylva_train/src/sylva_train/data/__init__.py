"""Data sets from files, and batches of them in an order that can be repeated."""

from .dataset import TextDataset, load_data
from .loader import Loader, ending, pad, prompt_ids, spaced
from .sources import builtin_names, is_single
from .unlabelled import load_texts

__all__ = [
    "Loader",
    "TextDataset",
    "builtin_names",
    "ending",
    "is_single",
    "load_data",
    "load_texts",
    "pad",
    "prompt_ids",
    "spaced",
]
