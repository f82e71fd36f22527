"""Tables and pictures of a comparison: terminal, Markdown and one HTML page.

All read the results of `sylva compare`. Beside what every comparison has, they use, where
it is there: ``setup["higher_is_better"]`` (true unless said), ``setup["notes"]`` (texts
for the end of the page), and in ``factor`` its ``side`` (``"in"`` or ``"out"``),
``level_ranks`` (one a level), ``level_bytes`` (one a level, then the leaves) and
``approximation`` (sampled like ``magnitude``).
"""

from __future__ import annotations

from .choices import AGREEMENT, agreement_cells, write_choices
from .figures import seeds_line
from .headline import Headline, headline
from .page import write_report
from .style import INK, THEME, looks, shorten, svg_file
from .summary import Metric, Paired, Row, metric_of, percentage, summary_rows
from .tables import markdown_table, summary_table

__all__ = [
    "AGREEMENT",
    "INK",
    "THEME",
    "Headline",
    "Metric",
    "Paired",
    "Row",
    "agreement_cells",
    "headline",
    "looks",
    "markdown_table",
    "metric_of",
    "percentage",
    "seeds_line",
    "shorten",
    "summary_rows",
    "summary_table",
    "svg_file",
    "write_choices",
    "write_report",
]
