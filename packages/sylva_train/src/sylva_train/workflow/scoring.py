"""Scoring a task's model, and keeping the scores in a file."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sylva_train._artifacts import as_read
from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train.config import SylvaConfig, TaskConfig, TrainingConfig
from sylva_train.data import Loader
from sylva_train.importance import Scores, score
from sylva_train.options import (
    KRONECKER,
    NEEDS_DATA,
    SEEN_FOR_ONE,
    SELECTION,
    WRITING,
    SylvaOptions,
    samples_to_score,
)
from sylva_train.processes import is_first, together
from sylva_train.progress import Progress, duration
from sylva_train.training import number_of_steps, pick_device

from .outputs import check_file, differences
from .task import SCORED, Task, load_task, located, tell_of_cuts

__all__ = [
    "begin_scoring",
    "examples_seen",
    "score_file",
    "score_task",
    "sylva_options",
]

#: Options that change no score, the block size not being one of them.
LATER = SELECTION - {"block_size"} | {"modules_to_save"}
#: Options of a task that say how to evaluate.
EVALUATION = {"eval_limit", "metric", "meteor", *WRITING}


def sylva_options(config: SylvaConfig) -> dict[str, Any]:
    """Return Sylva's own options, without PEFT's and the facts of an adapter."""
    names = [field.name for field in dataclasses.fields(SylvaOptions)]
    # The budgets of a machine's memory change nothing in a run.
    return {n: getattr(config, n) for n in names if not n.endswith("_budget")}


def asked(task: TaskConfig, config: SylvaConfig, seed: int) -> dict[str, Any]:
    """Return what scores are asked for with, as JSON that is kept in their file."""
    about = dataclasses.asdict(task) | {"seed": seed}
    parts = {
        "task": {n: v for n, v in about.items() if n not in EVALUATION},
        "sylva": {n: v for n, v in sylva_options(config).items() if n not in LATER},
    }
    return as_read(parts)


def finished(output: Path, wanted: dict[str, Any]) -> Scores | None:
    """Return the scores that are there, None if none are.

    Raises
    ------
    ConfigError
        If they are of other options, model or data.
    """
    if not output.is_file():
        return None
    scores = Scores.load(output)
    there = scores.metadata.get("asked")
    differ = (
        ["it does not say of which"] if there is None else differences(there, wanted)
    )
    if differ:
        msg = (
            f"`{output}` has finished scores, but of other options: {'; '.join(differ)}."
            " Use the same ones, choose another file, or replace it (`overwrite=True`,"
            " `--overwrite`, without `--resume`)."
        )
        raise ConfigError(msg)
    return scores


def unfinished_folder(output: str | os.PathLike[str]) -> Path:
    """Return where unfinished scoring for an output is kept: beside it."""
    return Path(f"{Path(output)}.unfinished")


def begin_scoring(
    output: str | os.PathLike[str], *, resume: bool, overwrite: bool
) -> Path:
    """Return the folder of unfinished scoring for an output; there is none to begin with.

    Raises
    ------
    OutputExistsError
        If there is one, and neither ``resume`` nor ``overwrite``.
    """
    folder = unfinished_folder(output)
    with together():
        stale = folder.exists() and not resume
        if stale and not overwrite:
            msg = (
                f"`{folder}` has scoring that was interrupted: go on with it"
                " (`resume=True`, `--resume`), or begin anew (`overwrite=True`,"
                " `--overwrite`)."
            )
            raise OutputExistsError(msg)
    with together():
        if stale and is_first():
            shutil.rmtree(folder)
    return folder


def examples_seen(loader: Loader, training: TrainingConfig) -> int:
    """Return how many examples training sees, counted again in each epoch."""
    steps_of_epoch = math.ceil(len(loader) / training.accumulate)
    return number_of_steps(loader, training) * len(loader.examples) // steps_of_epoch


def counted(asked: int | None, seen: int | None, there: int) -> str:
    """Say how many examples are scored, and why so many, beside what training sees."""
    wanted = samples_to_score(asked, seen)
    number = f"{min(wanted, there):,} examples"
    if seen is None:
        return number
    if wanted > there:
        return f"{number}, all that there are; training sees {seen:,}"
    if asked is not None:
        return f"{number}; training sees {seen:,}"
    part = seen // SEEN_FOR_ONE
    if wanted == part:
        return f"{number}, a thirtieth of the {seen:,} that training sees"
    end = "fewest" if wanted > part else "most"
    return f"{number}, the {end} by default (`samples`); training sees {seen:,}"


def score_task(
    task: Task,
    config: SylvaConfig,
    *,
    seen: int | None = None,
    seed: int = 0,
    batch_size: int = SCORED,
    device: str = "auto",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 10.0,
) -> Scores:
    """Score a task's model on samples of its training data.

    Parameters
    ----------
    task : Task
        From `load_task`.
    config : SylvaConfig
        Layers, rule and its options.
    seen : int, optional
        Samples that the training after it sees, from `examples_seen`.
    seed : int
        Seed of which samples.
    batch_size : int
        Samples that are run at once.
    device : str
        Where to.
    progress : Progress, optional
        Shows it.
    checkpoint, checkpoint_minutes
        Folder to go on from, as `sylva_train.score` does.

    Returns
    -------
    Scores
        With the model and the data in their metadata.

    Raises
    ------
    SylvaError
        As `sylva_train.score`.
    """
    progress = progress or Progress(enabled=False)
    loader = None
    rule, begin = config.importance, time.perf_counter()
    words = f"{rule} ({config.curvature})" if rule in KRONECKER else rule
    if rule in NEEDS_DATA:
        number = counted(config.samples, seen, len(task.train))
        samples = samples_to_score(config.samples, seen)
        config = dataclasses.replace(config, samples=samples)
        loader = task.score_loader(samples, seed, batch_size)
        progress.say(f"Scoring by {words} on {number}.")
        if seen is None:  # else the training, which has these examples, tells of them
            tell_of_cuts(loader, progress)
    else:
        progress.say(f"Scoring by {words}; this needs no data.")
    task.model.to(pick_device(device))
    scores = score(
        task.model,
        loader,
        config,
        progress=progress.stage("scoring"),
        log=progress.say,
        checkpoint=checkpoint,
        checkpoint_minutes=checkpoint_minutes,
    )
    scores.metadata |= {"model": task.config.model, "data": task.train.name}
    if loader is not None:
        progress.say(f"Scored in {duration(time.perf_counter() - begin)}.")
    return scores


def score_file(
    task_config: TaskConfig,
    config: SylvaConfig,
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    batch_size: int = SCORED,
    device: str = "auto",
    checkpoint_minutes: float = 10.0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Scores:
    """Score a model on a task's training data and keep the scores.

    Parameters
    ----------
    task_config, config : TaskConfig, SylvaConfig
        The task, the layers and the rule.
    output : path
        A safetensors file; `sylva_train.Scores.load` reads it.
    seed : int
        Seed of a new head and of which samples.
    batch_size : int
        Samples that are run at once; fewer take less memory for their activations.
    device : str
        Where to.
    checkpoint_minutes : float
        Time between two savings of what is scored so far, in a folder beside ``output``
        (its name and ``.unfinished``), which goes when the scores are written.
    resume : bool
        Go on with scoring that was interrupted, to the same scores; begin it where there
        is none. Scores that are finished are returned as they are.
    overwrite : bool
        Whether to replace a file that is there.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    Scores

    Raises
    ------
    OutputExistsError
        If ``output`` exists and not ``overwrite``, or unfinished scoring and neither
        ``resume`` nor ``overwrite``.
    ConfigError
        If ``resume`` meets scoring or scores with other options, model or data.
    SylvaError
        Whatever stops reading, loading or scoring; nothing is written then.
    """
    task_config = located(task_config)
    # What is asked for is the number, however it was asked for.
    config = dataclasses.replace(config, samples=samples_to_score(config.samples))
    wanted = asked(task_config, config, seed)
    with together():
        begun = unfinished_folder(output).exists()
        if resume and not overwrite and not begun:
            done = finished(Path(output), wanted)
            if done is not None:
                return done
        # What was begun may replace a file, or it would not have been begun.
        check_file(output, overwrite=overwrite or (resume and begun))
    unfinished = begin_scoring(output, resume=resume, overwrite=overwrite)
    pick_device(device)  # refused before any time is spent on the data
    with Progress(enabled=progress) as bars:
        task = load_task(
            task_config,
            seed=seed,
            evaluation=False,
            modules_to_save=config.modules_to_save,
        )
        scores = score_task(
            task,
            config,
            seed=seed,
            batch_size=batch_size,
            device=device,
            progress=bars,
            checkpoint=unfinished,
            checkpoint_minutes=checkpoint_minutes,
        )
    scores.metadata["asked"] = wanted
    with together():
        if is_first():
            scores.save(output)
            shutil.rmtree(unfinished, ignore_errors=True)
    return scores
