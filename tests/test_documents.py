"""Documentation and packages tell of the same names; tables in the README are measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

import hmatrix
import sylva_train
from tests.test_architecture import ORDER

ROOT = Path(__file__).parents[1]
PACKAGES = {"hmatrix": hmatrix, "sylva_train": sylva_train}


def load_script(name, folder="scripts"):
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    run = {"history": [], "metrics": {}, "train_seconds": 1.0, "peak_memory_bytes": 1e9}
    run |= {"seconds_per_step": 0.5, "step_seconds_iqr": [0.4, 0.6], "lr": 1e-3}
    run |= {"trainable": 5, "trainable_head": 1, "trainable_fraction": 0.05}
    run |= {"score_seconds": None, "score_memory_bytes": None, "adapter_bytes": 100}
    named = {"lora": "LoRA", "sylva:random": "Sylva, random blocks"}
    setup = {"model": "minilm", "data": "e2e-rating", "task": "classification"}
    setup |= {"labels": ["a", "b"], "metric": "accuracy", "train_examples": 10}
    setup |= {"eval_examples": 20, "steps": 3, "batch_size": 4, "density": 0.05}
    setup |= {"block_size": 32, "seeds": [0], "device": "A processor", "threads": 2}
    setup |= {"versions": {"torch": "2.13"}, "commit": "abc1234", "date": "2026-01-02"}
    setup |= {"total_weights": 100, "command": "sylva compare runs/x"}
    content = {
        "format": "sylva-comparison/1",
        "setup": setup,
        "runs": [
            run | {"method": name, "label": label, "seed": 0, "score": 0.5}
            for name, label in named.items()
        ],
        "masks": {},
        "scores": {},
        "factor": None,
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_lists_every_public_name(package):
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text("utf-8")
    listed = re.findall(r"^   (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(PACKAGES[package].__all__)


@pytest.mark.parametrize("package", ORDER)
def test_architecture_page_lists_every_room_in_order(package):
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text("utf-8")
    part = page.partition(f"## {package}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == ORDER[package].split()


def test_readme_has_a_place_for_the_table(results, tmp_path):
    script = load_script("readme_table")
    copy = tmp_path / "README.md"
    before = (ROOT / "README.md").read_text("utf-8")
    copy.write_text(before, encoding="utf-8")
    script.main([str(results), "--readme", str(copy)])
    after = copy.read_text("utf-8")
    for fact in (
        "LoRA",
        "A processor",
        "2 threads",
        "torch 2.13",
        "abc1234",
        "2026-01-02",
    ):
        assert fact in after
    marked = "<!-- demo-table -->.*<!-- /demo-table -->"
    outside = [re.sub(marked, "", text, flags=re.DOTALL) for text in (before, after)]
    assert outside[0] == outside[1]


def test_readme_has_the_figures_of_the_study(tmp_path):
    copy = tmp_path / "README.md"
    before = (ROOT / "README.md").read_text("utf-8")
    copy.write_text(before, encoding="utf-8")
    load_script("readme_table").main(["--readme", str(copy)])
    assert copy.read_text("utf-8") == before


def test_readme_table_refuses_a_file_without_marks(results, tmp_path):
    script = load_script("readme_table")
    file = tmp_path / "empty.md"
    file.write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit, match="demo-table"):
        script.main([str(results), "--readme", str(file)])
    assert file.read_text("utf-8") == "nothing here"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8"))
    assert all((ROOT / link).exists() for link in links)


@pytest.fixture(scope="module")
def measurements():
    pytest.importorskip("sphinx", reason="pages are built with Sphinx")
    return load_script("measurements", "docs/_ext")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4096, "4096"),
        (22565376, "22,565,376"),
        (10644.6, "10,645"),
        (1234.5, "1234"),
        (-0.02888, "−0.02888"),
        (7.7e-12, "7.7e−12"),
        (True, "yes"),
        ([4096, 11008], "4096,\xa011008"),
        ({"median": 0.5, "q1": 0.25, "q3": 1.0}, "0.5 (0.25–\u20601)"),
        ('numpy, method="inversion"', 'numpy, `method="inversion"`'),
    ],
)
def test_a_measurement_is_printed_for_people(measurements, value, text):
    assert measurements.cell(value) == text


@pytest.mark.parametrize("rows", [40, 41])
def test_long_tables_of_measurements_are_folded(measurements, rows):
    lines = list(measurements.table([{"who": "a", "n": n} for n in range(rows)]))
    assert (lines[0] == ":::{dropdown} All 41 rows") == (rows > 40)
    assert "| :--- | ---: |" in lines


def test_every_picture_is_told_in_words():
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text("utf-8")
        for picture in re.findall(
            r"(?:\{image\}|^\.\. plot::).*\n\s*(.*)", text, re.MULTILINE
        ):
            assert picture.startswith(":alt: "), path
