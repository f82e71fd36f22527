"""Where data comes from: the package, a file, a folder or the `datasets` library."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, DataError

from .files import SUFFIXES, HeaderTest, Table, data_suffix, named_table, read_table
from .instructions import is_instructions, read_instructions
from .mmlu import is_mmlu, read_mmlu

__all__ = ["builtin_names", "find_table", "is_single"]

# Names under which folders keep the same split; GLUE's MNLI, MRPC and E2E have their own.
SPLITS = (
    ("train", "trainset", "msr_paraphrase_train"),
    ("validation", "valid", "val", "dev", "devset"),
    ("validation_matched", "dev_matched"),
    ("validation_mismatched", "dev_mismatched"),
    ("test", "testset_w_refs", "msr_paraphrase_test"),
)
# Ending of one of several files of a split, before the suffix.
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]{16})?$")


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
    *,
    per_task: int = 100,
    seed: int = 0,
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
        (source,) = find_split(folder, split or "train", str(spec))
        table = read_table(source, is_header)
        return replace(table, name=f"{spec}/{Path(source.name).stem}"), info
    path = Path(spec).expanduser()
    if is_mmlu(path):
        return read_mmlu(path, split or "train"), {}
    if is_instructions(path):
        names = names_of(split or "train")
        return read_instructions(path, names, per_task=per_task, seed=seed), {}
    if path.is_dir() and not is_single(path):
        sources = find_split(path, split or "train", str(path))
        return joined([read_table(source, is_header) for source in sources]), {}
    if path.exists():
        if split is not None:
            msg = (
                f"`split` must not be given with a single file; got {split!r} and"
                f" `{path}`. Pass the file of that split, or the folder."
            )
            raise ConfigError(msg)
        parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
        return joined([read_table(part, is_header) for part in parts]), {}
    known = data_suffix(path.name) in SUFFIXES
    if isinstance(spec, Path) or known or spec.startswith(("/", ".", "~")):
        msg = f"{spec}: there is no such file or folder."
        raise DataError(msg)
    return read_datasets(spec, split or "train"), {}


def is_single(path: Path) -> bool:
    """Whether a path has no splits: a file, or one data set that `datasets` saved."""
    return path.is_file() or (path / "state.json").is_file()


def joined(tables: Sequence[Table]) -> Table:
    """Return one table of several with the same columns, its rows counted through."""
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for _, row in table.rows]
    name = SHARD.sub("", str(Path(tables[0].name).with_suffix("")))
    return replace(tables[0], name=name, rows=list(enumerate(rows, start=1)))


def stem_of(name: str) -> str:
    """Return a data file's name without its endings."""
    return SHARD.sub("", bare(name))


def bare(name: str) -> str:
    """Return a data file's name without the suffixes of its format."""
    return Path(name.removesuffix(".gz")).stem


def names_of(split: str) -> tuple[str, ...]:
    """Return the names under which folders keep a split."""
    return next((group for group in SPLITS if split in group), (split,))


def files_in(folder: Path | Traversable) -> list[Path | Traversable]:
    """Return a folder's data files."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.is_file() and data_suffix(entry.name) in SUFFIXES
    ]


def find_split(
    folder: Path | Traversable, split: str, name: str
) -> list[Path | Traversable]:
    """Return the files of a split, of which there are several if they are numbered.

    Raises
    ------
    DataError
        If the folder has none, more than one, or not all that are numbered.
    """
    names = names_of(split)
    every = files_in(folder)
    inner = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()}
    found = [entry for entry in every if stem_of(entry.name) == split]
    found = found or [entry for entry in every if stem_of(entry.name) in names]
    if not found and (part := next((inner[n] for n in names if n in inner), None)):
        # What `datasets` saves to disk: a folder a split, with descriptions beside.
        found = [e for e in files_in(part) if data_suffix(e.name) == ".arrow"]
    if not found and "data" in inner:
        return find_split(inner["data"], split, f"{name}/data")
    shards = [SHARD.search(bare(entry.name)) for entry in found]
    counts = {int(shard[1]) for shard in shards if shard}
    numbered = len({stem_of(entry.name) for entry in found}) == 1 and all(shards)
    if numbered and counts != {len(found)}:
        msg = (
            f"{name}: the split {split!r} has {len(found)} of {max(counts)} numbered"
            " files; get the others too."
        )
        raise DataError(msg)
    if len(found) == 1 or numbered:
        return sorted(found, key=lambda entry: entry.name)
    problem = "several files" if found else "no file"
    # Splits that `datasets` saved are folders, beside a description of their names.
    parts = [n for n in inner if (Path(name) / n / "state.json").is_file()]
    have = sorted(parts or [entry.name for entry in every])
    msg = (
        f"{name}: {problem} for the split {split!r}; the folder has"
        f" {', '.join(have) or 'no data file'}."
        " A split goes by its file's name without the ending (`split`, `eval_split`)."
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
    features = data.features.items()
    classes = {name: f.names for name, f in features if isinstance(f, ClassLabel)}
    table = named_table(f"{spec}[{split}]", data.column_names, data, classes)
    if not table.rows:
        msg = f"{table.name}: the split has no rows; expected at least one."
        raise DataError(msg)
    return table
