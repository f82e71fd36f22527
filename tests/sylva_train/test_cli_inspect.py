"""`sylva inspect` shows what it is given, in tables of any width."""

from __future__ import annotations

import json
import shutil

import pytest

from sylva_train.cli import printing
from tests.sylva_train.jobs import (
    source,
    sylva,
    told,
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run", "4 steps"),
        ("run/adapter", "fingerprint"),
        ("run/masks.safetensors", "density"),
        ("scores.safetensors", "effective"),
    ],
)
def test_inspect_knows_what_it_sees(home, name, words):
    assert words in sylva("inspect", home / name).stdout
    assert json.loads(sylva("inspect", home / name, "--json").stdout)


def test_a_run_tells_how_the_loss_went_and_of_a_model_that_learned_nothing(
    home, tmp_path
):
    record = json.loads((home / "run/sylva.json").read_text())
    step = record["history"][0]
    record["history"] = [step | {"loss": n / 8} for n in range(30, 0, -1)]
    shutil.copytree(home / "run", tmp_path / "run")
    idle = "; one answer for all does as well"
    for mcc, accuracy, told_of in (
        (0.0, 0.7, True),
        (0.1, 0.7, False),
        (0.0, 1.0, False),
    ):
        record["metrics"] |= {"mcc": mcc, "accuracy": accuracy}
        (tmp_path / "run/sylva.json").write_text(json.dumps(record))
        shown = sylva("inspect", tmp_path / "run").stdout
        assert "3.62 in the first tenth of the steps, 0.25 in the last" in shown
        assert (idle in shown) == told_of


def test_inspect_holds_scores_and_masks_against_others(home, tmp_path):
    scores, run = home / "scores.safetensors", home / "run"
    options = ["--importance", "random", "--block-size", 8, "--quiet"]
    sylva("score", tmp_path / "random.safetensors", *source(home), *options)
    shown = sylva("inspect", tmp_path / "random.safetensors", "--against", scores)
    assert "Spearman" in shown.stdout
    assert "by chance" in shown.stdout
    same = sylva("inspect", run, "--against", scores, "--json").stdout
    assert json.loads(same)["least"]["score_share"] == pytest.approx(1.0)
    shown = sylva("inspect", run, "--against", run / "masks.safetensors").stdout
    assert "100.0% are the same" in shown
    again = sylva("inspect", scores, "--density", 0.5, "--block-size", 16, "--json")
    about = json.loads(again.stdout)
    assert (about["density"], about["block_size"]) == (0.5, 16)


def test_inspect_draws_a_page(home, tmp_path):
    page, scores = tmp_path / "page.html", home / "scores.safetensors"
    shown = sylva("inspect", scores, "--against", home / "run", "--draw", page)
    assert f"page  {page}" in shown.stdout
    assert "of the blocks are the same" in page.read_text("utf-8")
    command = ["inspect", home / "run", "--draw", page]
    assert "exists" in told(sylva(*command, code=2))
    assert json.loads(sylva(*command, "--overwrite", "--json").stdout)
    assert "blocks in" in page.read_text("utf-8")


def test_inspect_refuses_what_has_no_blocks(home, tmp_path):
    scores = home / "scores.safetensors"
    refused = sylva(
        "inspect", home / "run/adapter", "--draw", tmp_path / "p.html", code=2
    )
    assert "neither scores nor masks" in told(refused)
    assert not any(tmp_path.iterdir())
    refused = sylva("inspect", scores, "--against", home / "run/adapter", code=2)
    assert "neither scores nor masks" in told(refused)
    refused = sylva("inspect", home / "run", "--density", 0.5, code=2)
    assert "to look at scores with" in told(refused)


def test_inspect_says_what_it_knows(home):
    message = told(sylva("inspect", home / "model", code=2))
    assert "is none of these" in message
    assert "there is nothing at" in told(sylva("inspect", home / "nowhere", code=2))


# Options


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_cut_no_number_however_narrow_the_terminal_is(
    width, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", str(width))
    methods = [f"a method named {number}" for number in range(9)]
    values = [f"{number}.001 ± 10.{number}02" for number in range(9)]
    rows = [["", *methods], [":--", *["--:"] * 9], ["a-setting-of-the-table", *values]]
    printing.markdown("# A table\n" + "".join(f"| {' | '.join(r)} |\n" for r in rows))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert all(word in shown.split() for value in values for word in value.split())


def test_columns_without_room_are_named(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    row = f"| {' | '.join(f'{number}.000000001' for number in range(8))} |\n"
    head = f"| {' | '.join(f'column-{number}' for number in range(8))} |\n"
    printing.markdown(f"{head}| {' | '.join(8 * ['--:'])} |\n{20 * row}")
    shown = " ".join(capsys.readouterr().out.split())
    assert "2.000000001" not in shown
    assert "No room for: column-2, column-3" in shown
