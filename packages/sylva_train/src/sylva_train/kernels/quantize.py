"""Moments in 8 bits: each 256 values in a row share a float32 scale, their largest.

First moments are ``± scale (q / 127)²`` with an int8 ``q``, second ones ``scale
(q / 255)⁴`` with a uint8 ``q``: levels are close where values are small, since a second
moment is divided by. Values are rounded up or down at random, in proportion, so that on
average nothing is lost: with β₂ = 0.999 a step changes second moments by less than half a
level, and rounding to the nearest would keep them where they are for good. The random
numbers are a hash of element and step: a run repeats itself.

Neighbouring levels of the second moment differ by ``4 / q`` of it, 2% near the largest and
5% at a hundredth of it; a step's size sees half of that. A second moment is rounded to zero
only if it is zero, for a quotient by nothing would be a step of any size.
"""

from __future__ import annotations

import torch

__all__ = ["GROUP", "decode", "encode", "noise"]

#: Values that share a scale.
GROUP = 256


def levels(dtype: torch.dtype) -> tuple[int, int]:
    """Return the largest code of a dtype, and the power of the map."""
    return (127, 2) if dtype == torch.int8 else (255, 4)


def noise(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return numbers in [0, 1) that depend on element and seed alone: (size,)."""
    mask = 0xFFFFFFFF
    h = torch.arange(size, device=device) * 0x9E3779B1 + seed * 0x85EBCA6B
    h &= mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & mask
    return ((h ^ (h >> 16)) >> 8).float() / (1 << 24)


def grouped(x: torch.Tensor) -> torch.Tensor:
    """Return values in rows of `GROUP`, filled up with zeros."""
    flat = x.flatten()
    filled = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP))
    return filled.view(-1, GROUP)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values of codes, float32.

    Parameters
    ----------
    codes : torch.Tensor, int8 or uint8
        Of first or of second moments, in any shape.
    scale : torch.Tensor, shape (groups,), float32
        Largest magnitude of each `GROUP` values in a row.
    """
    most, power = levels(codes.dtype)
    q = grouped(codes).float()
    values = (q.abs() / most) ** power * q.sign() * scale[:, None]
    return values.flatten()[: codes.numel()].view(codes.shape)


def encode(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, seed: int
) -> None:
    """Round values into ``codes`` and ``scale``, in place; see `decode`."""
    most, power = levels(codes.dtype)
    rows = grouped(x)
    scale.copy_(rows.abs().amax(1))
    share = rows.abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    low = (share ** (1 / power) * most).floor().clamp(max=most - 1)
    below, above = (low / most) ** power, ((low + 1) / most) ** power
    random = noise(rows.numel(), seed, x.device).view(rows.shape)
    q = low + (share - below > random * (above - below))
    if codes.dtype == torch.uint8:
        q = torch.where(rows > 0, q.clamp(min=1), q)
    q = q * rows.sign()
    codes.copy_(q.flatten()[: x.numel()].view(x.shape))
