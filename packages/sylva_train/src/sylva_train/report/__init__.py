"""Tables and pictures of the results of `sylva compare`: terminal, Markdown, one HTML page."""

from __future__ import annotations

from .choices import AGREEMENT, agreement_cells, write_choices
from .figures import label_rows, seeds_line
from .headline import headline
from .page import write_report
from .style import THEME, looks, shorten, svg_file
from .summary import Metric, deviation, percentage, summary_rows
from .tables import markdown_table, summary_table

__all__ = [
    "AGREEMENT",
    "THEME",
    "Metric",
    "agreement_cells",
    "deviation",
    "headline",
    "label_rows",
    "looks",
    "markdown_table",
    "percentage",
    "seeds_line",
    "shorten",
    "summary_rows",
    "summary_table",
    "svg_file",
    "write_choices",
    "write_report",
]
