"""The command line's frame: how functions become commands, and what holds them."""

from __future__ import annotations

import inspect
import io
import shlex
import sys
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Annotated

import typer

from .errors import Commands
from .options import expand

__all__ = ["app", "command", "main", "typed"]

app = typer.Typer(
    cls=Commands,
    help="Fine-tune only the most important blocks of a pretrained model, embedded in its"
    " dense weights.\n\nBegin with [bold]sylva demo[/bold]. Exit codes: 0 done, 1 failed,"
    " 2 options to change, 130 interrupted.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


def help_text(function: Callable[..., None]) -> str:
    """Return a docstring as Typer prints it: paragraphs joined, examples line by line."""
    text = inspect.cleandoc(function.__doc__ or "").replace("[", "\\[")
    text, _, examples = text.partition("Examples\n--------\n")
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return "\n\n".join([*paragraphs, f"[bold]Examples[/bold]\n{examples.rstrip()}"])


def command(
    *, omit: Collection[str] = (), shared: bool = False, **arguments: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command; ``arguments`` are the help of its arguments.

    Several processes may run one that is ``shared``, together.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        expanded = expand(function, omit=omit, shared=shared, arguments=arguments)
        name = function.__name__.removesuffix("_command")
        app.command(name, help=help_text(function))(expanded)
        return function

    return register


def show_version(value: bool) -> None:
    """Print the version and end."""
    if value:
        typer.echo(f"sylva-train {version('sylva-train')}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version.", is_eager=True, callback=show_version
        ),
    ] = False,
) -> None:
    """Hold the options of `sylva` itself."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Not every encoding has what tables are drawn with.
            stream.reconfigure(errors="replace")
    app(prog_name="sylva")


def typed() -> str:
    """Return the command as it was typed, but for `--resume` and `--overwrite`."""
    again = [a for a in sys.argv[1:] if a not in {"--resume", "--overwrite"}]
    return shlex.join(["sylva", *again])
