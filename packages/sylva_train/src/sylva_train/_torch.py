"""What several rooms do with PyTorch, and what it offers under private names alone."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "caching",
    "has_amx",
    "has_fast_bfloat16",
    "is_in_backward",
    "is_transformed",
    "note_tensors",
    "on_device",
    "preserved_modes",
    "sampled",
    "separate",
    "set_version",
    "tensor_bytes",
    "total_norm",
    "without_cache",
]


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device, those in lists and mappings as well."""
    # The host would read what a GPU has yet to write.
    waits = device.type == "cpu"

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=not waits)
        if isinstance(value, Mapping):
            return {name: moved(part) for name, part in value.items()}
        if type(value) in {list, tuple}:
            return type(value)(map(moved, value))
        return value

    return {name: moved(value) for name, value in batch.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements, of any type, row by row."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return some of a weight's elements, evenly spaced: enough to tell it from others."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 256)]


def separate(tensors: dict[str, torch.Tensor]) -> None:
    """Copy those of some tensors that share memory with others: safetensors refuses them."""
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[key] = tensor.clone()
        else:
            end = tensor.data_ptr() + tensor.nbytes


def is_transformed(tensor: torch.Tensor | None = None) -> bool:
    """Whether a tensor stands for others in a `torch.func` transform, or one is going on."""
    if tensor is None:
        return bool(torch._C._are_functorch_transforms_active())
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def note_tensors(tensors: Mapping[str, torch.Tensor], digest: hashlib._Hash) -> None:
    """Add tensors to a digest: their names, types, shapes and elements."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def total_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the norm of gradients together, in float32 at least.

    In float16 a norm overflows where no gradient does, and its square long before.
    """
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype.itemsize < 4 else g
        for g in gradients
    ]
    return torch.nn.utils.get_total_norm(norms)


@contextlib.contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Leave each module as it was, in training or in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def caching(model: nn.Module) -> list[Any]:
    """Return the configurations that ask for a cache for generation.

    It takes milliseconds to go through all modules: too long for each step.
    """
    configs = {
        id(c): c
        for m in model.modules()
        if (c := getattr(m, "config", None)) is not None
    }
    return [c for c in configs.values() if getattr(c, "use_cache", None) is True]


@contextlib.contextmanager
def without_cache(configs: list[Any]) -> Iterator[None]:
    """Let a model fill no cache for generation, whose tensors are no part of a gradient.

    Some, as RWKV's and xLSTM's, are written in place, under the gradient's feet.
    ``configs`` are those that are `caching`.
    """
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


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
