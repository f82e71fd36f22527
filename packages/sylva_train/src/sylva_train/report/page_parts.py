"""What the sections of the page share: its data, and pieces of HTML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from sylva_train.masks import LayerMask, Masks

from .style import Look, inline_svg, looks
from .summary import Metric, Results, Row, metric_of, summary_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "cells", "facts", "pair", "section", "small", "table"]


class Page:
    """Results, their summary, and one look a method; draws pictures.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.setup: Mapping[str, Any] = results.get("setup") or {}
        self.metric: Metric = metric_of(results)
        self.rows: list[Row] = summary_rows(results)
        self.looks: dict[str, Look] = looks(row.method for row in self.rows)
        self.labels = {row.method: row.label for row in self.rows}
        self.best: str | None = next((r.method for r in self.rows if r.best), None)
        self.several = any(len(row.seeds) > 1 for row in self.rows)
        self.masks = {
            method: Masks(
                {
                    name: LayerMask(mask["shape"], mask["block_size"], mask["indices"])
                    for name, mask in layers.items()
                }
            )
            for method, layers in self.by_method("masks").items()
        }
        self._names = (f"c{number}" for number in itertools.count())

    def by_method(self, key: str) -> dict[str, Mapping[str, Any]]:
        """Return an optional part of the results, in the order of the table."""
        found: Mapping[str, Any] = self.results.get(key) or {}
        return {r.method: found[r.method] for r in self.rows if found.get(r.method)}

    def named(self, method: str) -> str:
        """Return the method's label after a dot in its colour."""
        look, label = self.looks[method], escape(self.labels[method])
        kind = " hollow" if look.hollow else ""
        return f'<i class="swatch{kind}" style="--c:var(--{look.name})"></i>{label}'

    def picture(self, draw: Callable[[], Figure], title: str, text: str = "") -> str:
        """Return a picture under its title and over its caption, both plain text."""
        caption = f"<figcaption>{escape(text)}</figcaption>" if text else ""
        image = inline_svg(draw, next(self._names), title)
        return f"<figure><h3>{escape(title)}</h3>{image}{caption}</figure>"

    def cell(self, draw: Callable[[], Figure], title: str, label: str) -> str:
        """Return a small picture, its title HTML and its label plain text."""
        image = inline_svg(draw, next(self._names), label)
        return f'<figure><figcaption class="name">{title}</figcaption>{image}</figure>'


def section(title: str, body: str) -> str:
    """Return a section; nothing if it has no content."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def pair(pictures: Iterable[str], kind: str = "pair") -> str:
    """Lay pictures out side by side where there is room."""
    return f'<div class="{kind}">{"".join(pictures)}</div>'


def cells(pictures: list[str]) -> str:
    """Lay small pictures out in as many columns as leave the fewest gaps."""
    count = len(pictures)
    columns = min((4, 5, 3), key=lambda n: -count % n) if count > 5 else max(count, 3)
    return f'<div class="cells" style="--n:{columns}">{"".join(pictures)}</div>'


def facts(pairs: Iterable[tuple[str, object]], kind: str = "facts") -> str:
    """Lay out names and values; those without a value are left out."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{breakable(str(value))}</dd></div>"
        for name, value in pairs
        if value not in (None, "")
    )
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def table(kind: str, heads: str, lines: str) -> str:
    """Lay out a table, cells and rows of HTML, that scrolls where it is too wide."""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def breakable(text: str) -> str:
    """Return text whose dotted names may break behind their dots."""
    return re.sub(r"(?<=[a-z\d]\.)(?=[a-z]|\d+\.[a-z])", "<wbr>", escape(text))


def small(text: str) -> str:
    """Return a second line."""
    return f"<small>{escape(text)}</small>" if text else ""
