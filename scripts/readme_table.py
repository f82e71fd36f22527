"""Put the demo's table into README.md.

``python scripts/readme_table.py RESULTS.json`` takes the ``results.json`` of ``sylva demo``
and rewrites what stands between ``<!-- demo-table -->`` and ``<!-- /demo-table -->``: the
table, then a line on what it was measured with. No number there is typed by hand.
Needs an environment with sylva_train, such as ``.nox/demo``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from sylva_train import load_results, markdown_table

BLOCK = "demo-table"
README = Path(__file__).resolve().parents[1] / "README.md"


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


def block(results: dict[str, Any]) -> str:
    """Return the block with its markers."""
    table = markdown_table(results).strip()
    return f"<!-- {BLOCK} -->\n\n{table}\n\n{provenance(results['setup'])}\n\n<!-- /{BLOCK} -->"


def replace(text: str, results: dict[str, Any]) -> str:
    """Return the text with the block rewritten.

    Raises
    ------
    SystemExit
        If its markers do not stand there exactly once.
    """
    pattern = re.compile(f"<!-- {BLOCK} -->.*?<!-- /{BLOCK} -->", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        msg = f"expected one <!-- {BLOCK} --> … <!-- /{BLOCK} --> in the file."
        raise SystemExit(msg)
    return pattern.sub(lambda _: block(results), text)


def main(arguments: list[str] | None = None) -> None:
    """Read the results and rewrite the file."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("results", type=Path, help="results.json of a demo")
    options.add_argument("--readme", type=Path, default=README, help="file to rewrite")
    given = options.parse_args(arguments)
    text = given.readme.read_text(encoding="utf-8")
    text = replace(text, load_results(given.results))
    given.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
