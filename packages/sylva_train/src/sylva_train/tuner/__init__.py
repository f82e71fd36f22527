"""Sylva's adapters: a PEFT tuner, and the same folder format without PEFT's wrapping."""

from .files import Adapter, inspect_adapter
from .layer import SylvaLayer
from .model import SylvaModel
from .plain import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "SylvaLayer",
    "SylvaModel",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
]
