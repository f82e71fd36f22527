"""Sections of the page that compare the methods: table, scores, curves, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

from . import figures, histories, page_parts
from .page_parts import Page, cells, pair, section, small
from .summary import BYTES, SECONDS, digits
from .tables import caption, suited, summary_columns

__all__ = ["costs", "curves", "scores", "table"]


def table(page: Page) -> str:
    """Return the summary table."""
    columns = summary_columns(page.results)
    heads = "".join(
        f'<th scope="col">{escape(column.heading[0])}{small(column.heading[1])}</th>'
        for column in columns
    )
    lines = []
    for place, row in enumerate(page.rows):
        badge = '<b class="badge">best rule</b>' if row.best else ""
        values = "".join(
            f"<td>{escape(column.cells[place])}"
            f"{small(column.minor.cells[place] if column.minor else '')}</td>"
            for column in columns[1:]
        )
        lines.append(
            f"<tr{' class=best' if row.best else ''}>"
            f'<th scope="row"><span>{page.named(row.method)}</span>{badge}</th>'
            f"{values}</tr>"
        )
    note = caption(page.results).replace("; ★ best scoring rule", "")
    note += (
        " Trained: weights of the body, the task's head aside. Step: one batch of "
        "training. Scoring is done once, before it."
    )
    return section(
        "The numbers",
        f"{page_parts.table('summary', heads, ''.join(lines))}"
        f'<p class="note">{escape(note)}</p>',
    )


def scores(page: Page) -> str:
    """Return the scores, and the paired differences to random blocks."""
    if not any(row.scores for row in page.rows):
        return ""
    marks, interval = "One seed a method.", ""
    if page.several:
        marks = (
            "A tick is one seed, the marker their mean, the bar one standard deviation "
            "to either side."
        )
        interval = (
            " The bar is Student's 95% interval of the mean, for each rule alone: where "
            "it crosses zero, chance could explain the difference."
        )
    beyond = ""
    if figures.stragglers(page.rows, page.metric):
        beyond = " An arrow: beyond the picture."
    levels = [row.label for row in page.rows if row.method in {"frozen", "full"}]
    dashed = f" Dashed: {' and '.join(levels)}." if levels else ""
    pictures = [
        page.picture(
            partial(figures.score_dots, page.rows, page.metric, page.looks),
            f"{page.metric.heading} of each method",
            f"{marks}{dashed}{beyond}",
        )
    ]
    if any(row.versus_random for row in page.rows):
        pictures.append(
            page.picture(
                partial(figures.differences, page.rows, page.metric, page.looks),
                "Does scoring beat random blocks?",
                "Each rule against random blocks trained with the same seed, hence the "
                f"same batches and the same head.{interval}",
            )
        )
    return section("Scores", pair(pictures))


def curves(page: Page) -> str:
    """Return loss and score by step: in one frame, or a frame a method if many."""
    factor = page.metric.factor
    loss = histories.learning_curves(page.results, "loss", page.rows)
    score = histories.learning_curves(page.results, "score", page.rows, factor)
    trained = {curve.method for curve in (*loss, *score)}
    if all(len(curve.steps) < 2 for curve in score):
        score = []  # scored at the end only, which the table says
    levels = {
        row.method: (row.label, factor * row.mean)
        for row in page.rows
        if row.method not in trained and row.mean is not None
    }
    unit = ", %" if page.metric.percent else ""
    kinds: list[tuple[list[histories.Curve], str, dict[str, tuple[str, float]]]] = [
        (loss, "Training loss by step", {}),
        (score, f"{page.metric.heading} by step{unit}", levels),
    ]
    kinds = [kind for kind in kinds if kind[0]]
    band = "Line: mean over seeds. Band: lowest to highest seed, cut off where it is far out."
    note = band if page.several else ""
    if len(trained) <= figures.OVERLAY:
        pictures = [
            page.picture(
                partial(histories.curve_panel, found, page.looks, flat), title, note
            )
            for found, title, flat in kinds
        ]
        return section("Learning curves", pair(pictures) if pictures else "")
    parts = [
        f"<h3>{escape(title)}</h3>{_small_multiples(page, found, title, flat)}"
        for found, title, flat in kinds
    ]
    note += " Grey: the other methods."
    if levels and score:
        names = " and ".join(label for label, _ in levels.values())
        note += f" Dashed: {names}, without training steps."
    return section(
        "Learning curves", f'{"".join(parts)}<p class="note">{escape(note)}</p>'
    )


def _small_multiples(
    page: Page,
    found: list[histories.Curve],
    title: str,
    levels: Mapping[str, tuple[str, float]],
) -> str:
    """Return a frame a method, the others in grey behind it."""
    level = next((value for _, value in levels.values()), None)
    pictures = []
    for curve in found:
        others = [other for other in found if other is not curve]
        look = page.looks[curve.method]
        draw = partial(histories.curve_cell, curve, others, look, level)
        label = f"{title}, {curve.label}"
        pictures.append(page.cell(draw, page.named(curve.method), label))
    return cells(pictures)


def costs(page: Page) -> str:
    """Return score against trained weights, and bars of time and memory."""
    ranges = {row.method: row.step_iqr for row in page.rows if row.step_iqr}
    steps = "Median over the steps"
    steps += "; the line spans the middle half of them." if ranges else "."
    largest = "The largest over the seeds." if page.several else ""
    before = "What choosing the blocks costs before training begins."
    pictures = [
        _trade_off(page),
        _bars(page, "Time of a training step", "step_seconds", SECONDS, steps, ranges),
        _bars(page, "Peak memory of training", "peak_memory", BYTES, largest),
        _bars(page, "Time of scoring, once", "score_seconds", SECONDS, before),
        _bars(page, "Peak memory of scoring", "score_memory", BYTES, largest),
    ]
    found = [picture for picture in pictures if picture]
    return section("Cost", pair(found, "flow") if found else "")


def _trade_off(page: Page) -> str:
    """Return score against trained weights; nothing without two points of it."""
    beyond = figures.stragglers(page.rows, page.metric)
    points, others = [], []
    for row in page.rows:
        if row.mean is None:
            continue
        if row.method == "frozen" or row in beyond:
            others.append(f"{row.label} ({page.metric.value(row.mean)})")
        elif row.trainable > 0:
            points.append(row)
    if len(points) < 2:
        return ""
    text = "Mean over seeds. " if page.several else ""
    text += "Logarithmic axis."
    if others:
        text += f" Not drawn: {', '.join(others)}."
    return page.picture(
        partial(figures.trade_off, points, page.metric, page.looks),
        f"{page.metric.heading} against trained weights",
        text,
    )


def _bars(
    page: Page,
    title: str,
    name: str,
    units: Sequence[tuple[float, str]],
    text: str,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Return bars of a field of the rows, in the unit that suits most of them, if any."""
    values = {row.method: getattr(row, name) for row in page.rows}
    there = {method: value for method, value in values.items() if value is not None}
    if not there:
        return ""
    size, unit = suited(there.values(), units)
    spans = {m: (low / size, high / size) for m, (low, high) in (ranges or {}).items()}
    scaled = {method: value / size for method, value in there.items()}
    draw = partial(figures.bars, page.rows, scaled, spans, unit, page.looks, digits)
    return page.picture(draw, title, text)
