"""Losses and metrics of labelled batches, of classes or of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train.data import Loader

from .generation import is_encoder_decoder
from .metrics import CHOICE, CLASSIFICATION, GENERATION, LANGUAGE

__all__ = ["label_metrics"]


def label_metrics(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    metric: str | None,
    *,
    predictions: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any], str]:
    """Return the metrics of labelled batches, and which of them is the score.

    Raises
    ------
    ConfigError
        If the metric is not one for these labels.
    DataError
        If there is no batch, or one without labels.
    NonFiniteError
        If a logit is NaN or infinite.
    """
    parts = run(model, loader, progress)
    tokens = parts[0]["tokens"]
    known = LANGUAGE if tokens else CLASSIFICATION
    metric = metric or known[0]
    if metric not in known:
        kind = "tokens" if tokens else "classes"
        msg = f"`metric` for labels that are {kind} must be one of {known}; got {metric!r}."
        raise ConfigError(msg)
    if tokens and predictions:
        msg = (
            "`predictions` of a language model are texts or options: give a `metric` of"
            f" these, {', '.join(map(repr, (*GENERATION, CHOICE)))}."
        )
        raise ConfigError(msg)
    found: dict[str, Any] = {
        **(language_metrics(parts) if tokens else class_metrics(parts))
    }
    found["examples"] = sum(part["examples"] for part in parts)
    if predictions:
        found |= in_order(parts, loader)
    return found, metric


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
