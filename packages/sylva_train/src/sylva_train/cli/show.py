"""What commands have found, in words and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.measure import Measurement
from rich.table import Table

from sylva_train._checks import ConfigError
from sylva_train._files import folder_size
from sylva_train.comparison import load_results
from sylva_train.config import TaskConfig
from sylva_train.importance import Scores
from sylva_train.masks import Masks
from sylva_train.metrics import FRACTIONS, key_of
from sylva_train.options import KRONECKER
from sylva_train.overlaps import agreement as compared
from sylva_train.overlaps import best_blocks, usual_block_size
from sylva_train.progress import duration, size_words
from sylva_train.report import (
    AGREEMENT,
    agreement_cells,
    headline,
    summary_table,
    write_choices,
)
from sylva_train.tuner import inspect_adapter
from sylva_train.workflow import (
    describe_masks,
    describe_scores,
    evaluated_on,
    load_choice,
    mask_entries,
    read_run,
    score_entries,
)

from .printing import as_text, count, facts, markdown, out, prose, say, table, written

__all__ = [
    "agreement",
    "comparison",
    "diagnosis",
    "drawn",
    "inspect",
    "metrics",
    "run",
    "score_text",
    "scores",
    "show_table",
]


def score_text(metric: str, value: float) -> str:
    """Print a score with its name."""
    fraction = key_of(metric) in FRACTIONS
    number = f"{value:.1%}" if fraction else f"{value:.4g}"
    return f"{metric.replace('_', ' ')} {number}"


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return what layers' names have in common as a title, and the rest of each."""
    parts = [name.split(".")[:-1] for name in names]
    alike = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    common = [*alike, False].index(False) if len(names) > 1 else 0
    prefix = ".".join(names[0].split(".")[:common]) if common else ""
    title = f"layer in {prefix}" if prefix else "layer"
    return title, [".".join(name.split(".")[common:]) for name in names]


def layer_table(
    layers: Mapping[str, Any],
    columns: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
) -> Table:
    """Lay out layers with their shapes, and the cells of what is known of each."""
    title, names = shortened(list(layers))
    rows = [
        (name, " × ".join(map(str, layer["shape"])), *cells(layer))
        for name, layer in zip(names, layers.values(), strict=True)
    ]
    return table((title, "shape", *columns), rows)


def scores(about: Mapping[str, Any]) -> None:
    """Print how the importance of each layer is spread over its blocks."""
    side, density = about["block_size"], about["density"]
    top = f"in top {density:.3g}" if density < 0.01 else f"in top {density:.0%}"

    def cells(layer: Mapping[str, Any]) -> tuple[str, str, str]:
        share, spread = f"{layer['top_share']:.1%}", f"{layer['effective']:.0%}"
        return str(layer["blocks"]), share, spread

    out().print(layer_table(about["layers"], ("blocks", top, "effective"), cells))
    prose(
        f"Blocks of {side} × {side} weights. '{top}': the share of the layer's score that"
        " its best blocks have. 'effective': over how many blocks the score is spread;"
        " 100% if they are all alike."
    )
    if not any(layer["top"] for layer in about["layers"].values()):
        prose("At this density no layer has a whole block of its own.")


def masks(found: Masks) -> None:
    """Print the blocks of each layer."""
    about = describe_masks(found)
    provenance(about)
    block_table(about)


def block_table(about: Mapping[str, Any], total_name: str = "all") -> None:
    """Print blocks, weights and density of each layer and of all."""

    def cells(part: Mapping[str, Any]) -> tuple[str, str, str]:
        blocks, weights = f"{part['blocks']:,}", f"{part['trainable']:,}"
        return blocks, weights, f"{part['density']:.1%}"

    grid = layer_table(about["layers"], ("blocks", "weights", "density"), cells)
    grid.add_section()
    grid.add_row(total_name, "", *cells(about), style="bold")
    out().print(grid)


def adapter(path: Path) -> None:
    """Print what an adapter has, having verified it."""
    about = inspect_adapter(path)
    modules = ", ".join(about["modules_to_save"])
    rule = about["importance"]
    facts(
        {
            "base model": about["base"]["name"],
            "fingerprint": about["base"]["fingerprint"],
            "rule": f"{rule} ({about['curvature']})" if about["curvature"] else rule,
            "block size": about["block_size"],
            "trained whole": modules and f"{modules} ({about['modules_trainable']:,})",
            "on disk": size_words(about["bytes"]),
        }
    )
    # Layers without a block are not in an adapter.
    block_table(about, "all of these")


