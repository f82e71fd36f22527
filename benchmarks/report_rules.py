"""Tables and a picture of the runs of ``study_rules.py``.

Reads every ``*.jsonl`` of ``results/rules/`` and writes ``table.md``, ``table.csv`` and
``rules.svg`` beside them. A rule is held against random blocks seed by seed: model, data
order and batches are the same, so what the seeds have in common cancels.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from _common import RESULTS
from study_rules import ANCHORS, LAYERS_ALONE, TUNING_SEED
from study_rules import RULES as SCORED

mpl.use("svg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
TASKS = {
    "llama-e2e": "small LLaMA, E2E text",
    "llama-sst2": "small LLaMA, SST-2 text",
    "minilm-e2e": "MiniLM, e2e-rating",
    "minilm-sst2": "MiniLM, SST-2",
}
RULES = (*SCORED, LAYERS_ALONE)
#: What a cell's heading says of options that are not the usual ones.
USUAL = {
    "scope": "layer",
    "spread": None,
    "allocation": 0.0,
    "damping": 1e-2,
    "head": "fitted",
}
#: What a cell is known by.
CELL = ("task", "density", "block", *USUAL)
COLOURS = {"Kronecker factors": "#c1440e", "others": "#3b6ea5"}
#: Rules of a picture: a cell with fewer is a variation and has a table only.
FULL = 5


def read(folder: Path) -> list[Row]:
    """Return the rows of all files."""
    lines = [
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    # Runs of before it was an option do not name the allocation.
    return [{"allocation": 0.0} | json.loads(line) for line in lines]


def cells(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, dict[int, Row]]]:
    """Group the runs that are reported by cell, rule and seed.

    Those at the rate that was chosen in the cell; where rates were chosen elsewhere, at
    the last one that was run.
    """
    found: dict[Any, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    losses: dict[Any, dict[float, float]] = defaultdict(dict)
    last: dict[Any, float] = {}
    reported = []
    for row in rows:
        cell = tuple(row[name] for name in CELL), row["rule"]
        if row["seed"] == TUNING_SEED:
            losses[cell][row["lr"]] = row["validation"]["loss"]
        else:
            reported.append((cell, row))
            last[cell] = row["lr"]
    for (cell, rule), row in reported:
        tried = losses.get((cell, rule), {last[cell, rule]: 0.0})
        if row["lr"] == min(tried, key=tried.__getitem__):
            found[cell][rule][row["seed"]] = row
    return found


def rates(rows: Iterable[Row], cell: tuple[Any, ...]) -> list[str]:
    """Return the validation losses that a cell's rates were chosen by, as Markdown."""
    losses: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row["seed"] == TUNING_SEED and tuple(row[name] for name in CELL) == cell:
            losses[row["rule"]][row["lr"]] = row["validation"]["loss"]
    # Rules alone: the anchors' rates are others.
    found = {rule: losses[rule] for rule in RULES if rule in losses}
    if not found:
        return []
    columns = sorted({rate for tried in found.values() for rate in tried})
    lines = [
        "Validation loss at each peak rate, one seed that is not among those above:",
        "",
        f"| rule | {' | '.join(f'{rate:g}' for rate in columns)} |",
        f"| --- | {' | '.join('---' for _ in columns)} |",
    ]
    for rule, tried in found.items():
        values = (f"{tried[r]:.4f}" if r in tried else "" for r in columns)
        lines.append(f"| {rule} | {' | '.join(values)} |")
    return [*lines, ""]


def heading(cell: tuple[Any, ...]) -> str:
    """Name a cell."""
    task, density, block, *others = cell
    words = [TASKS[task], f"{100 * density:g}% in {block} × {block} blocks"]
    for (name, usual), value in zip(USUAL.items(), others, strict=True):
        if value != usual:
            words.append(f"{name} {value}")
    return ", ".join(words)


