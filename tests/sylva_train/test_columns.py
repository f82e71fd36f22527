"""Which columns are texts, labels and targets is found by name, or asked for."""

from __future__ import annotations

import json

import pytest

from sylva_train._checks import ConfigError, DataError
from sylva_train.data import Loader, load_data
from tests.sylva_train.tables import write, write_rows
from tests.sylva_train.words import word_tokenizer


def test_sst2_and_cola_need_no_column_names(tmp_path):
    sst2 = load_data(write(tmp_path / "a.tsv", '1\t"good film\n0\tbad\n'))
    assert (sst2.texts, sst2.labels) == (['"good film', "bad"], [1, 0])
    cola = load_data(write(tmp_path / "b.tsv", "gj\t1\t\tHe ran.\ngj\t0\t*\tRan he.\n"))
    assert (cola.texts, cola.labels) == (["He ran.", "Ran he."], [1, 0])


def test_columns_go_by_name_or_number(tmp_path):
    path = write(tmp_path / "x.csv", "x,y,z\nq,good,b\nr,bad,a\n")
    named = load_data(path, text_column="y", label_column="z")
    numbered = load_data(path, text_column=1, label_column=2, header=True)
    assert named == numbered
    assert named == load_data(path, text_column="1", label_column="2")
    assert named.labels == [1, 0]


def test_a_first_row_with_a_label_of_others_is_no_header(tmp_path):
    path = write(tmp_path / "x.csv", "good,b\nbad,a\nfair,b\n")
    data = load_data(path, text_column=0, label_column=1)
    assert (data.texts, data.labels) == (["good", "bad", "fair"], [1, 0, 1])
    assert data == load_data(path, text_column=0, label_column=1, header=False)


def test_usual_names_are_found_in_any_case(tmp_path):
    for name, comma in (("x.csv", ","), ("x.tsv", "\t")):
        path = write(
            tmp_path / name, "Label, Text\n1,good\n0,bad\n".replace(",", comma)
        )
        data = load_data(path)
        assert (data.texts, data.labels) == (["good", "bad"], [1, 0])


def test_two_columns_make_pairs(tmp_path):
    path = write(tmp_path / "x.tsv", "label\ts1\ts2\n1\ta\tb\n0\tc\td\n")
    data = load_data(path, text_column=["s1", "s2"])
    assert data.texts == [("a", "b"), ("c", "d")]
    batch = next(iter(Loader(data, word_tokenizer(), 2)))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 2


def test_a_column_is_not_text_and_label_at_once(tmp_path):
    path = write_rows(tmp_path / "x.csv")
    with pytest.raises(
        ConfigError, match="'sentence' cannot be text and label at once"
    ):
        load_data(path, label_column="sentence")


def test_another_separator_is_told_where_no_column_is_known(tmp_path):
    path = write(tmp_path / "x.csv", "sentence;label\na;1\nb;0\n")
    with pytest.raises(
        DataError, match=r"'sentence;label'.*The first row has semicolons"
    ):
        load_data(path)


def test_texts_are_in_one_or_two_columns(tmp_path):
    path = write_rows(tmp_path / "x.csv")
    for columns in ([], ["sentence"] * 3):
        with pytest.raises(ConfigError, match="one or two columns"):
            load_data(path, text_column=columns)


def test_columns_that_are_not_there_are_named(tmp_path):
    path = write_rows(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"`text_column` 'txt'.*'sentence', 'label'"):
        load_data(path, text_column="txt")
    with pytest.raises(DataError, match=r"`label_column` 7 .*'sentence'"):
        load_data(path, label_column=7, header=True)


def test_texts_are_not_taken_for_labels(tmp_path):
    path = write(tmp_path / "x.tsv", "".join(f"text {n}\t{n % 2}\n" for n in range(30)))
    with pytest.raises(DataError, match="30 different values in 30 rows"):
        load_data(path)
    assert load_data(path, text_column=0, label_column=1).labels[:2] == [0, 1]


def test_columns_without_a_use_are_refused(tmp_path):
    path = write_rows(tmp_path / "x.csv")
    with pytest.raises(ConfigError, match="`label_column` is for"):
        load_data(path, task="causal-lm", label_column="label")
    with pytest.raises(ConfigError, match="`target_column` is for"):
        load_data(path, target_column="label")
    with pytest.raises(DataError, match="no column is known to be the target"):
        load_data(path, task="seq2seq")


@pytest.mark.parametrize("named", ["prompt", "input"])
def test_a_prompt_without_a_known_target_is_no_whole_text(tmp_path, named):
    """Trained on as a text, it would teach to ask."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({named: "1 + 1?", "reply": "2"}))
    with pytest.raises(
        DataError, match=r"to be the target.*whole texts.*`text_column`"
    ):
        load_data(path, task="causal-lm")
    data = load_data(path, task="causal-lm", target_column="reply")
    assert (data.texts, data.targets) == (["1 + 1?"], ["2"])
    assert not load_data(path, task="causal-lm", text_column=named).targets
