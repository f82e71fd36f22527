"""``{measurements} NAME``: the figures of ``benchmarks/results/NAME.json`` as tables.

Pages show no number of a benchmark that is not read from its file when they are built.
Tables of more than `LONG` rows are folded away.
``{other-measurements}`` shows the files that no page names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
#: What belongs to the heading of a result rather than to its tables.
SETTING = ("device", "threads", "load", "versions", "commit", "date")
#: Rows of a table that a reader can still take in.
LONG = 40


def plain(value: Any) -> bool:
    """Whether a value fits a table cell."""
    if isinstance(value, Mapping):
        return "median" in value
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(v, int | float | str) for v in value)
    return True


def cell(value: Any) -> str:
    """Print a value; a timing as its median and quartiles."""
    if isinstance(value, Mapping):
        low, high = cell(value["q1"]), cell(value["q3"])
        return f"{cell(value['median'])} ({low}–\N{WORD JOINER}{high})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        # four digits, all of a whole part, in groups where there are more of these
        whole = isinstance(value, int) or abs(value) >= 1000
        groups = "," if abs(value) >= 10_000 else ""
        text = f"{value:{groups}.0f}" if whole else f"{value:.4g}"
        return text.replace("-", "\N{MINUS SIGN}")
    if isinstance(value, list):
        # a shape stays on one line, its sides without commas of their own
        return (",\N{NO-BREAK SPACE}" if len(value) == 2 else ", ").join(
            cell(v).replace(",", "") for v in value
        )
    # what is quoted is code, whose quotes stay straight
    text = re.sub(r'\S*"\S*', r"`\g<0>`", str(value))
    return text.replace("|", "\\|")


def words(name: str) -> str:
    """Turn a key into words."""
    return name.replace("_", " ")


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a row's cells; those of a group carry the group's name."""
    for name, value in row.items():
        if plain(value):
            yield f"{prefix}{words(name)}", value
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{words(name)}: ")


def spread(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each of a row's groups, where these measure the same things."""
    groups = {k: v for k, v in row.items() if isinstance(v, Mapping) and not plain(v)}
    if len(groups) > 1 and len({tuple(v) for v in groups.values()}) == 1:
        single = {k: v for k, v in row.items() if k not in groups}
        for name, group in groups.items():
            yield dict(flat({"": name} | single | group))
    else:
        yield dict(flat(row))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a pipe table, columns of numbers to the right."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    sides = (":---" if named(row.get(t) for row in rows) else "---:" for t in titles)
    if len(rows) > LONG:
        yield f":::{{dropdown}} All {len(rows)} rows"
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join(sides)} |"
    for row in rows:
        yield f"| {' | '.join(cell(row.get(title)) for title in titles)} |"
    if len(rows) > LONG:
        yield ":::"
    yield ""


def named(values: Iterable[Any]) -> bool:
    """Whether there are words among a column's values."""
    return any(isinstance(value, str | bool | list) for value in values)


def tables(name: str, value: Any) -> Iterator[str]:
    """Yield tables of what a result holds, whatever its benchmark made of it."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        if name:
            yield f"**{words(name)}**"
            yield ""
        yield from table([each for row in value for each in spread(row)])
        return
    if not isinstance(value, Mapping):
        return
    groups = {k: v for k, v in value.items() if not plain(v)}
    singles = {words(k): v for k, v in value.items() if plain(v)}
    same = [v.keys() for v in groups.values() if isinstance(v, Mapping)]
    if len(groups) > 1 and len(same) == len(groups) and all(s == same[0] for s in same):
        rows = [{"": k} | v for k, v in groups.items()]
        if not name:  # several quantities of the same things: a column each
            # Those of several columns last: rows need not have the same ones.
            names = sorted(
                groups, key=lambda n: not all(map(plain, groups[n].values()))
            )
            rows = [{"": k} | {n: groups[n][k] for n in names} for k in same[0]]
        yield from tables(name, rows)
        groups = {}
    if singles:
        what = ", ".join(f"{k}: {cell(v)}" for k, v in singles.items())
        yield f"{words(name)}: {what}." if name else f"{what}."
        yield ""
    for key, group in groups.items():
        yield from tables(f"{name}, {key}" if name else key, group)


def provenance(setting: Mapping[str, Any]) -> str:
    """Say on what, with what and when it was measured."""
    versions = ", ".join(f"{n} {v}" for n, v in setting.get("versions", {}).items())
    load = f" (load {setting['load']} when it began)" if "load" in setting else ""
    return (
        f"Device: {setting.get('device', 'not recorded')},"
        f" {setting.get('threads', '?')} threads{load}."
        f" Versions: {versions or 'not recorded'}."
        f" Date: {setting.get('date', 'not recorded')}."
        f" Commit: {setting.get('commit') or 'not recorded'}."
    )


def page(name: str) -> list[str]:
    """Return the Markdown of a result."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return [
            f"*Not measured yet: there is no file* `benchmarks/results/{name}.json`."
        ]
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("format", "").startswith("sylva-comparison/"):
        from sylva_train import markdown_table

        setup = results["setup"]
        command = f"`{setup['command']}`: " if setup.get("command") else ""
        what = (
            f"{command}{setup['model']} on {setup['data']},"
            f" {setup['train_examples']} training and {setup['eval_examples']}"
            f" evaluation examples, {setup['steps']} steps of {setup['batch_size']},"
            f" density {setup['density']:g}, blocks of {setup['block_size']},"
            f" seeds {cell(setup['seeds'])}."
        )
        return [*markdown_table(results).splitlines(), "", what, "", provenance(setup)]
    setting = results.pop("setting", results)
    rest = {k: v for k, v in results.items() if k not in SETTING}
    return [*tables("", rest), provenance(setting), ""]


class Measurements(SphinxDirective):
    """Tables of one result, or a line that says that there is none."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.measurements_shown = {  # type: ignore[attr-defined]
            *getattr(self.env, "measurements_shown", set()),
            name,
        }
        return self.parsed(page(name), name)

    def parsed(self, lines: list[str], name: str) -> list[nodes.Node]:
        """Parse Markdown, and rebuild the page when the result's file changes."""
        self.env.note_dependency(str(RESULTS / f"{name}.json"))
        holder = nodes.container(classes=["measurements"])
        self.state.nested_parse(StringList(lines, source=name), 0, holder)
        return [holder]


class OtherMeasurements(Measurements):
    """Tables of every result that no directive before this one named."""

    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        # Which files there are may change without a change of this page.
        self.env.note_reread()
        shown = getattr(self.env, "measurements_shown", set())
        found: list[nodes.Node] = []
        for path in sorted(RESULTS.glob("*.json")):
            if path.stem not in shown:
                title = nodes.rubric(text=path.stem)
                found += [title, *self.parsed(page(path.stem), path.stem)]
        return found or [nodes.paragraph(text="None.")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("measurements", Measurements)
    app.add_directive("other-measurements", OtherMeasurements)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
