"""The heads of tasks on labels: which modules they are, and where a new one begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from sylva_train.data import TextDataset
from sylva_train.layers import find_saved
from sylva_train.options import LABELLED

__all__ = ["begin_head", "heads"]

#: Deviations that a mean may be away from what a head without a bias begins with.
FAR = 10.0


def heads(model: nn.Module, task: str) -> list[str] | None:
    """Names of the modules that a new task trains whole: a head on labels."""
    if task not in LABELLED:
        return None
    backbone = getattr(model, "base_model", model)
    names = [n for n, child in model.named_children() if child is not backbone]
    return [n for n in names if any(True for _ in model.get_submodule(n).parameters())]


@torch.no_grad()
def begin_head(
    model: nn.Module, names: Iterable[str] | None, dataset: TextDataset
) -> None:
    """Let a new head begin with the mean and the deviation of the numbers it is to learn.

    From 0 ± 1, which it is drawn for, it would be thousands of steps on its way to prices,
    and its steps would be too large for fractions.

    Parameters
    ----------
    model : torch.nn.Module
        For a regression.
    names : iterable of str or None
        Modules that will be trained whole; None: the head. Others stay as they are.
    dataset : TextDataset
        What to train on.

    Warns
    -----
    UserWarning
        If the head has no bias, and the mean is far from 0.
    """
    mean, deviation = float(np.mean(dataset.labels)), float(np.std(dataset.labels))
    if names is None:
        names = heads(model, dataset.task) or ()
    inside = (part for m in find_saved(model, names).values() for part in m.modules())
    last = [m for m in inside if isinstance(m, nn.Linear) and m.out_features == 1][-1:]
    for head in last:
        head.weight.mul_(deviation or 1.0)
        bias: torch.Tensor | None = head.bias
        if bias is not None:
            bias.fill_(mean)
        elif abs(mean) > FAR * (deviation or 1.0):
            warnings.warn(
                f"the numbers of {dataset.name} are {mean:.3g} ± {deviation:.3g} (mean and"
                " standard deviation), and this model's head, which has no bias, begins"
                f" near 0 and moves slowly: train on number - {mean:.3g}, and add that to"
                " what is predicted.",
                stacklevel=3,
            )
