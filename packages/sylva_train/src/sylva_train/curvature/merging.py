"""What several processes have collected, each from its share of the batches, added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from sylva_train._checks import ConfigError
from sylva_train.processes import everyone, rank_and_size
from sylva_train.targets import weight_device

from .factors import revive
from .hooks import Collector
from .layer import TENSORS

__all__ = ["merge"]


def from_process(state: dict[str, Any], source: int) -> dict[str, Any]:
    """Send one process's state to all; the others give one of the same arrays."""
    plain = [{k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}]
    dist.broadcast_object_list(plain, source)
    arrays = {}
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            arrays[name] = value.clone(memory_format=torch.contiguous_format)
            dist.broadcast(arrays[name], source)
    return plain[0] | arrays


def total(own: Any) -> Any:
    """Merge all processes' accumulators in order of rank, the same in each of them."""
    _, size = rank_and_size()
    result = revive(from_process(own.state(), 0))
    for rank in range(1, size):
        result.merge(revive(from_process(own.state(), rank)))
    return result


def merge(collector: Collector) -> None:
    """Add up what all processes have collected; all of them hold the result.

    Gradients and diagonal Fishers are sums, equal to those of one process to rounding.
    So are MLR factors, which are linear; HODLR ones are truncated as by an update.

    Raises
    ------
    ConfigError
        If layers share an input in one process and not in another.
    """
    if rank_and_size()[1] == 1:
        return
    found = everyone(collector.owner)
    for name in sorted(set().union(*found)):
        owners = {owner[name] for owner in found if name in owner}
        if len(owners) > 1:
            msg = (
                f"the input of `{name}` is that of another layer in one process and not"
                " in the other; score it in a call of its own (`target_modules`)."
            )
            raise ConfigError(msg)
        collector.owner[name] = owners.pop()
    for name in collector.names:
        if name in collector.owner:
            add_up(collector, name)


def add_up(collector: Collector, name: str) -> None:
    """Add up one layer; a process that had no batch for it takes part with nothing."""
    if name not in collector.sums:
        module = collector.targets[name]
        like = torch.empty(0, dtype=module.weight.dtype, device=weight_device(module))  # type: ignore[arg-type]
        collector.begin(name, like)
    sums = collector.sums[name]
    device = weight_device(collector.targets[name])
    for part in TENSORS:
        tensor = getattr(sums, part)
        if tensor is not None:
            # NCCL adds on a GPU, where a gradient in main memory is not.
            there = tensor.to(device)
            dist.all_reduce(there)
            tensor.copy_(there)
    sums.rows = sum(everyone(sums.rows))
    if sums.A is not None:
        sums.A = total(sums.A)
    if sums.G is not None:
        sums.G = total(sums.G)
