"""The summary of a comparison as columns of text, for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .summary import (
    BYTES,
    COUNTS,
    SECONDS,
    Metric,
    Results,
    Row,
    digits,
    metric_of,
    percentage,
    quantity,
    summary_rows,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Column",
    "caption",
    "markdown_table",
    "suited",
    "summary_columns",
    "summary_table",
]

#: What a cell without a value shows.
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the summary table.

    Parameters
    ----------
    title : str
        What it holds.
    cells : tuple of str
        One cell a method.
    unit : str
        Unit of all its cells.
    minor : Column, optional
        A column that belongs to it: a second line where there is room for one only,
        a column of its own elsewhere.
    numeric : bool
        Whether cells are numbers, to be set flush right.
    """

    title: str
    cells: tuple[str, ...]
    unit: str = ""
    minor: Column | None = None
    numeric: bool = True

    @property
    def name(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def heading(self) -> tuple[str, str]:
        """Title over the unit, or over the minor column's title."""
        if self.minor is None:
            return self.title, self.unit
        return self.name, self.minor.title

    @property
    def empty(self) -> bool:
        """Whether no method has a value."""
        return set(self.cells) <= {MISSING}


def measured(
    title: str, values: Iterable[float | None], units: Sequence[tuple[float, str]]
) -> Column:
    """Return a column of quantities, all in the unit that suits their median."""
    values = list(values)
    size, unit = suited(values, units)
    cells = tuple(MISSING if v is None else digits(v / size) for v in values)
    return Column(title, cells, unit)


def suited(
    values: Iterable[float | None], units: Sequence[tuple[float, str]]
) -> tuple[float, str]:
    """Return the largest unit that the median of the values reaches."""
    there = sorted(abs(value) for value in values if value)
    typical = there[len(there) // 2] if there else 0.0
    return next((unit for unit in units if typical >= unit[0]), units[-1])


def summary_columns(results: Results) -> list[Column]:
    """Return the summary table by columns, methods first; empty ones are left out."""
    metric, rows = metric_of(results), summary_rows(results)
    labels = tuple(f"{row.label} ★" if row.best else row.label for row in rows)
    ranges = Column("range", tuple(_range(row, metric) for row in rows))
    fractions = Column("of all", tuple(percentage(r.trainable_fraction) for r in rows))
    columns = [
        Column("method", labels, numeric=False),
        Column(
            metric.words,
            tuple(_score(row, metric) for row in rows),
            unit="%" if metric.percent else "",
            minor=None if ranges.empty else ranges,
        ),
        Column("vs random", tuple(_versus(row, metric) for row in rows)),
        Column(
            "trained",
            tuple(quantity(row.trainable, COUNTS) for row in rows),
            minor=fractions,
        ),
        measured("step", (row.step_seconds for row in rows), SECONDS),
        measured("scoring", (row.score_seconds for row in rows), SECONDS),
        _memory(rows),
        measured("adapter", (row.adapter_bytes for row in rows), BYTES),
    ]
    return [column for column in columns if not column.empty]


def _memory(rows: Sequence[Row]) -> Column:
    """Return the peak memory of training and, in the same unit, that of scoring."""
    peaks = [row.peak_memory for row in rows]
    unit = [suited(peaks, BYTES)]
    scoring = measured("scoring", (row.score_memory for row in rows), unit)
    major = measured("memory", peaks, unit)
    return replace(major, minor=None if scoring.empty else scoring)


def _score(row: Row, metric: Metric) -> str:
    if row.mean is None:
        return MISSING
    return metric.number(row.mean) + metric.spread(row.std)


def _range(row: Row, metric: Metric) -> str:
    if len(row.scores) < 2:
        return MISSING
    return f"{metric.number(min(row.scores))}–{metric.number(max(row.scores))}"


def _versus(row: Row, metric: Metric) -> str:
    pair = row.versus_random
    return (
        MISSING if pair is None else metric.signed(pair.mean) + metric.spread(pair.std)
    )


def caption(results: Results) -> str:
    """Say what the marks of the summary table mean."""
    rows = summary_rows(results)
    seeds = max(len(row.scores) for row in rows)
    parts = [
        {0: "No run gave a finite score", 1: "One seed"}.get(
            seeds, f"Mean ± standard deviation and range over {seeds} seeds"
        )
    ]
    if any(row.versus_random for row in rows):
        parts.append("vs random: difference to random blocks, seed by seed")
    if any(row.best for row in rows):
        parts.append("★ best scoring rule")
    if tried := ", ".join(f"{multiple:g}" for multiple in results.get("tune", ())):
        parts.append(
            f"learning rates: the best of {tried} times each method's own, on a tenth of"
            " the training data"
        )
    return "; ".join(parts) + "."


def summary_table(results: Results) -> Table:
    """Lay the summary out for the terminal.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`.

    Returns
    -------
    rich.table.Table
        One row a method.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows, columns = summary_rows(results), summary_columns(results)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=Text(caption(results)),
        caption_justify="left",
    )
    for column in columns:
        minor = column.minor.title if column.minor else ""
        # A line each: 80 characters must do.
        heading = [part for part in (column.title, minor, column.unit) if part]
        words = [*heading, *column.cells, *(column.minor.cells if column.minor else ())]
        table.add_column(
            Text("\n".join(heading)),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            min_width=max(map(cell_len, words)) if column.numeric else 12,
        )
    for place, row in enumerate(rows):
        # Text, not str: a label with square brackets is not markup.
        cells = [
            Text.assemble(
                column.cells[place],
                (f"\n{column.minor.cells[place]}" if column.minor else "", "dim"),
            )
            for column in columns
        ]
        table.add_row(*cells, style="bold" if row.best else None)
    return table


def markdown_table(results: Results) -> str:
    """Lay the summary out as a Markdown pipe table.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`.

    Returns
    -------
    str
        Table and a line that explains its marks, ending in a newline.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    rows = summary_rows(results)
    columns = [
        column
        for major in summary_columns(results)
        for column in (major, major.minor)
        if column is not None
    ]
    lines = [
        [_escaped(column.name) for column in columns],
        ["---:" if column.numeric else ":---" for column in columns],
    ]
    for place, row in enumerate(rows):
        cells = [_escaped(column.cells[place]) for column in columns]
        lines.append([f"**{cell}**" for cell in cells] if row.best else cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_escaped(caption(results))}\n"


def _escaped(text: str) -> str:
    """Escape what Markdown (and the HTML within it) would read as markup."""
    text = "".join(f"\\{c}" if c in r"\`*_[]|~$#" else c for c in text)
    return text.replace("&", "&amp;").replace("<", "&lt;")
