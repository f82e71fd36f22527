"""Options that commands share: each is written once, and becomes a field of a config.

A parameter of a command whose annotation is `TaskConfig`, `SylvaConfig` or
`TrainingConfig` stands for the flags of that class (`expand`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sylva_train._checks import ConfigError
from sylva_train.baselines import METHODS
from sylva_train.config import (
    CURVATURES,
    IMPORTANCES,
    SCHEDULES,
    SylvaConfig,
    TaskConfig,
    TrainingConfig,
)
from sylva_train.evaluation import METRICS

from .files import read_options

__all__ = ["FLAGS", "Flag", "column", "expand", "numbers", "rates", "words"]

PANELS = (
    "Task", "Comparison", "What to train", "Scoring", "Training", "Seed and device",
    "Output",
)  # fmt: skip
TASK, COMPARISON, PARTS, SCORING, TRAINING, RUN, OUTPUT = PANELS
_NONE = inspect.Parameter.empty


@dataclass(frozen=True)
class Flag:
    """A command-line option.

    Parameters
    ----------
    kind : type
        Of its value, where it is a field of a configuration.
    panel : str
        Group in the help.
    help : str
        What it is: unit and choices; the default is printed after it.
    names : tuple of str
        Its names, where they do not follow from the parameter's.
    metavar : str
        Stands for the value.
    """

    kind: Any
    panel: str
    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None

    def annotate(self, kind: Any = None, **extra: Any) -> Any:
        """Return the annotation of a parameter."""
        option = typer.Option(
            *self.names,
            help=self.help,
            rich_help_panel=self.panel,
            metavar=self.metavar,
            **extra,
        )
        return Annotated[self.kind if kind is None else kind, option]


def flag(kind: Any, panel: str, help: str, *names: str, metavar: str = "") -> Flag:
    """Write down an option."""
    return Flag(kind, panel, help, names, metavar or None)


def either(choices: Collection[str]) -> str:
    """List choices."""
    return ", ".join(choices)


#: Fields of the configurations, and options that several commands have.
FLAGS: dict[str, Flag] = {
    "model": flag(
        str, TASK, "minilm, a folder, or a name on the hub.", metavar="NAME|DIR"
    ),
    "task": flag(str, TASK, "classification, causal-lm or seq2seq.", metavar="TASK"),
    "data": flag(
        str,
        TASK,
        "A built-in task (e2e-rating), a .csv, .tsv, .jsonl or .parquet file, a folder"
        " with a file a split, or a name for `datasets`.",
        metavar="DATA",
    ),
    "eval_data": flag(
        str | None,
        TASK,
        "The same to evaluate on; without it a split of the data, or a tenth of one file.",
        metavar="DATA",
    ),
    "eval_split": flag(
        str, TASK, "Split to evaluate on, where there are splits.", metavar="SPLIT"
    ),
    "text_column": flag(
        str | None,
        TASK,
        "Column of the texts: name, or number from 0.",
        metavar="COLUMN",
    ),
    "label_column": flag(
        str | None, TASK, "Column of the labels, likewise.", metavar="COLUMN"
    ),
    "target_column": flag(
        str | None, TASK, "Column of the texts to generate, likewise.", metavar="COLUMN"
    ),
    "limit": flag(
        int | None, TASK, "Most examples to train on; all without it.", metavar="N"
    ),
    "eval_limit": flag(
        int | None, TASK, "Most examples to evaluate on; all without it.", metavar="N"
    ),
    "max_length": flag(
        int, TASK, "Length at which texts are cut, in tokens.", metavar="N"
    ),
    "pooling": flag(
        str, TASK, "How a classifier reads a text: auto, mean or native.", metavar="HOW"
    ),
    "metric": flag(
        str | None,
        TASK,
        f"Score to report: {either(METRICS)}; by default accuracy or perplexity.",
        metavar="METRIC",
    ),
    "target_modules": flag(
        str,
        PARTS,
        "Layers that may be trained: all-linear, names or endings of names with commas"
        " between them, or a regular expression.",
        metavar="NAMES",
    ),
    "exclude_modules": flag(
        str | None, PARTS, "Layers to leave out, likewise.", metavar="NAMES"
    ),
    "modules_to_save": flag(
        str | None,
        PARTS,
        "Modules to train whole; by default a classifier's new head.",
        metavar="NAMES",
    ),
    "density": flag(
        float,
        PARTS,
        "Fraction of the blocks to train, above 0, at most 1.",
        metavar="X",
    ),
    "sparsity": flag(
        float | None,
        PARTS,
        "The same as the fraction not to train: 1 - density.",
        metavar="X",
    ),
    "block_size": flag(int, PARTS, "Side of a block, in weights.", metavar="N"),
    "scope": flag(
        str,
        PARTS,
        "Blocks compete within each layer or across the model: layer, model.",
        metavar="SCOPE",
    ),
    "importance": flag(str, SCORING, f"Rule: {either(IMPORTANCES)}.", metavar="RULE"),
    "curvature": flag(
        str,
        SCORING,
        f"Factors of the kfac rule: {either(CURVATURES)} (exact).",
        metavar="KIND",
    ),
    "levels": flag(int, SCORING, "Depth of the factors' hierarchy.", metavar="N"),
    "rank": flag(int, SCORING, "Rank of the factors' blocks.", metavar="N"),
    "samples": flag(int, SCORING, "Examples to score with.", metavar="N"),
    "tokens": flag(
        str,
        SCORING,
        "A sample is each token (expand) or a text's mean (reduce).",
        metavar="HOW",
    ),
    "damping": flag(
        float,
        SCORING,
        "Added to a factor's diagonal, in units of its mean eigenvalue.",
        metavar="X",
    ),
    "epochs": flag(int, TRAINING, "Passes over the data.", metavar="N"),
    "steps": flag(
        int | None, TRAINING, "Optimizer steps in all, instead of epochs.", metavar="N"
    ),
    "batch_size": flag(int, TRAINING, "Examples in a batch.", metavar="N"),
    "accumulate": flag(int, TRAINING, "Batches in an optimizer step.", metavar="N"),
    "lr": flag(float, TRAINING, "Peak learning rate.", metavar="X"),
    "weight_decay": flag(float, TRAINING, "Decoupled weight decay.", metavar="X"),
    "warmup": flag(
        float, TRAINING, "Fraction of the steps in which the rate rises.", metavar="X"
    ),
    "schedule": flag(
        str,
        TRAINING,
        f"The rate's course after that: {either(SCHEDULES)}.",
        metavar="NAME",
    ),
    "max_grad_norm": flag(
        float, TRAINING, "Norm at which gradients are clipped; 0: never.", metavar="X"
    ),
    "eval_every": flag(
        int | None,
        TRAINING,
        "Steps between evaluations; without it, at the end only.",
        metavar="N",
    ),
    "save_every": flag(
        int | None,
        TRAINING,
        "Steps between checkpoints; without it, after each epoch.",
        metavar="N",
    ),
    "seed": flag(
        int, RUN, "Seed of the head, the order, dropout and samples.", metavar="N"
    ),
    "device": flag(
        str,
        RUN,
        "auto (CUDA if there is one), cpu, cuda or cuda:N.",
        metavar="NAME",
    ),
    "methods": flag(
        str,
        COMPARISON,
        f"With commas between them, out of {either(METHODS)}.",
        metavar="NAMES",
    ),
    "seeds": flag(str, COMPARISON, "Seeds to run each method with.", metavar="N,N,…"),
    "learning_rates": flag(
        str | None,
        COMPARISON,
        "Peak learning rates, like full=2e-4,sylva=1e-3, instead of the tuned ones.",
        metavar="M=X,…",
    ),
    "masks": flag(
        Path | None, PARTS, "Train these blocks: a file of masks.", metavar="FILE"
    ),
    "scores": flag(
        Path | None,
        PARTS,
        "Choose blocks by these: a file of sylva score.",
        metavar="FILE",
    ),
    "split": flag(
        str | None, TASK, "Split of the data, where it has splits.", metavar="SPLIT"
    ),
    "report_only": flag(
        bool, OUTPUT, "Only write report and table of finished runs.", "--report-only"
    ),
    "resume": flag(
        bool, OUTPUT, "Go on with an interrupted job of the same options.", "--resume"
    ),
    "overwrite": flag(bool, OUTPUT, "Replace an output that exists.", "--overwrite"),
    "json": flag(bool, OUTPUT, "Print JSON.", "--json"),
    "quiet": flag(bool, OUTPUT, "Show no progress.", "--quiet", "-q"),
    "config_file": flag(
        Path | None,
        OUTPUT,
        "Options from a .yaml, .toml or .json file, under the names of the flags; those"
        " on the command line win.",
        "--config",
        metavar="FILE",
    ),
    "debug": flag(bool, OUTPUT, "Show where an error arose.", "--debug"),
}

CONFIGS: tuple[type, ...] = (TaskConfig, SylvaConfig, TrainingConfig)


def names_of(kind: type) -> list[str]:
    """Names of the flags of a configuration class, in order of the table."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"masks"}
    if kind is SylvaConfig:
        fields.add("sparsity")
    return [name for name in FLAGS if name in fields]


