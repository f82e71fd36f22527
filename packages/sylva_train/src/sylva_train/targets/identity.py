"""What tells one pretrained model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from sylva_train._torch import tensor_bytes

from .finding import head_names, is_inside

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, exclude: Iterable[str] | None = None) -> str:
    """Identify a model by its weights: a hash of their names, shapes and values.

    Parameters
    ----------
    model : torch.nn.Module
        The model without adapters. The task's head does not count.
    exclude : iterable of str, optional
        Name endings of other modules that do not count (``modules_to_save``).

    Returns
    -------
    str
        Hexadecimal SHA-256. Values count up to their rounding to bfloat16, so that one
        checkpoint has the same fingerprint in float32 and in bfloat16.
    """
    exclude = list(exclude or ())
    heads = head_names(model)
    digest = hashlib.sha256()
    kind = getattr(getattr(model, "config", None), "model_type", "")
    digest.update(str(kind).encode())
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            continue
        if owner in heads or is_inside(owner, exclude):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        kept = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(tensor_bytes(kept))
    return digest.hexdigest()
