"""Labels of the report stand beside what they name, and its words fit its pictures."""

from __future__ import annotations

import itertools
import re

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from sylva_train import LayerMask, Masks, report
from sylva_train.report import figures, structure
from sylva_train.report.masks import chance
from sylva_train.report.style import RC, looks
from sylva_train.report.summary import Metric, metric_of, summary_rows
from tests.sylva_train.results import scored


def results(found, metric="accuracy", trainable=None, **parts):
    """Two seeds of each method around a score."""
    higher = metric == "accuracy"
    scores = {method: (score, score + 0.002) for method, score in found.items()}
    made = scored(scores, metric=metric, higher_is_better=higher) | parts
    for run in made["runs"]:
        run["trainable"] = (trainable or {}).get(run["method"], 5000)
    return made


def drawn(figure):
    """Boxes of a figure's texts in pixels, by what they say."""
    FigureCanvasAgg(figure).draw()
    boxes = {}
    for text in figure.axes[0].texts:
        if isinstance(text, Annotation):
            # Its own extent has the arrow in it.
            text.update_positions(figure.canvas.get_renderer())
        boxes[text.get_text()] = Text.get_window_extent(text)
    return boxes


def clear(boxes):
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


# Words


@pytest.mark.parametrize(
    ("sylva", "control", "said"),
    [
        (0.91, 0.92, "closes the whole gap .*; so do random blocks."),
        (0.89, 0.92, "closes 90% of the gap .*; random blocks close all of it."),
        (0.91, 0.85, "closes the whole gap .*; random blocks close 50%."),
    ],
)
def test_the_title_gives_no_more_than_the_gap(sylva, control, said):
    scores = {"frozen": 0.8, "full": 0.9, "sylva:kfac:mlr": sylva}
    title = report.headline(results(scores | {"sylva:random": control})).title
    assert re.search(said, title)


@pytest.mark.parametrize(("weights", "told"), [(5200, False), (17_500, True)])
def test_another_budget_of_lora_is_told(weights, told):
    scores = {"lora": 0.9, "sylva:kfac:mlr": 0.9}
    found = report.headline(results(scores, trainable={"lora": weights})).sentences
    words = "The budgets differ: LoRA trains 3.50× the weights that Sylva does."
    assert (words in found) == told


def test_chance_is_the_expected_overlap_of_two_draws():
    rng = np.random.default_rng(0)
    grids = {"a": (4, 8, 5), "b": (3, 3, 2), "c": (6, 6, 0)}
    masks, common, trials = {}, 0, 4000
    for name, (rows, columns, count) in grids.items():
        # The last row and column of blocks are cut off.
        shape = rows * 16 - 1, columns * 16 - 1
        places = torch.tensor([divmod(k, columns) for k in range(count)])
        masks[name] = LayerMask(shape, 16, places)
        for _ in range(trials):
            one, other = (rng.permutation(rows * columns)[:count] for _ in range(2))
            common += len(np.intersect1d(one, other))
    assert chance(Masks(masks)) == pytest.approx(common / trials / 7, rel=0.05)


# Pictures


@pytest.mark.parametrize(
    ("scores", "metric", "far"),
    [
        ({"frozen": 0.8, "full": 0.9, "lora": 0.76, "kfac-pruner": 0.6}, "accuracy", 1),
        (
            {"frozen": 0.8, "full": 0.9, "lora": 0.85, "kfac-pruner": 0.79},
            "accuracy",
            0,
        ),
        ({"frozen": 0.9, "full": 0.8, "kfac-pruner": 0.6}, "accuracy", 0),
        ({"full": 0.9, "kfac-pruner": 0.6}, "accuracy", 0),
        ({"frozen": 0.8, "full": 0.3, "lora": 0.2, "kfac-pruner": 1.4}, "loss", 1),
    ],
)
def test_methods_far_below_the_frozen_model_squeeze_nothing(scores, metric, far):
    found = results(scores, metric)
    rows, how = summary_rows(found), metric_of(found)
    beyond = [row.method for row in figures.stragglers(rows, how)]
    assert beyond == ["kfac-pruner"] * far
    axes = figures.score_dots(rows, how, looks(scores)).axes[0]
    ends = sorted(
        how.factor * scores[row.method] for row in rows if row.method not in beyond
    )
    low, high = axes.get_xlim()
    assert low < ends[0]
    assert high > ends[-1]
    assert high - low < 1.6 * (ends[-1] - ends[0]) + 0.5


