"""One run of a comparison: adapt, train, evaluate, save, and what it took."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sylva_train._checks import NonFiniteError
from sylva_train._files import folder_size
from sylva_train.baselines import (
    Adapted,
    Method,
    SerialAdapter,
    adapt,
    parse_method,
    probe,
)
from sylva_train.config import SylvaConfig, TaskConfig, TrainingConfig
from sylva_train.curvature import describe_factor
from sylva_train.data import Loader
from sylva_train.evaluation import evaluate, number_metrics, prediction_metrics
from sylva_train.metrics import key_of, known_metrics
from sylva_train.options import samples_to_score
from sylva_train.pretrained import pooled_features, quiet
from sylva_train.targets import find_targets
from sylva_train.training import TrainResult, number_of_steps, pick_device, train
from sylva_train.tuner import save_adapter
from sylva_train.workflow import (
    SCORED,
    Task,
    evaluation_loader,
    examples_seen,
    heads,
    load_task,
    mask_entries,
    score_entries,
)

from .memory import PeakMemory
from .process import Tell

__all__ = ["run"]


def saved_bytes(adapted: Adapted, config: SylvaConfig) -> int:
    """Save what a method trained, as its users would, and return its size on disk."""
    model: Any = adapted.model
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        # PEFT asks the base's config.json, which a GGUF file has not, whether the
        # vocabulary was resized: here it never is.
        warnings.filterwarnings("ignore", "Could not find a config file")
        path = Path(folder) / "saved"
        if adapted.masks is not None:
            save_adapter(model, path, config=config)
        elif any(isinstance(m, SerialAdapter) for m in model.modules()):
            path.mkdir()
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            save_file(trained, path / "adapter.safetensors")
        else:
            model.save_pretrained(path)
        return folder_size(path)


def run_frozen(task: Task, training: TrainingConfig, tell: Tell) -> dict[str, Any]:
    """Fit a linear head on the frozen model's pooled features."""
    begin = time.perf_counter()
    loader = evaluation_loader(task.train, task.tokenizer, task.config.max_length)
    task.model.to(pick_device(training.device))
    features, labels = pooled_features(
        task.model, loader, progress=partial(tell, "reading features")
    )
    eval_features, eval_labels = pooled_features(
        task.model, task.eval_loader(training), progress=partial(tell, "evaluating")
    )
    predictions, size = probe(features, labels, eval_features, seed=training.seed)
    if task.config.task == "regression":
        metrics = number_metrics(eval_labels, predictions)
    else:
        classes = len(task.train.label_names)
        metrics = prediction_metrics(eval_labels, predictions, classes)
    metric = task.config.metric or known_metrics(task.config.task)[0]
    return {
        "score": metrics[key_of(metric)],
        "metrics": metrics,
        "trainable": 0,
        "trainable_head": size,
        "trainable_fraction": 0.0,
        "train_seconds": time.perf_counter() - begin,
        "adapter_bytes": size * 4,
    }


def train_measured(
    model: torch.nn.Module,
    loader: Loader,
    task: Task,
    training: TrainingConfig,
    memory: PeakMemory,
    tell: Tell,
) -> tuple[TrainResult, int]:
    """Train, and return the result and the peak memory without that of evaluations."""
    eval_loader = task.eval_loader(training)
    memory.reset()
    peak = 0

    def score(model: torch.nn.Module) -> dict[str, Any]:
        # Memory is that of training: an evaluation's batches are of another size.
        nonlocal peak
        peak = max(peak, memory.bytes())
        metrics = evaluate(
            model,
            eval_loader,
            metric=task.config.metric,
            meteor=task.config.meteor,
            generation=task.config.generation,
            progress=partial(tell, "evaluating"),
        )
        memory.reset()
        return metrics

    steps = number_of_steps(loader, training)
    result = train(
        model,
        loader,
        training,
        evaluate=score,
        progress=False,
        callbacks=[lambda record: tell("training", int(record["step"]), steps)],
    )
    return result, peak


