"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from sylva_train._checks import ConfigError, DataError
from sylva_train._torch import caching, on_device, preserved_modes, without_cache
from sylva_train.checkpoint import (
    Checkpoint,
    capture,
    claimed,
    identify,
    load_checkpoint,
    restore,
    save_checkpoint,
    update_record,
)
from sylva_train.config import TrainingConfig
from sylva_train.curvature import Loss, default_loss, loss_units, note
from sylva_train.evaluation import evaluate as evaluate_model
from sylva_train.layers import sync
from sylva_train.optimizer import SparseAdamW
from sylva_train.processes import agree, is_first, rank_and_size, together
from sylva_train.progress import Progress

from .batches import Batches, BatchLoader, in_epochs, number_of_steps
from .gradient import Batch, accumulate_gradient, clip_gradient, share
from .setup import check_parts, make_scheduler, place, preserved_rng, seed_everything

__all__ = ["TrainResult", "train"]

Evaluate = Callable[[nn.Module], Mapping[str, Any] | float]

#: Steps that are not timed: the first ones fill caches and allocate the moments.
WARM = 2


@dataclass(frozen=True)
class TrainResult:
    """What came of a training run, its interrupted parts included.

    Attributes
    ----------
    history : list of dict
        For each step ``step`` (from 1), ``loss`` (mean over the step's samples, or
        tokens), ``lr``, ``grad_norm`` (before clipping), ``seconds``, and, where it was
        evaluated, ``score``.
    steps : int
        Optimizer steps.
    seconds_per_step : float or None
        Median; None for a run of two steps or fewer. The first two steps, evaluation
        and checkpoints are not counted in any of the times.
    step_seconds_iqr : (float, float) or None
        First and third quartile.
    train_seconds : float
        All steps together.
    metrics : dict
        Of the last evaluation; empty without one.
    """

    history: list[dict[str, float]]
    steps: int
    seconds_per_step: float | None
    step_seconds_iqr: tuple[float, float] | None
    train_seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A run under way: its parts, and where it is."""

    model: nn.Module
    loader: BatchLoader
    config: TrainingConfig
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    device: torch.device
    loss: Loss
    total: int
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if any(id(p) not in names for p in trained):
            msg = (
                "`optimizer` trains a parameter that `model` does not have; make it after"
                " the model took its final form."
            )
            raise ConfigError(msg)
        self.named = {names[id(p)]: p for p in trained}
        self.caching = caching(self.model)
        self.alike = False
        # Blocks that no step has had a gradient for yet; None before the first one.
        self.idle: list[str] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.history)

    def groups(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step, and move the position behind them.

        A step takes ``accumulate`` batches of one epoch; the last may take fewer.
        """
        while True:
            batches = iter(self.loader.epoch(self.epoch, start=self.batch))
            while group := list(itertools.islice(batches, self.config.accumulate)):
                self.batch += len(group)
                yield group
            if not self.batch:
                msg = f"`loader` gave no batch in epoch {self.epoch}."
                raise DataError(msg)
            self.epoch, self.batch = self.epoch + 1, 0

    def advance(self, group: Sequence[Batch]) -> dict[str, float]:
        """Take one optimizer step."""
        rank, processes = rank_and_size()
        if processes > 1:
            self.compare(group)
            # Each drops out units of its own, wherever the run was interrupted.
            state = np.random.SeedSequence([self.config.seed, self.step, rank])
            seed_everything(int(state.generate_state(1)[0]), self.device)
        first = self.batch - len(group)
        where = f"step {self.step + 1} (epoch {self.epoch}, batch {first})"
        self.model.zero_grad(set_to_none=True)
        batches = [on_device(batch, self.device) for batch in group]
        with without_cache(
            self.caching
        ):  # also in passes that checkpointing runs again
            loss = accumulate_gradient(self.model, batches, self.loss, where)
        if self.idle != []:
            blocks = (n for n in self.named if "sylva_values" in n.split("."))
            idle = blocks if self.idle is None else self.idle
            self.idle = [name for name in idle if self.named[name].grad is None]
        norm = clip_gradient(self.named, self.config.max_grad_norm, where)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        return {"step": self.step + 1, "loss": loss, "lr": rate, "grad_norm": norm}

    def compare(self, group: Sequence[Batch]) -> None:
        """Raise `ConfigError` unless all processes begin with the same batches."""
        if not self.alike:
            digest = hashlib.sha256()
            for batch in group:
                note(batch, digest)
            agree(digest.hexdigest(), "batches")
            self.alike = True

    def evaluate(self, evaluate: Evaluate) -> float:
        """Evaluate the model; training goes on as if nothing had happened."""
        self.model.eval()
        with preserved_rng(self.device):
            found = evaluate(self.model)
        self.model.train()
        self.metrics = dict(found) if isinstance(found, Mapping) else {"score": found}
        first = next(iter(self.metrics), "score")
        return float(self.metrics["score" if "score" in self.metrics else first])

    def save(self, output: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        """Write a checkpoint; of several processes, which have the same, the first does."""
        if not is_first():
            return
        state = capture(self.model, self.optimizer, self.scheduler, self.device)
        save_checkpoint(output, Checkpoint(self.step, state, self.record()), identity)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the state, as JSON."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            # Not the arrays and the like that an evaluation of one's own may return.
            "metrics": {
                name: value for name, value in self.metrics.items() if is_json(value)
            },
        }

    def score(self, evaluate: Evaluate, kept: str | os.PathLike[str] | None) -> None:
        """Evaluate after a step, and note the score in its checkpoint in a folder."""
        self.history[-1]["score"] = self.evaluate(evaluate)
        if kept is not None and is_first():
            update_record(kept, self.step, self.record())

    def acquaint(self) -> None:
        """Let layers see who reads the same input, as they had when a run was interrupted.

        What they keep of it, and with that how products round, goes by what they have seen.
        """
        with preserved_rng(self.device):
            for batch in itertools.islice(self.loader.epoch(0), 1):
                part = share(on_device(batch, self.device))
                if loss_units(self.model, part):
                    with without_cache(self.caching):
                        self.loss(self.model, part)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        restore(
            checkpoint.state, self.model, self.optimizer, self.scheduler, self.device
        )
        self.epoch, self.batch = checkpoint.record["epoch"], checkpoint.record["batch"]
        self.history = checkpoint.record["history"]
        self.metrics = checkpoint.record["metrics"]

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now."""
        return self.step == self.total or (every is not None and self.step % every == 0)

    def result(self) -> TrainResult:
        """Sum the run up."""
        seconds = [record["seconds"] for record in self.history]
        timed = seconds[WARM:]
        quartiles = np.quantile(timed, (0.25, 0.5, 0.75)).tolist() if timed else None
        return TrainResult(
            history=self.history,
            steps=self.step,
            seconds_per_step=quartiles[1] if quartiles else None,
            step_seconds_iqr=(quartiles[0], quartiles[2]) if quartiles else None,
            train_seconds=sum(seconds),
            metrics=self.metrics,
        )


def is_json(value: Any) -> bool:
    """Whether a metric is a number, a word, or a few of these by name."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_json(v) for k, v in value.items())
    return isinstance(value, str | int | float)