def test_labels_of_one_side_are_clear_and_lead_to_their_points():
    scores = {"full": 0.9, "lora": 0.85, "sylva:kfac:mlr": 0.851, "sylva:random": 0.85}
    weights = {
        "full": 2_000_000,
        "lora": 3600,
        "sylva:kfac:mlr": 1000,
        "sylva:random": 1000,
    }
    found = results(scores, trainable=weights)
    rows = summary_rows(found)
    figure = figures.trade_off(rows, metric_of(found), looks(scores))
    assert clear(drawn(figure).values())
    (axes,) = figure.axes
    named = {row.label: row for row in rows}
    for text in axes.texts:
        row = named.pop(text.get_text())
        point = axes.transData.transform((row.trainable, 100 * row.mean))
        assert text.xy == pytest.approx(
            axes.transAxes.inverted().transform(point), abs=1e-6
        )
    assert not named


@pytest.mark.parametrize("scale", [1, 100])
def test_values_stand_clear_of_their_lines_and_inside_the_picture(scale):
    scores = {"lora": 9.21, "sylva:gradient": 7.43, "sylva:random": 8.96}
    found = {m: (x * scale, x * scale + 1.2) for m, x in scores.items()}
    made = scored(found, metric="perplexity", higher_is_better=False)
    rows, how = summary_rows(made), metric_of(made)
    for draw in (figures.score_dots, figures.differences):
        with mpl.rc_context(RC):
            figure = draw(rows, how, looks(scores))
            figure.set_dpi(720)  # few pixels would widen the letters
            boxes = drawn(figure).values()
        frame = figure.axes[0].get_window_extent()
        for box in boxes:
            assert frame.x1 + 40 < box.x0 < box.x1 < figure.bbox.x1


@pytest.mark.parametrize("most", [2400, 2800, 9000, 80_000, 22_000_000])
def test_trained_weights_have_a_scale(most):
    weights = {"lora": most, "sylva:kfac:mlr": 2300}
    found = results(dict.fromkeys(weights, 0.9), trainable=weights)
    rows = summary_rows(found)
    figure = figures.trade_off(rows, metric_of(found), looks(weights))
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    shown = [
        label.get_text()
        for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= place <= high
    ]
    assert len(set(shown)) == len(shown) >= 2


@pytest.mark.parametrize("levels", [2, 4])
def test_names_of_spectra_are_beside_the_curves(levels):
    dense = np.geomspace(20, 1e-4, 384).tolist()
    values = [np.geomspace(20 / 3**k, 1e-4, 384).tolist() for k in range(levels + 1)]
    factor = {"spectrum_dense": dense, "singular_values": values}
    factor |= {"level_ranks": [8] * levels, "level_bytes": [64] * (levels + 1)}
    figure = structure.spectra(factor)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    legend = axes.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(f"level {k}" for k in range(levels)), "leaves", "dense"]
    frame, box = axes.get_window_extent(), legend.get_window_extent()
    assert frame.x1 <= box.x0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("name", "words", "heading"),
    [
        ("bleu", "BLEU", "BLEU"),
        ("rouge-l", "ROUGE-L", "ROUGE-L"),
        ("f1-binary", "F1-binary", "F1-binary"),
        ("token_accuracy", "token accuracy", "Token accuracy"),
    ],
)
def test_metrics_are_spelled_as_their_field_does(name, words, heading):
    metric = Metric.of(name, higher=True, examples=10)
    assert (metric.words, metric.heading) == (words, heading)