def loss_course(history: Sequence[Mapping[str, float]]) -> str:
    """Say where the training's loss began and ended; batches differ, hence means."""
    losses = [step["loss"] for step in history]
    part = len(losses) // 10
    if not part:
        return ""
    return (
        f"{fmean(losses[:part]):.3g} in the first tenth of the steps,"
        f" {fmean(losses[-part:]):.3g} in the last"
    )


def is_idle(found: Mapping[str, Any]) -> bool:
    """Whether classes or numbers do not go with those predicted at all."""
    correlation = float(found.get("mcc", found.get("pearson", 1.0)))
    return correlation <= 0 and float(found.get("accuracy", 0.0)) < 1


def run(record: Mapping[str, Any], path: Path) -> None:
    """Print what a fine-tuning did."""
    task, options = record["task"], record["sylva"]
    rule = options["importance"]
    about: dict[str, object] = {
        "model": task["model"],
        "data": f"{task['data']} ({evaluated_on(TaskConfig(**task))})",
        "rule": f"{rule} ({options['curvature']})" if rule in KRONECKER else rule,
    }
    if not record["finished"]:
        facts(about | {"state": "interrupted; sylva finetune --resume goes on with it"})
        return
    found, steps = record["metrics"], len(record["history"])
    seconds = record["seconds_per_step"]
    scoring = record.get("scoring") or {}
    took = scoring.get("samples") and (
        f"{scoring['samples']:,} examples in {duration(scoring['seconds'])},"
        f" {scoring['seconds'] / record['train_seconds']:.0%} of the training's time"
    )
    facts(
        about
        | {
            "trained": f"{count(record['trainable'])} of {count(record['total'])} weights:"
            f" {record['density']:.1%} of the layers in {record['blocks']:,} blocks,"
            f" {record['head']:,} outside of them",
            "scoring": took,
            "training": f"{steps:,} steps in {duration(record['train_seconds'])}"
            + (f", {seconds:.3g} s each" if seconds else ""),
            "loss": loss_course(record["history"]),
            "result": f"{score_text(found['metric'], found['score'])} on"
            f" {found['examples']:,} examples"
            + ("; one answer for all does as well" if is_idle(found) else ""),
            "on disk": size_words(folder_size(path / "adapter")),
        }
    )


