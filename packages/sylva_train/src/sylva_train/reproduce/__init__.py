"""The paper's tables and figures, in form, on models and machines that are at hand."""

from .experiment import load_table, reproduce, write_table
from .measuring import MEASUREMENTS, measure, write_measurement
from .performance import measure_layer, measure_memory, measure_step
from .performance_jobs import fig4_jobs, fig5_jobs, table2_jobs
from .performance_tables import draw_fig4, draw_fig5, fig4, fig5, table2
from .quality import TABLES, Table
from .settings import load_setting, load_settings, with_values
from .subjects import draw_masks, staircase

__all__ = [
    "MEASUREMENTS",
    "TABLES",
    "Table",
    "draw_fig4",
    "draw_fig5",
    "draw_masks",
    "fig4",
    "fig4_jobs",
    "fig5",
    "fig5_jobs",
    "load_setting",
    "load_settings",
    "load_table",
    "measure",
    "measure_layer",
    "measure_memory",
    "measure_step",
    "reproduce",
    "staircase",
    "table2",
    "table2_jobs",
    "with_values",
    "write_measurement",
    "write_table",
]
