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
from matplotlib.lines import Line2D

Row = dict[str, Any]
TASKS = {
    "llama-e2e": "small LLaMA, E2E text",
    "llama-sst2": "small LLaMA, SST-2 text",
    "smollm2-e2e": "SmolLM2, E2E text",
    "smollm2-sst2": "SmolLM2, SST-2 text",
    "gemma3-e2e": "Gemma 3, E2E text",
    "gemma3-sst2": "Gemma 3, SST-2 text",
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
CELL = ("task", "density", "block", "steps", *USUAL)
#: How many of these the usual cell shares with its variations.
FIXED = len(CELL) - len(USUAL)
#: Inches above the panels, of a line, between panels, of a column and of its labels.
TOP, LINE, BETWEEN, COLUMN, LABELS = 0.6, 0.22, 0.8, 4.7, 2.55
COLOURS = {"Kronecker factors": "#c1440e", "others": "#3b6ea5"}


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
    order = dict.fromkeys([*RULES, *losses])
    found = {r: losses[r] for r in order if r in losses and r not in ANCHORS}
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
    task, density, block, steps, *_ = cell
    size = f"{100 * density:g}% in {block} × {block} blocks"
    return ", ".join([TASKS[task], size, f"{steps} steps", *variation(cell)])


def variation(cell: tuple[Any, ...]) -> list[str]:
    """Say which options of a cell are not the usual ones."""
    others = zip(USUAL.items(), cell[FIXED:], strict=True)
    return [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for (name, usual), value in others
        if value != usual
    ]


def spread(values: list[float], digits: int = 4) -> str:
    """Print a mean and a standard deviation."""
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def usual(cell: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the cell that a variation is one of."""
    return (*cell[:FIXED], *USUAL.values())


def summaries(rows: Iterable[Row], against: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the entries of each cell."""
    found = cells(rows)

    def place(cell: tuple[Any, ...]) -> tuple[Any, ...]:
        return [*TASKS].index(cell[0]), cell[1:FIXED], cell != usual(cell), str(cell)

    return {
        # A variation is held against the usual random blocks, where there are some.
        cell: summary(rules, found[usual(cell)].get(against) or rules[against])
        for cell, rules in sorted(found.items(), key=lambda item: place(item[0]))
    }


def summary(rules: dict[str, dict[int, Row]], other: dict[int, Row]) -> list[Row]:
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
        base = {s: r["test"]["loss"] for s, r in other.items()}
        entry["differences"] = {s: losses[s] - base[s] for s in losses.keys() & base}
        entries.append(entry)

    def place(entry: Row) -> tuple[bool, float]:
        return entry["rule"] not in ANCHORS, statistics.fmean(entry["losses"].values())

    return sorted(entries, key=place)


def table(
    cell: tuple[Any, ...], entries: list[Row], row: Row, against: str
) -> list[str]:
    """Return a cell's table as Markdown; ``row`` is one of its runs."""
    seeds = max(len(entry["losses"]) for entry in entries)
    about = (
        f"{seeds} seeds, steps of {row['batch']} sentences,"
        f" {row['sizes']['test']} of the test split"
    )
    rows = [
        f"| rule | rate | weights | loss | minus {against}'s | lower | accuracy | lines |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        losses, differences = ([*entry[n].values()] for n in ("losses", "differences"))
        against = ["", ""]
        if any(differences):
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


def draw(found: dict[tuple[Any, ...], list[Row]], path: Path, against: str) -> None:
    """Draw each seed's difference from a rule's, a panel for each task and density."""
    panels: dict[tuple[Any, ...], list[tuple[str, Row]]] = defaultdict(list)
    for cell, entries in found.items():
        panels[cell[:FIXED]] += [
            (", ".join([entry["rule"], *variation(cell)]), entry)
            for entry in entries
            if entry["rule"] not in ANCHORS and any(entry["differences"].values())
        ]
    # Each panel goes to the column that is shorter so far.
    ends, places = [TOP, TOP], []
    for entries in panels.values():
        column = ends.index(min(ends))
        places.append((column, ends[column] + LINE * len(entries)))
        ends[column] += LINE * len(entries) + BETWEEN
    figure = plt.figure(figsize=(2 * COLUMN, max(ends)))
    size = figure.get_size_inches()
    for (panel, entries), (column, bottom) in zip(panels.items(), places, strict=True):
        corner = (column * COLUMN + LABELS, size[1] - bottom)
        box = (*corner, COLUMN - LABELS - 0.2, LINE * len(entries))
        axis = figure.add_axes(
            [v / s for v, s in zip(box, (*size, *size), strict=True)]
        )
        entries.sort(key=lambda e: -statistics.fmean(e[1]["differences"].values()))
        for y, (_, entry) in enumerate(entries):
            values = [*entry["differences"].values()]
            second = "Kronecker factors" if "kfac" in entry["rule"] else "others"
            colour = COLOURS[second]
            axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color=colour)
            axis.plot(statistics.fmean(values), y, "|", ms=11, mew=2.5, color=colour)
        axis.axvline(0, color="0.4", lw=1)
        labels = [label for label, _ in entries]
        axis.set_yticks(range(len(entries)), labels)
        axis.set_ylim(-0.5, len(entries) - 0.5)
        axis.tick_params(labelsize=8)
        axis.set_title(heading((*panel, *USUAL.values())), fontsize=9, loc="right")
        axis.set_xlabel(f"test loss minus {against}'s", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.9")
        axis.locator_params(axis="x", nbins=4)
    handles = [
        Line2D([], [], ls="", marker="o", ms=4, color=c) for c in COLOURS.values()
    ]
    figure.legend(
        handles, [*COLOURS], loc="upper center", ncols=2, fontsize=8, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS / "rules")
    parser.add_argument("--against", default="random", help="rule to compare with")
    options = parser.parse_args()
    folder, against = options.folder, options.against
    rows = read(folder)
    rules = sorted({row["rule"] for row in rows})
    if against not in rules:
        parser.error(f"no run is of `{against}`; --against one of {', '.join(rules)}.")
    found = summaries(rows, against)
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
        lines += [*table(cell, entries, one, against), *rates(rows, cell)]
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
    draw(found, folder / "rules.svg", against)


if __name__ == "__main__":
    main()
