"""The paper's tables and figures, on the models and machines that are at hand."""

from .performance import measure_layer, measure_memory, measure_step
from .performance_jobs import fig4_jobs, fig5_jobs, table2_jobs
from .performance_tables import draw_fig4, draw_fig5, fig4, fig5, table2
from .subjects import draw_masks, staircase

__all__ = [
    "draw_fig4",
    "draw_fig5",
    "draw_masks",
    "fig4",
    "fig4_jobs",
    "fig5",
    "fig5_jobs",
    "measure_layer",
    "measure_memory",
    "measure_step",
    "staircase",
    "table2",
    "table2_jobs",
]
