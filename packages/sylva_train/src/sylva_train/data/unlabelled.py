"""Texts without labels or targets, for a model to say something of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sylva_train._checks import check_choice
from sylva_train.options import LABELLED, TASKS

from .columns import choose_texts, columns_of, header_test, names_among
from .dataset import TextDataset, texts_of
from .files import Row, Table
from .prompts import as_prompts
from .sources import find_table

__all__ = ["load_texts"]

#: The column of answers in Alpaca's records, which those that ask for one may leave out.
ANSWERS = "output"


def load_texts(
    spec: str | Path,
    *,
    task: str = "classification",
    split: str | None = None,
    text_column: str | int | Sequence[str | int] | None = None,
    per_task: int = 100,
    seed: int = 0,
) -> tuple[TextDataset, list[dict[str, Any]]]:
    """Read texts alone, whatever stands beside them.

    Parameters
    ----------
    spec, task, split, text_column, per_task, seed
        As for `load_data`. The first row of a ``.csv`` names the columns, unless texts to
        classify are in a column that is given by number and the row has no known name.

    Returns
    -------
    dataset : TextDataset
        The texts, without labels and targets.
    rows : list of dict
        The columns of each text's row.

    Raises
    ------
    DataError
        If the source or the texts' column cannot be found, or a row cannot be used; the
        message has the file and the line.
    """
    check_choice("task", task, TASKS)
    texts = columns_of(text_column)
    named = names_among(texts)
    # As of whole texts for a causal language model: no other column is to be there.
    known = header_test(None, named, "causal-lm")
    numbered = bool(texts) and not named and task in LABELLED
    table, info = find_table(
        spec,
        split,
        lambda fields, suffix: known(fields, ".tsv" if numbered else suffix),
        per_task=per_task,
        seed=seed,
    )
    if task not in LABELLED and not texts:
        table = as_prompts(answered(table))
    columns = choose_texts(table, texts, task, info)
    found = texts_of(table, columns)
    names = table.columns or range(table.width)
    rows = [{str(n): row.get(n) for n in names} for _, row in table.rows]
    return TextDataset(table.name, task, found, shorter=list(table.shorter)), rows


def answered(table: Table) -> Table:
    """Return Alpaca's records with an answer each, which may be blank."""
    if "instruction" not in table.columns or ANSWERS in table.columns:
        return table
    rows: list[tuple[int, Row]] = [
        (line, {**row, ANSWERS: ""}) for line, row in table.rows
    ]
    return replace(table, columns=(*table.columns, ANSWERS), rows=rows)
