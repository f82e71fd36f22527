"""The comparison as one HTML file that needs neither network nor script."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from sylva_train._files import write_text

from . import layers, methods
from .headline import Headline, headline
from .page_parts import Page, facts, section
from .page_style import CSS
from .style import css_colours
from .summary import Results, finite

__all__ = ["document", "write_report"]


def write_report(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write a comparison as one self-contained HTML page.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`. What is missing from them (masks, scores, factor,
        histories, all seeds but one) is missing from the page.
    path : path-like
        The file; replaced if it exists, and only by a whole page.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    page, found = Page(results), headline(results)
    sections = [
        methods.table(page),
        methods.scores(page),
        methods.curves(page),
        methods.costs(page),
        layers.chosen_blocks(page),
        layers.block_scores(page),
        layers.factor(page),
        _setup(page),
    ]
    names = [page.setup.get(key) for key in ("model", "data")]
    subject = " · ".join(str(name) for name in names if name)
    write_text(path, document("Sylva comparison", subject, found, sections))
    return Path(path)


def document(kind: str, subject: str, found: Headline, sections: Iterable[str]) -> str:
    """Return a page: what of, the headline with its figures, and sections."""
    tiles = "".join(
        f"<div><dt>{escape(words)}</dt><dd>{escape(number)}</dd></div>"
        for number, words in found.figures
    )
    return _DOCUMENT.format(
        title=escape(f"{kind}: {subject}" if subject else kind),
        light=css_colours(dark=False),
        dark=css_colours(dark=True),
        css=CSS,
        kind=escape(kind),
        subject=escape(subject),
        headline=escape(found.title),
        tiles=f'<dl class="tiles">{tiles}</dl>' if tiles else "",
        sentences="".join(f"<p>{escape(text)}</p>" for text in found.sentences),
        sections="\n".join(filter(None, sections)),
    )


def _setup(page: Page) -> str:
    setup = dict(page.setup)
    versions: Mapping[str, Any] = setup.pop("versions", None) or {}
    command = setup.pop("command", None)
    if setup.get("date"):
        setup["date"] = str(setup["date"]).replace("T", " ")
    basic = [(key.replace("_", " "), _plain(value)) for key, value in setup.items()]
    wide = [
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("learning rate", _rates(page)),
    ]
    measures = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>"
        for term, text in _measures(page).items()
    )
    return section(
        "Setup",
        f"{facts(basic)}{facts(wide, 'facts wide')}{_command(command)}"
        "<h3>How each number was measured</h3>"
        f'<dl class="measures">{measures}</dl>',
    )


def _command(command: str | None) -> str:
    """Return the command, each option on the line of its name."""
    if not command:
        return ""
    options = re.split(r" (?=--)", command)
    words = " ".join(f"<span>{escape(option)}</span>" for option in options)
    words = words.replace(",", ",<wbr>")
    return f'<dl class="facts wide"><div><dt>command</dt><dd>{words}</dd></div></dl>'


def _rates(page: Page) -> str:
    """Return the learning rate of most methods, and of those that have another one."""
    labels: dict[str, list[str]] = {}
    for row in page.rows:
        rates = {
            f"{run['lr']:g}"
            for run in page.results["runs"]
            if run["method"] == row.method and finite(run.get("lr"))
        }
        if rates and row.step_seconds is not None:
            labels.setdefault(", ".join(sorted(rates)), []).append(row.label)
    if not labels:
        return ""
    usual = max(labels, key=lambda rate: len(labels[rate]))
    others = [
        f"{label} {rate}" for rate in labels if rate != usual for label in labels[rate]
    ]
    return "; ".join([usual, *others])


def _measures(page: Page) -> dict[str, str]:
    """Say what each column of the table is, and what it leaves out."""
    count = page.setup.get("eval_examples")
    best = next((row for row in page.rows if row.best), page.rows[0])
    examples = f"{count} held-out examples" if count else "the held-out examples"
    text = (
        f"Of the model after its last step, on {examples}, the same for every method."
    )
    if page.several:
        text += (
            " The spread is over seeds, which set the head, the order of the data, random "
            "blocks and, where examples are limited or a tenth is held out, which ones."
        )
    if page.metric.name == "accuracy" and count and best.mean is not None:
        error = 100 * (best.mean * (1 - best.mean) / count) ** 0.5
        text += (
            f" One example is {100 / count:.2f} points, and the standard error of an "
            f"accuracy from so many examples is {error:.1f} points."
        )
    return {
        page.metric.words: text,
        "trained": "Weights of the body that the optimizer may change, and their share "
        "of all weights of the model. The task's head is trained beside them by every "
        "method.",
        "step": "Wall-clock time of forward, backward and optimizer for one batch: the "
        "median over the steps of a run, then over seeds.",
        "scoring": "Wall-clock time to score and to choose the blocks, once a run; the "
        "median over seeds.",
        "memory": "The highest in the run's own process while it trains and, apart from "
        "that, while it scores: resident memory on a CPU, libraries and data included; "
        "allocated memory on a GPU.",
        "adapter": "Bytes on disk of what the method saves.",
    }


def _plain(value: object) -> str:
    """Print a setup entry."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return "" if value is None else str(value)


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root{{{light}}}
@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}
image{{filter:invert(1) hue-rotate(180deg)}}}}
{css}</style>
</head>
<body>
<main>
<header>
<p class="subject">{kind}<span>{subject}</span></p>
<h1>{headline}</h1>
{tiles}
<div class="sentences">{sentences}</div>
</header>
{sections}
</main>
</body>
</html>
"""
