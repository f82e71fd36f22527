"""Labelled texts from a built-in task, a file, a folder or the `datasets` library."""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sylva_train._checks import (
    ConfigError,
    DataError,
    check_choice,
    check_integer,
    check_texts,
)
from sylva_train.options import LABELLED, TASKS

from .columns import (
    choose_columns,
    columns_of,
    header_test,
    names_among,
    number_in,
    without_header,
)
from .files import Row, Table
from .prompts import as_prompts
from .sources import find_table

__all__ = ["Text", "TextDataset", "load_data", "texts_of"]

#: Column of the part of the data that a row belongs to.
GROUP_NAME = "subject"
#: A whole number that is written as a fraction.
WHOLE = re.compile(r"-?\d+\.0+")

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
    labels : list of int or of float
        For classification: indices into ``label_names``; for regression: the numbers;
        otherwise empty.
    label_names : list of str
        The classes.
    targets : list of str
        For generation: what is to follow each prompt; otherwise empty.
    groups : list of str
        Part of the data that each text belongs to, such as its subject, where that is
        known; otherwise empty.
    shorter : list of tuple of str
        Shorter forms of each text, the longest first, for where it is too long; empty
        where there are none.

    Raises
    ------
    DataError
        If texts are not all strings, nor all pairs of them, or labels and the like are
        not as many.
    """

    name: str
    task: str
    texts: list[Text]
    labels: list[int] | list[float] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    shorter: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_texts(self.texts)
        for name in ("labels", "targets", "groups", "shorter"):
            if (count := len(getattr(self, name))) not in {0, len(self)}:
                msg = f"`{name}` must be {len(self)}, as `texts` are, or none; got {count}."
                raise DataError(msg)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        return f"TextDataset({self.name}, {self.task}, {len(self)} examples{classes})"

    def subset(self, indices: Sequence[int]) -> TextDataset:
        """Return the examples of the given indices, with the same classes."""
        columns: dict[str, Any] = {
            name: [values[i] for i in indices]
            for name in ("texts", "labels", "targets", "groups", "shorter")
            if (values := getattr(self, name))
        }
        return replace(self, **columns)

    def relabelled(self, names: Sequence[str]) -> TextDataset:
        """Return the examples with the same classes in another order."""
        index = {name: number for number, name in enumerate(names)}
        labels = [index[self.label_names[int(label)]] for label in self.labels]
        return replace(self, labels=labels, label_names=list(names))

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
    per_task: int = 100,
    seed: int = 0,
    header: bool | None = None,
) -> TextDataset:
    """Read texts and their labels.

    Parameters
    ----------
    spec : str or Path
        A built-in task (`builtin_names`); a file (``.csv``, ``.tsv``, ``.jsonl``,
        ``.json``, ``.parquet``, ``.arrow``, and ``.txt`` with a text a paragraph; with
        ``.gz`` after it if it is compressed); a folder with files named after the splits, such as
        GLUE's, or written by ``save_to_disk``; the folder of Super-NaturalInstructions;
        or, for `datasets.load_dataset`, ``"name"`` or ``"name:configuration"``.
    task : str
        ``"classification"``: texts with labels; ``"regression"``: texts with numbers;
        ``"causal-lm"``: texts, or prompts with targets; ``"seq2seq"``: texts with
        targets.
    split : str, optional
        Part of a built-in task, a folder or a `datasets` name; ``"train"`` by default. A
        folder's ``dev`` answers to ``"validation"``, its ``dev_matched`` to
        ``"validation_matched"``.
    text_column : str, int or two of them, optional
        Column of the texts, by name or (in ``.csv`` and ``.tsv``) number from 0; two
        columns make pairs. By default GLUE's pairs (`PAIR_NAMES`), or the first of
        `TEXT_NAMES`; without a header the second of two (SST-2) or the last of four
        (CoLA).
    label_column : str or int, optional
        Column of the labels, strings or integers; by default the first of
        `LABEL_NAMES`, or for numbers of `NUMBER_NAMES`; without a header the first of
        two or the second of four.
    target_column : str or int, optional
        Column of the targets; by default the first of `TARGET_NAMES`. A causal language
        model is trained on whole texts where there is none, unless they are found under
        the name of a prompt (`PROMPTS`). A list of targets (JSON)
        stands for a row each. Where neither it nor the texts' is given, OASST1's
        conversations, Alpaca's instructions, MetaMathQA and GSM8K become prompts and
        targets.
    labels : sequence of str or int, optional
        The classes in order, those of the training set above all. By default the order
        that the source states, else numbers by value or strings by alphabet.
    limit : int, optional
        Examples to keep at most: a random choice, in the order of the file.
    per_task : int
        Instances of each task of Super-NaturalInstructions at most; Tk-Instruct's 100.
    seed : int
        Seed of these choices.
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
        of fields, bad JSON, not UTF-8, no text, no label, a label that is not in
        ``labels``, or no finite number. The message has the file and the line.
    ConfigError
        If the arguments contradict each other, or ``spec`` is no path and no name.

    Examples
    --------
    >>> from sylva_train.data import load_data
    >>> load_data("e2e-rating", split="test")
    TextDataset(e2e-rating/test, classification, 1500 examples, 4 classes)
    """
    if not isinstance(cast("object", spec), str | Path):
        msg = (
            f"`spec` must be a path or a name; got a {type(spec).__name__}. Write rows that"
            " are in memory to a file, such as a .jsonl or .parquet, or make a"
            " `sylva_train.TextDataset` of them."
        )
        raise ConfigError(msg)
    check_choice("task", task, TASKS)
    if limit is not None:
        check_integer("limit", limit, 1)
    check_integer("per_task", per_task, 1)
    check_integer("seed", seed, 0)
    texts = columns_of(text_column)
    asked = (*texts, label_column, target_column)
    named = names_among(asked)
    is_header = header_test(header, named, task)
    table, info = find_table(spec, split, is_header, per_task=per_task, seed=seed)
    if task not in LABELLED and not texts and target_column is None:
        table = as_prompts(table)
    if header is None and not named and label_column is not None:
        table = without_header(table, int(label_column), task)
    if task == "regression" and labels is not None:
        msg = '`labels` are for `task` "classification"; a regression has no classes.'
        raise ConfigError(msg)
    chosen = choose_columns(table, texts, label_column, target_column, task, info)
    if labels is None:
        labels = info.get("labels") or table.label_names or None
    return build(table, task, *chosen, labels=labels).sample(limit, seed)


def unfit(
    table: Table, line: int, row: Row, column: str | int, wanted: str, what: str = ""
) -> DataError:
    """Return the error of a row whose column has not what is wanted, but ``what``."""
    got = what or reprlib.repr(row[column]) if column in row else "no such column"
    return DataError(
        f"{table.name}:{line}: expected {wanted} in column {column!r}; got {got}."
    )


def text_of(table: Table, line: int, row: Row, column: str | int) -> str:
    """Return a row's text.

    Raises
    ------
    DataError
        If there is none, or it is blank or no string.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        blank = "a blank one" if isinstance(value, str) else ""
        raise unfit(table, line, row, column, "a text", blank)
    return value


