"""What a failing command says, and its exit code."""

from __future__ import annotations

import functools
import re
import shlex
import traceback
import warnings
from typing import Any

import typer
import typer.core
from rich.console import Console

from sylva_train._checks import ConfigError, OutputExistsError, SylvaError, TargetError

__all__ = ["Commands", "fail"]

#: The command or its options must change; everything else is 1.
USAGE = (ConfigError, OutputExistsError, TargetError)
INTERRUPTED = 130
#: How Typer itself ends a command: exits, and errors of usage, which it prints.
OWN: tuple[type[Exception], ...] = (
    typer.Exit,
    typer.Abort,
    next(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    ),
)
ARGUMENTS = "sylva.arguments"


def tell(kind: str, message: str, style: str) -> None:
    """Print one line on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    line = " ".join(message.split())
    console.print(f"{kind}: {line}", style=style, markup=False)


def fail(message: str) -> None:
    """Print one red line on stderr."""
    tell("Error", message, "red")


def warn(
    told: set[str],
    message: Warning | str,
    category: type[Warning],
    *_: object,
    **__: object,
) -> None:
    """Print a warning as a line, without the source that it came from, if it was not told.

    What is looked at before anything takes time is warned of again where it counts. Not what
    libraries tell developers, such as that a function of theirs will go.
    """
    if issubclass(category, UserWarning) and str(message) not in told:
        told.add(str(message))
        tell("Warning", str(message), "yellow")


class Commands(typer.core.TyperGroup):
    """The commands, with one way to fail: a line that says why, and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the arguments, to say how to go on after an interruption."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        arguments: list[str] = ctx.meta[ARGUMENTS]
        try:
            with warnings.catch_warnings():
                warnings.showwarning = functools.partial(warn, set())
                return super().invoke(ctx)
        except KeyboardInterrupt:
            fail(interruption(arguments, self.flags(arguments)))
            raise typer.Exit(INTERRUPTED) from None
        except OWN:
            raise
        except Exception as error:  # noqa: BLE001 told in a line; `--debug` shows all of it
            if "--debug" in arguments:
                traceback.print_exc()
            # What was typed is no option's name: a folder may be called "model".
            fail(spoken(error, self.flags(arguments).difference(arguments)))
            raise typer.Exit(2 if isinstance(error, USAGE) else 1) from None

    def flags(self, arguments: list[str]) -> set[str]:
        """Return the options of the command that was called, by their names with ``_``."""
        command: Any = self.commands.get(arguments[0]) if arguments else None
        if command is None:
            return set()
        return {p.name for p in command.params if p.param_type_name == "option"}


def spoken(error: Exception, flags: set[str]) -> str:
    """Return an error's message, with options called by their flags."""
    # By its name: PyTorch is not imported to tell that something else failed.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU's memory is exhausted. Lower --batch-size (and raise --accumulate),"
            " --max-length or --density, or use --device cpu."
        )
    message = str(error) or type(error).__name__
    # What safetensors raises is about a file too: a full disk above all.
    written = type(error).__name__ == "SafetensorError"
    if not written and not isinstance(error, SylvaError | OSError):
        return (
            f"{type(error).__name__}: {message}. This was not foreseen; `--debug` shows"
            " where it arose."
        )

    def named(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in flags:
            return match[0]
        return f"`--{name.replace('_', '-')}{f' {value}' if value else ''}`"

    # `name`, and `name="value"` as Python has it.
    return re.sub(r'`([a-z_]+)(?:="([^"`]+)")?`', named, message)


def interruption(arguments: list[str], flags: set[str]) -> str:
    """Return what to do after Ctrl-C."""
    if "resume" not in flags:
        return "interrupted; nothing was written."
    again = [a for a in arguments if a != "--overwrite"]
    again += [] if "--resume" in again else ["--resume"]
    return f"interrupted. Go on with: sylva {shlex.join(again)}"
