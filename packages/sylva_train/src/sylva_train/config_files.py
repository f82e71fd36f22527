"""Configuration files: task, selection and training of an experiment, in one file.

Those that come with the package are JSON files in its folder ``configs``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ._checks import ConfigError
from .options import SylvaOptions, TaskConfig, TrainingConfig

if TYPE_CHECKING:
    from .config import SylvaConfig

__all__ = [
    "RATES",
    "READERS",
    "alternatives",
    "check_sections",
    "config_names",
    "fields_of",
    "find_config",
    "has_sections",
    "kind_name",
    "load_config",
    "load_rates",
    "nearest",
    "read_config_file",
]

#: How a file is read, by its suffix.
READERS: dict[str, Callable[[str], Any]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".toml": tomllib.loads,
    ".json": json.loads,
}
#: The parts of a file, beside ``about``, a text that says what it is.
SECTIONS: dict[str, type] = {
    "task": TaskConfig,
    "sylva": SylvaOptions,
    "training": TrainingConfig,
}
ABOUT = "about"
#: A part with peak learning rates by method, where methods are compared.
RATES = "learning_rates"
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def config_names() -> list[str]:
    """Return the names of the configurations that come with the package.

    Examples
    --------
    >>> from sylva_train.config_files import config_names
    >>> [name for name in config_names() if not name.startswith("roberta")]
    ['gpt2-large-e2e', 'llama-3.2-3b-metamathqa', 'llama-7b-oasst1', 'llama-small-e2e', 'minilm-e2e-rating', 't5-large-natural-instructions']
    """
    return sorted(shipped())


def shipped() -> dict[str, Traversable]:
    """Return the package's files by their names."""
    entries = files("sylva_train").joinpath("configs").iterdir()
    return {
        entry.name.removesuffix(".json"): entry
        for entry in entries
        if entry.name.endswith(".json")
    }


def load_config(
    name_or_path: str | Path,
) -> tuple[TaskConfig, SylvaConfig, TrainingConfig]:
    """Read the configuration of an experiment.

    Parameters
    ----------
    name_or_path : str or Path
        One that comes with the package (``sylva configs`` lists them), or a ``.json``,
        ``.yaml`` or ``.toml`` file with sections ``task``, ``sylva`` and ``training``,
        each with fields of that class; what is left out is as by default. Where methods
        are compared it may have another one, ``learning_rates``, by method.

    Returns
    -------
    task, sylva, training : TaskConfig, SylvaConfig, TrainingConfig
        For `sylva_train.finetune`.

    Raises
    ------
    ConfigError
        If there is no such file, or a section, a field or a value that cannot be used;
        names file, section and field.

    Examples
    --------
    >>> import dataclasses
    >>> import sylva_train
    >>> task, config, training = sylva_train.load_config("roberta-large-stsb")
    >>> task.task, config.density, training.lr
    ('regression', 0.05, 0.0002)
    >>> task = dataclasses.replace(task, data="glue_data/STS-B")
    """
    from .config import SylvaConfig

    name = str(name_or_path)
    sections = check_sections(name, read_config_file(find_config(name_or_path)))
    found = []
    for section, kind in (SECTIONS | {"sylva": SylvaConfig}).items():
        try:
            found.append(kind(**sections[section]))
        except ConfigError as error:
            msg = f"{name}: section {section!r}: {error}"
            raise ConfigError(msg) from error
    task, sylva, training = found
    return task, sylva, training


def load_rates(name_or_path: str | Path) -> dict[str, float]:
    """Read the peak learning rates by method of a configuration that has some.

    Raises
    ------
    ConfigError
        As `load_config`.
    """
    content = read_config_file(find_config(name_or_path))
    check_sections(str(name_or_path), content)
    return {method: float(rate) for method, rate in content.get(RATES, {}).items()}


def find_config(name_or_path: str | Path) -> Path | Traversable:
    """Return the file of a configuration.

    Raises
    ------
    ConfigError
        If there is none.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    if path.suffix.lower() in READERS:
        msg = f"{path}: there is no such file."
        raise ConfigError(msg)
    msg = (
        f"`config` must be a file or the name of one that comes with the package; there is"
        f" no {str(name_or_path)!r}{nearest(str(name_or_path), sorted(known))} `sylva configs`"
        " lists them."
    )
    raise ConfigError(msg)


def read_config_file(source: Path | Traversable) -> dict[str, Any]:
    """Read names and values from a YAML, TOML or JSON file.

    Raises
    ------
    ConfigError
        If it cannot be read, or has something else in it.
    """
    suffix = Path(source.name).suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        msg = f"{source}: expected one of the suffixes {', '.join(READERS)}."
        raise ConfigError(msg)
    try:
        content = reader(source.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{source}: the file cannot be read; {error.strerror or error}."
        raise ConfigError(msg) from error
    except (ValueError, yaml.YAMLError) as error:
        msg = (
            f"{source}: not valid {suffix[1:].upper()}: {' '.join(str(error).split())}"
        )
        raise ConfigError(msg) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        msg = f"{source}: expected names and values; got a {type(content).__name__}."
        raise ConfigError(msg)
    return content


def has_sections(content: Mapping[str, Any]) -> bool:
    """Whether a file has sections; those of flags alone have none."""
    return ABOUT in content or any(
        isinstance(content.get(name), dict) for name in (*SECTIONS, RATES)
    )


def check_sections(name: str, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a file's sections, their fields known and of the right types.

    Raises
    ------
    ConfigError
        If one is not; names file, section and field.
    """
    for section, fields in content.items():
        if section not in {ABOUT, *SECTIONS, RATES}:
            near = nearest(section, (ABOUT, *SECTIONS, RATES))
            msg = f"{name}: there is no section {section!r}{near}"
            raise ConfigError(msg)
        wanted = str if section == ABOUT else dict
        if not isinstance(fields, wanted):
            kind = "a text" if wanted is str else "names and values"
            msg = f"{name}: section {section!r} must be {kind}; got {fields!r}."
            raise ConfigError(msg)
    for method, rate in content.get(RATES, {}).items():
        if not fits(rate, float):
            msg = (
                f"{name}: section {RATES!r}: {method!r} must be a number; got {rate!r}."
            )
            raise ConfigError(msg)
    sections = {section: dict(content.get(section, {})) for section in SECTIONS}
    for section, fields in sections.items():
        known = fields_of(SECTIONS[section])
        for field, value in fields.items():
            if field not in known:
                near = nearest(field, known)
                msg = f"{name}: section {section!r} has no field {field!r}{near}"
                raise ConfigError(msg)
            if not fits(value, known[field]):
                msg = (
                    f"{name}: section {section!r}: {field!r} must be"
                    f" {kind_name(known[field])}; got {value!r}."
                )
                raise ConfigError(msg)
    return sections


def fields_of(kind: type) -> dict[str, Any]:
    """Return the fields that a file may set, with their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a file is of a field's type."""
    for option in alternatives(kind):
        if typing.get_origin(option) is list:
            (inner,) = typing.get_args(option)
            if isinstance(value, list) and all(fits(part, inner) for part in value):
                return True
        elif type(value) is option or (option is float and type(value) is int):
            return True
    return False


def kind_name(kind: Any) -> str:
    """Return what a field's type is called."""
    names = []
    for option in alternatives(kind):
        if typing.get_origin(option) is list:
            names.append("a list")
        elif option is types.NoneType:
            names.append("null")
        else:
            names.append(KINDS[option])
    return " or ".join(names)


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a message: the known name that is meant, or all if none is like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}."
    )
