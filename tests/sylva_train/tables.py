"""Small tables in files of any format."""

from __future__ import annotations

import csv
import json

import pytest

ROWS = [("good film", "pos"), ("bad film", "neg"), ('a "b", c', "pos")]


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(path, rows=ROWS):
    """The same rows in any format."""
    records = [{"sentence": text, "label": label} for text, label in rows]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])
    elif path.suffix == ".tsv":
        write(path, "sentence\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in rows))
    elif path.suffix == ".json":
        write(path, json.dumps(records, indent=2))
    elif path.suffix == ".jsonl":
        write(path, "".join(json.dumps(record) + "\n" for record in records))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), "pyarrow.parquet"
        table = arrow.Table.from_pylist(records)
        pytest.importorskip(parquet).write_table(table, path)
    return path
