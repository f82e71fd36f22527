"""One AdamW step of many layers' blocks, written into their dense weights.

The formulas in plain PyTorch, layer by layer: what `triton_adamw` is checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .quantize import decode, encode
from .reference import scatter_blocks_

__all__ = ["OPTIONS", "BlockState", "Tables", "adamw_"]

#: Columns of the table of a parameter group's options; ``sign`` is −1 to maximize.
OPTIONS = ("lr", "beta1", "beta2", "eps", "weight_decay", "sign")


@dataclass(frozen=True)
class BlockState:
    """The blocks of one layer, and what the optimizer keeps of them.

    Attributes
    ----------
    values, exp_avg, exp_avg_sq : torch.Tensor, shape (k, b, b)
        Masters and moments, contiguous; float32, or moments in 8 bits (`quantize`).
    indices : torch.Tensor, shape (k, 2), int32
        Block rows and block columns, contiguous.
    weight : torch.Tensor, shape (out, in)
        The dense weight, in any strides; float32, bfloat16 or float16.
    base : torch.Tensor or None, shape (k, b, b)
        Decay towards these weights instead of zero; in the dtype of ``weight``.
    group : int
        Row of the table of options.
    exp_avg_scale, exp_avg_sq_scale : torch.Tensor or None, shape (groups,), float32
        Scales of moments in 8 bits.
    """

    values: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    indices: torch.Tensor
    weight: torch.Tensor
    base: torch.Tensor | None = None
    group: int = 0
    exp_avg_scale: torch.Tensor | None = None
    exp_avg_sq_scale: torch.Tensor | None = None


def adamw_(
    layers: Sequence[BlockState],
    steps: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    options: torch.Tensor,
    factor: torch.Tensor,
    found_inf: torch.Tensor,
) -> None:
    """Take one step, in place.

    Parameters
    ----------
    layers : sequence of BlockState
        Their masters, moments and weights are changed.
    steps : torch.Tensor, shape (layers,), float32
        Steps taken by each layer; counted up.
    gradients : sequence of torch.Tensor or None
        Of the values; a layer without one is left as it is.
    options : torch.Tensor, shape (groups, 6), float64
        `OPTIONS` of each group.
    factor : torch.Tensor, shape (), float32
        What gradients are multiplied by: unscaling and clipping.
    found_inf : torch.Tensor, shape (), float32
        Unless zero, nothing at all is changed.

    Notes
    -----
    With gradient ``g`` and step ``t`` (Loshchilov and Hutter, 2019)::

        m += (1 - β₁) (g - m)            v = β₂ v + (1 - β₂) g²
        w -= lr λ (w - base)             w -= lr m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε)
    """
    if float(found_inf):
        return
    for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        if gradient is None:
            continue
        lr, beta1, beta2, eps, decay, sign = options[layer.group].tolist()
        steps[i] += 1
        step = float(steps[i])
        g = gradient * (factor * sign)
        values, m, v = layer.values, layer.exp_avg, layer.exp_avg_sq
        if layer.exp_avg_scale is not None and layer.exp_avg_sq_scale is not None:
            m, v = decode(m, layer.exp_avg_scale), decode(v, layer.exp_avg_sq_scale)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        distance = values if layer.base is None else values - layer.base
        values.sub_(distance, alpha=lr * decay)
        size = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        values.addcdiv_(m, size, value=-lr / (1 - beta1**step))
        scatter_blocks_(layer.weight, layer.indices, values)
        if layer.exp_avg_scale is not None and layer.exp_avg_sq_scale is not None:
            seed = 2 * int(step)
            encode(m, layer.exp_avg, layer.exp_avg_scale, seed)
            encode(v, layer.exp_avg_sq, layer.exp_avg_sq_scale, seed + 1)


class Tables:
    """The same interface as `triton_adamw.Tables`, in plain PyTorch."""

    def __init__(self, layers: Sequence[BlockState], steps: torch.Tensor) -> None:
        self.layers, self.steps = list(layers), steps
        self.gradients: list[torch.Tensor | None] = [None] * len(self.layers)

    def set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take the gradients of the next step."""
        self.gradients = list(gradients)

    def square_norm(self) -> torch.Tensor:
        """Return the sum of the squares of all gradients."""
        found = [g.square().sum() for g in self.gradients if g is not None]
        return torch.stack(found).sum() if found else self.steps.new_zeros(())

    def update(
        self, options: torch.Tensor, factor: torch.Tensor, found_inf: torch.Tensor
    ) -> None:
        """Take one step; see `adamw_` for the arguments."""
        adamw_(self.layers, self.steps, self.gradients, options, factor, found_inf)
