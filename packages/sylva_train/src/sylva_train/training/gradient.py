"""The gradient of one optimizer step: accumulated, checked, clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sylva_train._checks import NonFiniteError
from sylva_train._torch import total_norm
from sylva_train.curvature import Loss, damage, loss_scale, loss_units, some_samples
from sylva_train.layers import accumulating
from sylva_train.processes import rank_and_size

__all__ = ["Batch", "accumulate_gradient", "clip_gradient", "share"]

Batch = Mapping[str, Any]


def share(batch: Batch) -> Batch:
    """Return this process's share of the samples of a batch, which may be none."""
    rank, processes = rank_and_size()
    return some_samples(batch, slice(rank, None, processes)) if processes > 1 else batch


def accumulate_gradient(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, where: str
) -> float:
    """Add up the gradient of the mean loss over all samples of some batches.

    Each batch's mean counts by its number of samples (or tokens), so that the sum is
    the gradient of the one large batch, whatever the sizes. Under an initialised
    `torch.distributed` each process takes its share of the samples of each batch, and
    all end with the same gradient.

    Returns
    -------
    float
        The mean loss.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite.
    """
    processes = rank_and_size()[1]
    counts = [loss_units(model, batch) for batch in batches]
    units = sum(max(1, count) for count in counts)
    is_half = any(p.dtype == torch.float16 for p in model.parameters())
    scale = loss_scale(units) if is_half else 1.0
    # Where no label of a batch counts, all processes meet the NaN that comes of it.
    if shared := processes > 1 and all(counts):
        batches = [share(batch) for batch in batches]
        counts = [loss_units(model, batch) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        if shared and not count:
            continue
        # Exactly 1 for a single batch: its gradient is the plain one, bit for bit.
        weight = max(1, count) / units
        with accumulating():
            value = loss(model, batch) * weight
        value.backward(None if scale == 1 else torch.full_like(value, scale))
        # After it: a GPU would stand still between the two while the number is awaited.
        total += value.item()
        if not math.isfinite(total):
            break
    if processes > 1:
        total = add_up(model, total)
    if not math.isfinite(total):
        msg = (
            f"the loss is {total} in {where};{damage(model)} this step changed no"
            " weight. Lower `lr`, raise `warmup`, and check the data: NaN comes of a"
            " batch without a label that counts, too."
        )
        raise NonFiniteError(msg)
    if scale != 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / scale)
    return total


def add_up(model: nn.Module, loss: float) -> float:
    """Add the gradients and the loss of all processes up, to the same bits in each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    numbers = torch.tensor(
        [loss, *(p.grad is not None for p in trained)], device=device
    )
    dist.all_reduce(numbers)
    total: float
    total, *owners = numbers.tolist()
    # One that no process has a gradient for goes without, as in a single process.
    used = [p for p, count in zip(trained, owners, strict=True) if count]
    for dtype in sorted({p.dtype for p in used}, key=str):
        group = [p for p in used if p.dtype == dtype]
        for p in group:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        # A few messages instead of one for each layer.
        flat = torch.cat([p.grad.flatten() for p in group if p.grad is not None])
        dist.all_reduce(flat)
        pieces = flat.split([p.numel() for p in group])
        for p, piece in zip(group, pieces, strict=True):
            p.grad.copy_(piece.view(p.shape))  # type: ignore[union-attr]
    return total


def clip_gradient(
    named: Mapping[str, nn.Parameter], max_norm: float, where: str
) -> float:
    """Scale the gradient of all parameters together to a norm of at most ``max_norm``.

    Returns
    -------
    float
        The norm before.

    Raises
    ------
    NonFiniteError
        If a gradient is NaN or infinite.
    """
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    total = total_norm(gradients.values())
    norm = total.item()
    if not math.isfinite(norm):
        bad = (n for n, g in gradients.items() if not bool(torch.isfinite(g).all()))
        msg = (
            f"the gradient of `{next(bad, 'all parameters')}` is not finite in {where};"
            " this step changed no weight. Lower `lr`, raise `warmup`, set"
            " `max_grad_norm`, or train in float32."
        )
        raise NonFiniteError(msg)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(named.values(), max_norm, total)
    return norm