def default_of(kind: type, name: str) -> Any:
    """Return a field's default, as a flag has it."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    return fields.get(name)


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


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Read integers with commas between them."""
    try:
        return tuple(int(part) for part in words(text) or ())
    except ValueError:
        msg = f"`{name}` must be integers with commas between them; got {text!r}."
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
    fields = {name: values[name] for name in names_of(kind) if name in values}
    if kind is SylvaConfig:
        fields["density"] = density(values, source)
        fields.pop("sparsity", None)
    for name in fields.keys() & {"target_modules", "exclude_modules"}:
        fields[name] = modules(fields[name])
    if "modules_to_save" in fields:
        fields["modules_to_save"] = words(fields["modules_to_save"])
    for name in fields.keys() & {"text_column", "label_column", "target_column"}:
        fields[name] = column(fields[name])
    return kind(**fields)


def expand(
    function: Callable[..., None],
    *,
    omit: Collection[str] = (),
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
    arguments : mapping of str to str
        Help of the parameters that are arguments.
    """
    signature = inspect.signature(function, eval_str=True)
    configs = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation in CONFIGS
    }
    kinds: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for kind in configs.values():
        for name in names_of(kind):
            if name not in omit:
                kinds[name], defaults[name] = FLAGS[name].kind, default_of(kind, name)
    for name, parameter in signature.parameters.items():
        if name not in configs and name not in arguments:
            kinds[name], defaults[name] = parameter.annotation, parameter.default
    if configs:
        kinds["config_file"], defaults["config_file"] = FLAGS["config_file"].kind, None
    kinds["debug"], defaults["debug"] = bool, False
    parameters = [
        keyword(
            name,
            Annotated[
                signature.parameters[name].annotation,
                typer.Argument(help=text, metavar=name.upper()),
            ],
            signature.parameters[name].default,
        )
        for name, text in arguments.items()
    ]
    order = sorted(kinds, key=lambda name: PANELS.index(FLAGS[name].panel))
    for name in order:
        extra: dict[str, Any] = {}
        if name == "config_file":
            known = {n: k for n, k in kinds.items() if n not in {name, "debug"}}
            extra = {"is_eager": True, "callback": reader(known)}
        annotation = FLAGS[name].annotate(kinds[name], **extra)
        parameters.append(keyword(name, annotation, defaults[name]))
    parameters.append(keyword("context", typer.Context))

    def command(*, context: typer.Context, **values: Any) -> None:
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


def reader(kinds: Mapping[str, Any]) -> Callable[[typer.Context, Path | None], Any]:
    """Return the callback of ``--config``: a file's values become the defaults."""

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = read_options(path, kinds)
        return path

    return read
