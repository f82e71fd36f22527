"""Labelled texts from a built-in task, a file, a folder or the `datasets` library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sylva_train._checks import ConfigError, DataError, check_choice, check_integer

from .files import HeaderTest, Row, Table, other_separator
from .sources import find_table

__all__ = ["TASKS", "TextDataset", "load_data"]

#: What a data set is for; the first is the default.
TASKS = ("classification", "causal-lm", "seq2seq")

# Column names that are taken where none is given, whatever their case.
TEXT_NAMES = ("text", "sentence", "input", "prompt", "content")
LABEL_NAMES = ("label", "labels", "class")
GROUP_NAME = "subject"
TARGET_NAMES = ("target", "output", "completion", "response", "answer")
# Files without a header: GLUE's SST-2 is label, sentence; CoLA is source, label, mark,
# sentence.
HEADERLESS = {1: (0, None), 2: (1, 0), 4: (3, 1)}

Text = str | tuple[str, str]


@dataclass(frozen=True)
class TextDataset:
    """Texts with their labels or their targets.

    Parameters
    ----------
    name : str
        Where the texts came from.
    task : str
        One of `TASKS`.
    texts : list of str or of (str, str)
        Texts, or pairs of them; the prompts, where there are targets.
    labels : list of int
        For classification: indices into ``label_names``; otherwise empty.
    label_names : list of str
        The classes.
    targets : list of str
        For generation: what is to follow each prompt; otherwise empty.
    groups : list of str
        Part of the data that each text belongs to, such as its subject, where that is
        known; otherwise empty.
    """

    name: str
    task: str
    texts: list[Text]
    labels: list[int] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        return f"TextDataset({self.name}, {self.task}, {len(self)} examples{classes})"

    def subset(self, indices: Sequence[int]) -> TextDataset:
        """Return the examples of the given indices, with the same classes."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in indices] if values else []

        return replace(
            self,
            texts=pick(self.texts),
            labels=pick(self.labels),
            targets=pick(self.targets),
            groups=pick(self.groups),
        )

    def sample(self, limit: int | None, seed: int = 0) -> TextDataset:
        """Return at most ``limit`` examples: a random choice, in their order."""
        if limit is None or limit >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))[:limit]
        return self.subset(sorted(order.tolist()))

    def sample_texts(self, limit: int | None, seed: int = 0) -> TextDataset:
        """Return the rows of at most ``limit`` different texts, all rows of each."""
        texts = list(dict.fromkeys(self.texts))
        if limit is None or limit >= len(texts):
            return self
        order = np.random.default_rng(seed).permutation(len(texts))[:limit]
        kept = {texts[i] for i in order.tolist()}
        return self.subset([i for i, text in enumerate(self.texts) if text in kept])


