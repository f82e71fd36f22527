"""Whole jobs over files and folders: what the command line runs, as functions.

A fine-tuning is a folder: ``adapter/`` (PEFT's layout), ``masks.safetensors``,
``scores.safetensors`` where something was scored, ``checkpoints/`` while it runs, and
``sylva.json`` with the task, the options, the classes and the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ._checks import (
    AdapterError,
    ConfigError,
    atomic_folder,
    atomic_write,
    prepare_output,
)
from .config import NEEDS_DATA, SylvaConfig, TaskConfig, TrainingConfig
from .data import Loader, TextDataset, builtin_names, load_data
from .evaluation import evaluate
from .importance import Scores, score
from .layers import embed, merge
from .masks import Masks, select
from .pretrained import load_model
from .training import pick_device, train
from .tuner import load_adapter, save_adapter

__all__ = [
    "Task",
    "evaluate_folder",
    "finetune",
    "load_folder",
    "load_task",
    "merge_folder",
    "predict",
    "progress_bar",
    "score_task",
]

FORMAT = "sylva-run/1"
#: Part of a single file that is kept for evaluation.
HOLDOUT = 0.1

Report = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(description: str, *, enabled: bool = True) -> Iterator[Report]:
    """Yield a function of (done, total) that draws a bar with the time left.

    Only on a terminal, and only once the work has taken two seconds.
    """
    from .training.parts import ProgressBar

    bar: ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = ProgressBar(total, 0, enabled=enabled)
        bar.advance(done, description)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@dataclass(frozen=True)
class Task:
    """A task made ready: model, tokenizer and data.

    Attributes
    ----------
    config : TaskConfig
        The options.
    model, tokenizer
        The pretrained model, with a new head where the task needs one.
    train, evaluation : TextDataset
        The data.
    """

    config: TaskConfig
    model: nn.Module
    tokenizer: Any
    train: TextDataset
    evaluation: TextDataset

    def loader(self, batch_size: int, seed: int, *, progress: bool = True) -> Loader:
        """Return the training batches, in the order of a seed."""
        with progress_bar("tokenizing", enabled=progress) as report:
            return Loader(
                self.train,
                self.tokenizer,
                batch_size,
                max_length=self.config.max_length,
                shuffle=True,
                seed=seed,
                progress=report,
            )

    def eval_loader(self, batch_size: int = 64) -> Loader:
        """Return the evaluation batches, in the order of the data."""
        length = self.config.max_length
        return Loader(self.evaluation, self.tokenizer, batch_size, max_length=length)


def read_data(
    config: TaskConfig, *, seed: int, labels: Sequence[str] | None = None
) -> tuple[TextDataset | None, TextDataset]:
    """Read the training data (not with ``labels`` given) and the evaluation data."""
    columns = ("text_column", "label_column", "target_column")
    options: dict[str, Any] = {name: getattr(config, name) for name in columns}
    options |= {"task": config.task, "seed": seed}
    splits = config.data in builtin_names() or not Path(config.data).is_file()
    whole = splits or config.eval_data is not None
    training = None
    if labels is None or not whole:
        training = load_data(
            config.data,
            split="train" if splits else None,
            limit=config.limit,
            labels=labels,
            **options,
        )
    if labels is None and training is not None:
        labels = training.label_names or None
    if not whole and training is not None:
        order = np.random.default_rng(seed).permutation(len(training))
        held = max(1, round(HOLDOUT * len(training)))
        if held >= len(training):
            msg = f"`{config.data}` has one example: give `eval_data` to evaluate on."
            raise ConfigError(msg)
        evaluation = training.subset(sorted(order[:held].tolist()))
        training = training.subset(sorted(order[held:].tolist()))
        return training, evaluation
    source = config.eval_data or config.data
    evaluation = load_data(
        source,
        split=None if Path(source).is_file() else config.eval_split,
        limit=config.eval_limit,
        labels=labels,
        **options,
    )
    return training, evaluation


def load_task(config: TaskConfig, *, seed: int = 0) -> Task:
    """Read a task's data and load its model.

    Parameters
    ----------
    config : TaskConfig
        The task.
    seed : int
        Seed of a new head, and of what ``limit`` keeps.

    Returns
    -------
    Task

    Raises
    ------
    DataError
        If the data cannot be used; the message has file and line.
    SylvaError
        If the model cannot be loaded.
    """
    training, evaluation = read_data(config, seed=seed)
    assert training is not None
    model, tokenizer = load_model(
        config.model,
        task=config.task,
        labels=training.label_names or None,
        pooling=config.pooling,
        seed=seed,
    )
    return Task(config, model, tokenizer, training, evaluation)


def heads(model: nn.Module, task: str) -> list[str] | None:
    """Names of the modules that a new task trains whole: a classification head."""
    if task != "classification":
        return None
    backbone = getattr(model, "base_model", model)
    names = [n for n, child in model.named_children() if child is not backbone]
    return [n for n in names if any(True for _ in model.get_submodule(n).parameters())]


def score_task(
    task: Task, config: SylvaConfig, *, seed: int = 0, progress: bool = True
) -> Scores:
    """Score a task's model on samples of its training data."""
    loader = None
    if config.importance in NEEDS_DATA:
        loader = task.loader(min(32, config.samples), seed, progress=progress)
    task.model.to(pick_device("auto"))
    with progress_bar("scoring", enabled=progress) as report:
        return score(task.model, loader, config, progress=report)


