"""What a table's runs found, as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from sylva_train.baselines import parse_method
from sylva_train.metrics import METRICS, key_of
from sylva_train.report import Metric, deviation, percentage

from .quality import Cell

__all__ = [
    "as_csv",
    "as_markdown",
    "cells",
    "csv_text",
    "markdown",
    "metric",
    "printed_value",
    "provenance",
    "scored",
]

Results = Mapping[str, Any]
MISSING = "–"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in Markdown: words to the left, numbers to the right."""
    # The two ends of an interval stay on one line.
    rows = [
        [re.sub(r"(\[\S+,) ", "\\1\N{NO-BREAK SPACE}", cell) for cell in row]
        for row in rows
    ]
    words = [any(row[k][:1].isalpha() for row in rows) for k in range(len(header))]
    sides = [":--" if word else "--:" for word in [True, *words[1:]]]
    lines = [header, sides, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a table as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def cells(results: Results) -> dict[Cell, list[Mapping[str, Any]]]:
    """Return the runs of each cell, in the order of the table."""
    found: dict[Cell, list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        cell = Cell(run["setting"], run["method"], run["value"])
        found.setdefault(cell, []).append(run)
    return found


def metric(results: Results, setting: str, name: str | None = None) -> Metric:
    """Return how a metric of a setting is printed; by default the one it is scored by."""
    about = results["settings"][setting]
    name = name or str(about["metric"])
    return Metric.of(name, higher=METRICS[name], examples=about["eval_examples"])


def scored(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs that did not diverge."""
    return [run for run in runs if run["score"] is not None]


def printed(shown: Metric, runs: Sequence[Mapping[str, Any]]) -> str:
    """Print a metric's mean and deviation over a cell's runs, and how many diverged."""
    values = [float(run["metrics"][key_of(shown.name)]) for run in scored(runs)]
    words = []
    if values:
        words.append(shown.number(fmean(values)) + shown.spread(deviation(values)))
    if lost := len(runs) - len(values):
        words.append(f"({lost} of {len(runs)} diverged)")
    return " ".join(words) or MISSING


def shown_metrics(results: Results, setting: str) -> list[str]:
    """Return the metrics that a setting's table has: its score first."""
    score = results["settings"][setting]["metric"]
    measured = [
        name
        for name in METRICS
        if all(
            key_of(name) in run["metrics"]
            for run in scored(results["runs"])
            if run["setting"] == setting
        )
    ]
    return [score, *(name for name in measured if name != score)]


def by_method(results: Results) -> str:
    """Return a table with a line a setting and a column a method, as the paper's third."""
    found = cells(results)
    methods = list(dict.fromkeys(cell.method for cell in found))
    header = ["", "metric", *(parse_method(method).label for method in methods)]
    rows = []
    for setting in results["settings"]:
        shown = metric(results, setting)
        runs = [found.get(Cell(setting, method, None), []) for method in methods]
        rows.append([setting, shown.title, *(printed(shown, each) for each in runs)])
    return markdown(header, rows)


def printed_value(results: Results, value: Any, runs: Iterable[Results]) -> str:
    """Print an option's value, and how many samples were scored where there are fewer."""
    if results["option"] != "samples":
        return str(value)
    found = {run["scored"] for run in runs if run.get("scored") not in {None, value}}
    told = ", ".join(map(str, sorted(found)))
    return f"{value} ({told} scored)" if told else str(value)


def by_value(results: Results) -> str:
    """Return a table a setting, with a line a method and value, a column a metric."""
    found, parts = cells(results), []
    option = results["option"].replace("_", " ")
    for setting in results["settings"]:
        shown = [
            metric(results, setting, name) for name in shown_metrics(results, setting)
        ]
        header = ["", option, "trained", *(m.title for m in shown)]
        rows = []
        for cell, runs in found.items():
            if cell.setting != setting:
                continue
            fractions = [run["trainable_fraction"] for run in scored(runs)]
            fraction = percentage(fmean(fractions)) if fractions else MISSING
            label = parse_method(cell.method).label
            value = printed_value(results, cell.value, runs)
            rows.append([label, value, fraction, *(printed(m, runs) for m in shown)])
        parts.append(f"**{setting}**\n\n{markdown(header, rows)}")
    return "\n".join(parts)


def rates(results: Results) -> str:
    """Say what learning rates there were, and how they were chosen."""
    found: dict[tuple[str, str], set[float]] = {}
    for run in results["runs"]:
        key = run["setting"], parse_method(run["method"]).label
        found.setdefault(key, set()).add(run["lr"])
    rows = [
        [setting, method, ", ".join(f"{rate:g}" for rate in sorted(values))]
        for (setting, method), values in found.items()
    ]
    tried = ", ".join(f"{multiple:g}" for multiple in results["tune"])
    how = (
        f"each chosen among {tried} times the setting's, on a tenth of the training data"
        " and with a seed of their own"
        if tried
        else "those of the settings, not tuned for this table"
    )
    return f"Peak learning rates, {how}:\n\n{markdown(['', 'method', 'rate'], rows)}"


def provenance(results: Results) -> str:
    """Say with what and when results were made, and how to make them again."""
    about = results["made"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    text = (
        f"{about['device']}, {about['threads']} threads; {versions}; commit"
        f" {about['commit'] or 'unknown'}; {about['date']}."
    )
    for words in about.get("earlier", ()):
        text += f" Some runs were made earlier, with {words}."
    return f"{text}\n\nAgain: `{results['command']}`" if results["command"] else text


def facts(results: Results) -> str:
    """Say what the runs of a table were, and with what and when it was made."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    lines = [f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}."]
    for name, about in results["settings"].items():
        options = {
            "density": f"density {about['sylva']['density']:g}",
            "block_size": f"blocks of {about['sylva']['block_size']}",
        }
        options.pop(results["option"], None)
        lines.append(
            f"{name}: `{about['task']['model']}`, {about['data']}:"
            f" {about['train_examples']:,} examples to train on, {about['eval_examples']:,}"
            f" to evaluate on; {about['steps']:,} steps of {about['training']['batch_size']}"
            f" examples; {', '.join(options.values())}."
        )
    lines.append(provenance(results))
    return "\n\n".join(lines) + "\n"


def as_markdown(results: Results) -> str:
    """Return the results of `reproduce` as Markdown.

    Parameters
    ----------
    results : dict
        What `reproduce` returns.
    """
    body = by_method(results) if results["option"] is None else by_value(results)
    head = f"# {results['title']}\n"
    return "\n".join([head, body, rates(results), facts(results)])


def as_csv(results: Results) -> str:
    """Return every run of `reproduce` as a line, with all of its metrics."""
    runs = results["runs"]
    plain = ("setting", "method", "value", "seed", "lr", "score")
    costs = (
        "trainable", "trainable_head", "trainable_fraction", "scored", "score_seconds",
        "train_seconds", "seconds_per_step", "peak_memory_bytes", "adapter_bytes",
    )  # fmt: skip
    metrics = list(
        dict.fromkeys(
            name
            for run in runs
            for name, value in run["metrics"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
    )
    metrics = [name for name in metrics if name != "score"]
    rows = [
        [
            *(run[name] for name in plain),
            *(run["metrics"].get(name) for name in metrics),
            *(run.get(name) for name in costs),
        ]
        for run in runs
    ]
    return csv_text([*plain, *metrics, *costs], rows)
