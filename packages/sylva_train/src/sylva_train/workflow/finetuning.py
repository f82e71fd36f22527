"""Fine-tuning from start to end, into a folder that an interrupted run goes on from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

from sylva_train._artifacts import as_read
from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train._files import atomic_folder, occupied, write_text
from sylva_train._torch import tensor_bytes
from sylva_train.checkpoint import checkpoints
from sylva_train.config import SylvaConfig, TaskConfig, TrainingConfig
from sylva_train.data import Loader
from sylva_train.evaluation import evaluate
from sylva_train.importance import Scores
from sylva_train.layers import check_masks, embed, find_saved
from sylva_train.masks import Masks
from sylva_train.options import SCORING, SELECTION, SylvaOptions, samples_to_score
from sylva_train.processes import agree, is_first, together
from sylva_train.progress import Progress
from sylva_train.selection import check_selection, select_as
from sylva_train.targets import find_targets
from sylva_train.training import number_of_steps, pick_device, train
from sylva_train.tuner import save_adapter

from .heads import heads
from .outputs import check_folder, differences
from .runs import FORMAT, RECORD, read_run
from .scoring import begin_scoring, examples_seen, score_task, sylva_options
from .task import SCORED, Task, load_task, located, tell_of_cuts

__all__ = ["finetune"]

MASKS = "masks.safetensors"
#: Options that say how to choose blocks, which masks bring with them.
CHOICE = SELECTION | {"importance", "samples", *SCORING}
Given = TypeVar("Given", Masks, Scores)


def run_record(
    task: TaskConfig, config: SylvaConfig, training: TrainingConfig, source: str | None
) -> dict[str, Any]:
    """Return what ``sylva.json`` says of a run that has begun."""
    record = {
        "format": FORMAT,
        "finished": False,
        "task": dataclasses.asdict(task),
        "sylva": sylva_options(config),
        "training": dataclasses.asdict(training),
        "source": source,
        "scoring": None,
    }
    return as_read(record)


def check_same(begun: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Raise `ConfigError` where a run that is to go on has other options."""
    differ = differences(begun, wanted)
    if begun["source"] != wanted["source"] and wanted["source"] is not None:
        differ.append("the blocks come from other masks or scores")
    if differ:
        msg = (
            f"`{output}` is a run with other options: {'; '.join(differ)}. Go on with the"
            " same ones, or choose another folder."
        )
        raise ConfigError(msg)


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
        Chosen or scored before; nothing is scored then, and the options that they were
        made with take the place of ``config``'s. Those of the layers are taken that
        ``target_modules`` and ``exclude_modules`` name.
    resume : bool
        Go on with an interrupted run in ``output``, or with its scoring, which is kept
        every ten minutes in a folder beside it (its name and ``.unfinished``), to the
        identical weights; begin it where there is none.
    overwrite : bool
        Whether to replace a run that is there. It is deleted when the new one's blocks
        are chosen and its training begins.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    dict
        What ``sylva.json`` holds: ``task``, ``sylva``, ``training``, ``labels``,
        ``pairs`` (whether texts are pairs of them), ``metrics`` of the evaluation,
        ``history`` of the training, ``trainable`` (``head`` of them outside of the
        blocks) and ``total`` weights, and ``scoring``: the ``samples`` that were scored
        and the ``seconds`` that it took, None where ``masks`` or ``scores`` were given.

    Raises
    ------
    OutputExistsError
        If ``output`` or scoring for it exists and neither ``resume`` nor ``overwrite``
        is set.
    ConfigError
        If ``resume`` meets a run or scoring with other options.
    SylvaError
        Whatever stops scoring, training or saving.
    """
    output = Path(output)
    task_config = located(task_config)
    if masks is not None and scores is not None:
        msg = "`masks` and `scores` must not both be given: masks are made from scores."
        raise ConfigError(msg)
    given = masks if masks is not None else scores
    source = None
    if given is not None:
        config, source = chosen(config, given), origin(given)
    wanted = run_record(task_config, config, training, source)
    with together():  # before the first of several processes writes
        begun = begun_run(output, wanted, resume=resume, overwrite=overwrite)
    if begun is not None and begun["finished"]:
        return begun
    first, unfinished = is_first(), None
    if begun is None and given is None:
        unfinished = begin_scoring(output, resume=resume, overwrite=overwrite)
    pick_device(training.device)  # refused before any time is spent on the data
    with Progress(enabled=progress) as bars:
        task = load_task(
            task_config, seed=training.seed, modules_to_save=config.modules_to_save
        )
        bars.say(
            f"{len(task.train):,} examples to train on ({task.train.name}),"
            f" {task.eval_examples:,} to evaluate on."
        )
        # What the data and the tokenizer do not allow is found before anything is scored.
        loader = task.loader(training, progress=bars.stage("tokenizing"))
        eval_loader = task.eval_loader(training, progress=bars.stage("tokenizing"))
        for batches in (loader, eval_loader):
            tell_of_cuts(batches, bars)
        config = dataclasses.replace(config)
        if config.modules_to_save is None:
            config.modules_to_save = heads(task.model, task_config.task)
        seen = examples_seen(loader, training)
        if begun is not None:
            masks = Masks.load(output / MASKS)
            wanted["scoring"] = begun.get("scoring")
        elif masks is None:
            try:
                masks, scores, wanted["scoring"] = choose(
                    task, config, training, seen, scores, unfinished, bars
                )
            except ConfigError:
                # What was scored must not be in the way of other options.
                if unfinished is not None and not resume and first:
                    shutil.rmtree(unfinished, ignore_errors=True)
                raise
        else:
            masks = of_targets(masks, task, config)
        config.samples = samples_to_score(config.samples, seen)
        total = sum(p.numel() for p in task.model.parameters())
        agree(masks.digest(), "blocks to train")
        # Masks of another model stop here, before anything is written or replaced.
        embed(task.model, masks, modules_to_save=config.modules_to_save)
        with together():
            if begun is None and first:
                begin(output, wanted, masks, scores, overwrite=overwrite)
                if unfinished is not None:
                    shutil.rmtree(unfinished, ignore_errors=True)
        loaders = loader, eval_loader
        found = train_blocks(
            task, loaders, config, training, output, masks, resume, bars
        )
    record = wanted | {"finished": True, **found, "total": total}
    with together():
        if first:
            write_text(output / RECORD, json.dumps(record, indent=1))
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return record


def choose(
    task: Task,
    config: SylvaConfig,
    training: TrainingConfig,
    seen: int,
    scores: Scores | None,
    unfinished: Path | None,
    bars: Progress,
) -> tuple[Masks, Scores, dict[str, Any] | None]:
    """Choose blocks by scores, which are made where there are none; say what that took."""
    scoring = None
    if scores is None:
        drawn = check_selection(config, task.model)
        check_masks(task.model, drawn, config.modules_to_save)
        find_saved(task.model, config.modules_to_save)
        start = time.perf_counter()
        scores = score_task(
            task,
            config,
            seen=seen,
            seed=training.seed,
            batch_size=min(SCORED, training.batch_size),
            device=training.device,
            progress=bars,
            checkpoint=unfinished,
        )
        seconds = time.perf_counter() - start
        scoring = {"samples": scores.metadata["samples"], "seconds": seconds}
    else:
        scores = of_targets(scores, task, config)
    masks = select_as(config, scores, task.model, task.score_loader(4, 0))
    return masks, scores, scoring


def of_targets(given: Given, task: Task, config: SylvaConfig) -> Given:
    """Return masks or scores of the layers that options name; of all if they name none.

    Raises
    ------
    ConfigError
        If a layer has none.
    """
    patterns = config.target_modules, config.exclude_modules
    if patterns == ("all-linear", None):
        return given
    targets = find_targets(task.model, *patterns)
    known = {*given, *given.metadata.get("left_out", ())}
    missing = next((name for name in targets if name not in known), None)
    if missing is not None:
        what = "scores" if isinstance(given, Scores) else "masks"
        msg = (
            f"`target_modules` and `exclude_modules` leave `{missing}` in, of which there"
            f" are no {what}: leave it out, or make {what} again with the same options."
        )
        raise ConfigError(msg)
    kept = {name: given[name] for name in given if name in targets}
    return type(given)(kept, given.metadata)


def begun_run(
    output: Path, wanted: dict[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Return the record of the run to go on with, None if there is none to be."""
    if resume and (output / RECORD).exists():
        begun: dict[str, Any] = read_run(output, finished=False)
        check_same(begun, wanted, output)
        return begun
    if resume and occupied(output):
        msg = f"`{output}` has no run to go on with; choose another folder."
        raise OutputExistsError(msg)
    check_new(output, overwrite=overwrite)
    return None


