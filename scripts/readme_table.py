"""Put measured tables into README.md.

``python scripts/readme_table.py RESULTS.json`` takes the ``results.json`` of ``sylva demo``
and rewrites what stands between ``<!-- demo-table -->`` and ``<!-- /demo-table -->``: the
table, then a line on what it was measured with. What stands between ``<!-- study-table -->``
and its end is made of ``benchmarks/results/pretrained/table.csv``, also without RESULTS.
No number there is typed by hand. Needs an environment with sylva_train, such as
``.nox/demo``.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from sylva_train import load_results, markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
STUDY = ROOT / "benchmarks" / "results" / "pretrained" / "table.csv"
#: What the study's table has, by names and numbers in its file: steps last.
CELLS = {
    ("smollm2-e2e", "0.01", "40"): "SmolLM2-135M, restaurants, 1% of the weights",
    ("smollm2-sst2", "0.01", "40"): "SmolLM2-135M, film reviews, 1%",
    ("smollm2-e2e", "0.05", "40"): "SmolLM2-135M, restaurants, 5%",
    ("smollm2-e2e", "0.01", "10"): "SmolLM2-135M, restaurants, 1%, 10 steps",
    ("smollm2-e2e", "0.01", "100"): "SmolLM2-135M, restaurants, 1%, 100 steps",
    ("smollm2-e2e", "0.01", "200"): "SmolLM2-135M, restaurants, 1%, 200 steps",
    ("gemma3-e2e", "0.01", "40"): "Gemma 3 270M, restaurants, 1%",
    ("gemma3-sst2", "0.01", "40"): "Gemma 3 270M, film reviews, 1%",
    ("gemma3-e2e", "0.05", "40"): "Gemma 3 270M, restaurants, 5%",
    ("gemma3-e2e", "0.01", "10"): "Gemma 3 270M, restaurants, 1%, 10 steps",
    ("gemma3-e2e", "0.01", "160"): "Gemma 3 270M, restaurants, 1%, 160 steps",
}
METHODS = {
    "kfac": "`kfac`",
    "fisher-diag": "FISH",
    "gradient": "mean gradient",
    "magnitude": "magnitude",
    "lora": "LoRA",
}


def provenance(setup: dict[str, Any]) -> str:
    """Say on what, with what and when the results were measured."""
    versions = ", ".join(
        f"{name} {version}" for name, version in setup["versions"].items()
    )
    seeds, threads = len(setup["seeds"]), setup["threads"]
    earlier = "".join(f" Earlier runs: {w}." for w in setup.get("earlier", ()))
    return (
        f"{setup['model']} on {setup['data']}: {setup['train_examples']} training and"
        f" {setup['eval_examples']} evaluation examples, {setup['steps']} steps of"
        f" {setup['batch_size']}, density {setup['density']:g}, blocks of"
        f" {setup['block_size']}, {seeds} seed{'s' if seeds > 1 else ''}."
        f" {setup['device']}, {threads} thread{'s' if threads > 1 else ''}; {versions};"
        f" {setup['date']}, commit {setup['commit'] or 'unknown'}.{earlier}"
    )


def demo(results: dict[str, Any]) -> str:
    """Return the demo's table and what it was measured with."""
    return f"{markdown_table(results).strip()}\n\n{provenance(results['setup'])}"


def study(path: Path) -> str:
    """Return losses less those of random blocks, by seed, of the runs in a file."""
    usual = {"block": "16", "spread": "", "allocation": "0.0"}
    losses: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if usual.items() <= row.items():
                key = row["task"], row["density"], row["steps"], row["rule"]
                losses.setdefault(key, {})[row["seed"]] = float(row["loss"])

    def compared(cell: tuple[str, ...], rule: str) -> str:
        found, random = (losses.get((*cell, name), {}) for name in (rule, "random"))
        less = [loss - random[seed] for seed, loss in found.items()]
        if not less:
            return "–"
        mean, spread = statistics.mean(less), statistics.stdev(less)
        return f"{mean:+.2f} ± {spread:.2f}".replace("-", "−")

    lines = [["model and text", *METHODS.values()], [":---", *["---:"] * len(METHODS)]]
    lines += [
        [label, *(compared(cell, m) for m in METHODS)] for cell, label in CELLS.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace(text: str, name: str, content: str) -> str:
    """Return the text with what stands between two marks of a name rewritten.

    Raises
    ------
    SystemExit
        If these do not stand there exactly once.
    """
    pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        msg = f"expected one <!-- {name} --> … <!-- /{name} --> in the file."
        raise SystemExit(msg)
    block = f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"
    return pattern.sub(lambda _: block, text)


def main(arguments: list[str] | None = None) -> None:
    """Read the results and rewrite the file."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("results", type=Path, nargs="?", help="results.json of a demo")
    options.add_argument("--readme", type=Path, default=README, help="file to rewrite")
    given = options.parse_args(arguments)
    text = given.readme.read_text(encoding="utf-8")
    if given.results is not None:
        text = replace(text, "demo-table", demo(load_results(given.results)))
    text = replace(text, "study-table", study(STUDY))
    given.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
