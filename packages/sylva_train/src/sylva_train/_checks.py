"""Exceptions and argument checks: the wording every module shares."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NonFiniteError",
    "OutputExistsError",
    "SylvaError",
    "TargetError",
    "check_choice",
    "check_columns",
    "check_density",
    "check_integer",
    "check_positive",
    "check_spread",
    "check_texts",
]


class SylvaError(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigError(SylvaError, ValueError):
    """An option has a value that cannot be used."""


class TargetError(SylvaError, ValueError):
    """The model has no layer, or not the layer, that was asked for."""


class DataError(SylvaError, ValueError):
    """A data file or a row of it cannot be used; the message has ``file:line``."""


class ModelError(SylvaError, OSError):
    """A pretrained model or its tokenizer cannot be found, reached or read."""


class NonFiniteError(SylvaError, ArithmeticError):
    """A loss, gradient or activation is NaN or infinite."""


class AdapterError(SylvaError, ValueError):
    """An adapter file is damaged, or belongs to another base model."""


class OutputExistsError(SylvaError, FileExistsError):
    """The output path exists and overwriting was not asked for."""


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}."
        raise ConfigError(msg)


def check_density(density: float) -> None:
    """Raise `ConfigError` unless ``0 < density <= 1`` (sparsity in ``[0, 1)``)."""
    if not (isinstance(density, int | float) and 0 < density <= 1):
        msg = (
            "`density` (1 - sparsity), the fraction of weights to train, must be above 0 "
            f"and at most 1, so that sparsity is in [0, 1); got {density!r}."
        )
        raise ConfigError(msg)


def check_columns(max_columns: float, density: float) -> None:
    """Raise `ConfigError` unless ``density <= max_columns <= 1``."""
    if not (isinstance(max_columns, int | float) and density <= max_columns <= 1):
        msg = (
            "`max_columns`, the fraction of a layer's block columns that may have blocks,"
            f" must be at least `density` ({density}), and at most 1; got {max_columns!r}."
        )
        raise ConfigError(msg)


def check_spread(spread: float | None) -> None:
    """Raise `ConfigError` unless ``spread`` is None, 0, or finite and at least 1."""
    if spread is None:
        return
    good = isinstance(spread, int | float)
    if not (good and (spread == 0 or 1 <= spread < math.inf)):
        msg = (
            "`spread`, how many times its share of the blocks a row or column may have,"
            " must be a finite number of at least 1, 0 for no limit, or None for what"
            f" suits the rule; got {spread!r}."
        )
        raise ConfigError(msg)


def check_integer(name: str, value: int, minimum: int) -> None:
    """Raise `ConfigError` unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        msg = f"`{name}` must be an integer of at least {minimum}; got {value!r}."
        raise ConfigError(msg)
    if value >= 2**63:
        msg = f"`{name}` must be below 2**63; got {value}."
        raise ConfigError(msg)


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise `ConfigError` unless ``value`` is finite and positive (or zero)."""
    good = isinstance(value, int | float) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        kind = "a finite number of at least 0" if zero else "a finite number above 0"
        msg = f"`{name}` must be {kind}; got {value!r}."
        raise ConfigError(msg)


def check_texts(texts: Sequence[object]) -> None:
    """Raise `DataError` unless all are strings, or all pairs of strings."""
    for number, text in enumerate(texts):
        # A list would do for the words of one text, as a tokenizer takes it.
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        is_text = all(isinstance(part, str) for part in parts)
        if not is_text or isinstance(text, str) != isinstance(texts[0], str):
            msg = (
                "`texts` must be strings, or all of them pairs (tuples) of strings;"
                f" number {number} is {reprlib.repr(text)}."
            )
            raise DataError(msg)