def begin(
    output: Path,
    record: dict[str, Any],
    masks: Masks,
    scores: Scores | None,
    *,
    overwrite: bool,
) -> None:
    """Make the folder of a run whose blocks are chosen."""
    with atomic_folder(output, overwrite=overwrite) as folder:
        if scores is not None:
            scores.save(folder / "scores.safetensors")
        masks.save(folder / MASKS)
        write_text(folder / RECORD, json.dumps(record, indent=1))


def chosen(config: SylvaConfig, given: Masks | Scores) -> SylvaConfig:
    """Return the options with those that masks or scores were made with.

    Warns
    -----
    UserWarning
        If others were asked for, which then do not count.
    """
    names = [name for name in sorted(CHOICE) if given.metadata.get(name) is not None]
    if isinstance(given, Scores):
        names = [n for n in names if n not in SELECTION]
    known = {name: given.metadata[name] for name in names}
    # Rules that need no data have seen no sample.
    known["samples"] = known.get("samples") or config.samples
    usual = {field.name: field.default for field in dataclasses.fields(SylvaOptions)}
    # The seed is of more than the choice, and there may be fewer samples than asked for.
    differ = [
        f"`{name}` is {value!r} there and {getattr(config, name)!r} here"
        for name, value in known.items()
        if name not in {"samples", "seed"}
        and getattr(config, name) not in (value, usual[name])
    ]
    if differ:
        what = "scores" if isinstance(given, Scores) else "masks"
        msg = (
            f"the {what} were made with other options, which count: {'; '.join(differ)}."
            f" Leave these out, or make {what} with them."
        )
        warnings.warn(msg, stacklevel=3)
    return dataclasses.replace(config, **known)