def train(
    model: nn.Module,
    loader: BatchLoader | Batches,
    config: TrainingConfig | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    eval_loader: Iterable[Batch] | None = None,
    evaluate: Evaluate | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, float]], object]] = (),
) -> TrainResult:
    """Train what of a model requires a gradient: embedded blocks, LoRA, or all of it.

    Parameters
    ----------
    model : torch.nn.Module
        Moved to ``config.device`` and trained in place. When the function returns, or
        fails, its dense weights show the values of its embedded blocks.
    loader : BatchLoader, DataLoader or list
        Batches with ``labels``: a `sylva_train.Loader`, or without ``output`` anything
        with a length that can be run through for each epoch.
    config : TrainingConfig, optional
        Number of steps, learning rate, schedule, seed and the like.
    loss : callable, optional
        Mean loss of (model, batch), where the model does not compute its own.
    optimizer : torch.optim.Optimizer, optional
        Instead of `SparseAdamW` with ``config.lr`` and ``config.weight_decay``, which has
        float32 masters of weights in bfloat16 and float16, also in full fine-tuning.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Instead of the one that ``config`` describes; stepped once a step.
    eval_loader : iterable of batches, optional
        Data for `sylva_train.evaluate`, every ``config.eval_every`` steps and at the
        end.
    evaluate : callable, optional
        Instead of that: takes the model, returns a score or a dict of metrics, of which
        ``"score"``, or else the first, goes into the history.
    output : path, optional
        Folder for checkpoints: before the first step, every ``config.save_every`` steps
        (None: after each epoch) and at the end. The last two are kept.
    resume : bool
        Go on from the last whole checkpoint in ``output``, if there is one, to the
        weights that the run would have reached without the interruption.
    progress : bool
        Show a progress bar on a terminal.
    callbacks : sequence of callables
        Each is called after every step, and after its checkpoint, with the step's entry
        of the history.

    Returns
    -------
    TrainResult

    Raises
    ------
    NonFiniteError
        If a loss or a gradient is NaN or infinite, before it changes a weight.
    ConfigError
        If parts do not fit together.
    DataError
        If there is no batch, or the model returns no loss.
    OutputExistsError
        If ``output`` has checkpoints and ``resume`` is False, or another process trains
        in it.
    CheckpointError
        If the checkpoint is of another run, or none is whole.

    Notes
    -----
    Under an initialised `torch.distributed` every process is given the same model, options
    and batches, takes its share of the samples of each batch, and adds the gradients up:
    the steps are those of one process to rounding, but for what dropout draws. All
    evaluate; the first writes the checkpoints. The model is the bare one.

    The same seed gives the same weights, bit for bit, on a CPU with the same number of
    threads; evaluation does not change the course of a run. The caller's random
    generators are left as they were.
    """
    config = config or TrainingConfig()
    with together():  # before the first of several processes writes
        check_parts(model, optimizer, scheduler, output, resume=resume)
        batches = in_epochs(loader, kept=output is not None)
        total = number_of_steps(batches, config)
    device = place(model, config.device)
    optimizer = optimizer or SparseAdamW(
        model, lr=config.lr, weight_decay=config.weight_decay
    )
    scheduler = scheduler or make_scheduler(optimizer, config, total)
    run = Run(
        model,
        batches,
        config,
        optimizer,
        scheduler,
        device,
        loss or default_loss,
        total,
    )
    if evaluate is None and eval_loader is not None:
        evaluate = functools.partial(evaluate_model, loader=eval_loader)
    with preserved_modes(model):
        model.train()
        try:
            with contextlib.ExitStack() as kept, preserved_rng(device):
                with together():
                    if output is not None and is_first():
                        kept.enter_context(claimed(output))
                seed_everything(config.seed, device)
                run_to_end(run, evaluate, output, callbacks, resume, progress)
        finally:
            model.zero_grad(set_to_none=True)
            sync(model)
    if run.idle:
        warnings.warn(
            f"no step had a gradient for the blocks of {len(run.idle)} layers, like"
            f" `{run.idle[0]}`: the loss does not depend on them, or takes the weights of"
            " the base layers. They are as they were.",
            stacklevel=2,
        )
    return run.result()


