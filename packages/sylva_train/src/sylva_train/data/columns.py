"""Which columns of a table are texts, labels or targets: by name, number or custom."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sylva_train._checks import ConfigError, DataError
from sylva_train.options import LABELLED

from .files import HeaderTest, Row, Table, other_separator

__all__ = [
    "choose_columns",
    "choose_texts",
    "columns_of",
    "header_test",
    "names_among",
    "number_in",
    "without_header",
]

# Column names that are taken where none is given, whatever their case; the pairs are
# GLUE's: RTE and STS-B (and MNLI's own files), MNLI, QQP, QNLI, MRPC.
TEXT_NAMES = ("text", "sentence", "input", "prompt", "content")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
)
LABEL_NAMES = ("label", "labels", "class", "gold_label", "is_duplicate", "quality")
NUMBER_NAMES = ("score", "label", "labels")
NAMES = {"classification": LABEL_NAMES, "regression": NUMBER_NAMES}
#: Those of them that stand beside a target.
PROMPTS = {"input", "prompt"}
TARGET_NAMES = ("target", "output", "completion", "response", "answer")
# Columns that hold whole conversations.
CHATS = {"messages", "conversations"}
# Files without a header: GLUE's SST-2 is label, sentence; CoLA is source, label, mark,
# sentence.
HEADERLESS = {1: (0, None), 2: (1, 0), 4: (3, 1)}


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


def names_among(columns: Sequence[str | int | None]) -> list[str]:
    """Return the columns that are asked for by name; numbers may be strings of digits."""
    return [c for c in columns if isinstance(c, str) and not c.isdecimal()]


def header_test(header: bool | None, named: Sequence[str], task: str) -> HeaderTest:
    """Return the function that tells whether a first row names the columns."""
    if header is None and named:
        header = True
    if header is not None:
        return lambda *_: header
    # Both must be there: a single word may well be somebody's first sentence.
    needed = [
        (*TEXT_NAMES, *itertools.chain(*PAIR_NAMES)),
        NAMES.get(task, TARGET_NAMES),
    ]
    if task == "causal-lm":
        needed.pop()
    return lambda fields, suffix: (
        suffix == ".csv"
        or all(not set(n).isdisjoint(map(folded, fields)) for n in needed)
    )


def folded(column: str) -> str:
    """Return a column's name without case and blanks around it."""
    return column.strip().lower()


def folded_names(table: Table) -> dict[str, str]:
    """Return a table's columns by their folded names."""
    return {folded(column): column for column in table.columns}


def without_header(table: Table, label: int, task: str) -> Table:
    """Return the table with its header as a row, if that has a label as rows have."""
    if label >= len(table.columns):
        return table
    name = table.columns[label]
    if task == "regression":
        is_label = number_in(name) is not None
    else:
        is_label = any(row.get(label) == name for _, row in table.rows)
    if not is_label:
        return table
    first: tuple[int, Row] = (1, dict(enumerate(table.columns)))
    return replace(table, columns=(), rows=[first, *table.rows])


def number_in(value: Any) -> float | None:
    """Return a field as a finite number, if it is one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


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
            plain = folded_names(table)
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


def pair_of(table: Table) -> list[str | int]:
    """Return the two columns of a table's pairs of texts, if it has such."""
    plain = folded_names(table)
    found = (pair for pair in PAIR_NAMES if plain.keys() >= set(pair))
    return [plain[name] for name in next(found, ())]