def load_data(
    spec: str | Path,
    *,
    task: str = "classification",
    split: str | None = None,
    text_column: str | int | Sequence[str | int] | None = None,
    label_column: str | int | None = None,
    target_column: str | int | None = None,
    labels: Sequence[str | int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    header: bool | None = None,
) -> TextDataset:
    """Read texts and their labels.

    Parameters
    ----------
    spec : str or Path
        A built-in task (`builtin_names`); a file (``.csv``, ``.tsv``, ``.jsonl``,
        ``.json``, ``.parquet``, and ``.txt`` with a text a paragraph); a folder with
        files named after the splits; or, for `datasets.load_dataset`, ``"name"`` or
        ``"name:configuration"``.
    task : str
        ``"classification"``: texts with labels; ``"causal-lm"``: texts, or prompts with
        targets; ``"seq2seq"``: texts with targets.
    split : str, optional
        Part of a built-in task, a folder or a `datasets` name; ``"train"`` by default. A
        folder's ``dev`` answers to ``"validation"``.
    text_column : str, int or two of them, optional
        Column of the texts, by name or (in ``.csv`` and ``.tsv``) number from 0; two
        columns make pairs. By default the first of `TEXT_NAMES`; without a header the
        second of two (SST-2) or the last of four (CoLA).
    label_column : str or int, optional
        Column of the labels, strings or integers; by default the first of
        `LABEL_NAMES`; without a header the first of two or the second of four.
    target_column : str or int, optional
        Column of the targets; by default the first of `TARGET_NAMES`. A causal language
        model is trained on whole texts where there is none. A list of targets (JSON)
        stands for a row each.
    labels : sequence of str or int, optional
        The classes in order, those of the training set above all. By default the order
        that the source states, else numbers by value or strings by alphabet.
    limit : int, optional
        Examples to keep at most: a random choice, in the order of the file.
    seed : int
        Seed of that choice.
    header : bool, optional
        Whether the first row of a ``.csv`` or ``.tsv`` names the columns. By default it
        does in a ``.csv``, unless the columns are given by number and its label is one
        of those below; in a ``.tsv`` where a column is asked for by name or the default
        names are found.

    Returns
    -------
    TextDataset

    Raises
    ------
    DataError
        If the source or a column cannot be found, or a row cannot be used: wrong number
        of fields, bad JSON, not UTF-8, no text, no label, or a label that is not in
        ``labels``. The message has the file and the line.
    ConfigError
        If the arguments contradict each other.

    Examples
    --------
    >>> from sylva_train.data import load_data
    >>> load_data("e2e-rating", split="test")
    TextDataset(e2e-rating/test, classification, 1500 examples, 4 classes)
    """
    check_choice("task", task, TASKS)
    if limit is not None:
        check_integer("limit", limit, 1)
    check_integer("seed", seed, 0)
    texts = columns_of(text_column)
    # A command line gives numbers as strings.
    asked = (*texts, label_column, target_column)
    named = [c for c in asked if isinstance(c, str) and not c.isdecimal()]
    is_header = header_test(header, named, task)
    table, info = find_table(spec, split, is_header)
    if header is None and not named and label_column is not None:
        table = without_header(table, int(label_column))
    chosen = choose_columns(table, texts, label_column, target_column, task, info)
    if labels is None:
        labels = info.get("labels") or table.label_names or None
    return build(table, task, *chosen, labels=labels).sample(limit, seed)


def without_header(table: Table, label: int) -> Table:
    """Return the table with its header as a row, if that has a label as rows have."""
    if label >= len(table.columns):
        return table
    name = table.columns[label]
    if all(row.get(label) != name for _, row in table.rows):
        return table
    first: tuple[int, Row] = (1, dict(enumerate(table.columns)))
    return replace(table, columns=(), rows=[first, *table.rows])


def columns_of(text_column: str | int | Sequence[str | int] | None) -> list[str | int]:
    """Return the text columns that were asked for: none, one or two."""
    if text_column is None:
        return []
    if isinstance(text_column, str | int):
        return [text_column]
    if len(text_column) not in {1, 2}:
        msg = f"`text_column` must be one or two columns; got {list(text_column)!r}."
        raise ConfigError(msg)
    return list(text_column)


def header_test(header: bool | None, named: Sequence[str], task: str) -> HeaderTest:
    """Return the function that tells whether a first row names the columns."""
    if header is None and named:
        header = True
    if header is not None:
        return lambda *_: header
    # Both must be there: a single word may well be somebody's first sentence.
    needed = [TEXT_NAMES, LABEL_NAMES if task == "classification" else TARGET_NAMES]
    if task == "causal-lm":
        needed.pop()
    return lambda fields, suffix: (
        suffix == ".csv"
        or all(not set(n).isdisjoint(map(folded, fields)) for n in needed)
    )


def folded(column: str) -> str:
    """Return a column's name without case and blanks around it."""
    return column.strip().lower()


def pick_column(
    table: Table,
    option: str,
    wanted: str | int | None,
    names: Sequence[str],
    number: int | None,
) -> str | int | None:
    """Return a column of the table: the one asked for, else a default, else None.

    Raises
    ------
    DataError
        If the table does not have the column that was asked for.
    """
    if wanted is None:
        if table.columns:
            plain = {folded(column): column for column in table.columns}
            return next((plain[name] for name in names if name in plain), None)
        return number
    if wanted in table.columns:
        return wanted
    # Only delimited rows have numbers.
    if str(wanted).isdecimal() and int(wanted) in table.rows[0][1]:
        return int(wanted)
    have = ", ".join(map(repr, table.columns)) or f"numbers 0 to {table.width - 1}"
    msg = f"{table.name}: `{option}` {wanted!r} is not among the columns: {have}."
    raise DataError(msg)


def choose_columns(
    table: Table,
    texts: Sequence[str | int],
    label: str | int | None,
    target: str | int | None,
    task: str,
    info: dict[str, Any],
) -> tuple[list[str | int], str | int | None, str | int | None]:
    """Return the columns of the texts, of the labels and of the targets.

    Raises
    ------
    DataError
        If a column that the task needs is not found.
    ConfigError
        If a column is asked for that the task has no use for.
    """
    if task == "classification" and target is not None:
        msg = '`target_column` is for `task` "causal-lm" and "seq2seq".'
        raise ConfigError(msg)
    if task != "classification" and label is not None:
        msg = f'`label_column` is for `task` "classification"; got {task!r}.'
        raise ConfigError(msg)
    number, label_number = HEADERLESS.get(table.width, (None, None))
    if not texts:
        default = info.get("text_column")
        first = pick_column(table, "text_column", default, TEXT_NAMES, number)
        texts = [] if first is None else [first]
    found = [pick_column(table, "text_column", text, (), None) for text in texts]
    text_columns = [column for column in found if column is not None]
    guessed = label is None and not info
    if task == "classification":
        label = info.get("label_column") if label is None else label
        label = pick_column(table, "label_column", label, LABEL_NAMES, label_number)
        target = None
    else:
        label = None
        target = pick_column(table, "target_column", target, TARGET_NAMES, None)
    needed = {
        "text_column": bool(text_columns),
        "label_column": task != "classification" or label is not None,
        "target_column": task != "seq2seq" or target is not None,
    }
    for option, there in needed.items():
        if not there:
            have = (
                ", ".join(map(repr, table.columns)) or f"{table.width}, without names"
            )
            msg = (
                f"{table.name}: no column is known to be the {option.split('_')[0]}; the"
                f" columns are {have}. Name it: `{option}` (by number from 0 where there"
                " is no header)."
            )
            raise DataError(msg + other_separator(table.columns or ["", ""]))
    if label is not None and guessed:
        check_guess(table, label)
    return text_columns, label, target


def check_guess(table: Table, column: str | int) -> None:
    """Raise `DataError` if a column taken for the labels is more likely the texts."""
    values = {str(row.get(column)) for _, row in table.rows}
    if len(table.rows) >= 20 and 2 * len(values) > len(table.rows):
        msg = (
            f"{table.name}: the column {column!r}, taken for the labels, has"
            f" {len(values)} different values in {len(table.rows)} rows; say which it"
            " is: `label_column`, `text_column`."
        )
        raise DataError(msg)


def text_of(table: Table, line: int, row: Row, column: str | int) -> str:
    """Return a row's text.

    Raises
    ------
    DataError
        If there is none, or it is blank or no string.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        what = "a blank one" if isinstance(value, str) else f"{value!r}"
        if column not in row:
            what = "no such column"
        msg = f"{table.name}:{line}: expected a text in column {column!r}; got {what}."
        raise DataError(msg)
    return value


def with_targets(
    table: Table, task: str, texts: Sequence[Text], column: str | int
) -> TextDataset:
    """Return texts with their targets; a list of targets stands for so many rows."""
    found = TextDataset(table.name, task, [])
    for text, (line, row) in zip(texts, table.rows, strict=True):
        value = row.get(column)
        for target in value if isinstance(value, list) and value else [value]:
            found.texts.append(text)
            found.targets.append(text_of(table, line, {**row, column: target}, column))
            if GROUP_NAME in table.columns:
                found.groups.append(str(row.get(GROUP_NAME)))
    return found


def label_of(table: Table, line: int, row: Row, column: str | int) -> str:
    """Return a row's label as a string.

    Raises
    ------
    DataError
        If there is none, or it is neither a string nor an integer.
    """
    value = row.get(column)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    what = "no such column" if column not in row else repr(value)
    msg = (
        f"{table.name}:{line}: expected a label, a string or an integer, in column"
        f" {column!r}; got {what}."
    )
    raise DataError(msg)


def order_labels(found: Sequence[str]) -> list[str]:
    """Return distinct labels: integers by value, others by alphabet."""
    distinct = sorted(set(found))
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return distinct


def build(
    table: Table,
    task: str,
    text_columns: Sequence[str | int],
    label_column: str | int | None,
    target_column: str | int | None,
    *,
    labels: Sequence[str | int] | None,
) -> TextDataset:
    """Turn rows into a data set.

    Raises
    ------
    DataError
        If a row cannot be used, or all labels are the same and none were expected.
    """
    texts: list[Text] = []
    for line, row in table.rows:
        parts = [text_of(table, line, row, column) for column in text_columns]
        texts.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))
    if target_column is not None:
        return with_targets(table, task, texts, target_column)
    if label_column is None:
        return TextDataset(table.name, task, texts)
    found = [label_of(table, line, row, label_column) for line, row in table.rows]
    names = order_labels(found) if labels is None else [str(label) for label in labels]
    if len(names) < 2 or len(set(names)) != len(names):
        msg = (
            f"{table.name}: expected at least two classes, all different; got"
            f" {names!r} in column {label_column!r}."
        )
        raise DataError(msg)
    index = {name: number for number, name in enumerate(names)}
    for (line, _), label in zip(table.rows, found, strict=True):
        if label not in index:
            msg = (
                f"{table.name}:{line}: the label {label!r} is not among the known labels"
                f" {names!r}; correct the row, or train with that class."
            )
            raise DataError(msg)
    return TextDataset(table.name, task, texts, [index[name] for name in found], names)