def spread(values: list[float], digits: int = 4) -> str:
    """Print a mean and a standard deviation."""
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def usual(cell: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the cell that a variation is one of."""
    return (*cell[:3], *USUAL.values())


def summaries(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the entries of each cell."""
    found = cells(rows)
    return {
        # A variation without random blocks of its own is held against the usual ones.
        cell: summary(rules, rules.get("random") or found[usual(cell)]["random"])
        for cell, rules in list(found.items())
    }


def summary(rules: dict[str, dict[int, Row]], random: dict[int, Row]) -> list[Row]:
    """Return one entry a rule, the best first among the rules, anchors before them."""
    entries = []
    for rule, runs in rules.items():
        losses = {seed: row["test"]["loss"] for seed, row in runs.items()}
        entry: Row = {
            "rule": rule,
            "losses": losses,
            "lr": next(iter(runs.values()))["lr"],
        }
        every = [
            {"accuracy": r["test"].get("token_accuracy")} | r | r["test"]
            for r in runs.values()
        ]
        for name in ("accuracy", "lines", "trainable"):
            if name in every[0]:
                entry[name] = statistics.fmean(row[name] for row in every)
        base = {s: r["test"]["loss"] for s, r in random.items()}
        entry["differences"] = {s: losses[s] - base[s] for s in losses.keys() & base}
        entries.append(entry)

    def place(entry: Row) -> tuple[bool, float]:
        return entry["rule"] not in ANCHORS, statistics.fmean(entry["losses"].values())

    return sorted(entries, key=place)


def table(cell: tuple[Any, ...], entries: list[Row], row: Row) -> list[str]:
    """Return a cell's table as Markdown; ``row`` is one of its runs."""
    seeds = max(len(entry["losses"]) for entry in entries)
    about = (
        f"{seeds} seeds, {row['steps']} steps of {row['batch']} sentences,"
        f" {row['sizes']['test']} of the test split"
    )
    rows = [
        "| rule | rate | weights | loss | minus random's | lower | accuracy | lines |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        losses, differences = ([*entry[n].values()] for n in ("losses", "differences"))
        against = ["", ""]
        if differences and entry["rule"] != "random":
            lower = sum(difference < 0 for difference in differences)
            against = [spread(differences), f"{lower} of {len(differences)}"]
        cells = [
            entry["rule"],
            f"{entry['lr']:g}" if entry["trainable"] else "",
            f"{entry['trainable']:,.0f}",
            spread(losses).lstrip("+"),
            *against,
            f"{entry['accuracy']:.3f}",
            f"{entry['lines']:.0%}" if "lines" in entry else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return [f"**{heading(cell)}** ({about})", "", *rows, ""]


def draw(found: dict[tuple[Any, ...], list[Row]], path: Path) -> None:
    """Draw each seed's difference from random blocks, a panel a cell."""
    chosen = {
        cell: entries
        for cell, entries in found.items()
        if sum(entry["rule"] in RULES for entry in entries) >= FULL
    }
    wide, high = min(3, len(chosen)), -(-len(chosen) // 3)
    figure, axes = plt.subplots(
        high, wide, figsize=(4.2 * wide, 3.6 * high), squeeze=False
    )
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, (cell, entries) in zip(axes.flat, chosen.items(), strict=False):
        shown = [e for e in entries if e["rule"] in RULES and e["rule"] != "random"]
        shown.sort(key=lambda e: -statistics.fmean(e["differences"].values()))
        for y, entry in enumerate(shown):
            values = [*entry["differences"].values()]
            second = (
                "Kronecker factors" if entry["rule"].startswith("kfac") else "others"
            )
            colour = COLOURS[second]
            axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color=colour)
            axis.plot(statistics.fmean(values), y, "|", ms=16, mew=2.5, color=colour)
        axis.axvline(0, color="0.4", lw=1)
        axis.set_yticks(range(len(shown)), [entry["rule"] for entry in shown])
        axis.set_title(heading(cell).replace(", ", "\n", 1), fontsize=10)
        axis.set_xlabel("test loss minus that of random blocks")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.9")
    for label, colour in COLOURS.items():
        axes[0][0].plot([], [], "o", ms=4, color=colour, label=label)
    axes[0][0].legend(loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--folder", type=Path, default=RESULTS / "rules")
    folder = options.parse_args().folder
    rows = read(folder)
    found = summaries(rows)
    made, sizes = rows[-1]["setting"], rows[-1]["sizes"]
    commits = ", ".join(sorted({row["setting"]["commit"] for row in rows}))
    devices = " and ".join(dict.fromkeys(row["setting"]["device"] for row in rows))
    dates = sorted({row["setting"]["date"][:10] for row in rows})
    lines = [
        f"{devices}, {made['threads']} thread; "
        + ", ".join(f"{name} {v}" for name, v in made["versions"].items())
        + f"; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; commits {commits}."
        f" {sizes['samples']} sentences scored, {sizes['train']:,} to train on.",
        "",
    ]
    for cell, entries in found.items():
        one = next(r for r in rows if tuple(r[name] for name in CELL) == cell)
        lines += [*table(cell, entries, one), *rates(rows, cell)]
    (folder / "table.md").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*CELL, "rule", "lr", "seed", "loss", "accuracy", "trainable"])
        for row in rows:
            if row["seed"] != TUNING_SEED:
                accuracy = row["test"].get(
                    "accuracy", row["test"].get("token_accuracy")
                )
                writer.writerow(
                    [row[name] for name in (*CELL, "rule", "lr", "seed")]
                    + [row["test"]["loss"], accuracy, row["trainable"]]
                )
    draw(found, folder / "rules.svg")


if __name__ == "__main__":
    main()
