"""The page of one file of scores or masks, or of two held against each other."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from sylva_train import LayerScores, Scores, agreement
from sylva_train.masks import LayerMask, Masks
from sylva_train.overlaps import best_blocks
from sylva_train.report import layers, write_choices
from sylva_train.report.choices import divided
from sylva_train.report.masks import layer_places
from sylva_train.workflow import mask_entries, score_entries
from tests.sylva_train.results import Outline

NAMES = ("m.layer.0.query", "m.layer.0.key", "m.layer.1.query")


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    grids = [torch.rand(6, 8, generator=generator).double() for _ in NAMES]
    found = {
        name: LayerScores((24, 32), grid=grid, unit=4)
        for name, grid in zip(NAMES, grids, strict=True)
    }
    return Scores(found, {"importance": "gradient"})


def choice(scores, density=0.25):
    best = best_blocks(scores, 4, density)
    return {"masks": mask_entries(best), "scores": score_entries(scores, best)}


def read(choices, path, found=None):
    return write_choices(choices, path, found).read_text("utf-8")


def well_formed(page):
    outline = Outline(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    return outline.text


def blocks_in(path):
    """Blocks of an SVG path of runs."""
    runs = re.findall(r"M(\d+) (\d+)\.5h(\d+)", path)
    return {(int(r), int(c) + i) for c, r, length in runs for i in range(int(length))}


def test_one_file_is_drawn(tmp_path):
    text = well_formed(
        read([("<a>.safetensors", choice(drawn(0)))], tmp_path / "p.html")
    )
    assert "36 blocks in 3 layers" in text
    assert "<a>.safetensors" in text
    assert "Block scores" in text
    assert "How far they agree" not in text


@pytest.mark.parametrize("empty", [(), (1,)])
def test_of_one_layer_alone_the_scores_of_all_blocks_are_kept(tmp_path, empty):
    scores = drawn(0)
    masks = best_blocks(scores, 8, 0.25)
    names = list(masks)
    for number in empty:
        mask = masks[names[number]]
        masks.layers[names[number]] = replace(mask, indices=mask.indices[:0])
    found = score_entries(scores, masks)
    (kept,) = (name for name, entry in found.items() if "grid" in entry)
    assert len(masks[kept])
    assert found[kept]["grid"] == scores[kept].blocks(8).tolist()
    place = layer_places(found)[kept]
    parts = {"masks": mask_entries(masks), "scores": found}
    page = read([("run", parts)], tmp_path / "p.html")
    assert f"One matrix: layer {place.index}, {place.part}" in page


def test_a_layer_may_have_more_blocks_than_torch_takes_quantiles_of():
    lines = torch.arange(4097.0), torch.ones(4096)
    scores = Scores({"a": LayerScores((4097, 4096), *lines)}, {})
    masks = Masks({"a": LayerMask((4097, 4096), 1, torch.tensor([[4096, 0]]))})
    found = score_entries(scores, masks)["a"]
    assert "grid" not in found  # nor are they drawn one by one
    assert found["block_scores_quantiles"][::50] == [0, 2048, 4096]
    assert found["threshold"] == 4096


def test_masks_alone_are_drawn(tmp_path):
    masks = {"masks": choice(drawn(0))["masks"]}
    assert "Block scores" not in well_formed(
        read([("run", masks)], tmp_path / "p.html")
    )


def test_two_files_are_drawn_into_one_picture(tmp_path):
    one, other = drawn(0), drawn(1)
    found = agreement(other, one, 0.25, 4)
    page = read([("one", choice(one)), ("other", choice(other))], tmp_path / "p", found)
    text = well_formed(page)
    assert f"{found['overlap']:.1%} of the blocks are the same" in text
    assert f"{found['median']['spearman']:.3f}" in text
    picture = page.partition("How far they agree")[2].partition("<table")[0]
    drawings = re.findall(r"<path(?: style=\"--c:([^\"]+)\")? d=\"([^\"]*)\"", picture)
    counts = {}
    for colour, path in drawings:
        counts[colour] = counts.get(colour, 0) + len(blocks_in(path))
    both = round(found["overlap"] * 36)
    assert counts == {
        "": both, "var(--sky)": 36 - both, "var(--yellow)": 36 - both,
    }  # fmt: skip


def test_blocks_are_in_one_part_of_three():
    one, other = (best_blocks(drawn(seed), 4, 0.25) for seed in (0, 1))
    parts = divided({name: (one[name], other[name]) for name in one})
    for name in one:
        first, second, *found = (
            set(masks[name].flat.tolist()) for masks in (one, other, *parts)
        )
        assert found == [first & second, first - second, second - first]


@pytest.mark.parametrize("most", [10, 1000])
def test_a_page_stays_small(tmp_path, monkeypatch, most):
    monkeypatch.setattr(layers, "MOST_BLOCKS", most)
    one, other = drawn(0), drawn(1)
    found = agreement(other, one, 0.25, 4)
    page = read([("one", choice(one)), ("other", choice(other))], tmp_path / "p", found)
    picture = page.partition("How far they agree")[2].partition("<table")[0]
    assert ("<svg" in picture) == (most == 1000)
