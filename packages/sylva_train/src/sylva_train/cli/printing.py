"""Text on stdout: tables, facts and files for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
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