def origin(given: Masks | Scores) -> str:
    """Identify masks or scores that were given, to know them again."""
    if isinstance(given, Masks):
        return f"masks {given.digest()}"
    digest = hashlib.sha256()
    for name, layer in sorted(given.items()):
        digest.update(name.encode())
        for part in (layer.s_out, layer.s_in, layer.grid):
            if part is not None:
                digest.update(tensor_bytes(part))
    return f"scores {digest.hexdigest()}"


def check_new(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that is in the way."""
    record = output / RECORD
    unfinished = False
    if record.exists() and not overwrite:
        unfinished = not read_run(output, finished=False)["finished"]
    advice = "go on with it (`resume=True`, `--resume`), " if unfinished else ""
    check_folder(output, marks=[RECORD], overwrite=overwrite, advice=advice)


def train_blocks(
    task: Task,
    loaders: tuple[Loader, Loader],
    config: SylvaConfig,
    training: TrainingConfig,
    output: Path,
    masks: Masks,
    resume: bool,
    bars: Progress,
) -> dict[str, Any]:
    """Train embedded blocks, evaluate them and save the adapter."""
    loader, eval_loader = loaders
    steps = number_of_steps(loader, training)
    none = sum(not mask for mask in masks.values())
    bars.say(
        f"Training {masks.trainable:,} weights for {steps:,} steps: {masks.blocks:,} blocks,"
        f" {masks.density:.1%} of the weights of {len(masks)} layers"
        + (f" ({none} without a block)." if none else ".")
    )
    before = max(checkpoints(output / "checkpoints"), default=0)
    if before:
        bars.say(f"Going on after step {before:,}.")

    def show(step: dict[str, float]) -> None:
        words = f"step {step['step']:,} of {steps:,}, loss {step['loss']:.3f}"
        bars.report("training", step["step"], steps, words=words)

    result = train(
        task.model,
        loader,
        training,
        output=output / "checkpoints",
        resume=resume,
        evaluate=functools.partial(
            evaluate,
            loader=eval_loader,
            metric=task.config.metric,
            meteor=task.config.meteor,
            generation=task.config.generation,
            progress=bars.stage("evaluating"),
        ),
        progress=False,
        callbacks=[show],
    )
    with together():
        if is_first():
            save_adapter(
                task.model, output / "adapter", config=config, overwrite=resume
            )
    head = sum(
        p.numel()
        for name, p in task.model.named_parameters()
        if p.requires_grad and "sylva_values" not in name
    )
    return {
        "labels": task.train.label_names,
        "pairs": isinstance(task.train.texts[0], tuple),
        "metrics": result.metrics,
        "history": result.history,
        "seconds_per_step": result.seconds_per_step,
        "train_seconds": result.train_seconds,
        "blocks": masks.blocks,
        "trainable": masks.trainable + head,
        "head": head,
        "density": masks.density,
    }
