"""A task made ready: its data read, its model and tokenizer loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sylva_train._checks import ConfigError, DataError, ModelError, check_choice
from sylva_train.config import TaskConfig, TrainingConfig
from sylva_train.data import Loader, TextDataset, builtin_names, is_single, load_data
from sylva_train.evaluation import check_libraries, check_prompts
from sylva_train.metrics import GENERATION, known_metrics
from sylva_train.options import MINILM
from sylva_train.pretrained import load_model, saved_labels
from sylva_train.progress import Progress, Report

from .heads import begin_head

__all__ = [
    "HELD_OUT",
    "SCORED",
    "Task",
    "check_metric",
    "evaluated_on",
    "evaluation_loader",
    "is_file",
    "load_task",
    "located",
    "read_data",
    "tell_of_cuts",
    "words_of_cuts",
]

#: Part of a single file that is kept for evaluation.
HOLDOUT = 0.1
TENTH = "a tenth held out"
#: Examples in a batch of scoring, and of evaluation, at most.
SCORED, EVALUATED = 32, 64
#: As ``eval_split``: a tenth of the training data.
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Task:
    """A task made ready: model, tokenizer and data.

    Attributes
    ----------
    config : TaskConfig
        The options.
    model, tokenizer
        The pretrained model, with a new head where the task needs one.
    train : TextDataset
        What to train on.
    held_out : TextDataset or None
        What to evaluate on; None where only scoring was asked for.
    """

    config: TaskConfig
    model: nn.Module
    tokenizer: Any
    train: TextDataset
    held_out: TextDataset | None

    @property
    def eval_examples(self) -> int:
        """How many examples an evaluation counts: of generation, different prompts."""
        if self.held_out is None:
            return 0
        counted = self.held_out.texts
        return len(set(counted) if writes(self.config, self.held_out) else counted)

    def loader(
        self, training: TrainingConfig, *, progress: Report | None = None
    ) -> Loader:
        """Return the training batches, in the order of the seed."""
        loader = Loader(
            self.train,
            self.tokenizer,
            training.batch_size,
            max_length=self.config.max_length,
            shuffle=True,
            seed=training.seed,
            bucket=training.bucket,
            progress=progress,
        )
        check_ids(loader, self.model)
        return loader

    def score_loader(self, samples: int, seed: int, batch_size: int = SCORED) -> Loader:
        """Return batches of as many training examples as are scored, and no more.

        They are the first ones of a permutation by the seed, filled by length.
        """
        count = len(self.train)
        order = np.random.default_rng((seed, 0)).permutation(count)[:samples]
        loader = Loader(
            self.train.subset(order.tolist()),
            self.tokenizer,
            batch_size,
            max_length=self.config.max_length,
            bucket=16,
        )
        check_ids(loader, self.model)
        return loader

    def eval_loader(
        self, training: TrainingConfig, *, progress: Report | None = None
    ) -> Loader:
        """Return the evaluation batches, at most twice as large as those of training.

        What trained for hours must not fail for want of memory at its end.

        Raises
        ------
        DataError
            If the task was loaded without evaluation data.
        """
        if self.held_out is None:
            msg = f"{self.train.name}: the task was loaded without evaluation data."
            raise DataError(msg)
        return evaluation_loader(
            self.held_out,
            self.tokenizer,
            self.config.max_length,
            min(EVALUATED, 2 * training.batch_size),
            progress=progress,
        )


def check_ids(loader: Loader, model: nn.Module) -> None:
    """Raise `ModelError` for a token, or a padding, that the model has no vector of."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = len(embedding.weight)
    names = ["input_ids", "labels"] if loader.task == "seq2seq" else ["input_ids"]
    most = max(loader.tokenizer.pad_token_id, *map(loader.examples.largest, names))
    if most >= rows:
        msg = (
            f"the tokenizer has a token of number {most}, the model vectors for {rows}"
            " tokens: they do not belong together, or tokens were added without"
            " `resize_token_embeddings`."
        )
        raise ModelError(msg)


