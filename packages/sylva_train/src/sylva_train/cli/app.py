"""The commands: options to configurations, configurations to functions, results to text."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from sylva_train.baselines import METHODS
from sylva_train.comparison import (
    DEMO,
    DEMO_STEPS,
    DEMO_TASK,
    Comparison,
    demonstration,
    load_results,
)
from sylva_train.config import SylvaConfig, TaskConfig, TrainingConfig
from sylva_train.importance import Scores
from sylva_train.masks import Masks
from sylva_train.workflow import (
    diagnose,
    evaluate_folder,
    finetune,
    kind_of,
    merge_folder,
    score_file,
)

from . import show
from .comparing import publish, run_comparison
from .demo import run_demo
from .errors import Commands
from .options import column, columns, expand, given, numbers, rates, words

__all__ = ["app", "main"]

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
    *, omit: Collection[str] = (), **arguments: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command; ``arguments`` are the help of its arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        expanded = expand(function, omit=omit, arguments=arguments)
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
    app(prog_name="sylva")


EVALUATION = {"eval_data", "eval_split", "eval_limit", "metric"}


@command(
    omit=EVALUATION | {"modules_to_save", "scope", "max_columns", "spread"},
    output="The file to write, .safetensors.",
)
def score(
    output: Path,
    task: TaskConfig,
    sylva: SylvaConfig,
    checkpoint_minutes: float = 10.0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Score a model's weights by how much they matter for a task.

    Writes the scores, for `sylva finetune --scores`, and shows how the importance of each
    layer is spread over its blocks. Interrupted scoring goes on with --resume, to the
    same scores.

    Examples
    --------
      sylva score scores.safetensors --data e2e-rating --samples 256
      sylva score scores.safetensors --model ./bert --data train.csv
    """
    scores = score_file(
        task,
        sylva,
        output,
        seed=sylva.seed,
        device=device,
        checkpoint_minutes=checkpoint_minutes,
        resume=resume,
        overwrite=overwrite,
        progress=not quiet,
    )
    show.scores(scores, sylva.density, sylva.block_size)
    again = shlex.join(["--scores", str(output), *given(task), *given(sylva)])
    show.written({"scores": output}, f"sylva finetune RUN {again}")


