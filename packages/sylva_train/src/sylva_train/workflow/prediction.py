"""What a fine-tuned model says of texts without labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, DataError
from sylva_train.config import TaskConfig
from sylva_train.data import Loader, TextDataset, load_texts
from sylva_train.evaluation import label_logits, write
from sylva_train.options import LABELLED
from sylva_train.progress import Progress
from sylva_train.training import pick_device

from .outputs import check_file, write_rows
from .runs import check_pairs, load_folder, read_run
from .task import evaluation_loader, is_file, tell_of_cuts

__all__ = ["predict", "predict_file"]

#: Columns that are added to a row.
ADDED = ("prediction", "probability")
#: Endings of the files that rows are written to.
WRITTEN = (".jsonl", ".csv")


def predict(
    folder: str | os.PathLike[str],
    texts: Sequence[str | tuple[str, str]],
    *,
    base: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> list[Any]:
    """Say what a fine-tuned model, its adapter loaded into a fresh base, says of texts.

    Parameters
    ----------
    folder : path
        From `finetune`.
    texts : sequence of str or of (str, str)
        Texts, or pairs of them where the model was trained on pairs; or prompts.
    base : str, optional
        The base model, where it is not where it was.
    batch_size : int
        Texts in a batch.
    device : str
        Where to; ``"auto"`` takes CUDA where there is one.

    Returns
    -------
    list
        For each text, of a classifier the most probable class and its probability (a pair
        of str and float), of a regression the number, of a language model what it writes,
        by the run's options of generation.

    Raises
    ------
    ConfigError
        If ``texts`` is a single string.
    DataError
        If they are pairs and the model was trained on single texts, or the reverse; if
        one of them is neither.
    """
    if isinstance(texts, str):
        msg = f"`texts` must be a list of texts; got one: pass [{texts[:40]!r}]."
        raise ConfigError(msg)
    if not len(texts):
        return []
    task = TaskConfig(**read_run(folder)["task"])
    data = TextDataset("texts", task.task, list(texts))
    silent = Progress(enabled=False)
    found = predictions(folder, data, task, base, batch_size, device, silent)
    single = task.task != "classification"
    return [row["prediction"] if single else tuple(row.values()) for row in found]


def predictions(
    folder: str | os.PathLike[str],
    data: TextDataset,
    task: TaskConfig,
    base: str | None,
    batch_size: int,
    device: str,
    bars: Progress,
) -> list[dict[str, Any]]:
    """Return a model's ``prediction`` of each text, and its ``probability`` if it has one."""
    check_pairs(read_run(folder), data)
    model, tokenizer, run = load_folder(folder, base=base)
    loader: Loader = evaluation_loader(data, tokenizer, task.max_length, batch_size)
    model.to(pick_device(device))
    progress = bars.stage("predicting")
    # A causal model's prompts are cut for their answers, with a warning.
    if task.task != "causal-lm":
        tell_of_cuts(loader, bars)
    if task.task not in LABELLED:
        prompts = list(dict.fromkeys(map(str, loader.dataset.texts)))
        written = write(model, loader, prompts, task.generation, progress)
        answers = dict(zip(prompts, written, strict=True))
        return [{"prediction": answers[str(text)]} for text in loader.dataset.texts]
    logits = label_logits(model, loader, progress)
    if task.task == "regression":
        return [{"prediction": number} for number in logits.squeeze(-1).tolist()]
    best = logits.softmax(-1).max(-1)
    return [
        {"prediction": run["labels"][index], "probability": probability}
        for index, probability in zip(
            best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def predict_file(
    folder: str | os.PathLike[str],
    data: str,
    output: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    split: str | None = None,
    base: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Add a fine-tuned model's predictions to the rows of some data.

    Parameters
    ----------
    folder : path
        From `finetune`.
    data : str
        As for `sylva_train.load_data`; labels and targets need not be there.
    output : path, optional
        File to write the rows to: ``.jsonl`` or ``.csv``.
    changes : mapping, optional
        Fields of `TaskConfig` to change, such as ``text_column`` or ``num_beams``.
    split : str, optional
        Where the data has splits; ``"test"`` by default.
    base, batch_size, device
        As for `predict`.
    overwrite : bool
        Whether to replace the output if it is there.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    list of dict
        Each row's columns, ``prediction`` (a class, a number or what is written) and, of
        a class, its ``probability``.

    Raises
    ------
    ConfigError
        If the output has another ending, or a split of a single file is asked for.
    OutputExistsError
        If the output exists and not ``overwrite``.
    DataError
        If the data cannot be used, or has a column of the name of one that is added.
    SylvaError
        If the folder or its base model cannot be used.
    """
    if output is not None:
        if Path(output).suffix.lower() not in WRITTEN:
            msg = f"`out` must end in {' or '.join(WRITTEN)}; got {str(output)!r}."
            raise ConfigError(msg)
        check_file(output, overwrite=overwrite)
    with Progress(enabled=progress) as bars:
        run = read_run(folder)
        task = TaskConfig(**(run["task"] | dict(changes or {})))
        dataset, rows = load_texts(
            data,
            task=task.task,
            split=split or (None if is_file(data) else "test"),
            text_column=task.text_column,
            per_task=task.per_task,
            seed=run["training"]["seed"],
        )
        taken = [name for name in ADDED if name in rows[0]]
        if taken:
            msg = (
                f"{dataset.name}: a column is called {taken[0]!r}, as one that is added"
                " to the rows; give it another name."
            )
            raise DataError(msg)
        found = predictions(folder, dataset, task, base, batch_size, device, bars)
    rows = [row | added for row, added in zip(rows, found, strict=True)]
    if output is not None:
        write_rows(output, rows, as_csv=Path(output).suffix.lower() == ".csv")
    return rows