def evaluation_loader(
    dataset: TextDataset,
    tokenizer: Any,
    max_length: int,
    batch_size: int = EVALUATED,
    *,
    progress: Report | None = None,
) -> Loader:
    """Return batches to evaluate on, filled by length, which leaves little padding.

    `evaluate` and `pooled_features` give their answers in the order of the data.
    """
    return Loader(
        dataset,
        tokenizer,
        batch_size,
        max_length=max_length,
        bucket=16,
        progress=progress,
    )


def words_of_cuts(loader: Loader) -> str:
    """Say how many texts are too long: what a model does not see it cannot learn."""
    if not loader.cut:
        return ""
    data, what = loader.dataset, "texts lose their end: they"
    if loader.task == "causal-lm" and data.targets:
        what = "prompts lose their beginning: with their targets they"
    return (
        f"{loader.cut:,} of {len(data):,} {what} have more than {loader.max_length} tokens"
        f" ({data.name}). A larger `max_length` (`--max-length`) keeps more."
    )


def tell_of_cuts(loader: Loader, progress: Progress) -> None:
    """Tell of texts that are too long, if some are."""
    if words := words_of_cuts(loader):
        progress.say(words)


def located(config: TaskConfig) -> TaskConfig:
    """Return the task with its files' whole paths, to be found from another folder."""
    changes: dict[str, Any] = {}
    for name in ("data", "eval_data", "model"):
        value = getattr(config, name)
        if value is None or value == MINILM or value in builtin_names():
            continue
        path = Path(value).expanduser()
        if path.exists():
            changes[name] = str(path.resolve())
    return dataclasses.replace(config, **changes)


def is_file(spec: str) -> bool:
    """Whether data is a single file, which has no splits."""
    return spec not in builtin_names() and is_single(Path(spec).expanduser())


def evaluated_on(config: TaskConfig) -> str:
    """Say on what a task is evaluated."""
    if config.eval_data is not None:
        return config.eval_data
    return TENTH if is_divided(config) else config.eval_split


def is_divided(config: TaskConfig) -> bool:
    """Whether a tenth of the training data is evaluated on."""
    held_out = is_file(config.data) or config.eval_split == HELD_OUT
    return config.eval_data is None and held_out


def read_data(
    config: TaskConfig,
    *,
    seed: int,
    labels: Sequence[str] | None = None,
    training: bool = True,
    evaluation: bool = True,
) -> tuple[TextDataset | None, TextDataset | None]:
    """Read the data of a task.

    Parameters
    ----------
    config : TaskConfig
        Where it is.
    seed : int
        Seed of what is kept.
    labels : sequence of str, optional
        The classes, where they are known: those of the model.
    training, evaluation : bool
        Which part is wanted; the other is read only if it takes part in the answer.

    Returns
    -------
    training, evaluation : TextDataset or None

    Raises
    ------
    DataError
        If the data cannot be used; the message has file and line.
    """
    options: dict[str, Any] = {
        "text_column": config.text_column,
        "label_column": config.label_column,
        "target_column": config.target_column,
        "task": config.task,
        "per_task": config.per_task,
        "seed": seed,
    }
    examples, divided = None, is_divided(config)
    if training or divided:
        examples = load_data(
            config.data,
            split=None if is_file(config.data) else "train",
            limit=config.limit,
            labels=labels,
            **options,
        )
        if divided:
            rest, tenth = divide(examples, seed)
            return rest, limited(tenth, config, seed)
        labels = labels or examples.label_names or None
    held_out = None
    if evaluation:
        source = config.eval_data or config.data
        held_out = load_data(
            source,
            split=None if is_file(source) else config.eval_split,
            labels=labels,
            **options,
        )
        held_out = limited(held_out, config, seed)
    return examples, held_out


def divide(examples: TextDataset, seed: int) -> tuple[TextDataset, TextDataset]:
    """Hold a tenth of some examples out, the same ones for the same seed.

    Raises
    ------
    ConfigError
        If there is one example only.
    """
    count = len(set(examples.texts))
    if count < 2:
        msg = f"{examples.name} has one text: give `eval_data` to evaluate on."
        raise ConfigError(msg)
    # All rows of some texts: a held-out text must not have been trained on.
    held_out = examples.sample_texts(max(1, round(HOLDOUT * count)), seed)
    kept = set(held_out.texts)
    rest = [i for i, text in enumerate(examples.texts) if text not in kept]
    named = dataclasses.replace(held_out, name=f"{examples.name} ({TENTH})")
    return examples.subset(rest), named


