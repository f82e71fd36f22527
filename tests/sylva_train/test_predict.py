"""`sylva predict`: rows without labels, with what a model says of them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from sylva_train import DataError
from sylva_train.data import load_data
from sylva_train.workflow import predict
from tests.sylva_train.jobs import sylva, told

TEXTS = ["a b good", 'c, "d" bad', "g film", "a"]


def written(path: Path, rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_rows_are_printed_with_their_class_and_its_probability(home, tmp_path):
    rows = [["id", "Text"], *([str(n), text] for n, text in enumerate(TEXTS))]
    data = written(tmp_path / "new.csv", rows)
    shown = sylva("predict", home / "run", "--data", data, "-q").stdout
    found = [json.loads(line) for line in shown.splitlines()]
    assert [row["id"] for row in found] == ["0", "1", "2", "3"]
    assert [row["Text"] for row in found] == TEXTS
    expected = predict(home / "run", TEXTS)
    for row, (label, probability) in zip(found, expected, strict=True):
        assert row["prediction"] == label
        assert row["probability"] == pytest.approx(probability, rel=1e-6)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_rows_are_written_to_a_file(home, tmp_path, name):
    data = written(tmp_path / "new.csv", [["text"], *([text] for text in TEXTS)])
    command = ["predict", home / "run", "--data", data, "--out", tmp_path / name]
    assert "4 predictions" in sylva(*command).stdout
    with (tmp_path / name).open(encoding="utf-8", newline="") as file:
        rows = list(
            csv.DictReader(file) if name == "out.csv" else map(json.loads, file)
        )
    assert [row["text"] for row in rows] == TEXTS
    labels = [label for label, _ in predict(home / "run", TEXTS)]
    assert [row["prediction"] for row in rows] == labels
    assert "exists" in told(sylva(*command, code=2))
    sylva(*command, "--overwrite")
    # What was predicted stands in the way of another prediction, and is not lost.
    again = ["predict", home / "run", "--data", tmp_path / name]
    assert "a column is called 'prediction'" in told(sylva(*again, code=1))


def test_cut_texts_are_told(home, tmp_path):
    data = written(tmp_path / "new.csv", [["text"], ["a " * 20], ["b"]])
    found = sylva("predict", home / "run", "--data", data).stderr
    assert "1 of 2 texts lose their end: they have more than 16 tokens" in found
    assert "lose" not in sylva("predict", home / "run", "--data", data, "-q").stderr


def test_labels_that_are_there_change_nothing(home, tmp_path):
    sylva(
        "predict",
        home / "run",
        "--data",
        home / "train.jsonl",
        "--out",
        tmp_path / "o.csv",
    )
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["prediction"] for row in rows)
    command = ["evaluate", home / "run", "--data", home / "train.jsonl", "--json"]
    accuracy = json.loads(sylva(*command).stdout)["accuracy"]
    assert right / len(rows) == pytest.approx(accuracy)
    assert len(rows) == len(load_data(home / "train.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("one.txt", "a good\n\nb bad\n", []),
        ("known.tsv", "index\tsentence\n0\ta good\n1\tb bad\n", []),
        ("plain.tsv", "a good\nb bad\n", []),
        ("plain.csv", "a good\nb bad\n", ["--text-column", 0]),
        ("known.csv", "text\na good\nb bad\n", ["--text-column", 0]),
        ("named.csv", "no,what\n1,a good\n2,b bad\n", ["--text-column", "what"]),
    ],
)
def test_no_first_row_is_lost_or_made_up(home, tmp_path, name, content, options):
    (tmp_path / name).write_text(content)
    shown = sylva("predict", home / "run", "--data", tmp_path / name, *options).stdout
    found = [json.loads(line)["prediction"] for line in shown.splitlines()]
    assert found == [label for label, _ in predict(home / "run", ["a good", "b bad"])]


def test_a_folder_is_asked_for_its_test_split(home, tmp_path):
    written(tmp_path / "train.csv", [["text", "label"], ["a", "good"], ["b", "bad"]])
    written(tmp_path / "test.csv", [["text"], ["c"]])
    for options, count in ([], 1), (["--split", "train"], 2):
        command = ["predict", home / "run", "--data", tmp_path, *options]
        assert len(sylva(*command).stdout.splitlines()) == count


def test_what_cannot_be_used_is_named_before_the_model_is_loaded(home, tmp_path):
    data = written(tmp_path / "new.csv", [["words"], ["a"]])
    command = ["predict", home / "run", "--data", data]
    message = told(sylva(*command, code=1))
    assert "no column is known to be the text; the columns are 'words'" in message
    assert "Name it: `--text-column`" in message
    message = told(sylva(*command, "--out", tmp_path / "out.xlsx", code=2))
    assert "`--out` must end in .jsonl or .csv" in message
    written(data, [["text"], ["a"], [" "]])
    assert "new.csv:3: expected a text" in told(sylva(*command, code=1))
    message = told(sylva(*command, "--split", "test", code=2))
    assert "`--split` must not be given with a single file" in message
    message = told(sylva("predict", tmp_path, "--data", data, code=1))
    assert "is not the folder of a fine-tuning" in message


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_whatever_json_holds_is_written(home, tmp_path, name):
    # The second is half of a surrogate pair, which no UTF-8 has.
    (tmp_path / "new.jsonl").write_text(
        r'{"text": "a good", "tags": ["é", {"n": 1}], "id": "\ud83d"}'
    )
    command = ["predict", home / "run", "--data", tmp_path / "new.jsonl"]
    sylva(*command, "--out", tmp_path / name)
    with (tmp_path / name).open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file) if name == "out.csv" else map(json.loads, file)
    if name == "out.csv":
        assert json.loads(row["tags"]) == ["é", {"n": 1}]
        assert row["id"] == r"\ud83d"
    else:
        assert row["tags"] == ["é", {"n": 1}]
        assert row["id"] == "\ud83d"


def test_a_model_of_single_texts_is_not_asked_of_pairs(home, tmp_path):
    with pytest.raises(DataError, match=r"texts has pairs.*trained on single texts"):
        predict(home / "run", [("a", "b")])
    data = written(tmp_path / "x.csv", [["text", "other"], ["a good", "b bad"]])
    command = ["predict", home / "run", "--data", data, "--text-column", "text,other"]
    assert "`--text-column`, a name or two" in told(sylva(*command, code=1))
    # A run of before does not say, and is asked.
    shutil.copytree(home / "run", tmp_path / "run")
    record = json.loads((home / "run" / "sylva.json").read_text())
    assert record.pop("pairs") is False
    (tmp_path / "run" / "sylva.json").write_text(json.dumps(record))
    sylva("predict", tmp_path / "run", *command[2:])
