"""The operations as layers call them, and as `torch.compile` sees them."""

from __future__ import annotations

import torch

from . import reference
from .capture import never_ran
from .cost import wide
from .dispatch import find_kernel, give_up, is_demanded

__all__ = ["block_sddmm"]


def block_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``; `reference.block_sddmm` says what goes in and comes out.

    Compiled code calls it as ``torch.ops.sylva.block_sddmm`` or, with ``out``, as
    ``torch.ops.sylva.add_block_sddmm``; other code without the detour through PyTorch's
    dispatcher, which takes longer than a small product.
    """
    if not torch.compiler.is_compiling():
        return run_sddmm(dy, x, indices, block_size, out)
    if out is None:
        made: torch.Tensor = sddmm_operator(dy, x, indices, block_size)
        return made
    add_sddmm_operator(out, dy, x, indices, block_size)
    return out


def run_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel for these operands, or the reference."""
    key = ("sddmm", dy.device, dy.dtype, block_size)
    found = find_kernel(*key)
    if found is not None:
        try:
            result: torch.Tensor = found.block_sddmm(
                dy, x, indices, block_size, out=out
            )
            return result
        except Exception as failure:
            # This shape's tile does not compile, so nothing was computed or added.
            if is_demanded() or not never_ran(failure, dy.device):
                raise
            give_up(*key, f"{type(failure).__name__}: {failure}")
    return reference.block_sddmm(dy, x, indices, block_size, out=out)


@torch.library.custom_op("sylva::block_sddmm", mutates_args=())
def sddmm_operator(
    dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Blocks of ``dyᵀ x``."""
    return run_sddmm(dy, x, indices, block_size)


@sddmm_operator.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,  # noqa: ARG001
    indices: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    shape = (indices.shape[0], block_size, block_size)
    return dy.new_empty(shape, dtype=wide(dy.dtype))


@torch.library.custom_op("sylva::add_block_sddmm", mutates_args=("out",))
def add_sddmm_operator(
    out: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
) -> None:
    """Add blocks of ``dyᵀ x`` to a gradient."""
    run_sddmm(dy, x, indices, block_size, out)


@add_sddmm_operator.register_fake
def _(*_: object) -> None:
    """Nothing to infer: the gradient is changed in place."""
