"""Whether an output can be written or gone on with: asked before the work begins."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train._files import occupied

__all__ = ["check_file", "check_folder", "differences"]


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
