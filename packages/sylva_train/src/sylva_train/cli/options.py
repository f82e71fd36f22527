"""Options that become the fields of configurations.

A parameter of a command whose annotation is `TaskConfig`, `SylvaOptions`,
`TrainingConfig` or a class of changes stands for the flags of that class (`expand`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

import typer

from sylva_train._checks import ConfigError
from sylva_train.config_files import alternatives, fields_of
from sylva_train.options import SylvaOptions, TaskConfig, TrainingConfig

from .files import read_options
from .flags import FLAGS, annotated
from .processes import check_alone

__all__ = [
    "EvaluationChanges",
    "RowChanges",
    "expand",
    "given",
    "numbers",
    "rates",
    "words",
]

_NONE = inspect.Parameter.empty
Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChanges:
    """Options of a fine-tuning's task that other rows may need; None: as it was."""

    text_column: str | int | list[str | int] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None

    def given(self) -> dict[str, Any]:
        """Return those that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationChanges(RowChanges):
    """The same where the rows have labels or targets."""

    label_column: str | int | None = None
    target_column: str | int | None = None
    eval_limit: int | None = None
    metric: str | None = None
    meteor: bool | None = None


#: Classes that may come from a file of options.
FILED: tuple[type, ...] = (TaskConfig, SylvaOptions, TrainingConfig)
CONFIGS = (*FILED, RowChanges, EvaluationChanges)
#: Parameters of commands that write what several processes must not.
WRITTEN = {"output", "answers", "out"}


def flags_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """Return type and default of a configuration's flags, in the order of the help.

    What a flag does not take as it is, columns and names of modules, it takes as text.
    """
    hints = fields_of(kind)
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(kind):
        options = set(alternatives(hints[field.name])) - {types.NoneType}
        plain = options.pop() if options in ({int}, {float}, {bool}) else str
        optional = plain | None if field.default is None else plain
        found[field.name] = optional, field.default
    if kind is SylvaOptions:
        found["sparsity"] = float | None, None
    return {name: found[name] for name in FLAGS if name in found}


def words(text: str | None) -> list[str] | None:
    """Split at commas."""
    if text is None:
        return None
    return [part.strip() for part in text.split(",") if part.strip()]


def modules(text: str | None) -> list[str] | str | None:
    """Read names of modules, or leave a pattern whole, which may have commas in it."""
    if text is None or text == "all-linear" or re.search(r"[^\w.,\s-]", text):
        return text
    return words(text)


def numbers(
    name: str, text: str | None, kind: type[Number] = int
) -> tuple[Number, ...]:
    """Read numbers of a kind, integers or floats, with commas between them."""
    try:
        return tuple(kind(part) for part in words(text) or ())
    except ValueError:
        what = "integers" if kind is int else "numbers"
        msg = f"`{name}` must be {what} with commas between them; got {text!r}."
        raise ConfigError(msg) from None


def rates(name: str, text: str | None) -> dict[str, float]:
    """Read ``name=number`` pairs with commas between them."""
    found = {}
    for part in words(text) or ():
        method, _, value = part.partition("=")
        try:
            found[method.strip()] = float(value)
        except ValueError:
            msg = f"`{name}` must be like full=2e-4,lora=1e-3; got {part!r}."
            raise ConfigError(msg) from None
    return found


def column(text: str | None) -> str | int | None:
    """Read a column's name or number."""
    return int(text) if text is not None and text.isdigit() else text


def columns(text: str | None) -> str | int | list[str | int | None] | None:
    """Read a column, or two with a comma between them."""
    parts = [column(part) for part in words(text) or ()]
    return parts if len(parts) > 1 else column(text)


#: How flags are read that become something else than the text, by name.
READ: dict[str, Callable[[str | None], Any]] = {
    "target_modules": modules, "exclude_modules": modules, "modules_to_save": words,
    "text_column": columns, "label_column": column, "target_column": column,
}  # fmt: skip


