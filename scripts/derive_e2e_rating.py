"""Derive the embedded task ``e2e-rating`` from the E2E NLG Challenge data.

``python scripts/derive_e2e_rating.py SOURCE TARGET`` reads ``devset.csv`` and
``testset_w_refs.csv`` (columns ``mr``, ``ref``) in SOURCE and writes ``train.csv``,
``validation.csv`` and ``test.csv`` (columns ``sentence``, ``label``) to TARGET. The
same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from pathlib import Path

SOURCES = ("devset.csv", "testset_w_refs.csv")
# Sentences wanted of each split; the meaning representations are dealt out in proportion.
SIZES = {"train": 4000, "validation": 700, "test": 1500}
# The source writes one rating in three ways: in words, as a mark, or not at all.
RATINGS = {
    None: "not stated",
    "low": "low",
    "1 out of 5": "low",
    "average": "average",
    "3 out of 5": "average",
    "high": "high",
    "5 out of 5": "high",
}


def read(path: Path) -> list[tuple[str, str]]:
    """Return (meaning representation, sentence with single spaces) pairs."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (row["mr"], " ".join(row["ref"].split())) for row in csv.DictReader(file)
        ]


def rating(meaning: str) -> str:
    """Return the label: what the meaning representation says of the customers' rating."""
    found = re.search(r"customer rating\[(.*?)\]", meaning)
    return RATINGS[found[1] if found else None]


def deal(meanings: list[str]) -> dict[str, str]:
    """Give each meaning representation to one split, so that no split shares one."""
    meanings = sorted(set(meanings))
    random.Random(0).shuffle(meanings)
    total = sum(SIZES.values())
    owner, start = {}, 0
    for split, size in SIZES.items():
        stop = start + round(len(meanings) * size / total)
        owner |= dict.fromkeys(meanings[start:stop], split)
        start = stop
    return {meaning: owner.get(meaning, "test") for meaning in meanings}


def derive(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (sentence, label) pairs of each split."""
    rows = [row for name in SOURCES for row in read(source / name)]
    owner = deal([meaning for meaning, _ in rows])
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SIZES}
    # A sentence written for several meaning representations stays with the first.
    home: dict[str, str] = {}
    for meaning, sentence in rows:
        if sentence and home.setdefault(sentence, meaning) == meaning:
            splits[owner[meaning]].append((sentence, rating(meaning)))
    for split, pairs in splits.items():
        distinct = list(dict.fromkeys(pairs))
        random.Random(split).shuffle(distinct)
        splits[split] = distinct[: SIZES[split]]
    return splits


def main() -> None:
    """Write the splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the E2E files")
    parser.add_argument("target", type=Path, help="folder for the three splits")
    options = parser.parse_args()
    for split, pairs in derive(options.source).items():
        with (options.target / f"{split}.csv").open(
            "w", encoding="utf-8", newline=""
        ) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("sentence", "label"), *pairs])


if __name__ == "__main__":
    main()
