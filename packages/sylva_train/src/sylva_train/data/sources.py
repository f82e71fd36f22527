"""Where data comes from: the package, a file, a folder or the `datasets` library."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, DataError

from .files import SUFFIXES, HeaderTest, Row, Table, read_table
from .mmlu import is_mmlu, read_mmlu

__all__ = ["builtin_names", "find_table"]

# Names under which folders keep the same split.
SPLITS = (("train",), ("validation", "valid", "val", "dev"), ("test",))


@functools.cache
def builtins() -> dict[str, tuple[Traversable, dict[str, Any]]]:
    """Return folder and description of each task inside the package, by name."""
    found = {}
    for folder in files("sylva_train").joinpath("datasets").iterdir():
        record = folder.joinpath("dataset.json")
        if record.is_file():
            info = json.loads(record.read_text(encoding="utf-8"))
            found[info["name"]] = (folder, info)
    return found


def builtin_names() -> list[str]:
    """Return the names of the tasks that come with the package.

    Examples
    --------
    >>> from sylva_train.data import builtin_names
    >>> builtin_names()
    ['e2e-nlg', 'e2e-rating']
    """
    return sorted(builtins())


def find_table(
    spec: str | Path,
    split: str | None,
    is_header: HeaderTest,
) -> tuple[Table, dict[str, Any]]:
    """Return the rows of a source, and what a built-in task states about itself.

    Raises
    ------
    DataError
        If there is no such source.
    ConfigError
        If a split of a single file is asked for.
    """
    if str(spec) in builtins() and not isinstance(spec, Path):
        folder, info = builtins()[str(spec)]
        source = find_split(folder, split or "train", str(spec))
        table = read_table(source, is_header)
        return replace(table, name=f"{spec}/{Path(source.name).stem}"), info
    path = Path(spec).expanduser()
    if is_mmlu(path):
        return read_mmlu(path, split or "train"), {}
    if path.is_dir():
        source = find_split(path, split or "train", str(path))
        return read_table(source, is_header), {}
    if path.exists():
        if split is not None:
            msg = (
                f"`split` must not be given with a single file; got {split!r} and"
                f" `{path}`. Pass the file of that split, or the folder."
            )
            raise ConfigError(msg)
        return read_table(path, is_header), {}
    looks_like_path = path.suffix.lower() in SUFFIXES or str(spec)[:1] in {
        "/",
        ".",
        "~",
    }
    if isinstance(spec, Path) or looks_like_path:
        msg = f"{spec}: there is no such file or folder."
        raise DataError(msg)
    return read_datasets(spec, split or "train"), {}


def find_split(folder: Path | Traversable, split: str, name: str) -> Path | Traversable:
    """Return the file of a split.

    Raises
    ------
    DataError
        If the folder has none, or more than one.
    """
    names = next((group for group in SPLITS if split in group), (split,))
    every = [
        entry
        for entry in folder.iterdir()
        if entry.is_file() and Path(entry.name).suffix.lower() in SUFFIXES
    ]
    found = [entry for entry in every if Path(entry.name).stem == split]
    found = found or [entry for entry in every if Path(entry.name).stem in names]
    if len(found) == 1:
        return found[0]
    problem = "several files" if found else "no file"
    msg = (
        f"{name}: {problem} for the split {split!r}; the folder has"
        f" {', '.join(sorted(entry.name for entry in every)) or 'no data file'}."
    )
    raise DataError(msg)


def read_datasets(spec: str, split: str) -> Table:
    """Read a split through the `datasets` library.

    Raises
    ------
    DataError
        If the library is missing, or the data set cannot be reached.
    """
    unknown = (
        f"`{spec}` is no file, folder or built-in task ({', '.join(builtin_names())})"
    )
    try:
        from datasets import ClassLabel, load_dataset
        from datasets.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
    except ImportError:
        msg = (
            f"{unknown}; to look for it on the hub, `pip install 'sylva-train[data]'`."
        )
        raise DataError(msg) from None
    name, _, configuration = spec.partition(":")
    # Whether to show progress is for the caller to say, and `datasets` does not ask.
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        data = load_dataset(name, configuration or None, split=split)
    # Which of a dozen errors (HTTP, file, value, offline mode) depends on the version.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        msg = (
            f"{unknown}, and `datasets` could not load its split {split!r}:"
            f" {reason.rstrip('.')}. Without a network, pass the path of a local file."
        )
        raise DataError(msg) from error
    finally:
        if not hidden:
            enable_progress_bars()
    classes = {n: f for n, f in data.features.items() if isinstance(f, ClassLabel)}

    def named(column: str, value: Any) -> Any:
        if column not in classes or value is None:
            return value
        # Unlabelled test sets have -1.
        return classes[column].int2str(value) if value >= 0 else None

    rows: list[tuple[int, Row]] = [
        (number, {column: named(column, value) for column, value in row.items()})
        for number, row in enumerate(data, start=1)
    ]
    if not rows:
        msg = f"{spec}[{split}]: the split has no rows; expected at least one."
        raise DataError(msg)
    order = tuple(next(iter(classes.values())).names) if len(classes) == 1 else ()
    columns = tuple(data.column_names)
    return Table(f"{spec}[{split}]", columns, len(columns), rows, order)
