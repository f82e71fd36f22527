"""Rows of a data file, each with the line it came from."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sylva_train._checks import DataError

__all__ = [
    "SUFFIXES",
    "HeaderTest",
    "Row",
    "Table",
    "data_suffix",
    "named_table",
    "other_separator",
    "read_table",
]

Row = Mapping[str | int, Any]
#: Rows of an Arrow table that become Python's at once.
ROWS = 1000
#: How a JSON file begins that is one array.
ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
#: Tells from the fields of a first row and the suffix whether they name the columns.
HeaderTest = Callable[[Sequence[str], str], bool]


@dataclass(frozen=True)
class Table:
    """Rows of a file and where they came from.

    Parameters
    ----------
    name : str
        The file, as errors name it.
    columns : tuple of str
        Names of the columns; empty for a file without a header.
    width : int
        Number of columns.
    rows : list of (int, Row)
        Line (or row, counted from 1) and fields; a delimited row answers to column
        numbers as well as to names.
    label_names : tuple of str
        Names of the classes, where the source itself orders them.
    shorter : tuple of tuple of str
        Shorter forms of each row's text, the longest first, where there are some.
    """

    name: str
    columns: tuple[str, ...]
    width: int
    rows: list[tuple[int, Row]]
    label_names: tuple[str, ...] = ()
    shorter: tuple[tuple[str, ...], ...] = ()


class Fields(Mapping[str | int, Any]):
    """A row of a table with many like it, which share their columns.

    A dict of its own for each of a million rows takes several times the file's size.

    Parameters
    ----------
    places : mapping of str or int to int
        Place of each column's value; two columns may have one place.
    fields : iterable
        The values.
    """

    __slots__ = ("fields", "places")

    def __init__(self, places: Mapping[Any, int], fields: Iterable[Any]) -> None:
        self.places = places
        self.fields = tuple(fields)

    def __getitem__(self, column: str | int) -> Any:
        return self.fields[self.places[column]]

    def __iter__(self) -> Iterator[str | int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def text_lines(name: str, data: bytes, newline: str) -> Iterator[str]:
    """Yield lines as `decode` reads them, never the whole text.

    ``newline`` is where they end, as `io.TextIOWrapper` takes it.

    Raises
    ------
    DataError
        If the bytes are not UTF-8; names the line.
    """
    try:
        yield from io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=newline)
    except UnicodeDecodeError:
        decode(name, data)


def decode(name: str, data: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark.

    Raises
    ------
    DataError
        If the bytes are not UTF-8; names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        msg = (
            f"{name}:{line}: expected UTF-8 text; got the byte 0x{data[error.start]:02x}."
            " Convert the file to UTF-8."
        )
        raise DataError(msg) from None


def delimited_rows(
    name: str, data: bytes, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of each row that is not blank.

    Raises
    ------
    DataError
        If quotes do not close, a row has another number of fields than the first, or the
        bytes are not UTF-8.

    Warns
    -----
    UserWarning
        If rows of GLUE's QQP are broken, which are left out: its files have a few such.
    """
    # Tab-separated corpora (GLUE's) do not quote: a sentence may begin with a quote.
    reader = csv.reader(
        text_lines(name, data, ""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    first: list[str] = []
    broken: list[int] = []
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason:
                reason = "a quote that opens here is never closed"
            msg = f"{name}:{start}: {reason}; the row cannot be read."
            raise DataError(msg) from None
        if fields is None:
            break
        if fields:
            first = first or fields
            if len(fields) != len(first) and "is_duplicate" in first:
                broken.append(start)
            elif len(fields) != len(first):
                msg = (
                    f"{name}:{start}: expected {len(first)} fields, as in the first row; got"
                    f" {len(fields)}.{other_separator(first)}"
                )
                raise DataError(msg)
            else:
                yield start, fields
        start = reader.line_num + 1
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        msg = f"{name}: {len(broken)} broken rows are left out: lines {lines}."
        warnings.warn(msg, stacklevel=2)


def other_separator(first: Sequence[str]) -> str:
    """Tell of another separator in a first row that is read as one field."""
    marks = {";": "semicolons", "\t": "tabs", ",": "commas"}
    kind = next((marks[mark] for mark in marks if mark in first[0]), None)
    if len(first) > 1 or kind is None:
        return ""
    return f" The first row has {kind}; a .csv is separated by commas, a .tsv by tabs."


def read_delimited(name: str, data: bytes, is_header: HeaderTest, suffix: str) -> Table:
    """Read comma- or tab-separated values."""
    delimiter = "," if suffix == ".csv" else "\t"
    # No document is too long, and a quote that is never closed is told as such.
    limit = csv.field_size_limit(max(len(data), csv.field_size_limit()))
    try:
        found = delimited_rows(name, data, delimiter)
        line, first = next(found, (1, []))
        columns = tuple(first) if first and is_header(first, suffix) else ()
        if len(set(columns)) != len(columns):
            msg = f"{name}:1: expected distinct column names; got {list(columns)}."
            raise DataError(msg)
        numbers = range(len(first))
        places: dict[str | int, int] = {number: number for number in numbers}
        places |= {column: place for place, column in enumerate(columns)}
        rows: list[tuple[int, Row]] = [(n, Fields(places, row)) for n, row in found]
    finally:
        csv.field_size_limit(limit)
    if first and not columns:
        rows.insert(0, (line, Fields(places, first)))
    return Table(name, columns, len(first), rows)


def json_reason(error: Exception) -> str:
    """Say why a value cannot be read: no JSON, a number too long, or nested too deep."""
    return getattr(error, "msg", None) or str(error).partition(";")[0]


def json_values(name: str, data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the line and the value of each element of an array, or of each line.

    Raises
    ------
    DataError
        If the text is not JSON or UTF-8; names the line.
    """
    if not ARRAY.match(data):
        # Other separators may be in JSON strings.
        for line, part in enumerate(text_lines(name, data, "\n"), start=1):
            if part.strip():
                try:
                    yield line, json.loads(part)
                except (ValueError, RecursionError) as error:
                    msg = (
                        f"{name}:{line}: expected one JSON object a line;"
                        f" {json_reason(error)}."
                    )
                    raise DataError(msg) from None
        return
    text, decoder = decode(name, data), json.JSONDecoder()
    position, line, seen = text.index("[") + 1, 1, 0
    for between in itertools.cycle((False, True)):
        while text[position : position + 1].isspace():
            position += 1
        line += text.count("\n", seen, position)
        seen, mark = position, text[position : position + 1]
        if mark == "]":
            if text[position + 1 :].strip():
                msg = f"{name}:{line}: expected nothing after the JSON array."
                raise DataError(msg)
            return
        if between:
            if mark != ",":
                msg = f"{name}:{line}: expected `,` or `]` in the JSON array; got {mark!r}."
                raise DataError(msg)
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            msg = f"{name}:{line}: the JSON array cannot be read; {json_reason(error)}."
            raise DataError(msg) from None
        yield line, value


def read_json(name: str, data: bytes, _: HeaderTest) -> Table:
    """Read an array of JSON objects, or one object a line (whatever the suffix)."""
    rows: list[tuple[int, Row]] = []
    known: dict[tuple[str, ...], dict[str, int]] = {}
    for line, value in json_values(name, data):
        if not isinstance(value, dict):
            msg = (
                f"{name}:{line}: expected a JSON object, column name to value; got"
                f" {json.dumps(value)[:40]}."
            )
            raise DataError(msg)
        keys = tuple(value)
        if keys not in known:
            known[keys] = {key: place for place, key in enumerate(keys)}
        rows.append((line, Fields(known[keys], value.values())))
    columns = tuple(dict.fromkeys(itertools.chain(*known)))
    return Table(name, columns, len(columns), rows)


def read_arrow(name: str, data: bytes, suffix: str) -> Table:
    """Read a Parquet or an Arrow file, or the Arrow stream that `datasets` saves."""
    kind = suffix[1:].capitalize()
    try:
        from pyarrow import ArrowException, ipc, parquet
    except ImportError:
        msg = (
            f"{name}: {kind} files need pyarrow: `pip install 'sylva-train[data]'`, or"
            " convert the file to .jsonl or .csv."
        )
        raise DataError(msg) from None
    try:
        if suffix == ".arrow":
            # What pandas and Polars write has an index at its end; `datasets` streams.
            indexed = data.startswith(b"ARROW1")
            table = (ipc.open_file if indexed else ipc.open_stream)(data).read_all()
        else:
            table = parquet.read_table(io.BytesIO(data))
    except (ArrowException, OSError) as error:
        msg = f"{name}: the {kind} file cannot be read; {str(error).splitlines()[0]}"
        raise DataError(msg) from error
    classes = class_names(table.schema.metadata or {})
    parts = (part.to_pylist() for part in table.to_batches(max_chunksize=ROWS))
    records = itertools.chain.from_iterable(parts)
    return named_table(name, table.column_names, records, classes)


def named_table(
    name: str,
    columns: Sequence[str],
    records: Iterable[Row],
    classes: Mapping[str | int, Sequence[str]],
) -> Table:
    """Return records as a table, their classes by name; rows are counted from 1.

    Raises
    ------
    DataError
        If a record has a class that has no name.
    """

    def named(number: int, column: str | int, value: Any) -> Any:
        if column not in classes or value is None:
            return value
        names = classes[column]
        if value >= len(names):
            msg = (
                f"{name}:{number}: expected one of {len(names)} classes by its number from"
                f" 0, in column {column!r}; got {value}."
            )
            raise DataError(msg)
        # Unlabelled test sets have -1.
        return names[value] if value >= 0 else None

    places = {column: place for place, column in enumerate(columns)}
    rows: list[tuple[int, Row]] = [
        (number, Fields(places, [named(number, c, record[c]) for c in columns]))
        for number, record in enumerate(records, start=1)
    ]
    order = tuple(next(iter(classes.values()))) if len(classes) == 1 else ()
    return Table(name, tuple(columns), len(columns), rows, order)


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str | int, list[str]]:
    """Return the classes of columns, as `datasets` writes them into its files."""
    features = json.loads(metadata.get(b"huggingface", b"{}"))
    features = features.get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def read_text(name: str, data: bytes, _: HeaderTest) -> Table:
    """Read plain text, one row a paragraph, in the column ``text``."""
    rows: list[tuple[int, Row]] = []
    paragraph: list[str] = []
    lines = decode(name, data).split("\n")
    for line, part in enumerate([*lines, ""], start=1):
        if part.strip():
            paragraph.append(part.rstrip("\r"))
        elif paragraph:
            rows.append((line - len(paragraph), {"text": "\n".join(paragraph)}))
            paragraph = []
    return Table(name, ("text",), 1, rows)


READERS: dict[str, Callable[[str, bytes, HeaderTest], Table]] = {
    ".csv": lambda name, data, header: read_delimited(name, data, header, ".csv"),
    ".tsv": lambda name, data, header: read_delimited(name, data, header, ".tsv"),
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": lambda name, data, _: read_arrow(name, data, ".parquet"),
    ".arrow": lambda name, data, _: read_arrow(name, data, ".arrow"),
    ".txt": read_text,
}
#: Endings of the files that can be read.
SUFFIXES = tuple(READERS)


def data_suffix(name: str) -> str:
    """Return the ending of a file's name that says how it is read.

    Examples
    --------
    >>> from sylva_train.data.files import data_suffix
    >>> data_suffix("a.jsonl.gz"), data_suffix("msr_paraphrase_train.txt")
    ('.jsonl', '.tsv')
    """
    # MRPC's own files, with tabs between columns.
    if name.startswith("msr_paraphrase"):
        return ".tsv"
    path = Path(name)
    return Path(path.stem if path.suffix == ".gz" else name).suffix.lower()


def read_table(source: Path | Traversable, is_header: HeaderTest) -> Table:
    """Read a file by its suffix.

    Parameters
    ----------
    source : Path or Traversable
        The file.
    is_header : callable
        Tells from the first row's fields whether they are column names; asked for
        ``.csv`` and ``.tsv`` only.

    Raises
    ------
    DataError
        If the suffix is unknown, a row cannot be read, or there is no row.
    """
    name = str(source) if isinstance(source, Path) else source.name
    suffix = data_suffix(source.name)
    if suffix not in READERS:
        msg = f"{name}: expected one of the suffixes {', '.join(SUFFIXES)}; got {suffix!r}."
        raise DataError(msg)
    try:
        data = source.read_bytes()
        if name.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        msg = f"{name}: the file cannot be read; {reason}."
        raise DataError(msg) from error
    table = READERS[suffix](name, data, is_header)
    if not table.rows:
        msg = f"{name}: the file has no rows; expected at least one."
        raise DataError(msg)
    return table
