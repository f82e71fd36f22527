"""Losses and metrics of labelled batches, of classes or of tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train._torch import on_device
from sylva_train.curvature import batches_of
from sylva_train.data import Loader
from sylva_train.metrics import ANSWERS, CLASSIFICATION, LANGUAGE, REGRESSION, key_of
from sylva_train.model_classes import class_name, is_encoder_decoder
from sylva_train.progress import Report

__all__ = ["label_logits", "label_metrics", "number_metrics", "prediction_metrics"]

#: Logits of tokens that are looked at together.
LARGEST_PART = 1 << 24


def label_metrics(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    metric: str | None,
    *,
    predictions: bool,
    progress: Report | None,
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
    kind = parts[0]["kind"]
    known, measure = KINDS[kind]
    metric = metric or known[0]
    if metric not in known:
        msg = f"`metric` for labels that are {kind} must be one of {known}; got {metric!r}."
        raise ConfigError(msg)
    if kind == "tokens" and predictions:
        msg = (
            "`predictions` of a language model are texts or options: give a `metric` of"
            f" these, {', '.join(map(repr, ANSWERS))}."
        )
        raise ConfigError(msg)
    found: dict[str, Any] = {**measure(parts)}
    if key_of(metric) not in found:
        msg = f"`metric` {metric!r} is for two classes; the model has another number."
        raise ConfigError(msg)
    names = loader.dataset.label_names if isinstance(loader, Loader) else []
    if "f1_binary" in found and len(names) == 2:
        found["positive"] = names[1]
    found["examples"] = sum(part["examples"] for part in parts)
    if predictions:
        found |= in_order(parts, loader)
    return found, metric


@torch.no_grad()
def run(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    progress: Report | None,
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
    # A DataLoader of a stream has a method for its length, which fails.
    total = operator.length_hint(loader)
    parts: list[dict[str, Any]] = []
    for number, batch in enumerate(batches_of("loader", loader)):
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor):
            msg = (
                f"`loader`: batch {number} has no `labels` to evaluate against, which must"
                " be a tensor."
            )
            raise DataError(msg)
        inputs = on_device(batch, device)
        labels = inputs["labels"]
        tokens = labels.ndim > 1
        # An encoder-decoder makes its decoder's input from the labels; a loss that a
        # model computes of its own would only be computed twice elsewhere.
        if not (tokens and is_encoder_decoder(model)):
            inputs.pop("labels")
        logits = logits_of(model, inputs)
        if tokens:
            parts.append(language_part(model, logits, labels))
        else:
            parts.append(class_part(logits, labels))
        if not parts[-1].pop("finite"):
            raise not_finite(number)
        if progress is not None:
            progress(number + 1, max(total, number + 1))
    if not parts:
        msg = "`loader` has no batch: there is nothing to evaluate on."
        raise DataError(msg)
    return parts


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a model makes of a batch.

    Raises
    ------
    ConfigError
        If that has no ``logits``.
    """
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        msg = (
            "`model` must return an object with a tensor `logits`, as those of transformers"
            f" do; {type(model).__name__} returned a {type(output).__name__}."
        )
        raise ConfigError(msg)
    return logits


def not_finite(number: int) -> NonFiniteError:
    """Return the error of a batch whose logits are not finite."""
    return NonFiniteError(
        f"the logits of batch {number} are NaN or infinite: training diverged or the"
        " weights are damaged. Lower the learning rate, or go back to an earlier"
        " checkpoint."
    )


@torch.no_grad()
def label_logits(
    model: nn.Module, loader: Loader, progress: Report | None
) -> torch.Tensor:
    """Return a classifier's logits in the order of the data set, without labels.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    loader : Loader
        The texts.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    torch.Tensor, shape (texts, classes), float32
        On the CPU.

    Raises
    ------
    NonFiniteError
        If a logit is NaN or infinite.
    """
    device = next(model.parameters()).device
    parts = []
    for number, batch in enumerate(loader):
        parts.append(logits_of(model, on_device(batch, device)).float().cpu())
        if not bool(torch.isfinite(parts[-1]).all()):
            raise not_finite(number)
        if progress is not None:
            progress(number + 1, len(loader))
    return torch.cat(parts)[loader.positions()]


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


def labels_each_token(model: Any, width: int) -> bool:
    """Whether a model says something of each token, not of the one that follows it.

    Its class's name tells, or that it has far fewer classes than there are tokens.
    """
    if class_name(model).endswith(("ForMaskedLM", "ForTokenClassification")):
        return True
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = len(getattr(embedding, "weight", ()))
    return 2 * width <= rows


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

    Raises
    ------
    ConfigError
        If the labels are numbers, or the logits are not of tokens.
    """
    if labels.is_floating_point():
        msg = (
            "`labels` of several numbers a sample, as of several classes at once, are not"
            f" evaluated; got {tuple(labels.shape)} of {labels.dtype}."
        )
        raise ConfigError(msg)
    if logits.shape[:-1] != labels.shape:
        msg = (
            f"`labels` of shape {tuple(labels.shape)} are of tokens, which logits of shape"
            f" {tuple(logits.shape)} are not; labels of samples have one axis."
        )
        raise ConfigError(msg)
    examples = len(labels)
    if not (is_encoder_decoder(model) or labels_each_token(model, logits.shape[-1])):
        logits, labels = logits[:, :-1], labels[:, 1:]
    # Only positions that count: padding may have any logits. Part by part: most memory is
    # here, and of a large vocabulary copies in float32 would be several times as much.
    places = labels.ne(-100).nonzero()
    sums = []
    for part in places.split(max(1, LARGEST_PART // logits.shape[-1])):
        where = tuple(part.T)
        kept, wanted = logits[where].float(), labels[where]
        found = (
            torch.isfinite(kept).all(),
            F.cross_entropy(kept, wanted, reduction="sum"),
            (kept.argmax(-1) == wanted).sum(),
        )
        sums.append(torch.stack([each.float() for each in found]))
    # The host waits for a device once.
    finite, losses, hits = torch.stack(sums).T.tolist()
    return {
        "kind": "tokens",
        "examples": examples,
        "finite": all(finite),
        "loss": math.fsum(losses),
        "hits": int(sum(hits)),
        "count": len(places),
    }


def class_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a classifier.

    Raises
    ------
    DataError
        If no label counts, or one is of no class.
    """
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    counted = labels.ne(-100)
    if not counted.any():
        msg = "`loader`: no label counts, all are -100."
        raise DataError(msg)
    logits, labels = logits[counted], labels[counted].long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        msg = (
            f"`loader`: labels must be classes from 0 to {logits.shape[-1] - 1}, the"
            f" model's; got {int(labels.min())} to {int(labels.max())}."
        )
        raise DataError(msg)
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
        found["f1_binary"] = float(f1_score(truth == 1, guess == 1, zero_division=0.0))
    return found


def regression_metrics(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a regression.

    Raises
    ------
    DataError
        If a label is NaN or infinite.
    """
    logits = torch.cat([part["logits"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts])
    if not torch.isfinite(labels).all():
        msg = "`loader`: labels are NaN or infinite; leave these samples out."
        raise DataError(msg)
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
