"""Outputs: whether one can be written or gone on with, asked before the work; rows."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train._files import atomic_write, occupied

__all__ = ["check_file", "check_folder", "differences", "write_rows"]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say what options of a job that is there are others than wanted, group by group."""
    groups = [name for name, value in wanted.items() if isinstance(value, dict)]
    return [
        f"`{name}` is {there[name]!r} there and {value!r} here"
        if name in there
        else f"`{name}` is not told there: another version began it"
        for group in groups
        for there in [found.get(group, {})]
        for name, value in wanted[group].items()
        if there.get(name) != value
    ]


def check_writable(path: Path) -> None:
    """Raise `ConfigError` if a path cannot be made."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        msg = f"`{path}` cannot be written: `{parent}` {what}."
        raise ConfigError(msg)


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a file that exists, or that cannot be made.

    Raises
    ------
    OutputExistsError
        If the file exists and not ``overwrite``, or it is a folder.
    ConfigError
        If it cannot be made.
    """
    path = Path(path)
    if path.is_dir():
        msg = f"`{path}` is a folder; the output is a file. Give it a name."
        raise OutputExistsError(msg)
    if occupied(path) and not overwrite:
        msg = (
            f"the output `{path}` exists; nothing was written. Choose another path, or"
            " replace it (`overwrite=True`, `--overwrite`)."
        )
        raise OutputExistsError(msg)
    check_writable(path)


def check_folder(
    path: str | os.PathLike[str],
    *,
    marks: Collection[str],
    overwrite: bool = False,
    advice: str = "",
) -> None:
    """Refuse a folder with something in it, and never replace one of another kind.

    Parameters
    ----------
    path : path
        The folder.
    marks : collection of str
        Names of which the folder to be replaced must have one: `overwrite` with a wrong
        path must not delete somebody's home.
    overwrite : bool
        Whether to replace it.
    advice : str
        What else can be done, after "Choose another path, ".

    Raises
    ------
    OutputExistsError
        If it is in the way.
    ConfigError
        If it cannot be made.
    """
    path = Path(path)
    if not occupied(path):
        check_writable(path)
        return
    if not path.is_dir() or path.is_symlink():
        msg = f"the output `{path}` exists and is not a folder; choose another path."
        raise OutputExistsError(msg)
    if not overwrite:
        msg = (
            f"the output `{path}` exists; nothing was changed. Choose another path,"
            f" {advice}or replace it (`overwrite=True`, `--overwrite`)."
        )
        raise OutputExistsError(msg)
    if not any((path / name).exists() for name in marks):
        msg = (
            f"the output `{path}` is not what this command writes (it has no"
            f" {' or '.join(marks)}), so that it is not replaced. Choose another path."
        )
        raise OutputExistsError(msg)
    check_writable(path)


def write_rows(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    as_csv: bool = False,
) -> None:
    """Write rows as a line of JSON each, or as comma-separated values."""
    with (
        atomic_write(path) as temporary,
        # Half of a surrogate pair, which JSON may hold, has no other form in UTF-8.
        temporary.open(
            "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as file,
    ):
        if as_csv:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({n: field(v) for n, v in row.items()} for row in rows)
        else:
            # What JSON has no form for, such as a date out of Parquet, becomes a text.
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
            file.writelines(f"{line}\n" for line in lines)


def field(value: Any) -> Any:
    """Return a value as a field of a .csv: lists and objects as the JSON they were."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value