def run_to_end(
    run: Run,
    evaluate: Evaluate | None,
    output: str | os.PathLike[str] | None,
    callbacks: Sequence[Callable[[dict[str, float]], object]],
    resume: bool,
    progress: bool,
) -> None:
    """Take the steps that are left, with evaluation and checkpoints between them."""
    identity: dict[str, Any] = {}
    if output is not None:
        data = {"batches": len(run.loader)} | getattr(run.loader, "identity", {})
        if rank_and_size()[1] > 1:
            data["processes"] = rank_and_size()[1]
        identity = identify(run.model, run.optimizer, run.scheduler, run.config, data)
        with together():
            checkpoint = load_checkpoint(output, identity) if resume else None
            if checkpoint is not None:
                if checkpoint.step:
                    run.acquaint()
                run.load(checkpoint)
        if checkpoint is None:
            # The start is kept too: a new head is drawn by whoever made the model.
            run.save(output, identity)
    failed = bool(run.history) and "score" not in run.history[-1]
    if evaluate is not None and failed and run.due(run.config.eval_every):
        run.score(evaluate, output)
    save_every = run.config.save_every
    groups = run.groups()
    with Progress(enabled=progress) as bars:
        while run.step < run.total:
            begin = time.perf_counter()
            record = run.advance(next(groups))
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            record["seconds"] = time.perf_counter() - begin
            run.history.append(record)
            epoch_end = save_every is None and run.batch >= len(run.loader)
            kept = output if run.due(save_every) or epoch_end else None
            # First: hours of training are not to be lost where an evaluation fails.
            if kept is not None:
                run.save(kept, identity)
            if evaluate is not None and run.due(run.config.eval_every):
                run.score(evaluate, kept)
            words = f"step {run.step}  loss {record['loss']:.4f}"
            bars.report("training", run.step, run.total, words=words, lines=False)
            for callback in callbacks:
                callback(record)