def unknown_column(table: Table, option: str, task: str) -> DataError:
    """Return the error of a table of whose columns none is known to be the one needed."""
    columns = [str(field) for field in table.columns or table.rows[0][1].values()]
    plain = set(map(folded, columns))
    texts = {*TEXT_NAMES, *itertools.chain(*PAIR_NAMES)}
    if not table.columns and plain & texts:
        # A first row that was not taken for a header, as it names no label or target.
        option = "label_column" if task in LABELLED else "target_column"
    elif not table.columns:
        columns = []
    have = ", ".join(map(repr, columns)) or f"{table.width}, without names"
    if option == "label_column" and "score" in plain and task == "classification":
        msg = (
            f"{table.name}: no column is known to be the label; the columns are {have}."
            ' The score is a number: give `task="regression"`, or name the column of the'
            " classes (`label_column`)."
        )
        return DataError(msg)
    advice = (
        f"Name it: `{option}` (by number from 0 where there is no header)."
        if CHATS.isdisjoint(table.columns)
        else "Write conversations as prompts and completions first, with the chat"
        " template of the model's tokenizer (docs/how-to/own-data.md)."
    )
    if option == "target_column" and task == "causal-lm":
        advice += " To train on whole texts name their column: `text_column`."
    msg = (
        f"{table.name}: no column is known to be the {option.partition('_')[0]}; the"
        f" columns are {have}. {advice}"
    )
    return DataError(msg + other_separator(table.columns or ["", ""]))


def choose_texts(
    table: Table, texts: Sequence[str | int], task: str, info: dict[str, Any]
) -> list[str | int]:
    """Return the columns of the texts.

    Raises
    ------
    DataError
        If they are not found.
    """
    if not texts and "text_column" not in info and task in LABELLED:
        texts = pair_of(table)
    if not texts:
        default = info.get("text_column")
        number, _ = HEADERLESS.get(table.width, (None, None))
        first = pick_column(table, "text_column", default, TEXT_NAMES, number)
        texts = [] if first is None else [first]
    found = [pick_column(table, "text_column", text, (), None) for text in texts]
    if not found:
        raise unknown_column(table, "text_column", task)
    return [column for column in found if column is not None]


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
        If a column is asked for that the task has no use for, or one for two uses.
    """
    if task in LABELLED and target is not None:
        msg = '`target_column` is for `task` "causal-lm" and "seq2seq".'
        raise ConfigError(msg)
    if task not in LABELLED and label is not None:
        msg = f"`label_column` is for `task` {' and '.join(LABELLED)}; got {task!r}."
        raise ConfigError(msg)
    text_columns = choose_texts(table, texts, task, info)
    named = label is not None
    if task in LABELLED:
        label = info.get("label_column") if label is None else label
        _, number = HEADERLESS.get(table.width, (None, None))
        label = pick_column(table, "label_column", label, NAMES[task], number)
        if label is None:
            raise unknown_column(table, "label_column", task)
    else:
        target = pick_column(table, "target_column", target, TARGET_NAMES, None)
        if target is None and wants_target(table, task, texts):
            raise unknown_column(table, "target_column", task)
    if label is not None and label in text_columns:
        msg = (
            f"{table.name}: the column {label!r} cannot be text and label at once; name"
            " both: `text_column`, `label_column`."
        )
        raise ConfigError(msg)
    if label is not None and not info and task == "classification":
        check_classes(table, label, named=named)
    return text_columns, label, target


def wants_target(table: Table, task: str, texts: Sequence[str | int]) -> bool:
    """Whether texts are half of what is to be learnt: prompts, unless they are asked for."""
    asked = bool(texts) or task != "causal-lm"
    found = next((n for n in TEXT_NAMES if n in folded_names(table)), None)
    return task == "seq2seq" or (not asked and found in PROMPTS)


def check_classes(table: Table, column: str | int, *, named: bool) -> None:
    """Raise `DataError` if the labels are more likely numbers, or, if not named, texts."""
    values = {str(row.get(column)) for _, row in table.rows}
    if len(table.rows) < 20 or 2 * len(values) <= len(table.rows):
        return
    numbers = [number_in(value) for value in values]
    if all(n is not None for n in numbers) and any(n != int(n) for n in numbers if n):
        msg = (
            f"{table.name}: the labels in column {column!r} are {len(values)} different"
            f" numbers in {len(table.rows)} rows; to predict numbers instead of classes,"
            ' `task` is "regression".'
        )
        raise DataError(msg)
    if not named:
        msg = (
            f"{table.name}: the column {column!r}, taken for the labels, has"
            f" {len(values)} different values in {len(table.rows)} rows; say which it"
            " is: `label_column`, `text_column`."
        )
        raise DataError(msg)
