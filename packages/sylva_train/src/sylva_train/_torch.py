"""What is needed of PyTorch and it offers under private names alone."""

from __future__ import annotations

import functools

import torch

__all__ = ["has_amx", "has_fast_bfloat16", "is_in_backward", "set_version"]


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has units for products of matrices, as Intel's Xeons have."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_fast_bfloat16() -> bool:
    """Whether this CPU's products of bfloat16 are faster than those of float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_in_backward() -> bool:
    """Whether autograd calls this in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def set_version(tensor: torch.Tensor, version: int) -> None:
    """Set the count of a tensor's changes, by which backward passes notice them."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
