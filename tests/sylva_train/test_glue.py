"""GLUE is read as it is downloaded, and as `datasets` keeps it."""

from __future__ import annotations

import re

import pytest

from sylva_train import ConfigError, DataError, Loader, TaskConfig, load_data
from sylva_train.workflow.task import read_data
from tests.sylva_train.layouts import GLUE, QUOTED, write_e2e, write_glue
from tests.sylva_train.words import word_tokenizer

PAIRS = {
    "MRPC": (3, 4, 0),
    "QQP": (3, 4, 5),
    "QNLI": (1, 2, 3),
    "RTE": (1, 2, 3),
    "MNLI": (8, 9, 11),
    "STS-B": (7, 8, 9),
}


def options(name: str) -> dict:
    return {"task": "regression"} if name == "STS-B" else {}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_the_download_are_read_as_they_stand(tmp_path, name):
    folder = write_glue(tmp_path, name)
    first, second, label = PAIRS[name]
    rows = GLUE[name][1]
    split = "validation_matched" if name == "MNLI" else "validation"
    for part in ("train", split):
        data = load_data(folder, split=part, **options(name))
        assert data.texts == [(row[first], row[second]) for row in rows]
        labels = data.labels
        if data.label_names:
            labels = [data.label_names[number] for number in labels]
        expected = [row[label] for row in rows]
        assert labels == (list(map(float, expected)) if name == "STS-B" else expected)
    assert len(Loader(data, word_tokenizer(), 2)) > 0


@pytest.mark.parametrize(("name", "text", "label"), [("CoLA", 3, 1), ("SST-2", 0, 1)])
def test_sentences_of_the_download_are_read_as_they_stand(tmp_path, name, text, label):
    folder = write_glue(tmp_path, name)
    for split in ("train", "validation"):
        data = load_data(folder, split=split)
        assert data.texts == [row[text] for row in GLUE[name][1]]
        assert data.labels == [int(row[label]) for row in GLUE[name][1]]


def test_mnli_has_two_dev_sets(tmp_path):
    folder = write_glue(tmp_path, "MNLI")
    names = ["contradiction", "entailment", "neutral"]
    for split in ("validation_mismatched", "dev_mismatched", "dev_matched"):
        data = load_data(folder, split=split, labels=names)
        assert split.partition("_")[2] in data.name
        assert data.labels == [1, 0, 2]
    words = r"no file for the split.*dev_matched\.tsv.*`eval_split`"
    with pytest.raises(DataError, match=words):
        load_data(folder, split="validation")


def test_a_header_without_a_label_is_told_as_such(tmp_path):
    folder = write_glue(tmp_path, "STS-B")
    with pytest.raises(DataError, match=r"'score'.*`task=\"regression\"`"):
        load_data(folder)
    rows = (folder / "dev.tsv").read_text().splitlines()
    test = "\n".join(row.rpartition("\t")[0] for row in rows)
    (folder / "test.tsv").write_text(test)
    with pytest.raises(DataError, match="to be the label; the columns are 'index'"):
        load_data(folder, split="test", task="regression")


def test_quotes_of_rte_do_not_join_rows(tmp_path):
    rows = [f'{n}\t"a {n}\tb" {n}\tentailment' for n in range(3)]
    rows += ["3\tc\td\tnot_entailment"]
    text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows])
    (tmp_path / "train.tsv").write_text(text)
    data = load_data(tmp_path)
    assert data.texts[:3] == [(f'"a {n}', f'b" {n}') for n in range(3)]


def test_mrpcs_own_files_serve_too(tmp_path):
    folder = write_glue(tmp_path, "MRPC")
    expected = load_data(folder).texts
    (folder / "train.tsv").rename(folder / "msr_paraphrase_train.txt")
    assert load_data(folder).texts == expected
    assert load_data(folder / "msr_paraphrase_train.txt").texts == expected
    assert expected[0][0] == QUOTED


def test_broken_rows_of_qqp_are_left_out_and_told(tmp_path):
    folder = write_glue(tmp_path, "QQP", times=3)
    path = folder / "train.tsv"
    lines = path.read_text().splitlines()
    lines[2:2] = ["7\t8\t9\tA question that", "goes on?\tAnother?\t0"]
    path.write_text("\n".join(lines))
    with pytest.warns(
        UserWarning, match=re.escape(f"{path}: 2 broken rows are left out")
    ):
        data = load_data(folder)
    assert data.texts == load_data(folder, split="validation").texts


def test_a_pair_has_one_text_at_least(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na\t\t0\n\tb\t1\n")
    assert load_data(path).texts == [("a", ""), ("", "b")]
    path.write_text("sentence1\tsentence2\tlabel\na\tb\t0\n\t\t1\n")
    with pytest.raises(DataError, match=r"x\.tsv:3: expected a text in column"):
        load_data(path)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_copies_of_datasets_keep_names_and_order_of_classes(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    names = ["entailment", "neutral", "contradiction"]
    features = {
        "premise": datasets.Value("string"),
        "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
        "idx": datasets.Value("int32"),
    }
    rows = {
        "premise": ["a", "b"],
        "hypothesis": ["c", "d"],
        "label": [2, 0],
        "idx": [0, 1],
    }
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    splits = {"train": data, "validation_matched": data}
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "mnli")
    else:
        (tmp_path / "mnli").mkdir()
        for name, part in splits.items():
            part.to_parquet(tmp_path / "mnli" / f"{name}-00000-of-00001.parquet")
    for split in ("train", "dev_matched"):
        read = load_data(tmp_path / "mnli", split=split)
        assert read.texts == [("a", "c"), ("b", "d")]
        assert (read.labels, read.label_names) == ([2, 0], names)
    with pytest.raises(
        DataError, match=r"has train\S*, validation_matched\S*\. A split"
    ):
        load_data(tmp_path / "mnli", split="test")


def test_numbered_files_make_one_split(tmp_path):
    for number, label in enumerate("abc"):
        text = f'{{"text": "{number}", "label": "{label}"}}\n'
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text(text)
    data = load_data(tmp_path)
    assert (data.texts, data.label_names) == (["0", "1", "2"], ["a", "b", "c"])
    (tmp_path / "train.csv").write_text("text,label\nx,a\ny,b\n")
    with pytest.raises(DataError, match="several files for the split 'train'"):
        load_data(tmp_path)


def test_e2e_is_read_as_it_is_downloaded(tmp_path):
    folder = write_e2e(tmp_path / "e2e")
    columns = {"text_column": "mr", "target_column": "ref", "task": "causal-lm"}
    for split in ("train", "validation", "test"):
        data = load_data(folder, split=split, **columns)
        assert data.texts[0].startswith("name[Blue Spice]")
        assert data.targets[0] == 'Blue Spice, a "coffee shop", is here.'


def test_one_data_set_that_was_saved_has_no_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["yes", "no"])
    rows = {"text": [f"row {n}" for n in range(20)], "label": [0, 1] * 10}
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    found = load_data(tmp_path / "saved")
    assert (found.texts, found.labels) == (rows["text"], rows["label"])
    assert found.label_names == ["yes", "no"]
    with pytest.raises(ConfigError, match="`split` must not be given"):
        load_data(tmp_path / "saved", split="test")
    train, held_out = read_data(TaskConfig(data=str(tmp_path / "saved")), seed=0)
    assert set(train.texts) | set(held_out.texts) == set(rows["text"])
    assert not set(train.texts) & set(held_out.texts)
