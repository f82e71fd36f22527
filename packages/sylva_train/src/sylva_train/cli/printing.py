"""Text on stdout: tables, facts and files for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sylva_train.config_files import config_names, find_config, read_config_file

__all__ = [
    "as_text",
    "configs",
    "count",
    "facts",
    "lines",
    "markdown",
    "out",
    "prose",
    "say",
    "table",
    "written",
]

#: Columns where the output is not a terminal: nothing should be cut off in a file.
WIDE = 160
#: Columns of running text.
READABLE = 88


def out() -> Console:
    """Return the console of stdout."""
    # Names and texts are the user's: ":100:" of a file and line is no picture, nor
    # "[metrics]" a style.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def say(text: str, style: str | None = None) -> None:
    """Print text as it is, wrapped by the terminal only."""
    out().print(text, soft_wrap=True, style=style)


def prose(text: str) -> None:
    """Print sentences, broken between words where lines are easy to read."""
    console = out()
    console.width = min(console.width, READABLE)
    console.print(text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1
) -> Table:
    """Lay out rows; the first ``texts`` columns are words, the others numbers."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        grid.add_column(
            name, justify="left" if number < texts else "right", overflow="fold"
        )
    for row in rows:
        grid.add_row(*row)
    return grid


def markdown(text: str) -> None:
    """Print Markdown, the words and numbers of its tables uncut."""
    from rich.markdown import Markdown  # slow, and few commands need it

    console = out()
    for tabular, block in groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not tabular:
            console.print(Markdown("\n".join(block)))
            continue
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block]
        console.print(_whole([rows[0], *rows[2:]], console.width))


def _whole(rows: list[list[str]], room: int) -> Table:
    """Lay out a table whose columns have room for their longest words.

    It is turned where that makes it fit. Columns that do not fit are named below it.
    """

    def words(columns: Sequence[Sequence[str]]) -> list[int]:
        return [
            max((len(word) for cell in column for word in cell.split()), default=1)
            for column in columns
        ]

    def fit(columns: Sequence[Sequence[str]]) -> bool:
        return sum(words(columns)) + 3 * len(columns) <= room  # with what is between

    columns = [list(column) for column in zip(*rows, strict=True)]
    if not fit(columns) and fit(rows):
        columns = rows
    left_out: list[str] = []
    while not fit(columns) and len(columns) > 2:
        *columns, last = columns
        left_out.insert(0, last[0])
    widths = words(columns)
    lacks = [
        max(map(len, column)) - width
        for column, width in zip(columns, widths, strict=True)
    ]
    left = room - sum(widths) - 3 * len(columns)
    # Numbers before the words of the first column, as many on one line as can be.
    for n in sorted(range(len(columns)), key=lambda n: (n == 0, lacks[n])):
        more = max(0, min(left, lacks[n]))
        widths[n] += more
        left -= more
    header, *body = zip(*columns, strict=True)
    grid = table(header, body)
    for column, width in zip(grid.columns, widths, strict=True):
        column.width = width
    if left_out:
        grid.caption = f"No room for: {', '.join(left_out)}."
        grid.caption_justify = "left"
    return grid


def facts(pairs: Mapping[str, object]) -> None:
    """Print names and values, a line each; those without a value are left out."""
    kept = {name: value for name, value in pairs.items() if value not in (None, "")}
    width = max(map(len, kept), default=0)
    for name, value in kept.items():
        say(f"{name:<{width}}  {value}")


def count(number: int) -> str:
    """Print a number of weights."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def as_text(content: Any) -> None:
    """Print JSON."""
    say(json.dumps(content, indent=1, ensure_ascii=False))


def lines(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows, a line of JSON each."""
    say("\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows))


def written(paths: Mapping[str, Path], command: str | None = None) -> None:
    """Say where results are, and what to do next."""
    facts({**paths, "next": command})


def configs(name: str | None) -> None:
    """Print the configurations of the package, or what is in one."""
    if name is not None:
        as_text(read_config_file(find_config(name)))
        return
    for known in config_names():
        say(known, style="bold")
        prose(read_config_file(find_config(known))["about"])
