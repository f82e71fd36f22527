"""Tables and figures of the paper on the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError
from sylva_train.progress import Progress
from sylva_train.reproduce import (
    MEASUREMENTS,
    TABLES,
    load_settings,
    measure,
    reproduce,
    with_values,
)

from .comparing import row_text, show_event
from .show import show_table

__all__ = ["EXPERIMENTS", "check_unused", "make_measurement", "make_table"]

#: Everything that can be made, the paper's order.
EXPERIMENTS = ("table2", "fig4", "fig5", *TABLES)


def make_measurement(name: str, output: Path, *, quiet: bool, **options: Any) -> None:
    """Measure with progress on stderr, and show the table."""
    with Progress(enabled=not quiet) as bars:
        watch = partial(show_event, bars, text=lambda _: "measured")
        measure(name, output, watch=watch, **options)
    show_table(output)


def make_table(
    name: str,
    output: Path,
    *,
    configs: Sequence[str],
    values: Sequence[str] | None,
    methods: Sequence[str] | None,
    changes: dict[str, Any],
    quiet: bool,
    **options: Any,
) -> None:
    """Run a table with progress on stderr, and show it."""
    table = TABLES[name]
    if values is not None:
        table = with_values(table, values)
    if methods is not None:
        table = dataclasses.replace(table, methods=tuple(methods))
    settings = load_settings(configs, **changes)
    with Progress(enabled=not quiet) as bars:
        watch = partial(show_event, bars, text=row_text)
        reproduce(table, settings, output, watch=watch, **options)
    show_table(output)


def check_unused(
    experiment: str, options: Mapping[str, Any], command: Callable[..., None]
) -> None:
    """Raise `ConfigError` if one of the options that it does not take is given."""
    known = inspect.signature(command).parameters
    given = [name for name, value in options.items() if value != known[name].default]
    if given:
        takes = "only a `scale`" if experiment in MEASUREMENTS else "no scale"
        msg = (
            f"`{given[0]}` is not for {experiment}, which takes {takes}; leave it out."
        )
        raise ConfigError(msg)
