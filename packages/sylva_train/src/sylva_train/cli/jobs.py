"""The commands of one job each: options to configurations, results to text.

A command imports what it calls when it runs: PyTorch takes seconds, which help and errors
of options need not wait for.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from sylva_train.options import WRITING, SylvaOptions, TaskConfig, TrainingConfig

from . import printing
from .frame import command
from .options import EvaluationChanges, RowChanges, given
from .processes import check_alone, joined

EVALUATION = {"eval_data", "eval_split", "eval_limit", "metric", "meteor", *WRITING}


@command(
    omit=EVALUATION
    | {"modules_to_save", "scope", "allocation", "max_columns", "spread"},
    shared=True,
    output="The file to write, .safetensors.",
)
def score(
    output: Path,
    task: TaskConfig,
    sylva: SylvaOptions,
    batch_size: int = 32,
    checkpoint_minutes: float = 10.0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Score a model's weights by how much they matter for a task.

    Writes the scores, for `sylva finetune --scores`, and shows how the importance of each
    layer is spread over its blocks. Interrupted scoring goes on with --resume, to the
    same scores; finished scores of the same options are shown again.

    Examples
    --------
      sylva score scores.safetensors --data e2e-rating --samples 256
      sylva score scores.safetensors --model ./bert --data train.csv
    """
    from sylva_train.config import SylvaConfig
    from sylva_train.workflow import describe_scores, score_file

    from . import show

    with joined() as speaks:
        scores = score_file(
            task,
            SylvaConfig(**vars(sylva)),
            output,
            seed=sylva.seed,
            batch_size=batch_size,
            device=device,
            checkpoint_minutes=checkpoint_minutes,
            resume=resume,
            overwrite=overwrite,
            progress=speaks and not quiet,
        )
    if not speaks:
        return
    show.scores(describe_scores(scores, sylva.density, sylva.block_size))
    again = shlex.join(["--scores", str(output), *given(task), *given(sylva)])
    printing.written({"scores": output}, f"sylva finetune RUN {again}")


@command(shared=True, output="The folder to write: adapter, masks, scores, results.")
def finetune_command(
    output: Path,
    task: TaskConfig,
    sylva: SylvaOptions,
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
    from sylva_train.config import SylvaConfig
    from sylva_train.importance import Scores
    from sylva_train.masks import Masks
    from sylva_train.workflow import finetune

    from . import show

    with joined() as speaks:
        run = finetune(
            task,
            SylvaConfig(**vars(sylva)),
            training,
            output,
            masks=None if masks is None else Masks.load(masks),
            scores=None if scores is None else Scores.load(scores),
            resume=resume,
            overwrite=overwrite,
            progress=speaks and not quiet,
        )
    if not speaks:
        return
    show.run(run, output)
    printing.written(
        {"adapter": output / "adapter"}, f"sylva evaluate {shlex.quote(str(output))}"
    )


@command(run="Folder of a fine-tuning.")
def evaluate(
    run: Path,
    changes: EvaluationChanges,
    data: str | None = None,
    split: str | None = None,
    base: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    answers: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Evaluate a fine-tuned model on its own evaluation data, or on other data.

    The adapter is loaded into a fresh base model, which must be the one it was made for.
    Options that are not given are as in the run.

    Examples
    --------
      sylva evaluate runs/rating --split test
      sylva evaluate runs/rating --data new.csv --json
      sylva evaluate runs/nlg --metric bleu --answers answers.jsonl
    """
    from sylva_train.workflow import evaluate_folder

    from . import show

    source = {"eval_data": data, "eval_split": split}
    found = evaluate_folder(
        run,
        {n: v for n, v in source.items() if v is not None} | changes.given(),
        base=base,
        batch_size=batch_size,
        device=device,
        answers=answers,
        overwrite=overwrite,
        progress=not quiet,
    )
    show.metrics(found, as_json=json)


@command(run="Folder of a fine-tuning.")
def predict(
    run: Path,
    changes: RowChanges,
    data: str,
    split: str | None = None,
    base: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Predict what new rows are: their class, their number, or the answer to their prompt.

    Labels need not be there. To each row `prediction` is added, and the `probability` of
    a class. Options that are not given are as in the run.

    Examples
    --------
      sylva predict runs/rating --data new.csv
      sylva predict runs/rating --data new.csv --out predicted.csv
    """
    from sylva_train.workflow import predict_file

    rows = predict_file(
        run,
        data,
        out,
        changes.given(),
        split=split,
        base=base,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
        progress=not quiet,
    )
    if out is None:
        printing.lines(rows)
    else:
        printing.written({f"{len(rows)} predictions": out})


@command(run="Folder of a fine-tuning.", output="Folder for the whole model.")
def merge(
    run: Path, output: Path, base: str | None = None, overwrite: bool = False
) -> None:
    """Write a fine-tuned model whole, as a folder for --model and sylva_train.load_model.

    transformers loads it too, unless it is a classifier that pools by the mean.

    Examples
    --------
      sylva merge runs/rating rating-model
    """
    from sylva_train.workflow import merge_folder

    merge_folder(run, output, base=base, overwrite=overwrite)
    printing.written({"model": output})


@command(path="What to look into.")
def inspect_command(
    path: Path,
    against: Path | None = None,
    density: float | None = None,
    block_size: int | None = None,
    draw: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Show what is in a run, an adapter, masks, scores, results or a table.

    Files are read and verified; no model is needed. --draw draws scores and masks as a
    page, block by block. --against tells how far they agree with others, which are taken
    for right, layer by layer: the rank correlation of the blocks' scores, which of the
    best blocks are the same, and how much of the others' score they have.

    Examples
    --------
      sylva inspect runs/rating
      sylva inspect runs/rating/adapter
      sylva inspect scores.safetensors --density 0.01
      sylva inspect scores.safetensors --against exact.safetensors --draw page.html
      sylva inspect runs/mine --against runs/random --json
    """
    from sylva_train.workflow import check_file, kind_of

    from . import show

    if draw is not None:
        check_alone()
        check_file(draw, overwrite=overwrite)
        show.drawn(draw, path, against, density, block_size)
    if against is None:
        show.inspect(path, kind_of(path), density, block_size, as_json=json)
    else:
        show.agreement(path, against, density, block_size, as_json=json)
    if draw is not None and not json:
        printing.written({"page": draw})


@command(name="A configuration, to print it.")
def configs(name: str | None = None) -> None:
    """List the configurations that come with the package, or print one.

    They are for --config: models and data must be there, under the names in the file or
    those given by --model and --data.

    Examples
    --------
      sylva configs
      sylva configs roberta-large-stsb > mine.json
      sylva finetune runs/stsb --config mine.json --data glue_data/STS-B
    """
    printing.configs(name)


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
    from sylva_train.workflow import diagnose

    from . import show

    found = diagnose()
    show.diagnosis(found, as_json=json)
    if found["problems"]:
        raise typer.Exit(1)
