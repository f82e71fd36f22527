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
    "mcc": True,
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
}
CLASSIFICATION = ("accuracy", "f1", "mcc", "loss")
LANGUAGE = ("perplexity", "loss", "token_accuracy")


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
        Labels of shape (batch,) are classes; of shape (batch, length) they are tokens,
        with −100 where none counts.
    metric : str, optional
        One of `METRICS`, to be the ``score``; by default ``"accuracy"`` for classes and
        ``"perplexity"`` for tokens.
    predictions : bool
        Whether to return the predicted and the true classes and the logits as well, in
        the order of the data set.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    dict
        For classes ``accuracy``, ``f1`` (macro average over the classes that occur or
        are predicted), ``mcc`` (Matthews correlation coefficient) and ``loss`` (mean
        cross-entropy). For tokens ``loss`` (mean over all tokens that count, whatever
        the batches), ``perplexity`` (its exponential) and ``token_accuracy``. For both
        ``score``, ``metric``, ``higher_is_better``, ``examples``, and with
        ``predictions`` the NumPy arrays ``predictions``, ``labels`` and ``logits``.

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
    tokens = parts[0]["tokens"]
    known = LANGUAGE if tokens else CLASSIFICATION
    metric = metric or known[0]
    if metric not in known:
        kind = "tokens" if tokens else "classes"
        msg = f"`metric` for labels that are {kind} must be one of {known}; got {metric!r}."
        raise ConfigError(msg)
    if tokens and predictions:
        msg = "`predictions` are for classification; a language model's labels are tokens."
        raise ConfigError(msg)
    found: dict[str, Any] = {
        **(language_metrics(parts) if tokens else class_metrics(parts))
    }
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
    """Return a batch's logits, shape (batch, classes), and its labels, on the CPU."""
    logits = logits.float()
    return {
        "tokens": False,
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
        "tokens": True,
        "examples": examples,
        "finite": bool(torch.isfinite(kept).all()),
        "loss": float(F.cross_entropy(kept, wanted, reduction="sum")),
        "hits": int((kept.argmax(-1) == wanted).sum()),
        "count": len(wanted),
    }


def class_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a classifier."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    truth, guess = labels.numpy(), logits.argmax(-1).numpy()
    several = len(np.union1d(truth, guess)) > 1
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
        # 0 by convention for a single class, of which scikit-learn warns.
        "mcc": float(matthews_corrcoef(truth, guess)) if several else 0.0,
        "loss": float(F.cross_entropy(logits.double(), labels)),
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


def in_order(
    parts: list[dict[str, Any]], loader: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, np.ndarray]:
    """Return predictions, labels and logits in the order of the data set."""
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    if isinstance(loader, Loader):
        order = loader.positions()
        logits, labels = logits[order], labels[order]
    return {
        "predictions": logits.argmax(-1).numpy(),
        "labels": labels.numpy(),
        "logits": logits.numpy(),
    }
