"""Derive the embedded task ``e2e-nlg`` from the E2E NLG Challenge data.

``python scripts/derive_e2e_nlg.py SOURCE TARGET`` reads ``devset.csv`` and
``testset_w_refs.csv`` (columns ``mr``, ``ref``) in SOURCE and writes ``train.jsonl``,
``validation.jsonl`` and ``test.jsonl`` to TARGET: a line for each meaning
representation, ``text``, with its sentences, ``target``. The same source gives the same
bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

#: Meaning representations of the development set that are kept to validate with.
VALIDATION = 40
#: Sentences to train on of each of the others, out of about nine.
SENTENCES = 3


def read(path: Path) -> dict[str, list[str]]:
    """Return the sentences, with single spaces, of each meaning representation."""
    found: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    return found


def derive(source: Path) -> dict[str, dict[str, list[str]]]:
    """Return the meaning representations and the sentences of each split."""
    development = read(source / "devset.csv")
    meanings = sorted(development)
    random.Random(0).shuffle(meanings)
    held, rest = meanings[:VALIDATION], meanings[VALIDATION:]
    return {
        "train": {m: development[m][:SENTENCES] for m in rest},
        "validation": {m: development[m] for m in held},
        "test": read(source / "testset_w_refs.csv"),
    }


def main() -> None:
    """Write the splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the E2E files")
    parser.add_argument("target", type=Path, help="folder for the three splits")
    options = parser.parse_args()
    for split, meanings in derive(options.source).items():
        lines = [
            json.dumps({"text": text, "target": target}, ensure_ascii=False)
            for text, target in meanings.items()
        ]
        path = options.target / f"{split}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
