"""``{command-help}``: what ``sylva`` and each of its commands print for ``--help``."""

from __future__ import annotations

import importlib.util
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def commands() -> list[tuple[str, str]]:
    """Return each command and its help, as plain text of 88 columns."""
    import typer
    from typer.testing import CliRunner

    from sylva_train import cli

    runner = CliRunner()
    group: Any = typer.main.get_command(cli.app)
    found = []
    environment = {"TERMINAL_WIDTH": "88", "COLUMNS": "88", "NO_COLOR": "1"}
    for names in [[], *([name] for name in group.commands)]:
        result = runner.invoke(cli.app, [*names, "--help"], env=environment)
        found.append((" ".join(["sylva", *names]), result.output))
    return found


class CommandHelp(SphinxDirective):
    """A section for each command with its help text."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        if importlib.util.find_spec("sylva_train.cli") is None:
            text = "This version has no command line."
            return [nodes.paragraph(text=text)]
        found: list[nodes.Node] = []
        for name, text in commands():
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text, text.strip(), language="text")
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