def finetune(
    task_config: TaskConfig,
    config: SylvaConfig,
    training: TrainingConfig,
    output: str | os.PathLike[str],
    *,
    masks: Masks | None = None,
    scores: Scores | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score, choose blocks, fine-tune them, evaluate, and save the adapter.

    Parameters
    ----------
    task_config, config, training : TaskConfig, SylvaConfig, TrainingConfig
        The task, what to train of the model, and how.
    output : path
        Folder of the run.
    masks, scores : Masks, Scores, optional
        Chosen or scored before; nothing is scored then.
    resume : bool
        Go on with an interrupted run in ``output``, to the identical weights.
    overwrite : bool
        Whether to replace a run that is there.
    progress : bool
        Show progress bars on a terminal.

    Returns
    -------
    dict
        What ``sylva.json`` holds: ``task``, ``sylva``, ``training``, ``labels``,
        ``metrics`` of the evaluation, ``history`` of the training, ``trainable`` and
        ``total`` weights.

    Raises
    ------
    OutputExistsError
        If ``output`` exists and neither ``resume`` nor ``overwrite`` is set.
    SylvaError
        Whatever stops scoring, training or saving.
    """
    output = Path(output)
    if resume and (output / "sylva.json").exists():
        return read_run(output)
    if resume and not (output / "masks.safetensors").exists():
        msg = f"`{output}` has no run to resume; leave out `resume` to begin one."
        raise ConfigError(msg)
    if not resume:
        prepare_output(output, overwrite=overwrite)
    task = load_task(task_config, seed=training.seed)
    if config.modules_to_save is None:
        config = dataclasses.replace(config)
        config.modules_to_save = heads(task.model, task_config.task)
    loader = task.loader(training.batch_size, training.seed, progress=progress)
    if resume:
        masks = Masks.load(output / "masks.safetensors")
    elif masks is None:
        if scores is None:
            scores = score_task(task, config, seed=training.seed, progress=progress)
        masks = select(scores, config.density, config.block_size, config.scope)
    if not resume:
        if overwrite and output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        if scores is not None:
            scores.save(output / "scores.safetensors")
        masks.save(output / "masks.safetensors")
    total = sum(p.numel() for p in task.model.parameters())
    embed(task.model, masks, modules_to_save=config.modules_to_save)
    eval_loader = task.eval_loader()
    result = train(
        task.model,
        loader,
        training,
        output=output / "checkpoints",
        resume=resume,
        evaluate=lambda model: evaluate(model, eval_loader, metric=task_config.metric),
        progress=progress,
    )
    save_adapter(task.model, output / "adapter", config=config, overwrite=resume)
    run = {
        "format": FORMAT,
        "task": dataclasses.asdict(task_config),
        "training": dataclasses.asdict(training),
        "sylva": masks.metadata,
        "labels": task.train.label_names,
        "metrics": result.metrics,
        "history": result.history,
        "seconds_per_step": result.seconds_per_step,
        "trainable": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "total": total,
    }
    with atomic_write(output / "sylva.json") as temporary:
        temporary.write_text(json.dumps(run, indent=1), encoding="utf-8")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return run


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``sylva.json`` of a fine-tuning's folder.

    Raises
    ------
    AdapterError
        If there is none, or it is damaged.
    """
    path = Path(folder) / "sylva.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"`{folder}` is not a finished fine-tuning: it has no sylva.json."
        raise AdapterError(msg) from error
    except (ValueError, OSError) as error:
        msg = f"`{path}` is damaged ({error}); fine-tune again."
        raise AdapterError(msg) from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        msg = f"`{path}` is not of the format {FORMAT}."
        raise AdapterError(msg)
    return run


def load_folder(
    folder: str | os.PathLike[str],
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a fine-tuned model: its base, with the folder's adapter embedded.

    Returns
    -------
    model, tokenizer, run
        The model in evaluation mode, and what ``sylva.json`` holds.

    Raises
    ------
    AdapterError
        If the folder is damaged, or the base model is not the one it was made for.
    """
    run = read_run(folder)
    task = TaskConfig(**run["task"])
    model, tokenizer = load_model(
        task.model,
        task=task.task,
        labels=run["labels"] or None,
        pooling=task.pooling,
        seed=run["training"]["seed"],
    )
    load_adapter(model, Path(folder) / "adapter")
    return model.eval(), tokenizer, run


def evaluate_folder(
    folder: str | os.PathLike[str], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate a fine-tuned model, on its own evaluation data or on other data.

    Parameters
    ----------
    folder : path
        From `finetune`.
    changes : dict, optional
        Fields of `TaskConfig` to change, such as ``eval_data`` or ``eval_split``.

    Returns
    -------
    dict
        Metrics.
    """
    model, tokenizer, run = load_folder(folder)
    task = TaskConfig(**(run["task"] | (changes or {})))
    seed = run["training"]["seed"]
    _, data = read_data(task, seed=seed, labels=run["labels"] or None)
    loader = Loader(data, tokenizer, 64, max_length=task.max_length)
    model.to(pick_device("auto"))
    return evaluate(model, loader, metric=task.metric)


def merge_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write the fine-tuned model whole, as an ordinary `transformers` folder."""
    prepare_output(output, overwrite=overwrite)
    model, tokenizer, _ = load_folder(folder)
    with atomic_folder(output, overwrite=overwrite) as temporary:
        merged: Any = merge(model)
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@torch.no_grad()
def predict(
    folder: str | os.PathLike[str], texts: Sequence[str]
) -> list[tuple[str, float]]:
    """Classify texts with a fine-tuned model.

    Returns
    -------
    list of (str, float)
        The most probable class of each text, and its probability.
    """
    model, tokenizer, run = load_folder(folder)
    if run["task"]["task"] != "classification":
        msg = (
            f"`{folder}` was fine-tuned for {run['task']['task']}, not classification."
        )
        raise ConfigError(msg)
    batch = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=run["task"]["max_length"],
        return_tensors="pt",
    )
    probabilities = model(**batch).logits.float().softmax(-1)
    best = probabilities.max(-1)
    labels = run["labels"]
    return [
        (labels[int(i)], float(p))
        for p, i in zip(best.values, best.indices, strict=True)
    ]
