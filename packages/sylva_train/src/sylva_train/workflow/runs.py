"""The folder of a fine-tuning: read, evaluated, merged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sylva_train._checks import AdapterError, ConfigError, DataError, OutputExistsError
from sylva_train._files import atomic_folder
from sylva_train.config import TaskConfig
from sylva_train.data import TextDataset
from sylva_train.evaluation import evaluate
from sylva_train.layers import merge
from sylva_train.metrics import ANSWERS
from sylva_train.pretrained import load_model, quiet
from sylva_train.progress import Progress
from sylva_train.training import pick_device
from sylva_train.tuner import load_adapter

from .outputs import check_file, check_folder, write_rows
from .task import check_metric, evaluation_loader, is_file, read_data, tell_of_cuts

__all__ = [
    "FORMAT",
    "RECORD",
    "check_pairs",
    "evaluate_folder",
    "load_folder",
    "merge_folder",
    "read_run",
]

FORMAT = "sylva-run/1"
#: What a run was asked for and, once it is finished, what came of it.
RECORD = "sylva.json"


def read_run(
    folder: str | os.PathLike[str], *, finished: bool = True
) -> dict[str, Any]:
    """Read the ``sylva.json`` of a fine-tuning's folder.

    Parameters
    ----------
    folder : path
        The folder.
    finished : bool
        Whether to refuse a run that was interrupted.

    Returns
    -------
    dict
        As from `finetune`; of an interrupted run, what it was asked for.

    Raises
    ------
    AdapterError
        If there is none, it is damaged, or it was interrupted.
    """
    path = Path(folder) / RECORD
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = f"`{folder}` is not the folder of a fine-tuning: it has no {RECORD}."
        raise AdapterError(msg) from error
    except (ValueError, OSError) as error:
        msg = f"`{path}` is damaged ({error}); fine-tune again."
        raise AdapterError(msg) from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        msg = f"`{path}` is not of the format {FORMAT}."
        raise AdapterError(msg)
    if finished and not run["finished"]:
        msg = (
            f"the fine-tuning in `{folder}` was interrupted; go on with it first"
            " (`resume=True`, `sylva finetune --resume`)."
        )
        raise AdapterError(msg)
    return run


def load_folder(
    folder: str | os.PathLike[str], *, base: str | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a fine-tuned model: its base, with the folder's adapter embedded.

    Parameters
    ----------
    folder : path
        From `finetune`.
    base : str, optional
        The base model, where it is not where it was: the same weights, which is checked.

    Returns
    -------
    model, tokenizer, run
        The model in evaluation mode, and what ``sylva.json`` holds.

    Raises
    ------
    AdapterError
        If the folder is damaged, or the base model is not the one it was made for.
    ModelError
        If the base model cannot be loaded.
    """
    run = read_run(folder)
    task = TaskConfig(**run["task"])
    model, tokenizer = load_model(
        base or task.model,
        task=task.task,
        labels=run["labels"] or None,
        pooling=task.pooling,
        dtype=task.dtype,
        seed=run["training"]["seed"],
    )
    load_adapter(model, Path(folder) / "adapter")
    return model.eval(), tokenizer, run


def check_pairs(run: Mapping[str, Any], dataset: TextDataset) -> None:
    """Raise `DataError` for single texts where a model was trained on pairs, or pairs."""
    found = isinstance(dataset.texts[0], tuple)
    if run.get("pairs", found) != found:
        kinds = ("single texts", "pairs of texts")
        msg = (
            f"{dataset.name} has {kinds[found]}, and the model was trained on"
            f" {kinds[not found]}; say where they are: `text_column`, a name or two."
        )
        raise DataError(msg)


def evaluate_folder(
    folder: str | os.PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    answers: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a fine-tuned model, on its own evaluation data or on other data.

    Parameters
    ----------
    folder : path
        From `finetune`.
    changes : mapping, optional
        Fields of `TaskConfig` to change, such as ``eval_data`` or ``eval_split``.
    base : str, optional
        The base model, where it is not where it was.
    batch_size : int
        Texts in a batch.
    device : str
        Where to.
    answers : path, optional
        A file to write: for each prompt a line of JSON with ``prompt``, ``references``
        and the model's ``answer``. The metric must be one of what a model writes or
        chooses.
    overwrite : bool
        Whether to replace that file if it is there.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    dict
        Metrics of `sylva_train.evaluate`, and ``data``: of what.

    Raises
    ------
    ConfigError
        If a split of a single file, or answers to no prompts, are asked for.
    OutputExistsError
        If ``answers`` exists and not ``overwrite``.
    SylvaError
        If the folder, its base model or the data cannot be used.
    """
    with Progress(enabled=progress) as bars:
        changes = dict(changes or {})
        task = TaskConfig(**(read_run(folder)["task"] | changes))
        check_metric(task)
        if answers is not None:
            if task.metric not in ANSWERS:
                msg = (
                    "`answers` are there for a `metric` of what a model writes or chooses:"
                    f" {', '.join(ANSWERS)}; got {task.metric}."
                )
                raise ConfigError(msg)
            check_file(answers, overwrite=overwrite)
        source = task.eval_data or task.data
        if "eval_split" in changes and is_file(source):
            msg = (
                f"`split` must not be given with a single file; got {task.eval_split!r}"
                f" and `{source}`."
            )
            raise ConfigError(msg)
        model, tokenizer, run = load_folder(folder, base=base)
        seed = run["training"]["seed"]
        labels = run["labels"] or None
        _, data = read_data(task, seed=seed, labels=labels, training=False)
        assert data is not None
        check_pairs(run, data)
        loader = evaluation_loader(
            data,
            tokenizer,
            task.max_length,
            batch_size,
            progress=bars.stage("tokenizing"),
        )
        tell_of_cuts(loader, bars)
        model.to(pick_device(device))
        found = evaluate(
            model,
            loader,
            metric=task.metric,
            meteor=task.meteor,
            predictions=answers is not None,
            generation=task.generation,
            progress=bars.stage("evaluating"),
        )
    if answers is not None:
        names = ("prompts", "references", "predictions")
        rows = zip(*(found.pop(name) for name in names), strict=True)
        keys = ("prompt", "references", "answer")
        write_rows(answers, [dict(zip(keys, row, strict=True)) for row in rows])
    return found | {"data": data.name}


def merge_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the fine-tuned model whole, as a folder that `load_model` takes.

    The Auto classes of `transformers` load it too, unless it is a `PooledClassifier`.

    Parameters
    ----------
    folder : path
        From `finetune`.
    output : path
        The new folder, as large as the base model.
    base : str, optional
        The base model, where it is not where it was.
    overwrite : bool
        Whether to replace a model that is there.

    Raises
    ------
    OutputExistsError
        If ``output`` exists and not ``overwrite``, or it is the base model.
    SylvaError
        If the folder or its base model cannot be used.
    """
    check_folder(output, marks=["config.json"], overwrite=overwrite)
    model = Path(base or read_run(folder)["task"]["model"])
    if Path(output).resolve() == model.expanduser().resolve():
        msg = f"`{output}` is the base model, which the adapter needs; choose another path."
        raise OutputExistsError(msg)
    loaded, tokenizer, _ = load_folder(folder, base=base)
    with atomic_folder(output, overwrite=overwrite) as temporary, quiet():
        merged: Any = merge(loaded)
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
