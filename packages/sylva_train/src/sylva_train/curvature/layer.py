"""What the data tells about a layer, while it adds up and when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .factors import Factor

__all__ = ["TENSORS", "Accumulators", "LayerCurvature", "block_sums"]

#: The sums that are plain tensors.
TENSORS = ("gradient", "fisher", "input_squares", "output_squares")


def block_sums(matrix: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sum a matrix (..., out, in) over square blocks; the last ones may be cut off."""
    out, inputs = matrix.shape[-2:]
    if inputs % block_size or out % block_size:  # to pad by nothing is to copy
        matrix = F.pad(matrix, (0, -inputs % block_size, 0, -out % block_size))
    columns: torch.Tensor = matrix.unflatten(-1, (-1, block_size)).sum(-1)
    return columns.unflatten(-2, (-1, block_size)).sum(-2)  # type: ignore[no-any-return]


@dataclass
class Accumulators:
    """Running sums of one layer; those that were not asked for stay None."""

    A: Any = None
    G: Any = None
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    input_squares: torch.Tensor | None = None
    output_squares: torch.Tensor | None = None
    rows: int = 0


@dataclass
class LayerCurvature:
    """What the data tells about one layer.

    Attributes
    ----------
    A, G : Factor or None
        Kronecker factors of inputs and output gradients.
    gradient : torch.Tensor (out, in) or None
        Mean gradient Γ, float32 (float64 where the model is).
    fisher : torch.Tensor or None
        Diagonal Fisher, mean of squared per-sample gradients, summed over blocks.
    input_squares : torch.Tensor (in,) or None
        Mean square of each input over the tokens: the diagonal of ``A``.
    output_squares : torch.Tensor (out,) or None
        Mean square of each output's gradient over the tokens: the diagonal of ``G``.
    """

    A: Factor | None = None
    G: Factor | None = None
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    input_squares: torch.Tensor | None = None
    output_squares: torch.Tensor | None = None
