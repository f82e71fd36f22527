"""How well a model does: losses and metrics over a loader, without a trace left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ._checks import ConfigError, DataError, NonFiniteError, check_choice
from .data import Loader

__all__ = ["METRICS", "evaluate"]

#: Metrics that can be the score, and whether more is better.
METRICS = {
    "accuracy": True,
    "f1": True,
    "f1-binary": True,
    "mcc": True,
    "pearson": True,
    "spearman": True,
    "mse": False,
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
}
CLASSIFICATION = ("accuracy", "f1", "f1-binary", "mcc", "loss")
REGRESSION = ("pearson", "spearman", "mse")
LANGUAGE = ("perplexity", "loss", "token_accuracy")


def known_metrics(task: str) -> tuple[str, ...]:
    """Return the metrics of a task, the default one first."""
    known = {"classification": CLASSIFICATION, "regression": REGRESSION}
    return known.get(task, LANGUAGE)


def evaluate(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    metric: str | None = None,
    *,
    predictions: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on labelled batches.

    Parameters
    ----------
    model : torch.nn.Module
        Returns ``logits``. Run in evaluation mode, without gradients; every module's
        mode is restored afterwards.
    loader : Loader or iterable of batches
        Labels of shape (batch,) are classes, or numbers if they are floating point; of
        shape (batch, length) they are tokens, with −100 where none counts.
    metric : str, optional
        One of `METRICS`, to be the ``score``; by default ``"accuracy"`` for classes,
        ``"pearson"`` for numbers and ``"perplexity"`` for tokens.
    predictions : bool
        Whether to return the predicted and the true classes or numbers and the logits as
        well, in the order of the data set.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    dict
        For classes ``accuracy``, ``f1`` (macro average over the classes that occur or
        are predicted), ``f1-binary`` (of two classes, the second's, as GLUE reports for
        MRPC and QQP), ``mcc`` (Matthews correlation coefficient) and ``loss`` (mean
        cross-entropy). For numbers the correlations ``pearson`` and ``spearman``, 0
        where either side is constant, and ``mse`` (mean squared error). For tokens
        ``loss`` (mean over all tokens that count, whatever the batches), ``perplexity``
        (its exponential) and ``token_accuracy``. For all ``score``, ``metric``,
        ``higher_is_better``, ``examples``, and with ``predictions`` the NumPy arrays
        ``predictions``, ``labels`` and ``logits``.

    Raises
    ------
    ConfigError
        If the metric is unknown or is not one for these labels, or the loader leaves
        examples out.
    DataError
        If there is no batch, or one without labels.
    NonFiniteError
        If a logit is NaN or infinite.
    """
    if metric is not None:
        check_choice("metric", metric, METRICS)
    if isinstance(loader, Loader):
        loader.positions()  # refuses a loader that leaves examples out
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = run(model, loader, progress)
    finally:
        for module, training in modes.items():
            module.training = training
    kind = parts[0]["kind"]
    known, measure = KINDS[kind]
    metric = metric or known[0]
    if metric not in known:
        msg = f"`metric` for labels that are {kind} must be one of {known}; got {metric!r}."
        raise ConfigError(msg)
    if kind == "tokens" and predictions:
        msg = "`predictions` are for classification; a language model's labels are tokens."
        raise ConfigError(msg)
    found: dict[str, Any] = {**measure(parts)}
    if metric not in found:
        msg = f"`metric` {metric!r} is for two classes; the model has another number."
        raise ConfigError(msg)
    found |= {
        "score": found[metric],
        "metric": metric,
        "higher_is_better": METRICS[metric],
        "examples": sum(part["examples"] for part in parts),
    }
    if predictions:
        found |= in_order(parts, loader)
    return found


