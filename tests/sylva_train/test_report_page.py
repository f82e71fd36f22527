"""The page of a report, and the drawings on it."""

from __future__ import annotations

import math
import re

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sylva_train import LayerMask, Masks, report
from sylva_train.report import layers
from sylva_train.report.histories import curve_cell, curve_panel, learning_curves
from sylva_train.report.masks import layer_places, mask_key, mask_path, overlaps
from sylva_train.report.page_parts import Page
from sylva_train.report.style import dodge, looks
from tests.sylva_train.results import (
    DEMO,
    METHODS,
    Outline,
    fake_results,
    scored,
    small_results,
    written,
)


@pytest.fixture(scope="module")
def page(every_method, tmp_path_factory):
    return written(every_method, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def small_page(tmp_path_factory):
    return written(small_results(), tmp_path_factory.mktemp("report"))


def test_the_page_needs_nothing_else(page):
    outline = Outline(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(outline.tags)
    assert all(link.startswith(("#", "data:image/png")) for link in outline.links)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page


def test_the_page_is_well_formed_and_its_references_resolve(page):
    outline = Outline(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link[0] == "#"} == set(outline.ids)


def test_the_page_names_every_method_and_what_was_measured(page, every_method):
    text = Outline(page).text
    for label, *_ in METHODS.values():
        assert label in text
    for part in (report.headline(every_method).title, "3947c39", "torch 2.13.0"):
        assert part in text


def test_colours_follow_the_theme(page, small_page):
    for text in (page, small_page):
        body = text[text.index("<body>") :]
        assert not re.findall(r"(?:fill|stroke|color): ?#\w+", body)
        used = set(re.findall(r"var\(--([a-z0-9]+)\)", body)) - {"c", "v", "n"}
        themes = re.findall(r":root\{(.*?)\}", text)
        light, dark = (set(re.findall(r"--([a-z0-9]+):#", part)) for part in themes)
        assert used <= light == dark


def test_the_same_results_make_the_same_page(small_page, tmp_path):
    before = dict(mpl.rcParams)
    assert written(small_results(), tmp_path) == small_page
    assert dict(mpl.rcParams) == before


def test_a_failed_report_leaves_the_old_one(tmp_path):
    (tmp_path / "report.html").write_text("old")
    broken = small_results()
    broken["factor"]["magnitude"] = "not a matrix"
    with pytest.raises(ValueError, match="could not convert"):
        report.write_report(broken, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def without_history(results):
    for run in results["runs"]:
        run["history"] = []


def without_measures(results):
    for run in results["runs"]:
        for key in ("seconds_per_step", "step_seconds_iqr", "peak_memory_bytes"):
            run[key] = None


def without_scores(results):
    for run in results["runs"]:
        run["score"] = math.nan


@pytest.mark.parametrize(
    ("remove", "title"),
    [
        (lambda results: results.update(masks={}), "The chosen blocks"),
        (lambda results: results.pop("scores"), "Block scores"),
        (lambda results: results.update(factor=None), "Inside a Kronecker factor"),
        (without_history, "Learning curves"),
        (without_measures, "Time of a training step"),
        (without_scores, "Does scoring beat random blocks?"),
        (lambda results: results.pop("setup"), "3947c39"),
    ],
)
def test_what_is_missing_from_results_is_missing_from_the_page(
    small_page, tmp_path, remove, title
):
    less = small_results()
    remove(less)
    assert title in Outline(small_page).text
    assert title not in Outline(written(less, tmp_path)).text


@pytest.mark.parametrize(
    "methods", [("frozen",), ("sylva:random",), ("adapter", "lora")]
)
def test_few_methods_and_one_seed_make_a_page(methods, tmp_path):
    (run, *_) = small_results(seeds=1)["runs"]
    runs = [run | {"method": method, "label": method} for method in methods]
    text = written({"format": "sylva-comparison/1", "runs": runs}, tmp_path)
    assert Outline(text).open == []


def test_headings_are_nested(page, small_page):
    for text in (page, small_page):
        levels = [int(tag[1]) for tag in Outline(text).tags if re.match(r"h\d", tag)]
        assert levels[0] == 1
        assert np.diff(levels).max() == 1


def test_words_speak_of_what_the_results_have(small_page, tmp_path):
    assert "largest over the seeds" in Outline(small_page).text
    assert "Dashed: Full fine-tuning." in Outline(small_page).text
    one = small_results(("lora", "sylva:random"), seeds=1)
    text = Outline(written(one, tmp_path)).text
    for words in ("largest over the seeds", "spread is over seeds", "Dashed"):
        assert words not in text


def test_the_usual_learning_rate_is_named_once(tmp_path):
    results = small_results(("full", "lora", "sylva:kfac:mlr", "sylva:random"))
    for run in results["runs"]:
        run["lr"] = 4e-4 if run["method"] == "full" else 0.004
    text = Outline(written(results, tmp_path)).text
    assert "learning rate0.004; Full fine-tuning 0.0004" in text


def test_steps_are_whole_numbers():
    results = small_results(seeds=1)
    found = learning_curves(results, "loss", report.summary_rows(results))
    look = looks(curve.method for curve in found)
    cell = curve_cell(found[0], found[1:], look[found[0].method], None)
    for figure in (curve_panel(found, look, {}), cell):
        ticks = figure.axes[0].get_xticks()
        np.testing.assert_array_equal(ticks, ticks.round())


def test_thirty_six_layers_are_all_drawn():
    results = fake_results(DEMO[3:], seeds=1, depth=36, steps=8)
    text = Outline(layers.chosen_blocks(Page(results))).text
    assert all(f"layer {i}" in text for i in range(36))
    assert "encoder.layer.35.output.dense, 384 × 1536: 29 blocks" in text


def test_the_key_is_as_large_beside_a_head_of_many_words():
    no_blocks = torch.zeros((0, 2), dtype=torch.int64)
    layer = {"layers.0.q": LayerMask((96, 96), 16, no_blocks)}
    head = {"head": LayerMask((9600, 96), 16, no_blocks)}
    assert mask_key(Masks(layer | head)) == mask_key(Masks(layer))


@pytest.mark.parametrize("kind", ["MLR", "HODLR"])
def test_a_factor_shows_rank_and_bytes_of_each_level(kind):
    results = small_results()
    results["factor"] |= {"kind": kind, "level_ranks": [6, 5, 4]}
    text = Outline(layers.factor(Page(results))).text
    assert all(f"rank {rank}" in text for rank in (6, 5, 4))
    assert "4.61 kB" in text


# The pieces


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_mask_path_covers_its_blocks_and_no_others(chosen):
    drawn = np.zeros_like(chosen)
    for x, y, length in re.findall(
        r"M(\d+) (\d+)\.5h(\d+)", mask_path(mask_of(chosen))
    ):
        piece = drawn[int(y), int(x) : int(x) + int(length)]
        assert piece.size == int(length)
        assert not piece.any()
        piece[:] = True
    np.testing.assert_array_equal(drawn, chosen)


def mask_of(chosen):
    return LayerMask(chosen.shape, 1, torch.from_numpy(np.argwhere(chosen)))


@given(arrays(bool, (2, 5, 6)))
def test_overlap_is_the_common_share_of_the_smaller_mask(chosen):
    shares = overlaps([Masks({"layer": mask_of(one)}) for one in chosen])
    smaller = max(1, min(one.sum() for one in chosen))
    assert shares[0, 1] == shares[1, 0] == (chosen[0] & chosen[1]).sum() / smaller


@given(st.lists(st.floats(-1, 2), max_size=9), st.floats(0.01, 0.1))
def test_dodged_labels_keep_their_order_distance_and_bounds(places, gap):
    moved = dodge(places, gap, 0.0, 1.0)
    order = np.argsort(places, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert ((moved >= 0) & (moved <= 1 + 1e-9)).all()


def test_labels_that_are_apart_stay_where_they_are():
    np.testing.assert_allclose(dodge([0.9, 0.1, 0.5], 0.2, 0, 1), [0.9, 0.1, 0.5])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("encoder.layer.3.attention.self.query", ("encoder.layer", 3, "query")),
        ("encoder.layer.3.output.dense", ("encoder.layer", 3, "output.dense")),
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11, "c_attn")),
        ("model.layers.0.mlp.up_proj", ("model.layers", 0, "up_proj")),
        ("encoder.block.1.layer.0.SelfAttention.q", ("encoder.block", 1, "q")),
        ("decoder.block.1.layer.0.Self.q", ("decoder.block", 1, "Self.q")),
        ("classifier", ("", -1, "classifier")),
    ],
)
def test_a_module_name_tells_layer_and_part(name, place):
    others = [
        "encoder.layer.0.attention.output.dense",
        "decoder.block.1.layer.1.Cross.q",
        "other",
    ]
    found = layer_places([name, *others])[name]
    assert (found.stack, found.index, found.part) == place


