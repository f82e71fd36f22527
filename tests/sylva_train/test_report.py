"""The report says what the numbers say, in one file that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console
from scipy import stats

from sylva_train import report
from sylva_train._checks import DataError
from sylva_train.report import layers
from sylva_train.report.histories import learning_curves
from sylva_train.report.masks import layer_places, mask_path, overlaps
from sylva_train.report.parts import Page
from sylva_train.report.style import dodge, looks

# label, trainable fraction (None: all), accuracy, step seconds, scoring seconds
METHODS = {
    "frozen": ("Frozen features + head", 0.0, 0.812, None, None),
    "full": ("Full fine-tuning", None, 0.903, 0.412, None),
    "lora": ("LoRA", 0.013, 0.896, 0.367, None),
    "kfac-pruner": ("K-FAC pruner", 0.05, 0.879, 0.349, 14.8),
    "sylva:kfac:mlr": ("Sylva, K-FAC (MLR)", 0.05, 0.897, 0.341, 12.3),
    "sylva:kfac:hodlr": ("Sylva, K-FAC (HODLR)", 0.05, 0.887, 0.342, 15.1),
    "sylva:kfac:dense": ("Sylva, K-FAC (exact factors)", 0.05, 0.898, 0.340, 19.9),
    "sylva:fisher-diag": ("Sylva, diagonal Fisher", 0.05, 0.893, 0.341, 8.2),
    "sylva:weight-gradient": ("Sylva, weight × gradient", 0.05, 0.891, 0.339, 8.0),
    "sylva:gradient": ("Sylva, gradient", 0.05, 0.894, 0.343, 8.1),
    "sylva:magnitude": ("Sylva, magnitude", 0.05, 0.883, 0.341, 0.1),
    "sylva:random": ("Sylva, random blocks", 0.05, 0.886, 0.344, None),
}
DEMO = ("frozen", "full", "lora", "sylva:kfac:mlr", "sylva:random")
TOTAL = 22_713_986
HEAD = 770


def layer_shapes(depth, width=384, inner=1536):
    """Names and shapes of a BERT-like encoder's linear layers."""
    parts = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    return {
        f"encoder.layer.{i}.{part}": shape
        for i in range(depth)
        for part, shape in parts.items()
    }


