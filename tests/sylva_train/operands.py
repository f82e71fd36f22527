"""Operands of products in the layouts that activations have, and masks."""

from __future__ import annotations

import torch

from sylva_train.masks import LayerMask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "columns", "strided", "offset", "expanded"]


def operand(tokens, n, dtype, layout, seed, device):
    """A (tokens, n) matrix with NaN wherever a kernel should not read."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if layout == "expanded" else tokens
    values = torch.randn((rows, n), generator=generator).to(device, dtype)
    nan = torch.full_like(values, torch.nan)
    if layout == "columns":
        return torch.cat([values, nan], 1).t().contiguous().t()[:, :n]
    if layout == "strided":
        return torch.stack([values, nan], 2)[:, :, 0]
    if layout == "offset":
        return torch.cat([nan, values, nan], 1)[:, n : 2 * n]
    return values.expand(tokens, n)


def make_mask(shape, block, share, seed):
    grid = [-(-n // block) for n in shape]
    generator = torch.Generator().manual_seed(seed)
    return LayerMask(
        shape, block, (torch.rand(grid, generator=generator) < share).nonzero()
    )