def metrics(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the metrics of an evaluation."""
    if as_json:
        as_text(found)
        return
    numbers = {n: v for n, v in found.items() if isinstance(v, float) and n != "score"}
    names = {"f1_binary": f"f1 of {found.get('positive')!r}"}
    facts({"data": f"{found['data']}, {found['examples']:,} examples"})
    facts(
        {
            names.get(name, name.replace("_", " ")): f"{value:.2%}"
            if name in FRACTIONS
            else f"{value:.4g}"
            for name, value in numbers.items()
        }
    )
    if found.get("groups"):
        rows = [(name, f"{value:.2%}") for name, value in found["groups"].items()]
        out().print(table(("group", found["metric"]), rows))


def comparison(results: Mapping[str, Any], output: Path | None = None) -> None:
    """Print a comparison's table and where its files are."""
    console, shown = out(), summary_table(results)
    # Columns that a terminal has no room for are left out, and stand in the files: what
    # does not fit would take the methods' names away.
    unlimited = console.options.update(width=10_000)
    while len(shown.columns) > 2 and (
        Measurement.get(console, unlimited, shown).minimum > console.width
    ):
        shown.columns.pop()
    console.print(shown)
    prose(headline(results).title)
    if output is not None:
        files = ("report.html", "results.json", "table.md")
        written({file.partition(".")[0]: output / file for file in files})


def diagnosis(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what `diagnose` found."""
    if as_json:
        as_text(found)
        return
    versions = {n: v or "not installed" for n, v in found["versions"].items()}
    facts({"versions": ", ".join(f"{name} {v}" for name, v in versions.items())})
    for about in found["devices"]:
        kernels = {"torch": "PyTorch", "triton": "Triton", None: "none"}
        tried = f" ({about['tried']} tried)" if about["tried"] else ""
        memory = about.get("memory_bytes")
        threads = about.get("threads")
        room = (
            size_words(memory) if memory else f"{threads} thread{'s' * (threads != 1)}"
        )
        facts(
            {
                "device": f"{about['device']}: {about['name']}, {room}; kernels of"
                f" {kernels[about['kernels']]}{tried}"
            }
        )
    for name, folder in found["model"].items():
        facts({"model": f"{name}: {folder or 'not installed'}"})
    rows = [
        (o["name"], o["version"] or f"- ({o['remedy']})", o["purpose"])
        for o in found["optional"]
    ]
    out().print(table(("optional", "version", "for"), rows, texts=3))
    for problem in found["problems"]:
        say(f"problem  {problem}", "red")
    if not found["problems"]:
        say("Everything that is there works.")


def provenance(about: Mapping[str, Any]) -> None:
    """Print where scores or masks come from, without all that they were asked for with."""
    metadata = about["metadata"].items()
    facts({n: plain(value) for n, value in metadata if not isinstance(value, dict)})


def plain(value: Any) -> Any:
    """Print a list as words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def agreement(
    path: Path,
    against: Path,
    density: float | None,
    block_size: int | None,
    *,
    as_json: bool,
) -> None:
    """Print how far scores or masks agree with others."""
    reference, other = load_choice(against), load_choice(path)
    found = compared(reference, other, density, block_size)
    if as_json:
        as_text({"path": str(path), "against": str(against)} | found)
        return
    facts({str(path): other, "against": reference})
    grid = layer_table(
        found["layers"],
        ("blocks", *AGREEMENT),
        lambda layer: (f"{layer['blocks']:,}", *agreement_cells(layer)),
    )
    grid.add_section()
    for name in ("least", "median"):
        grid.add_row(name, "", "", *agreement_cells(found[name]), style="bold")
    out().print(grid)
    side, share = found["block_size"], found["density"]
    which = "the masks'" if share is None else f"the best {share:.3g} of each layer's"
    prose(
        f"Blocks of {side} × {side} weights, {which}. 'overlap': the part of those of"
        f" {against} that are here too. 'of score': what the blocks here have of the"
        " score there, over what the best have."
    )
    if found["overlap"] is not None:
        prose(
            f"Of all layers' blocks together {found['overlap']:.1%} are the same; by"
            f" chance {found['chance']:.1%} would be."
        )
    for where, alone in (
        (against, found["only_reference"]),
        (path, found["only_other"]),
    ):
        if alone:
            prose(f"Only in {where}: {', '.join(alone)}.")


def drawn(
    draw: Path,
    path: Path,
    against: Path | None,
    density: float | None,
    block_size: int | None,
) -> None:
    """Draw scores or masks, and how far they agree with others, as a page."""
    paths = [path] if against is None else [path, against]
    loaded = [load_choice(each) for each in paths]
    found = None
    if len(loaded) == 2:
        found = compared(loaded[1], loaded[0], density, block_size)
        density, block_size = found["density"], found["block_size"]
    like = next((each for each in loaded if isinstance(each, Masks)), None)
    choices = []
    for name, each in zip(map(str, paths), loaded, strict=True):
        best, parts = each, {}
        if isinstance(each, Scores):
            side = block_size or usual_block_size(each.values())
            best = best_blocks(each, side, 0.05 if density is None else density, like)
            parts["scores"] = score_entries(each, best)
        assert isinstance(best, Masks)
        choices.append((name, parts | {"masks": mask_entries(best)}))
    write_choices(choices, draw, found)


def show_table(output: Path) -> None:
    """Print a finished table, and where it is."""
    markdown((output / "table.md").read_text(encoding="utf-8"))
    names = {
        "table": "table.md", "rows": "table.csv", "picture": "table.svg",
        "figure": "figure.svg",
    }  # fmt: skip
    paths = {label: output / name for label, name in names.items()}
    written({label: path for label, path in paths.items() if path.exists()})


def inspect(
    path: Path,
    kind: str,
    density: float | None = None,
    block_size: int | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Print what is at a path of a kind that `kind_of` knows.

    Raises
    ------
    ConfigError
        If ``density`` or ``block_size`` is given for something else than scores.
    """
    if kind != "scores" and (density, block_size) != (None, None):
        msg = (
            f"`density` and `block_size` are to look at scores with; `{path}` has none."
        )
        raise ConfigError(msg)
    if kind == "adapter":
        as_text(inspect_adapter(path)) if as_json else adapter(path)
    elif kind == "run":
        record = read_run(path, finished=False)
        if record["finished"]:
            inspect_adapter(path / "adapter")  # verifies it
        as_text(record) if as_json else run(record, path)
    elif kind == "table":
        if as_json:
            as_text(json.loads((path / "results.json").read_text(encoding="utf-8")))
        else:
            show_table(path)
    elif kind == "masks":
        found = Masks.load(path)
        as_text(describe_masks(found)) if as_json else masks(found)
    elif kind == "scores":
        share = 0.05 if density is None else density
        about = describe_scores(Scores.load(path), share, block_size)
        if as_json:
            as_text(about)
        else:
            provenance(about)
            scores(about)
    else:
        file = path / "results.json" if path.is_dir() else path
        results = load_results(file)
        as_text(results) if as_json else comparison(results)