@torch.no_grad()
def run(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Return what each batch adds to the metrics.

    Raises
    ------
    DataError
        If there is no batch, or one without labels.
    NonFiniteError
        If a logit that counts is NaN or infinite.
    """
    device = next(model.parameters()).device
    total = len(loader) if isinstance(loader, Sized) else 0
    parts: list[dict[str, Any]] = []
    for number, batch in enumerate(loader):
        labels = batch.get("labels")
        if labels is None:
            msg = f"`loader`: batch {number} has no `labels` to evaluate against."
            raise DataError(msg)
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        labels = inputs["labels"]
        tokens = labels.ndim > 1
        # An encoder-decoder makes its decoder's input from the labels; a loss that a
        # model computes of its own would only be computed twice elsewhere.
        if not (tokens and is_encoder_decoder(model)):
            inputs.pop("labels")
        logits = model(**inputs).logits
        if tokens:
            parts.append(language_part(model, logits, labels))
        else:
            parts.append(class_part(logits, labels))
        if not parts[-1].pop("finite"):
            msg = (
                f"the logits of batch {number} are NaN or infinite: training diverged or"
                " the weights are damaged. Lower the learning rate, or go back to an"
                " earlier checkpoint."
            )
            raise NonFiniteError(msg)
        if progress is not None:
            progress(number + 1, max(total, number + 1))
    if not parts:
        msg = "`loader` has no batch: there is nothing to evaluate on."
        raise DataError(msg)
    return parts


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's logits are aligned with its labels, not one ahead of them."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def class_part(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return a batch's logits, shape (batch, classes), and its labels, on the CPU.

    Raises
    ------
    ConfigError
        If the labels are numbers and the model has not one output.
    """
    logits = logits.float()
    numbers = labels.is_floating_point()
    if numbers and logits.shape[-1] != 1:
        msg = (
            "`model` must have one output for labels that are numbers; got"
            f' {logits.shape[-1]}. Load it with `task="regression"`.'
        )
        raise ConfigError(msg)
    return {
        "kind": "numbers" if numbers else "classes",
        "examples": len(labels),
        "finite": bool(torch.isfinite(logits).all()),
        "logits": logits.cpu(),
        "labels": labels.cpu(),
    }


def language_part(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor
) -> dict[str, Any]:
    """Return a batch's summed loss, its hits and the number of its tokens.

    Parameters
    ----------
    model : torch.nn.Module
        Tells whether labels are to be shifted.
    logits : torch.Tensor, shape (batch, length, vocabulary)
        Scores of each next token.
    labels : torch.Tensor, shape (batch, length)
        Tokens, −100 where none counts.
    """
    examples = len(labels)
    if not is_encoder_decoder(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels.ne(-100)
    # Only positions that count: padding may have any logits, and most memory is here.
    kept, wanted = logits[counted].float(), labels[counted]
    return {
        "kind": "tokens",
        "examples": examples,
        "finite": bool(torch.isfinite(kept).all()),
        "loss": float(F.cross_entropy(kept, wanted, reduction="sum")),
        "hits": int((kept.argmax(-1) == wanted).sum()),
        "count": len(wanted),
    }


def class_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a classifier."""
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    guess, classes = logits.argmax(-1).numpy(), logits.shape[-1]
    loss = float(F.cross_entropy(logits.double(), labels))
    return prediction_metrics(labels.numpy(), guess, classes) | {"loss": loss}


def prediction_metrics(
    truth: np.ndarray, guess: np.ndarray, classes: int
) -> dict[str, float]:
    """Return the metrics that follow from the true and the predicted classes alone."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    several = len(np.union1d(truth, guess)) > 1
    found = {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
        # 0 by convention for a single class, of which scikit-learn warns.
        "mcc": float(matthews_corrcoef(truth, guess)) if several else 0.0,
    }
    if classes == 2:
        found["f1-binary"] = float(f1_score(truth == 1, guess == 1, zero_division=0.0))
    return found


def regression_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a regression."""
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    return number_metrics(labels.numpy(), logits.squeeze(-1).numpy())


def number_metrics(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Return how well predicted numbers agree with the true ones."""
    from scipy.stats import pearsonr, spearmanr

    truth, guess = truth.astype(np.float64), guess.astype(np.float64)
    # 0 by convention for constants, of which SciPy warns.
    varied = np.ptp(guess) > 0 and np.ptp(truth) > 0
    return {
        "pearson": float(pearsonr(guess, truth)[0]) if varied else 0.0,
        "spearman": float(spearmanr(guess, truth)[0]) if varied else 0.0,
        "mse": float(np.square(guess - truth).mean()),
    }


def language_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a language model.

    Raises
    ------
    DataError
        If no token counts.
    """
    count = sum(part["count"] for part in parts)
    if not count:
        msg = "`loader`: no label counts, all are -100; are the texts cut too short?"
        raise DataError(msg)
    loss = math.fsum(part["loss"] for part in parts) / count
    return {
        # exp overflows above 709; a loss of 100 is no language model either.
        "perplexity": math.exp(min(loss, 100.0)),
        "loss": loss,
        "token_accuracy": sum(part["hits"] for part in parts) / count,
    }


#: What labels can be: the metrics that fit, and how they are measured.
KINDS = {
    "classes": (CLASSIFICATION, class_metrics),
    "numbers": (REGRESSION, regression_metrics),
    "tokens": (LANGUAGE, language_metrics),
}


def in_order(
    parts: list[dict[str, Any]], loader: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, np.ndarray]:
    """Return predictions, labels and logits in the order of the data set."""
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    if isinstance(loader, Loader):
        order = loader.positions()
        logits, labels = logits[order], labels[order]
    numbers = labels.is_floating_point()
    return {
        "predictions": (logits.squeeze(-1) if numbers else logits.argmax(-1)).numpy(),
        "labels": labels.numpy(),
        "logits": logits.numpy(),
    }