def run(spec: dict[str, Any], tell: Tell = lambda *_: None) -> dict[str, Any]:
    """Do one run: adapt, train, evaluate, save; return its row of the results.

    Parameters
    ----------
    spec : dict
        From `Comparison.spec`.
    tell : callable
        Called with (stage, done, total).

    Raises
    ------
    SylvaError
        Whatever stops it.
    """
    method = parse_method(spec["method"])
    training = TrainingConfig(**spec["training"])
    config = SylvaConfig(**spec["sylva"], seed=training.seed)
    task = load_task(TaskConfig(**spec["task"]), seed=training.seed)
    config.modules_to_save = heads(task.model, task.config.task)
    device = pick_device(training.device)
    memory = PeakMemory(device)
    row = begun_row(method, task, training)
    memory.reset()
    if method.name == "frozen":
        row |= run_frozen(task, training, tell)
        row["peak_memory_bytes"] = memory.bytes()
        return row
    loader = task.loader(training)
    # what `finetune` scores with the same seed
    count = samples_to_score(config.samples, examples_seen(loader, training))
    config.samples = count
    samples = task.score_loader(count, training.seed, min(SCORED, training.batch_size))
    task.model.to(device)
    if spec["describe"] and method.curvature is not None:
        row["factor"] = factor_entry(task, config, method, samples)
    memory.reset()
    begin = time.perf_counter()
    adapted = adapt(
        method, task.model, config, samples, progress=partial(tell, "scoring")
    )
    if adapted.scores is not None:
        row["score_seconds"] = time.perf_counter() - begin
        row["scored"] = adapted.scores.metadata["samples"]
        row["score_memory_bytes"] = memory.bytes()
    result, peak = train_measured(adapted.model, loader, task, training, memory, tell)
    row |= {
        "score": result.history[-1]["score"],
        "metrics": result.metrics,
        "trainable": adapted.trainable,
        "trainable_head": adapted.head,
        "trainable_fraction": adapted.trainable / row["total"],
        "seconds_per_step": result.seconds_per_step,
        "step_seconds_iqr": result.step_seconds_iqr,
        "train_seconds": result.train_seconds,
        "peak_memory_bytes": peak,
        "adapter_bytes": saved_bytes(adapted, config),
        "history": result.history,
    }
    if spec["describe"] and adapted.masks is not None and adapted.scores is not None:
        row["masks"] = mask_entries(adapted.masks)
        row["scores"] = score_entries(adapted.scores, adapted.masks)
    return row


def begun_row(method: Method, task: Task, training: TrainingConfig) -> dict[str, Any]:
    """Return what is known of a run at its begin; None is what it need not measure."""
    return {
        "method": method.name,
        "label": method.label,
        "seed": training.seed,
        "lr": training.lr if method.name != "frozen" else None,
        "seconds_per_step": None,
        "step_seconds_iqr": None,
        "score_seconds": None,
        "scored": None,
        "score_memory_bytes": None,
        "history": [],
        "total": sum(p.numel() for p in task.model.parameters()),
        "examples": [len(task.train), task.eval_examples],
        "labels": task.train.label_names,
    }


def try_rate(spec: dict[str, Any], tell: Tell = lambda *_: None) -> dict[str, Any]:
    """As `run`, but a run that diverges is one without a score: it is a result too."""
    try:
        return run(spec, tell)
    except NonFiniteError as error:
        return {
            "method": spec["method"],
            "seed": spec["training"]["seed"],
            "lr": spec["training"]["lr"],
            "score": None,
            "metrics": {},
            "diverged": str(error),
        }


def factor_entry(
    task: Task, config: SylvaConfig, method: Method, loader: Iterable[Any]
) -> dict[str, Any]:
    """Describe the input factor of a middle layer for the report."""
    targets = find_targets(task.model, config.target_modules, config.exclude_modules)
    names = list(targets)
    options = dataclasses.replace(
        config,
        curvature=method.curvature or config.curvature,
        samples=min(128, samples_to_score(config.samples)),
    )
    return describe_factor(task.model, names[len(names) // 2], loader, options)