def with_targets(
    table: Table, task: str, texts: Sequence[Text], column: str | int
) -> TextDataset:
    """Return texts with their targets; a list of targets stands for so many rows."""
    found = TextDataset(table.name, task, [])
    for number, (line, row) in enumerate(table.rows):
        value = row.get(column)
        for target in value if isinstance(value, list) and value else [value]:
            found.texts.append(texts[number])
            found.targets.append(text_of(table, line, {**row, column: target}, column))
            if GROUP_NAME in table.columns:
                found.groups.append(str(row.get(GROUP_NAME)))
            if table.shorter:
                found.shorter.append(table.shorter[number])
    return found


def pair_in(
    table: Table, line: int, row: Row, columns: Sequence[str | int]
) -> tuple[str, str]:
    """Return a row's two texts, of which one may be blank: some of QQP's are.

    Raises
    ------
    DataError
        If a text is missing or both are blank.
    """
    first, second = (
        "" if row.get(column) == "" else text_of(table, line, row, column)
        for column in columns
    )
    if not first and not second:
        text_of(table, line, row, columns[0])
    return first, second


def texts_of(table: Table, columns: Sequence[str | int]) -> list[Text]:
    """Return the text of each row, or its two texts."""
    return [
        text_of(table, line, row, columns[0])
        if len(columns) == 1
        else pair_in(table, line, row, columns)
        for line, row in table.rows
    ]


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
    none = "none, as in test sets without labels, which `sylva predict` is for"
    what = none if value is None else ""
    raise unfit(table, line, row, column, "a label, a string or an integer,", what)