@command(output="The folder to write: adapter, masks, scores, results.")
def finetune_command(
    output: Path,
    task: TaskConfig,
    sylva: SylvaConfig,
    training: TrainingConfig,
    masks: Path | None = None,
    scores: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Fine-tune the most important blocks of a model.

    Scores the weights, chooses blocks, trains them, evaluates, and saves an adapter of a
    few megabytes. An interrupted run goes on with --resume, to the same weights.

    Examples
    --------
      sylva finetune runs/rating --data e2e-rating --max-length 64
      sylva finetune runs/mine --model ./bert --data train.csv --sparsity 0.9
    """
    run = finetune(
        task,
        sylva,
        training,
        output,
        masks=None if masks is None else Masks.load(masks),
        scores=None if scores is None else Scores.load(scores),
        resume=resume,
        overwrite=overwrite,
        progress=not quiet,
    )
    show.run(run, output)
    show.written(
        {"adapter": output / "adapter"}, f"sylva evaluate {shlex.quote(str(output))}"
    )


@command(run="Folder of a fine-tuning.")
def evaluate(
    run: Path,
    data: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    eval_limit: int | None = None,
    max_length: int | None = None,
    metric: str | None = None,
    model: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Evaluate a fine-tuned model on its own evaluation data, or on other data.

    The adapter is loaded into a fresh base model, which must be the one it was made for.

    Examples
    --------
      sylva evaluate runs/rating --split test
      sylva evaluate runs/rating --data new.csv --json
    """
    changes = {
        "eval_data": data,
        "eval_split": split,
        "text_column": columns(text_column),
        "label_column": column(label_column),
        "target_column": column(target_column),
        "eval_limit": eval_limit,
        "max_length": max_length,
        "metric": metric,
    }
    found = evaluate_folder(
        run,
        {name: value for name, value in changes.items() if value is not None},
        base=model,
        batch_size=batch_size,
        device=device,
        progress=not quiet,
    )
    show.metrics(found, as_json=json)


@command(run="Folder of a fine-tuning.", output="Folder for the whole model.")
def merge(
    run: Path,
    output: Path,
    model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a fine-tuned model whole, as a folder for --model and sylva_train.load_model.

    transformers loads it too, unless it is a classifier that pools by the mean.

    Examples
    --------
      sylva merge runs/rating rating-model
    """
    merge_folder(run, output, base=model, overwrite=overwrite)
    show.written({"model": output})


@command(path="What to look into.")
def inspect_command(path: Path, json: bool = False) -> None:
    """Show what is in a run, an adapter, masks, scores or results.

    Files are read and verified; no model is needed.

    Examples
    --------
      sylva inspect runs/rating
      sylva inspect runs/rating/adapter
      sylva inspect scores.safetensors
    """
    show.inspect(path, kind_of(path), as_json=json)


@command(
    omit={
        "task", "target_column", "importance", "curvature", "seed", "lr", "save_every",
        "modules_to_save", "max_columns", "memory_budget",
    },
    output="Folder for results.json, report.html, table.md.",
)  # fmt: skip
def compare(
    output: Path,
    task: TaskConfig,
    sylva: SylvaConfig,
    training: TrainingConfig,
    methods: str = ",".join(METHODS),
    seeds: str = "0,1,2",
    learning_rates: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report_only: bool = False,
    quiet: bool = False,
) -> None:
    """Compare Sylva's rules with each other, LoRA, full fine-tuning and pruning.

    Every method trains on the same data, seeds and steps, in a process of its own; LoRA
    has as many trainable weights as Sylva has. Finished runs are kept: --resume goes on
    after them, and may add methods and seeds.

    Examples
    --------
      sylva compare runs/compared --max-length 64 --steps 150
      sylva compare runs/two --methods full,sylva:kfac --seeds 0,1 --data train.csv
    """
    if report_only:
        show.comparison(publish(load_results(output / "results.json"), output), output)
        return
    comparison = Comparison(
        task=task,
        sylva=sylva,
        training=training,
        methods=tuple(words(methods) or ()),
        seeds=numbers("seeds", seeds),
        learning_rates=rates("learning_rates", learning_rates),
    )
    results = run_comparison(
        comparison,
        output,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        command=typed(),
    )
    show.comparison(results, output)


@command(output="Folder for results and adapter.")
def demo(
    output: Path = Path("runs/demo"),
    model: str = DEMO_TASK.model,
    limit: int | None = DEMO_TASK.limit,
    eval_limit: int | None = DEMO_TASK.eval_limit,
    steps: int = DEMO_STEPS,
    methods: str = ",".join(DEMO),
    seeds: str = "0,1,2",
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """See the whole of it in ten minutes on two CPU cores, without a network.

    Fine-tunes MiniLM to tell which customer rating a sentence about a restaurant states:
    5% of the weights of its linear layers, chosen by Sylva, beside LoRA, full
    fine-tuning, random blocks and frozen features, with three seeds each. Then saves the
    adapter, loads it again and asks it.

    Examples
    --------
      sylva demo
      sylva demo runs/second --seeds 0
    """
    task = dataclasses.replace(
        DEMO_TASK, model=model, limit=limit, eval_limit=eval_limit
    )
    run_demo(
        demonstration(
            task=task,
            steps=steps,
            methods=tuple(words(methods) or ()),
            seeds=numbers("seeds", seeds),
        ),
        output,
        resume=resume,
        overwrite=overwrite,
        command=typed(),
    )


@command()
def doctor(json: bool = False) -> None:
    """Check this machine: versions, devices, kernels, optional parts, the built-in model.

    Kernels are tried and their results compared with PyTorch's. The exit code is 1 if
    something that is there does not work; parts that are not installed are listed with
    how to get them.

    Examples
    --------
      sylva doctor
      sylva doctor --json
    """
    found = diagnose()
    show.diagnosis(found, as_json=json)
    if found["problems"]:
        raise typer.Exit(1)


def typed() -> str:
    """Return the command as it was typed, but for `--resume` and `--overwrite`."""
    again = [a for a in sys.argv[1:] if a not in {"--resume", "--overwrite"}]
    return shlex.join(["sylva", *again])
