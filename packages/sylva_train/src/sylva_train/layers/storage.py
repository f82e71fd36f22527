"""Where a layer's values and indices are kept, and how their changes are noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Masters", "Tables", "watch_optimizers"]


class Masters(nn.ParameterDict):
    """Parameters that keep their precision when the model is cast.

    ``model.to(torch.bfloat16)`` moves and casts every floating-point tensor; steps of a
    fine-tuning would vanish in bfloat16 values. Cast as integers, they only move.
    """

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        def moved(values: torch.Tensor) -> torch.Tensor:
            wide = values.dtype == torch.float64
            bits = values.detach().view(torch.int64 if wide else torch.int32)
            return fn(bits).view(values.dtype)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class Tables(nn.Module):
    """Named buffers: the block indices of each adapter."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get_buffer(name)

    def __setitem__(self, name: str, table: torch.Tensor) -> None:
        self._buffers[name] = table

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def keys(self) -> Iterator[str]:
        """Return the adapters' names, as PEFT asks for them."""
        return iter(self._buffers)


@functools.cache
def watch_optimizers() -> None:
    """See that steps of every optimizer count as changes of the values.

    Fused optimizers, Trainer's default among them, write parameters without counting up
    their version, and the dense weights would stay as they were for good.
    """

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "writes_through", False):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if getattr(parameter, "sylva_shown", False):
                    torch.autograd.graph.increment_version(parameter)

    register_optimizer_step_post_hook(count)