def check_metric(config: TaskConfig) -> None:
    """Raise `ConfigError` for a metric of another task, before hours of training."""
    if config.metric is not None:
        check_choice("metric", config.metric, known_metrics(config.task))
        check_libraries(config.metric)


def check_split(config: TaskConfig) -> None:
    """Raise `ConfigError` for a split of a single file, which has none to evaluate on."""
    if config.eval_data is not None or not is_file(config.data):
        return
    # The default cannot be told from what nobody has asked for.
    if config.eval_split not in {HELD_OUT, TaskConfig.eval_split}:
        msg = (
            f"`eval_split` is {config.eval_split!r}, and `data` a single file, which has"
            f" no splits: {config.data}. Give the file of that split as `eval_data`, a"
            " folder with a file for each split as `data`, or"
            f' `eval_split="{HELD_OUT}"` to hold a tenth of the file out.'
        )
        raise ConfigError(msg)


def head_order(names: Sequence[str], saved: Sequence[str]) -> list[str]:
    """Return classes in the order of a head that knows them, whatever their case.

    Such a head is kept output by output: MNLI's classes are not alphabetical everywhere.
    """
    place = {name.casefold(): number for number, name in enumerate(saved)}
    if len(place) != len(saved) or {name.casefold() for name in names} != place.keys():
        return list(names)
    return sorted(names, key=lambda name: place[name.casefold()])


def writes(config: TaskConfig, dataset: TextDataset) -> bool:
    """Whether answers are written, of which a prompt has one for all its references."""
    return config.metric in GENERATION and bool(dataset.targets)


def limited(dataset: TextDataset, config: TaskConfig, seed: int) -> TextDataset:
    """Keep so many examples to evaluate on; of generation, prompts with all references."""
    if writes(config, dataset):
        return dataset.sample_texts(config.eval_limit, seed)
    return dataset.sample(config.eval_limit, seed)


def load_task(
    config: TaskConfig,
    *,
    seed: int = 0,
    evaluation: bool = True,
    modules_to_save: Sequence[str] | None = None,
) -> Task:
    """Read a task's data and load its model.

    Parameters
    ----------
    config : TaskConfig
        The task.
    seed : int
        Seed of a new head, and of what ``limit`` keeps.
    evaluation : bool
        Whether evaluation data is wanted.
    modules_to_save : sequence of str, optional
        What will be trained whole: by default the head. A regression's new one among them
        begins with the mean and the deviation of the numbers.

    Returns
    -------
    Task

    Raises
    ------
    DataError
        If the data cannot be used; the message has file and line.
    ModelError
        If the model cannot be loaded.
    ConfigError
        If the metric is not one of the task's, or evaluation is to be on a split of a
        single file.

    Warns
    -----
    UserWarning
        If a regression's new head has no bias, and the numbers are far from 0.
    """
    check_metric(config)
    if evaluation:
        check_split(config)
    training, held_out = read_data(config, seed=seed, evaluation=evaluation)
    assert training is not None
    if training.label_names:
        names = head_order(training.label_names, saved_labels(config.model))
        training = training.relabelled(names)
        if held_out is not None:
            held_out = held_out.relabelled(names)
    if held_out is not None:
        check_prompts(held_out, config.metric)
    if config.metric == "f1-binary" and len(training.label_names) != 2:
        msg = (
            f"`metric` 'f1-binary' is for two classes; {training.name} has"
            f" {len(training.label_names)}."
        )
        raise ConfigError(msg)
    model, tokenizer = load_model(
        config.model,
        task=config.task,
        labels=training.label_names or None,
        pooling=config.pooling,
        dtype=config.dtype,
        seed=seed,
    )
    # A head for several classes is not kept.
    if config.task == "regression" and len(saved_labels(config.model)) != 1:
        begin_head(model, modules_to_save, training)
    return Task(config, model, tokenizer, training, held_out if evaluation else None)