def fake_run(method, seed, steps, rng, shift=0.0):
    """One run whose curves bend as those of a real fine-tuning do."""
    label, fraction, score, step, scoring = METHODS[method]
    end = score + shift + rng.normal(0, 0.004)
    trainable = TOTAL if fraction is None else int(fraction * TOTAL)
    logged = np.arange(1, steps + 1) if step else []
    history = [
        {
            "step": int(i),
            "loss": float(
                0.69 * np.exp(-3 * i / steps) + 0.22 + abs(rng.normal(0, 0.06))
            ),
            "score": float(end - 0.38 * np.exp(-5 * i / steps) + rng.normal(0, 0.002))
            if i % (steps // 8) == 0
            else None,
            "lr": 2e-4 * (1 - float(i) / steps),
        }
        for i in logged
    ]
    return {
        "method": method,
        "label": label,
        "seed": seed,
        "score": round(end * 872) / 872,
        "metrics": {},
        "trainable": trainable,
        "trainable_head": HEAD,
        "trainable_fraction": trainable / TOTAL,
        "seconds_per_step": step and step * float(rng.normal(1, 0.01)),
        "step_seconds_iqr": step and [step * 0.96, step * 1.07],
        "score_seconds": scoring,
        "score_memory_bytes": scoring and int(9e8 + 2e7 * scoring),
        "train_seconds": (step or 0) * steps,
        "peak_memory_bytes": int(7e8 + 16 * trainable + (0.4e9 if step else 0)),
        "adapter_bytes": (trainable + HEAD) * 4,
        "lr": 2e-4 if step else None,
        "history": history,
    }


def fake_scores(method, shapes, block, density, rng):
    """Rank-one block scores and the blocks that they choose in each layer."""
    masks, scores = {}, {}
    for depth, (name, (out, width)) in enumerate(shapes.items()):
        rows, columns = -(-out // block), -(-width // block)
        grid = np.outer(rng.lognormal(0, 0.8, rows), rng.lognormal(0, 1.1, columns))
        grid *= 1e-6 * np.exp(-0.02 * depth)
        if method == "sylva:random":
            grid = rng.random((rows, columns))
        keep = max(1, round(density * rows * columns))
        threshold = np.sort(grid, axis=None)[-keep]
        masks[name] = {
            "shape": [out, width],
            "block_size": block,
            "indices": np.argwhere(grid >= threshold).tolist(),
        }
        scores[name] = {
            "block_scores_quantiles": np.quantile(
                grid, np.linspace(0, 1, 101)
            ).tolist(),
            "threshold": float(threshold),
            "grid": grid.tolist(),
        }
    return masks, scores


def fake_factor(rng, n=96, levels=3, rank=6):
    """A covariance and its multilevel low rank form, by eigenvectors of each level."""
    mix = rng.normal(size=(n, n)) * np.arange(1, n + 1) ** -0.8
    near = np.exp(-np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / 6)
    dense = mix @ mix.T / n + 0.4 * near
    rest, spectra = dense.copy(), []
    for level in range(levels):
        size, values = n >> level, []
        for start in range(0, n, size):
            part = slice(start, start + size)
            w, v = np.linalg.eigh(rest[part, part])
            values += w[-rank:].tolist()
            rest[part, part] -= (v[:, -rank:] * w[-rank:]) @ v[:, -rank:].T
        spectra.append(sorted(values, reverse=True))
    leaf = n >> levels
    where = np.arange(n) // leaf
    leaves = [
        np.linalg.eigvalsh(rest[i : i + leaf, i : i + leaf]) for i in range(0, n, leaf)
    ]
    spectra.append(np.sort(np.abs(leaves), axis=None)[::-1].tolist())
    lost = np.where(np.equal.outer(where, where), 0, rest)
    sizes = [8 * n * rank] * levels + [8 * n * leaf]
    return {
        "layer": "encoder.layer.0.attention.self.query",
        "side": "in",
        "kind": "MLR",
        "n": n,
        "levels": levels,
        "rank": rank,
        "level_bytes": sizes,
        "singular_values": spectra,
        "spectrum_dense": np.linalg.eigvalsh(dense)[::-1].tolist(),
        "magnitude": np.abs(dense).tolist(),
        "approximation": np.abs(dense - lost).tolist(),
        "bytes": sum(sizes),
        "dense_bytes": 8 * n * n,
        "error": float(np.linalg.norm(lost) / np.linalg.norm(dense)),
    }


def fake_results(
    methods=DEMO, seeds=3, depth=6, steps=48, block=32, shapes=None, shift=None
):
    """Results of a comparison, as realistic as numbers from a generator can be."""
    rng = np.random.default_rng(0)
    shapes = layer_shapes(depth) if shapes is None else shapes
    chosen = {
        method: fake_scores(method, shapes, block, 0.05, rng)
        for method in methods
        if method.startswith("sylva")
    }
    shift = shift or {}
    return {
        "format": "sylva-comparison/1",
        "setup": {
            "model": "minilm",
            "data": "sst2 (validation)",
            "task": "classification",
            "labels": ["negative", "positive"],
            "metric": "accuracy",
            "train_examples": 2000,
            "eval_examples": 872,
            "steps": steps,
            "batch_size": 32,
            "density": 0.05,
            "block_size": block,
            "seeds": list(range(seeds)),
            "device": "AMD EPYC 7B13",
            "threads": 2,
            "versions": {"sylva_train": "0.1.0", "torch": "2.13.0"},
            "commit": "3947c39",
            "date": "2026-11-24T20:19:00+00:00",
            "total_weights": TOTAL,
            "command": "sylva compare --data sst2 --seeds 3",
        },
        "runs": [
            fake_run(method, seed, steps, rng, shift.get(method, 0.0))
            for method in methods
            for seed in range(seeds)
        ],
        "masks": {method: masks for method, (masks, _) in chosen.items()},
        "scores": {method: scores for method, (_, scores) in chosen.items()},
        "factor": fake_factor(rng),
    }


class Outline(HTMLParser):
    """What a page is made of: tags, their nesting, ids, references and text."""

    VOID = frozenset({"meta", "br", "wbr", "img", "path", "use", "rect", "image"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"href", "src", "xlink:href"}:
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


RUNS = {m: fake_run(m, 0, 8, np.random.default_rng(0)) for m in METHODS}
SMALL = {
    "encoder.layer.0.attention.query": (40, 96),
    "encoder.layer.1.attention.query": (40, 96),
}


def small_results(methods=("full", "sylva:kfac:mlr", "sylva:random"), seeds=2):
    """Results that are quick to draw."""
    return fake_results(methods, seeds, steps=8, block=16, shapes=SMALL)


@pytest.fixture(scope="module")
def everything():
    return fake_results(tuple(METHODS), seeds=5, steps=120, depth=3)


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory):
    return written(everything, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def small_page(tmp_path_factory):
    return written(small_results(), tmp_path_factory.mktemp("report"))


def written(results, tmp_path):
    return report.write_report(results, tmp_path / "report.html").read_text("utf-8")


def printed(table, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def scored(scores, **setup):
    """Results with the given scores by method and seed, and nothing else."""
    runs = [
        RUNS[method] | {"seed": seed, "score": score}
        for method, found in scores.items()
        for seed, score in enumerate(found)
    ]
    return {
        "format": "sylva-comparison/1",
        "setup": {"metric": "accuracy", "eval_examples": 872} | setup,
        "runs": runs,
    }


def verdict(rule, control):
    results = scored({"sylva:kfac:mlr": rule, "sylva:random": control})
    return next(s for s in report.headline(results).sentences if "random" in s)


# The summary


def test_rows_go_from_frozen_to_random_whatever_the_order_of_runs(everything):
    shuffled = everything | {"runs": everything["runs"][::-1]}
    assert [row.method for row in report.summary_rows(shuffled)] == list(METHODS)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_row_has_mean_deviation_and_range_of_its_scores(scores):
    (row,) = report.summary_rows(scored({"full": scores}))
    assert row.mean == pytest.approx(np.mean(scores))
    assert row.std == pytest.approx(np.std(scores, ddof=1), abs=1e-12)
    assert (row.low, row.high) == (min(scores), max(scores))


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
def test_the_terminal_table_cuts_nothing(everything, width):
    text = printed(report.summary_table(everything), width)
    assert "…" not in text
    assert "90.9" in text  # in the last column
    for row in report.summary_rows(everything):
        assert f"{100 * row.mean:.1f} ± {100 * row.std:.1f}" in text


def test_the_markdown_table_has_a_row_a_method_and_one_best(everything):
    lines = report.markdown_table(everything).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert sum("★" in line for line in lines) == 1


def test_labels_are_text_and_never_markup(tmp_path):
    label = "<script>alert('1')</script> & [red] |x| $y$ `z` *b*"
    hostile = small_results()
    for run in hostile["runs"][2:]:
        run["label"] = label
    hostile["setup"] |= {"model": label, "data": f'"{label}', "notes": [label]}
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


# The page


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


def test_the_page_names_every_method_and_what_was_measured(page, everything):
    text = Outline(page).text
    for label, *_ in METHODS.values():
        assert label in text
    for part in (report.headline(everything).title, "3947c39", "torch 2.13.0"):
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


def test_thirty_six_layers_are_all_drawn():
    results = fake_results(DEMO[3:], seeds=1, depth=36, steps=8)
    text = Outline(layers.chosen_blocks(Page(results))).text
    assert all(f"layer {i}" in text for i in range(36))
    assert "encoder.layer.35.output.dense, 384 × 1536: 29 blocks" in text


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
        r"M(\d+) (\d+)\.5h(\d+)", mask_path(list_of(chosen))
    ):
        piece = drawn[int(y), int(x) : int(x) + int(length)]
        assert piece.size == int(length)
        assert not piece.any()
        piece[:] = True
    np.testing.assert_array_equal(drawn, chosen)


def list_of(chosen):
    return np.argwhere(chosen).tolist()


@given(arrays(bool, (2, 5, 6)))
def test_overlap_is_the_common_share_of_the_smaller_mask(chosen):
    masks = {
        str(k): {"layer": {"shape": [5, 6], "block_size": 1, "indices": list_of(one)}}
        for k, one in enumerate(chosen)
    }
    shares = overlaps(masks)
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
