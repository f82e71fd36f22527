"""``{command-options}``: each command of ``sylva`` with its options, from the program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def plain(text: str) -> str:
    """Take Rich's markup away, and keep what Markdown would read as its own."""
    text = re.sub(r"\[/?[a-z ]+\]", "", text)
    return re.sub(r"(?<!\w)(\.\w+)", r"`\1`", text).replace("|", "\\|")


def options(command: Any) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the groups of options, each a list of (option, default, meaning)."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        kind = "" if argument else f" {parameter.metavar or ''}".rstrip()
        names = (
            [parameter.metavar or parameter.name.upper()]
            if argument
            else parameter.opts
        )
        name = f"`{', '.join(names)}{kind}`".replace("|", "\\|")
        default = parameter.default
        shown = "" if default is None or default is False else f"`{default}`"
        if parameter.required:
            shown = "required"
        title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None)
        row = (name, shown.replace(",", ", "), plain(parameter.help or ""))
        groups.setdefault(title or "Options", []).append(row)
    yield from groups.items()


def page(command: Any) -> list[str]:
    """Return the Markdown of a command."""
    text, _, examples = (command.help or "").partition("[bold]Examples[/bold]")
    lines = [plain(text).strip(), ""]
    if examples.strip():
        commands = [line.strip() for line in examples.strip().splitlines()]
        lines += ["```", *commands, "```", ""]
    for title, rows in options(command):
        lines += [f"| {title} | default | |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    return [part for line in lines for part in line.splitlines() or [""]]


class CommandOptions(SphinxDirective):
    """A section for each command."""

    def run(self) -> list[nodes.Node]:
        import typer

        from sylva_train import cli

        self.env.note_reread()
        found: list[nodes.Node] = []
        group: Any = typer.main.get_command(cli.app)
        for name, command in group.commands.items():
            title = f"sylva {name}"
            section = nodes.section(ids=[nodes.make_id(title)], names=[title])
            section += nodes.title(text=title)
            lines = StringList(page(command), source=title)
            self.state.nested_parse(lines, 0, section)
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
