"""Batches of samples: their size, the terms of their loss, the part that counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sylva_train._checks import DataError
from sylva_train._torch import note_tensors
from sylva_train.model_classes import UNSHIFTED, class_name, is_causal

__all__ = [
    "batch_size",
    "batches_of",
    "default_loss",
    "first_samples",
    "loss_scale",
    "loss_units",
    "note",
    "some_samples",
]


def batches_of(name: str, loader: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the batches of the argument ``name``.

    Raises
    ------
    DataError
        If it is none that can be run through, or gives something else: a data set gives
        single samples.
    """
    try:
        found = iter(loader)
    except TypeError:
        raise not_batches(name, loader, "none") from None
    for batch in found:
        if not isinstance(batch, Mapping):
            raise not_batches(name, loader, f"a {type(batch).__name__}")
        tensors = [v for v in batch.values() if isinstance(v, torch.Tensor)]
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and not labels.dim():
            raise not_batches(name, loader, "a single sample")
        if not any(tensor.dim() for tensor in tensors):
            raise not_batches(name, loader, "a mapping without such a tensor")
        yield batch


def not_batches(name: str, loader: Any, got: str) -> DataError:
    """Return the error of an argument that gives something else than batches."""
    return DataError(
        f"`{name}` must give batches, mappings of names to tensors whose first axis is"
        f" samples; got {got} out of a {type(loader).__name__}. Texts go into a"
        " `sylva_train.Loader`, another data set into a `torch.utils.data.DataLoader` with"
        " a collator that makes such mappings."
    )


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch, one of `batches_of`.

    Labels and tokens are of samples whatever comes first: patches of all images may be in
    a row.
    """
    known = (batch.get(name) for name in ("labels", "input_ids"))
    tensors = (v for v in (*known, *batch.values()) if isinstance(v, torch.Tensor))
    return next(len(tensor) for tensor in tensors if tensor.dim())


def loss_units(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return how many terms the model's mean loss has, 0 if no label counts.

    Samples for regression and for CTC, which divides by the length of each text or adds
    all up, else labels that count (not -100): of samples, of pixels, or of a language
    model's tokens, shifted by one for a causal one but those of `UNSHIFTED`.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return batch_size(batch)
    config = getattr(model, "config", None)
    if class_name(model).endswith("ForCTC"):
        added = getattr(config, "ctc_loss_reduction", "mean") == "sum"
        return 1 if added else len(labels)
    if labels.is_floating_point():
        return len(labels)
    shifted = is_causal(model) and class_name(model) not in UNSHIFTED
    shifted &= labels.dim() > 1
    pixels = labels.dim() == 3
    ignored = getattr(config, "semantic_loss_ignore_index", -100) if pixels else -100
    return int((labels[:, 1:] if shifted else labels).ne(ignored).sum())


def loss_scale(units: int) -> float:
    """Return a power of two to scale a mean over so many terms by: no bit of it changes.

    Its gradient would be below what 16 bits can tell from zero. 2¹⁶ is beyond float16.
    """
    return 2.0 ** min(units.bit_length() - 1, 15)


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that a `transformers` model computes from a batch with labels.

    Raises
    ------
    DataError
        If the model returns none, or labels are of samples and a causal language model's
        should be of tokens.
    """
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 1 and is_causal(model):
        msg = (
            "batches have one label for each sample, of a class, but the model is a causal"
            " language model, which needs one for each token: load the model for"
            " classification, or data for generation."
        )
        raise DataError(msg)
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        msg = (
            "the model returned no loss: batches must have `labels`, or pass `loss`, a"
            " function of (model, batch)."
        )
        raise DataError(msg)
    return loss  # type: ignore[no-any-return]


def some_samples(batch: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """Return some of the samples of a batch.

    Objects of each sample, as detectors have for labels, are in lists.
    """
    full = batch_size(batch)
    result = dict(batch)
    for name, value in batch.items():
        tensor = isinstance(value, torch.Tensor) and value.dim()
        objects = isinstance(value, list) and isinstance(
            next(iter(value), None), Mapping | torch.Tensor | str
        )
        if (tensor or objects) and len(value) == full:
            result[name] = value[which]
    return result


def first_samples(batch: Mapping[str, Any], most: int) -> Mapping[str, Any]:
    """Return a batch of at most so many samples, or all of one that cannot be cut.

    Patches of all images in a row, as Qwen2-VL reads them, do not tell whose they are.
    """
    full = batch_size(batch)
    tensors = (v for v in batch.values() if isinstance(v, torch.Tensor))
    packed = any(t.dim() and len(t) not in {1, full} for t in tensors)
    return batch if packed or full <= most else some_samples(batch, slice(most))


def note(batch: Mapping[str, Any], digest: hashlib._Hash) -> None:
    """Add a batch's tensors to a digest, by which the same batches are known again."""
    tensors = {n: v for n, v in batch.items() if isinstance(v, torch.Tensor)}
    note_tensors(tensors, digest)
