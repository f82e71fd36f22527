"""Options from a file, under the names that the flags have."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from sylva_train._checks import ConfigError

__all__ = ["read_options"]

READERS: dict[str, Callable[[str], Any]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".toml": tomllib.loads,
    ".json": json.loads,
}
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def read_options(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read options from a YAML, TOML or JSON file.

    Parameters
    ----------
    path : path
        The file: names of flags with ``-`` or ``_``, and their values; a list may stand
        where a flag has commas.
    kinds : mapping of str to type
        The flags, by their names with ``_``.

    Returns
    -------
    dict
        Values as the flags take them.

    Raises
    ------
    ConfigError
        If the file cannot be read, or has a key or a value that no flag takes; names
        file and key.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        msg = f"{path}: expected one of the suffixes {', '.join(READERS)}."
        raise ConfigError(msg)
    try:
        content = reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: the file cannot be read; {error.strerror or error}."
        raise ConfigError(msg) from error
    except (ValueError, yaml.YAMLError) as error:
        msg = f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        msg = f"{path}: expected names and values; got a {type(content).__name__}."
        raise ConfigError(msg)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            advice = f"; did you mean {near[0].replace('_', '-')!r}?" if near else "."
            msg = f"{path}: there is no option {str(key)!r}{advice}"
            raise ConfigError(msg)
        if name in values:
            msg = f"{path}: {key!r} stands twice."
            raise ConfigError(msg)
        values[name] = converted(path, key, value, kinds[name])
    return {name: value for name, value in values.items() if value is not None}


def converted(path: Path, key: str, value: Any, kind: Any) -> Any:
    """Return a value as its flag takes it.

    Raises
    ------
    ConfigError
        If it is of another type.
    """
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    wanted = next(option for option in options if option is not types.NoneType)
    if wanted is Path:
        wanted = str
    if wanted is float and isinstance(value, str):
        # YAML reads 1e-3 as a text.
        try:
            return float(value)
        except ValueError:
            pass
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) in {int, float}:
        return str(value)
    if wanted is str and isinstance(value, list) and all(map(is_word, value)):
        return ",".join(map(str, value))
    if wanted is str and isinstance(value, dict) and all(map(is_word, value.values())):
        return ",".join(f"{name}={part}" for name, part in value.items())
    if type(value) is not wanted:
        msg = f"{path}: {key!r} must be {NAMES[wanted]}; got {value!r}."
        raise ConfigError(msg)
    return value


def is_word(value: Any) -> bool:
    """Whether a value can be part of a list."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)
