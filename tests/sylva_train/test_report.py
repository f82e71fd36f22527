"""Reports: summary, verdict and tables."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from sylva_train import report
from sylva_train._checks import DataError
from sylva_train.cli import show
from tests.sylva_train.results import METHODS, Outline, scored, small_results, written


def printed(table, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def verdict(rule, control):
    results = scored({"sylva:kfac:mlr": rule, "sylva:random": control})
    return next(s for s in report.headline(results).sentences if "random" in s)


# The summary


def test_rows_go_from_frozen_to_random_whatever_the_order_of_runs(every_method):
    shuffled = every_method | {"runs": every_method["runs"][::-1]}
    assert [row.method for row in report.summary_rows(shuffled)] == list(METHODS)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_row_has_mean_and_deviation_of_its_scores(scores):
    (row,) = report.summary_rows(scored({"full": scores}))
    assert row.mean == pytest.approx(np.mean(scores))
    assert row.std == pytest.approx(np.std(scores, ddof=1), abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8))
def test_the_interval_against_random_is_that_of_the_paired_t_test(pairs):
    rule, control = zip(*pairs, strict=True)
    results = scored({"sylva:kfac:mlr": rule, "sylva:random": control})
    pair = report.summary_rows(results)[0].versus_random
    gaps = np.subtract(rule, control)
    assert pair.mean == pytest.approx(gaps.mean(), abs=1e-12)
    expected = stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
    assert pair.margin() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert pair.margin(7) >= pair.margin()


def test_only_common_seeds_are_paired():
    results = scored({"sylva:kfac:mlr": [0.9, 0.8, 0.7], "sylva:random": [0.5, 0.6]})
    pair = report.summary_rows(results)[0].versus_random
    assert pair.differences == pytest.approx((0.4, 0.2))


@pytest.mark.parametrize(
    ("higher", "winner"), [(True, "gradient"), (False, "magnitude")]
)
def test_the_best_rule_follows_the_direction_of_the_metric(higher, winner):
    """Random blocks are the control, and no winner even where they score best."""
    scores = {
        "full": [0.99],
        "sylva:gradient": [0.9],
        "sylva:magnitude": [0.5],
        "sylva:random": [0.2 if not higher else 0.95],
    }
    rows = report.summary_rows(scored(scores, higher_is_better=higher))
    assert [row.method for row in rows if row.best] == [f"sylva:{winner}"]


def test_a_run_without_a_finite_score_is_left_out_and_named():
    results = scored({"full": [0.9, math.nan, None]})
    (row,) = report.summary_rows(results)
    assert (row.mean, row.failed) == (0.9, 2)
    assert "2 of 3 runs" in " ".join(report.headline(results).sentences)


@pytest.mark.parametrize("broken", [{}, {"format": "sylva-comparison/0"}])
def test_another_format_is_refused(broken, tmp_path):
    with pytest.raises(DataError, match="`results` must have format"):
        report.write_report(broken, tmp_path / "report.html")
    with pytest.raises(DataError, match="at least one entry in `runs`"):
        report.summary_rows({"format": "sylva-comparison/1", "runs": []})


# The headline


def test_a_clear_lead_beats_random():
    said = verdict([0.90, 0.91, 0.92], [0.80, 0.812, 0.821])
    assert said.startswith("Scoring beats random blocks beyond the spread")


@pytest.mark.parametrize(
    ("rule", "control"),
    [
        ([0.90, 0.91, 0.92], [0.91, 0.89, 0.92]),
        ([0.80, 0.80, 0.80], [0.90, 0.90, 0.90]),
        ([0.90, 0.91, 0.92], [0.90, 0.91, 0.92]),
    ],
)
def test_what_chance_could_explain_does_not_beat_random(rule, control):
    assert verdict(rule, control).startswith("Scoring does not beat random blocks")


def test_one_seed_tells_nothing():
    assert "cannot be told from one seed" in verdict([0.95], [0.2])


def test_the_best_of_many_rules_needs_a_wider_lead():
    rule, control = [0.90, 0.912, 0.921], [0.885, 0.90, 0.90]
    assert verdict(rule, control).startswith("Scoring beats")
    rest = [m for m in METHODS if m.startswith("sylva") and "random" not in m][1:]
    scores = {"sylva:kfac:mlr": rule} | {m: [0.5, 0.6, 0.7] for m in rest}
    said = report.headline(scored(scores | {"sylva:random": control})).sentences
    assert any(s.startswith("Scoring does not beat") and "best of 7" in s for s in said)


@pytest.mark.parametrize(
    ("sylva", "full", "said"),
    [
        (0.85, 0.9, "closes 50% of the gap"),
        (0.95, 0.9, "closes the whole gap"),
        (0.70, 0.9, "does not improve on the frozen model"),
        (0.85, 0.7, "there is no gap"),
    ],
)
def test_the_title_says_how_much_of_the_gap_closes(sylva, full, said):
    scores = {"frozen": [0.8], "full": [full], "sylva:kfac:mlr": [sylva]}
    assert said in report.headline(scored(scores)).title


def test_the_control_does_not_stand_for_sylva():
    scores = {"frozen": [0.8], "full": [0.9], "sylva:gradient": [0.85]}
    found = report.headline(scored(scores | {"sylva:random": [0.89]}))
    assert "closes 50%" in found.title
    assert "random blocks close 90%" in found.title


# The tables


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_table_cuts_nothing(every_method, width):
    text = printed(report.summary_table(every_method), width)
    assert "…" not in text
    assert "90.9" in text  # in the last column
    for row in report.summary_rows(every_method):
        assert f"{100 * row.mean:.1f} ± {100 * row.std:.1f}" in text


@pytest.mark.parametrize("width", [40, 60, 79])
def test_a_narrow_terminal_leaves_the_last_columns_out(
    every_method, width, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", str(width))
    show.comparison(every_method)
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in report.summary_rows(every_method):
        assert row.label.split()[0] in text
        assert f"{100 * row.mean:.1f} ± {100 * row.std:.1f}" in text


def test_the_markdown_table_has_a_row_a_method_and_one_best(every_method):
    lines = report.markdown_table(every_method).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert sum("★" in line for line in lines) == 1


def test_labels_are_text_and_never_markup(tmp_path):
    label = "<script>alert('1')</script> & [red] |x| $y$ `z` *b*"
    hostile = small_results()
    for run in hostile["runs"][2:]:
        run["label"] = label
    hostile["setup"] |= {"model": label, "data": f'"{label}'}
    for part in ("masks", "scores"):
        layers_ = hostile[part]["sylva:kfac:mlr"]
        named = {f"{label}{name}": value for name, value in layers_.items()}
        hostile[part]["sylva:kfac:mlr"] = named
    outline = Outline(written(hostile, tmp_path))
    assert "script" not in outline.tags
    assert outline.text.count("<script>alert('1')</script> & [red]") > 5
    assert "[red]" in printed(report.summary_table(hostile), 160)
    table = report.markdown_table(hostile)
    assert "<script" not in table
    assert r"\|x\|" in table