def whole(label: str) -> str:
    """Return a whole number without its ``.0``, which pandas writes after missing values."""
    return label.partition(".")[0] if WHOLE.fullmatch(label) else label


def number_of(table: Table, line: int, row: Row, column: str | int) -> float:
    """Return a row's number.

    Raises
    ------
    DataError
        If there is none, or it is not finite.
    """
    number = number_in(row.get(column))
    if number is None:
        raise unfit(table, line, row, column, "a finite number")
    return number


def order_labels(found: Sequence[str]) -> list[str]:
    """Return distinct labels: integers by value, others by alphabet."""
    distinct = {whole(label): label for label in found}
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return sorted(distinct.values())


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
        If a row cannot be used, or all labels are the same and none were expected, or
        all numbers are -1.

    Warns
    -----
    UserWarning
        If classes differ in their case alone, or one is a missing label as a string.
    """
    texts = texts_of(table, text_columns)
    if target_column is not None:
        return with_targets(table, task, texts, target_column)
    if label_column is None:
        return TextDataset(table.name, task, texts)
    if task == "regression":
        numbers = [number_of(table, n, row, label_column) for n, row in table.rows]
        if len(numbers) > 1 and set(numbers) == {-1.0}:  # GLUE's test sets have that
            msg = (
                f"{table.name}: every number in column {label_column!r} is -1, as in test"
                " sets without labels: `sylva predict` is for these."
            )
            raise DataError(msg)
        return TextDataset(table.name, task, texts, numbers)
    found = [label_of(table, line, row, label_column) for line, row in table.rows]
    names = order_labels(found) if labels is None else [str(label) for label in labels]
    if len(names) < 2 or len(set(map(whole, names))) != len(names):
        msg = (
            f"{table.name}: expected at least two classes, all different; got"
            f" {names!r} in column {label_column!r}."
        )
        raise DataError(msg)
    written = Counter(name.casefold() for name in names)
    alike = [name for name in names if written[name.casefold()] > 1]
    if labels is None and alike:
        warnings.warn(
            f"{table.name}: the classes {', '.join(map(repr, alike))} in column"
            f" {label_column!r} differ in their case alone; write those that are one the"
            " same way.",
            stacklevel=2,
        )
    if labels is None and (missing := [n for n in names if n.casefold() == "nan"]):
        count = sum(label in missing for label in found)
        warnings.warn(
            f"{table.name}: {missing[0]!r} in column {label_column!r}, of {count:,} rows, is"
            " taken for a class; leave out rows whose label is missing.",
            stacklevel=2,
        )
    index = {whole(name): number for number, name in enumerate(names)}
    for (line, _), label in zip(table.rows, found, strict=True):
        if whole(label) not in index:
            msg = (
                f"{table.name}:{line}: the label {reprlib.repr(label)} is not among the"
                f" known labels {reprlib.repr(names)}; correct the row, or train with"
                " that class."
            )
            raise DataError(msg)
    return TextDataset(
        table.name, task, texts, [index[whole(name)] for name in found], names
    )
