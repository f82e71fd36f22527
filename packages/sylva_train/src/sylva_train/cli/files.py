"""Options from a file, under the names that the flags have."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError
from sylva_train.config_files import (
    RATES,
    alternatives,
    check_sections,
    find_config,
    has_sections,
    kind_name,
    nearest,
    read_config_file,
)

__all__ = ["read_options"]


def read_options(name: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read options from a configuration or a YAML, TOML or JSON file.

    Parameters
    ----------
    name : str
        A configuration of the package, or a file: sections as `load_config` reads them,
        of which a command takes what it has flags for, or names of flags with ``-`` or
        ``_``, and their values; a list may stand where a flag has commas.
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
    content = read_config_file(find_config(name))
    if has_sections(content):
        content = flat(name, content, kinds)
    values = {}
    for key, value in content.items():
        option = str(key).replace("-", "_")
        if option not in kinds:
            near = nearest(option, [kind.replace("_", "-") for kind in kinds])
            msg = f"{name}: there is no option {str(key)!r}{near}"
            raise ConfigError(msg)
        if option in values:
            msg = f"{name}: {key!r} stands twice."
            raise ConfigError(msg)
        values[option] = converted(name, key, value, kinds[option])
    return {option: value for option, value in values.items() if value is not None}


def flat(
    name: str, content: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of all sections that a command has flags for.

    Raises
    ------
    ConfigError
        If sections give a flag different values, or one of them cannot be used.
    """
    found: dict[str, Any] = {}
    for section, fields in check_sections(name, content).items():
        for field, value in fields.items():
            if found.get(field, value) != value:
                msg = (
                    f"{name}: section {section!r}: {field!r} is {value!r}, and"
                    f" {found[field]!r} before it; a flag sets both."
                )
                raise ConfigError(msg)
            found[field] = value
    if content.get(RATES):
        found[RATES] = content[RATES]
    return {field: value for field, value in found.items() if field in kinds}


def converted(path: str, key: str, value: Any, kind: Any) -> Any:
    """Return a value as its flag takes it.

    Raises
    ------
    ConfigError
        If it is of another type.
    """
    options = alternatives(kind)
    if value is None and types.NoneType in options:
        return None
    wanted = next(option for option in options if option is not types.NoneType)
    if wanted is Path:
        wanted = str
    if wanted is float and type(value) in {int, str}:  # YAML reads 1e-3 as a text
        with contextlib.suppress(ValueError):
            return float(value)
    if wanted is str and type(value) in {int, float}:
        return str(value)
    if wanted is str and isinstance(value, list) and all(map(is_word, value)):
        return ",".join(map(str, value))
    if wanted is str and isinstance(value, dict) and all(map(is_word, value.values())):
        return ",".join(f"{name}={part}" for name, part in value.items())
    if type(value) is not wanted:
        msg = f"{path}: {key!r} must be {kind_name(wanted)}; got {value!r}."
        raise ConfigError(msg)
    return value


def is_word(value: Any) -> bool:
    """Whether a value can be part of a list."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)