def density(values: dict[str, Any], source: Callable[[str], int]) -> float:
    """Return the density, which may be given as sparsity.

    Parameters
    ----------
    values : dict
        The flags.
    source : callable
        How strongly a flag was given: 0 its default, 1 in a file, 2 on the command line.

    Raises
    ------
    ConfigError
        If both are given in the same place.
    """
    sparsity = values.get("sparsity")
    if sparsity is None or source("density") > source("sparsity"):
        return float(values["density"])
    if source("density") == source("sparsity"):
        msg = (
            "`density` and `sparsity` must not both be given: density is 1 - sparsity."
        )
        raise ConfigError(msg)
    if not 0 <= sparsity < 1:
        msg = f"`sparsity` must be at least 0 and below 1; got {sparsity!r}."
        raise ConfigError(msg)
    # 1 - 0.9 is 0.09999999999999998.
    return float(round(1 - sparsity, 12))


def build(kind: type, values: dict[str, Any], source: Callable[[str], int]) -> Any:
    """Make a configuration of the flags' values."""
    fields = {name: values[name] for name in flags_of(kind) if name in values}
    if kind is SylvaOptions:
        fields["density"] = density(values, source)
        fields.pop("sparsity", None)
    for name in fields.keys() & READ.keys():
        fields[name] = READ[name](fields[name])
    return kind(**fields)


def given(config: Any) -> list[str]:
    """Return a configuration's options that are not the defaults, as they are typed."""
    found = []
    for name, (_, default) in flags_of(type(config)).items():
        value = getattr(config, name, None)
        if value not in (None, default):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return found


def all_flags(
    signature: inspect.Signature,
    configs: Mapping[str, type],
    omit: Collection[str],
    arguments: Collection[str],
) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each flag of a command, in the order of the help."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind in configs.values():
        found |= {n: flag for n, flag in flags_of(kind).items() if n not in omit}
    for name, parameter in signature.parameters.items():
        if name not in configs and name not in arguments:
            found[name] = parameter.annotation, parameter.default
    if set(FILED) & set(configs.values()):
        found["config_file"] = str | None, None
    found["debug"] = bool, False
    return {name: found[name] for name in FLAGS if name in found}


def expand(
    function: Callable[..., None],
    *,
    omit: Collection[str] = (),
    shared: bool = False,
    arguments: Mapping[str, str],
) -> Callable[..., None]:
    """Return a command whose flags make up the configurations that a function takes.

    Parameters
    ----------
    function : callable
        The command. Parameters annotated with a configuration class become its flags;
        others are options of `FLAGS`, or arguments.
    omit : collection of str
        Fields that are not flags.
    shared : bool
        Whether several processes may run it together.
    arguments : mapping of str to str
        Help of the parameters that are arguments.
    """
    signature = inspect.signature(function, eval_str=True)
    configs = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation in CONFIGS
    }
    parameters = []
    for name, text in arguments.items():
        own = signature.parameters[name]
        argument = typer.Argument(help=text, metavar=name.upper())
        kind: Any = Annotated[own.annotation, argument]
        parameters.append(keyword(name, kind, own.default))
    flags = all_flags(signature, configs, omit, arguments)
    known = {n: k for n, (k, _) in flags.items() if n not in {"config_file", "debug"}}
    for name, (kind, default) in flags.items():
        extra: dict[str, Any] = {}
        if name == "config_file":
            extra = {"is_eager": True, "callback": reader(known)}
        parameters.append(keyword(name, annotated(name, kind, **extra), default))
    parameters.append(keyword("context", typer.Context))

    def command(*, context: typer.Context, **values: Any) -> None:
        if not shared and WRITTEN & values.keys():
            check_alone()

        def source(name: str) -> int:
            found = context.get_parameter_source(name)
            return {"COMMANDLINE": 2, "DEFAULT_MAP": 1}.get(
                getattr(found, "name", ""), 0
            )

        built = {name: build(kind, values, source) for name, kind in configs.items()}
        own = {
            n: values[n] for n in signature.parameters if n in values.keys() - configs
        }
        function(**own, **built)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # What Typer reads: the flags, where the function has configurations.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def keyword(name: str, annotation: Any, default: Any = _NONE) -> inspect.Parameter:
    """Return a parameter that is given by name."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def reader(kinds: Mapping[str, Any]) -> Callable[[typer.Context, str | None], Any]:
    """Return the callback of ``--config``: a file's values become the defaults."""

    def read(context: typer.Context, name: str | None) -> str | None:
        if name is not None:
            context.default_map = read_options(name, kinds)
        return name

    return read