def test_curves_average_the_steps_that_all_seeds_have():
    results = scored({"full": [0.5, 0.6]})
    losses = [{1: 1.0, 2: 3.0, 3: 9.0}, {1: 2.0, 2: 5.0}]
    for run, steps in zip(results["runs"], losses, strict=True):
        run["history"] = [{"step": s, "loss": x} for s, x in steps.items()]
    (curve,) = learning_curves(results, "loss", report.summary_rows(results))
    np.testing.assert_array_equal(curve.steps, [1, 2])
    np.testing.assert_array_equal(curve.mean, [1.5, 4.0])
    np.testing.assert_array_equal(curve.low, [1, 3])
    np.testing.assert_array_equal(curve.high, [2, 5])


def test_a_long_history_is_averaged_in_stretches_and_keeps_its_mean():
    results = scored({"full": [0.5]})
    results["runs"][0]["history"] = [
        {"step": step, "loss": float(step)} for step in range(600)
    ]
    (curve,) = learning_curves(results, "loss", report.summary_rows(results))
    assert len(curve.steps) <= 60
    np.testing.assert_allclose(curve.mean, curve.steps)
    assert curve.mean.mean() == pytest.approx(299.5)


def test_every_known_method_has_its_own_colour():
    found = looks(METHODS)
    assert len({look.name for look in found.values()}) == len(METHODS)
    assert (
        looks(["full", "sylva:kfac:mlr"])["sylva:kfac:mlr"] == found["sylva:kfac:mlr"]
    )


def test_methods_without_a_colour_take_none_that_another_has():
    methods = ["adapter", "shira", "supertuning", "kfac-pruner", "lora", "sylva:new"]
    methods += ["sylva:kfac:mlr", "sylva:kfac:hodlr", "sylva:gradient"]
    found = looks(methods)
    assert len({look.name for look in found.values()}) == len(methods)
    for method in ("kfac-pruner", "lora", "sylva:kfac:hodlr", "sylva:gradient"):
        assert found[method] == looks([method])[method]
