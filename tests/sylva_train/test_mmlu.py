"""MMLU's folders and files become the prompts that everybody uses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from sylva_train._checks import DataError
from sylva_train.data import Loader, load_data
from tests.sylva_train.jobs import write_mmlu
from tests.sylva_train.words import word_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "mmlu" / "sample.jsonl"
LISTED = r".*?\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:"


def test_questions_come_after_five_examples(tmp_path):
    data = load_data(write_mmlu(tmp_path / "m"), task="causal-lm", split="test")
    assert (len(data), data.name) == (4, f"{tmp_path / 'm'}/test")
    assert data.targets == ["A", "B"] * 2
    assert data.groups == ["high_school_art"] * 2 + ["law"] * 2
    parts = data.texts[1].split("\n\n")
    assert parts[0] == (
        "The following are multiple choice questions (with answers) about high school art."
    )
    listed = 'A. w, x\nB. a "y"\nC. z\nD. 1\n2\nAnswer:'
    assert parts[1:6] == [
        f"high_school_art dev {n}?\n{listed} {'ABCD'[n % 4]}" for n in range(5)
    ]
    assert parts[6:] == [f"high_school_art test 1?\n{listed}"]


def test_long_questions_come_after_fewer_examples(tmp_path):
    tokenizer = word_tokenizer("decoder")
    data = load_data(write_mmlu(tmp_path / "m"), task="causal-lm", split="test")
    sizes = [
        [len(ids) for ids in tokenizer(list(forms))["input_ids"]]
        for forms in zip(data.texts, *zip(*data.shorter, strict=True), strict=True)
    ]
    assert [text.count("Answer:") for text in data.shorter[0]] == [5, 4, 3, 2, 1]
    loader = Loader(data, tokenizer, 4, max_length=sizes[0][2] + 2)
    assert loader.dataset.texts[0] == data.shorter[0][1]
    # Too long even without an example: the question is kept, its beginning is not.
    loader = Loader(data, tokenizer, 4, max_length=8)
    assert loader.dataset.texts[0].count("Answer:") == 1


def test_splits_answer_to_their_usual_names(tmp_path):
    folder = write_mmlu(tmp_path / "m")
    counts = {
        split: len(load_data(folder, task="seq2seq", split=split))
        for split in ("train", "dev", "val", "validation", "test")
    }
    assert counts == {"train": 12, "dev": 12, "val": 2, "validation": 2, "test": 4}
    with pytest.raises(DataError, match=r"SUBJECT_auxiliary\.csv"):
        load_data(folder, task="causal-lm", split="auxiliary")
    # Examples before themselves would tell the answer.
    examples = load_data(folder, task="causal-lm").texts
    assert all(text.count("Answer:") == 1 for text in examples)


@pytest.mark.parametrize(
    "row", ["q,a,b,c,d,E", "q,a,b,c,A", "q,a,b,c,d,AB", "q,a,b,c,d,"]
)
def test_a_row_that_is_no_question_is_named(tmp_path, row):
    folder = write_mmlu(tmp_path / "m")
    file = folder / "test" / "law_test.csv"
    file.write_text(f"q,a,b,c,d,A\n{row}\n" if row.count(",") == 5 else f"{row}\n")
    with pytest.raises(
        DataError, match=rf"{re.escape(str(file))}:[12]: expected a quest"
    ):
        load_data(folder, task="causal-lm", split="test")


def test_prompts_of_a_file_are_those_of_folders(tmp_path):
    data = load_data(SAMPLE, task="causal-lm")
    assert len(data) == len(set(data.groups)) > 20
    folder = tmp_path / "m" / "dev"
    folder.mkdir(parents=True)
    for text, target, subject in zip(
        data.texts, data.targets, data.groups, strict=True
    ):
        row = [*re.fullmatch(LISTED, text, re.DOTALL).groups(), target]
        with (folder / f"{subject}_dev.csv").open(
            "w", encoding="utf-8", newline=""
        ) as f:
            csv.writer(f).writerow(row)
    read = load_data(folder.parent, task="causal-lm")
    told = dict(
        zip(read.groups, zip(read.texts, read.targets, strict=True), strict=True)
    )
    for text, target, subject in zip(
        data.texts, data.targets, data.groups, strict=True
    ):
        # The file has two spaces before a subject, and one after some lines.
        assert told[subject] == (
            re.sub(" +(?=\n)", "", text.replace("about  ", "about ")),
            target,
        )


def test_the_sample_is_of_one_question_a_line():
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    assert {frozenset(row) for row in rows} == {
        frozenset({"subject", "input", "output"})
    }
