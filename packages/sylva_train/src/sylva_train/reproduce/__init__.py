"""The paper's tables and figures, in form, on models and machines that are at hand."""

from .experiment import reproduce
from .measuring import MEASUREMENTS, measure
from .performance import measure_layer, measure_memory, measure_step
from .quality import TABLES, Table
from .settings import load_settings, with_values
from .subjects import draw_masks, staircase

__all__ = [
    "MEASUREMENTS",
    "TABLES",
    "Table",
    "draw_masks",
    "load_settings",
    "measure",
    "measure_layer",
    "measure_memory",
    "measure_step",
    "reproduce",
    "staircase",
    "with_values",
]
