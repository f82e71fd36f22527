"""Data sets are read whole or refused with the line."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc

import numpy as np
import pytest

from sylva_train._checks import ConfigError, DataError
from sylva_train.data import TextDataset, builtin_names, load_data
from tests.sylva_train.tables import ROWS, write, write_rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    data = load_data(write_rows(tmp_path / f"x.{suffix}"))
    assert list(zip(data.texts, data.labels, strict=True)) == [
        ("good film", 1),
        ("bad film", 0),
        ('a "b", c', 1),
    ]
    assert data.label_names == ["neg", "pos"]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_a_row_takes_little_more_than_its_text(tmp_path, suffix):
    """One letter of four bytes, and rows of their own for columns that all share."""
    rows = [(f"number {i} is a film 😀", "ab"[i % 2]) for i in range(3000)]
    path = write_rows(tmp_path / f"data.{suffix}", rows)
    load_data(path, limit=1)  # what is imported once
    tracemalloc.start()
    data = load_data(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (data.texts[2999], data.labels[2999]) == (rows[2999][0], 1)
    assert most / len(rows) < 550


def test_json_lines_are_read_whatever_the_suffix(tmp_path):
    source = write_rows(tmp_path / "x.jsonl")
    assert load_data(source.rename(tmp_path / "x.json")).texts[0] == "good film"


def test_byte_order_mark_and_crlf_are_no_text(tmp_path):
    path = write(tmp_path / "x.csv", b"\xef\xbb\xbfsentence,label\r\na,1\r\nb,0\r\n")
    assert load_data(path).texts == ["a", "b"]


def test_labels_have_a_stable_order(tmp_path):
    lines = "".join(f"{n}\ttext {n}\n" for n in (10, 9, 2, 10))
    assert load_data(write(tmp_path / "x.tsv", lines)).label_names == ["2", "9", "10"]
    path = write_rows(tmp_path / "x.csv")
    assert load_data(path, labels=["pos", "neg"]).labels == [0, 1, 0]


def test_whole_numbers_are_the_same_classes_in_every_format(tmp_path):
    """Of a column with missing values pandas makes fractions, and writes them so."""
    files = [
        write(tmp_path / "x.csv", "text,label\na,10.0\nb,2.0\n"),
        write(tmp_path / "y.csv", "text,label\na,10\nb,2\n"),
        write(
            tmp_path / "x.jsonl",
            '{"text": "a", "label": 10.0}\n{"text": "b", "label": 2}\n',
        ),
    ]
    for path in files:
        assert load_data(path).label_names == ["2", "10"]
        data = load_data(path, labels=["10.0", "2.0"])
        assert (data.labels, data.label_names) == ([0, 1], ["10.0", "2.0"])
    path = write(tmp_path / "z.csv", "text,label\na,1.5\nb,v2.0\n")
    assert load_data(path).label_names == ["1.5", "v2.0"]


def test_classes_that_differ_in_case_alone_are_told(tmp_path):
    rows = [("one", "True"), ("two", "no"), ("three", "true")]
    path = write_rows(tmp_path / "cases.csv", rows)
    with pytest.warns(UserWarning, match="'True', 'true' in column 'label' differ in"):
        data = load_data(path)
    assert data.label_names == ["True", "no", "true"]


def test_evaluation_knows_the_labels_of_training_only(tmp_path):
    path = write_rows(tmp_path / "dev.csv", [*ROWS, ("a", "mixed")])
    with pytest.raises(DataError, match=r"dev\.csv:5: the label 'mixed'.*neg.*pos"):
        load_data(path, labels=["neg", "pos"])


BAD = {
    "csv-fields": ("x.csv", "sentence,label\na,1\nb\n", ":3: expected 2 fields"),
    "csv-multiline": ("x.csv", 'sentence,label\n"a\nb",1\nc,2,3\n', ":4: expected 2"),
    "csv-open-quote": (
        "x.csv",
        'sentence,label\na,1\n"b,0\nc,1\n',
        ":3: a quote that opens here is never closed",
    ),
    "csv-semicolons": (
        "x.csv",
        "sentence;label\na, b;1\n",
        ":2: expected 1 fields, as in the first row; got 2. The first row has semicolons",
    ),
    "tsv-fields": ("x.tsv", "1\ta\n0\tb\tc\n", ":2: expected 2 fields"),
    "blank-text": ("x.csv", "sentence,label\na,1\n ,0\n", ":3: expected a text"),
    "blank-label": ("x.csv", "sentence,label\na,1\nb,\n", ":3: expected a label"),
    "jsonl-syntax": ("x.jsonl", '{"text": "a", "label": 1}\n{"text": \n', ":2: "),
    "jsonl-list": (
        "x.jsonl",
        '{"text": "a", "label": 1}\n[1]\n',
        ":2: expected a JSON",
    ),
    "jsonl-missing": (
        "x.jsonl",
        '{"text": "a", "label": 1}\n\n{"label": 0}\n',
        ":3: expected a text in column 'text'; got no such column",
    ),
    "jsonl-number": ("x.jsonl", '{"text": 1, "label": 1}\n', ":1: expected a text"),
    "jsonl-float": ("x.jsonl", '{"text": "a", "label": 0.5}\n', ":1: expected a label"),
    "json-comma": ("x.json", '[{"text": "a", "label": 1}\n {}]', ":2: expected `,`"),
    "json-open": ("x.json", '[{"text": "a", "label": 1},\n\n', ":3: "),
    "json-more": (
        "x.json",
        '[{"text": "a", "label": 1}]\n[{}]',
        ":1: expected nothing",
    ),
    "json-deep": (
        "x.jsonl",
        '{"text": "a", "label": ' + "[" * 9**5,
        ":1: expected one",
    ),
    "json-digits": (
        "x.json",
        "[{}, " + "9" * 5000,
        ":1: the JSON array cannot be read",
    ),
    "json-value": ("x.json", '\n[\n{"text": "a", "label": 1},\n{"text" 1}]', ":4: "),
    "encoding": ("x.csv", b"sentence,label\na,1\n\xff,0\n", ":3: expected UTF-8"),
    "parquet": ("x.parquet", b"PAR1 nothing", ": the Parquet file cannot be read"),
    "no-rows": ("x.csv", "sentence,label\n", ": the file has no rows"),
    "empty": ("x.jsonl", "", ": the file has no rows"),
    "no-text": ("x.csv", "a,b\n1,2\n", ": no column is known to be the text"),
    "no-label": ("x.csv", "text,b\n1,2\n", ": no column is known to be the label"),
    "twice": ("x.csv", "sentence,label,label\na,1,1\n", ":1: expected distinct"),
    "one-class": ("x.csv", "sentence,label\na,1\nb,1\n", ": expected at least two"),
    "suffix": ("x.doc", "a", ": expected one of the suffixes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_with_file_and_line(tmp_path, case):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        load_data(path)


def test_texts_may_be_of_any_length_and_quotes_must_close(tmp_path):
    text = "a b " * 50_000
    path = write(tmp_path / "x.csv", f'sentence,label\n"{text}",1\nb,0\n')
    assert load_data(path).texts == [text, "b"]
    write(path, f'sentence,label\n"{text},1\nb,0\n')
    with pytest.raises(DataError, match=":2: a quote that opens here is never closed"):
        load_data(path)


def test_a_number_beyond_all_floats_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", f'{{"text": "a", "score": {"9" * 400}}}\n')
    with pytest.raises(DataError, match=":1: expected a finite number"):
        load_data(path, task="regression")


def test_a_class_without_a_name_is_refused(tmp_path):
    names = {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": names}})}
    arrow, parquet = pytest.importorskip("pyarrow"), "pyarrow.parquet"
    table = arrow.table({"text": ["a", "b", "c"], "label": [0, 1, 2]})
    table = table.replace_schema_metadata(metadata)
    path = tmp_path / "x.parquet"
    pytest.importorskip(parquet).write_table(table, path)
    with pytest.raises(
        DataError, match=r"x\.parquet:3: expected one of 2 classes.*got 2"
    ):
        load_data(path)


def test_a_missing_shard_is_told(tmp_path):
    for number in (0, 2):
        name = f"train-{number:05}-of-00003.csv.gz"
        write(tmp_path / name, gzip.compress(b"text,label\na,0\nb,1\n"))
    with pytest.raises(DataError, match="'train' has 2 of 3 numbered files"):
        load_data(tmp_path)
    write(
        tmp_path / "train-00001-of-00003.csv.gz",
        gzip.compress(b"text,label\nc,0\nd,1\n"),
    )
    assert load_data(tmp_path).texts == ["a", "b", "c", "d", "a", "b"]


@pytest.mark.parametrize("spec", ["nowhere/x.csv", "./nowhere", "/nowhere"])
def test_missing_paths_are_errors(spec):
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_data(spec)


def test_hub_names_offline_say_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"e2e-rating.*could not load.*local file"):
        load_data("no-such-name-anywhere")


def test_hub_data_keeps_its_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b"], "label": [1, -1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data.select([0]))
    assert load_data("some/name:sub", split="dev").label_names == ["no", "yes"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    with pytest.raises(
        DataError, match=r"\[test\]:2: expected a label.* `sylva predict`"
    ):
        load_data("some/name", split="test")


def test_missing_labels_that_became_strings_are_warned_of(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\nc,nan\nd,nan\n")
    with pytest.warns(UserWarning, match=r"a\.csv: 'nan' .* of 2 rows, is taken for a"):
        assert load_data(tmp_path / "a.csv").label_names == ["0", "1", "nan"]
    # Without a warning, which would be an error, where it is a class by name.
    load_data(tmp_path / "a.csv", labels=["0", "1", "nan"])


def test_folders_are_read_by_split(tmp_path):
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.csv")
    assert load_data(tmp_path).name.endswith("train.csv")
    assert load_data(tmp_path, split="validation").name.endswith("dev.csv")
    with pytest.raises(DataError, match=r"no file for the split 'test'.*dev\.csv"):
        load_data(tmp_path, split="test")
    with pytest.raises(ConfigError, match="`split` must not"):
        load_data(tmp_path / "dev.csv", split="dev")


def test_limit_keeps_a_random_part_in_order_and_all_classes(tmp_path):
    path = write_rows(tmp_path / "x.csv", [(f"t {i}", i % 5) for i in range(50)])
    few, again = (load_data(path, limit=7, seed=3) for _ in range(2))
    assert few == again
    assert len(few) == 7
    assert few.label_names == list("01234")
    order = [int(text.split()[1]) for text in few.texts]
    assert order == sorted(order)
    assert load_data(path, limit=7, seed=4) != few
    assert len(load_data(path, limit=99)) == 50


def test_e2e_nlg_has_every_sentence_of_a_meaning_in_one_split():
    splits = {
        s: load_data("e2e-nlg", task="causal-lm", split=s)
        for s in ("train", "validation", "test")
    }
    counts = {s: (len(set(data.texts)), len(data)) for s, data in splits.items()}
    # The challenge's own test set has 630 and 4693.
    assert counts == {
        "train": (507, 1520),
        "validation": (40, 292),
        "test": (630, 4693),
    }
    texts = [set(data.texts) for data in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_a_list_of_targets_stands_for_rows(tmp_path):
    rows = [
        {"input": "a", "output": ["x", "y"], "subject": "s"},
        {"input": "b", "output": "z", "subject": "t"},
    ]
    path = write(tmp_path / "x.jsonl", "".join(f"{json.dumps(r)}\n" for r in rows))
    for task in ("causal-lm", "seq2seq"):
        data = load_data(path, task=task)
        assert (data.texts, data.targets) == (["a", "a", "b"], ["x", "y", "z"])
        assert data.groups == ["s", "s", "t"]
        assert data.subset([2, 0]).groups == ["t", "s"]
    for bad in ([], ["x", " "], ["x", 3]):
        rows[1]["output"] = bad
        write(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        with pytest.raises(
            DataError, match=r"x.jsonl:2: expected a text in column 'output'"
        ):
            load_data(path, task="seq2seq")


def test_a_sample_of_texts_has_all_of_their_rows():
    texts = [f"text {n % 10}" for n in range(40)]
    data = TextDataset("toy", "causal-lm", texts, targets=[str(n) for n in range(40)])
    few = data.sample_texts(3, seed=1)
    assert few == data.sample_texts(3, seed=1) != data.sample_texts(3, seed=2)
    assert len(set(few.texts)) == 3
    assert few.targets == [
        target for text, target in zip(texts, data.targets, strict=True)
        if text in few.texts
    ]  # fmt: skip
    assert data.sample_texts(None) is data.sample_texts(10) is data


def test_builtin_splits_share_nothing_and_are_small():
    assert builtin_names() == ["e2e-nlg", "e2e-rating"]
    splits = {
        s: load_data("e2e-rating", split=s) for s in ("train", "validation", "test")
    }
    assert {name: len(data) for name, data in splits.items()} == {
        "train": 4000,
        "validation": 700,
        "test": 1500,
    }
    texts = [set(data.texts) for data in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    for data in splits.values():
        assert data.label_names == ["not stated", "low", "average", "high"]
        assert min(np.bincount(data.labels)) > 0.15 * len(data)


def test_arrow_files_are_read_with_and_without_an_index(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": ["a", "b"], "label": [0, 1]})
    for kind in (arrow.ipc.new_file, arrow.ipc.new_stream):
        with kind(tmp_path / "x.arrow", table.schema) as writer:
            writer.write_table(table)
        assert load_data(tmp_path / "x.arrow").labels == [0, 1]


@pytest.mark.parametrize("spec", [None, [{"text": "a", "label": 0}]])
def test_what_is_no_path_is_refused(spec):
    with pytest.raises(
        ConfigError, match=r"must be a path or a name; got a .*TextData"
    ):
        load_data(spec)


def test_long_values_do_not_fill_the_screen(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": ["a" * 99] * 99, "label": 0}))
    with pytest.raises(DataError, match="expected a text") as caught:
        load_data(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "texts", [["a", None], [["a", "b"]], [("a", "b"), "cd"], [("a", "b", "c")], [5]]
)
def test_texts_that_are_no_texts_are_refused(texts):
    with pytest.raises(DataError, match=f"number {len(texts) - 1} is"):
        TextDataset("toy", "classification", texts)


def test_labels_are_as_many_as_texts():
    with pytest.raises(
        DataError, match="`labels` must be 2, as `texts` are, or none; got 1"
    ):
        TextDataset("toy", "classification", ["a", "b"], [0], ["x", "y"])
