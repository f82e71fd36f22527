"""Models and tasks of a table, out of configuration files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError
from sylva_train.comparison import LEARNING_RATES, Comparison
from sylva_train.config_files import READERS, load_config, load_rates

from .quality import Table

__all__ = ["load_settings", "with_values"]


def load_setting(
    name_or_path: str | Path, *, seeds: Sequence[int] = (0, 1, 2), **changes: Any
) -> Comparison:
    """Read model, task, options and learning rates of a table's line.

    Parameters
    ----------
    name_or_path : str or Path
        As `sylva_train.load_config` takes it. A section ``learning_rates`` has peak rates
        by method; those that it leaves out are the training's ``lr`` for Sylva, and for
        others as much more or less as they are for MiniLM (`LEARNING_RATES`).
    seeds : sequence of int
        Of the runs.
    **changes
        Fields of task or training to change where they are not None.

    Raises
    ------
    ConfigError
        If the configuration cannot be used.
    """
    parts: list[Any] = list(load_config(name_or_path))
    for name, value in changes.items():
        if value is None:
            continue
        for number, part in enumerate(parts):
            if hasattr(part, name):
                parts[number] = dataclasses.replace(part, **{name: value})
    task, sylva, training = parts
    ratio = training.lr / LEARNING_RATES["sylva"]
    guessed = {method: ratio * rate for method, rate in LEARNING_RATES.items()}
    return Comparison(
        task=task,
        sylva=sylva,
        training=training,
        methods=("full",),
        seeds=tuple(seeds),
        learning_rates=guessed | load_rates(name_or_path),
    )


def load_settings(names: Sequence[str], **options: Any) -> dict[str, Comparison]:
    """Read several, each under its name without folder and suffix.

    Raises
    ------
    ConfigError
        If one cannot be used, or two have one name.
    """
    found: dict[str, Comparison] = {}
    for name in names:
        short = Path(name).stem if Path(name).suffix in READERS else name
        if short in found:
            msg = f"`configs` must have different names; {short!r} stands twice."
            raise ConfigError(msg)
        found[short] = load_setting(name, **options)
    return found


def with_values(table: Table, values: Sequence[str]) -> Table:
    """Return a table with other values of its option, read from text.

    Raises
    ------
    ConfigError
        If the table has no option, or a value is not of its type.
    """
    if table.option is None:
        msg = f"`values` are of an option, and {table.name} varies none."
        raise ConfigError(msg)
    kind = type(table.values[0])
    try:
        read = dict.fromkeys(kind(text) for text in values)  # none counts twice
        return dataclasses.replace(table, values=tuple(read))
    except ValueError:
        msg = f"`values` of {table.option!r} must be {kind.__name__}s; got {values!r}."
        raise ConfigError(msg) from None
