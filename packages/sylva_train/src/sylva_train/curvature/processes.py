"""Several processes work together: each on its share of the batches, then all add up.

Without an initialised `torch.distributed` there is one process, and nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sylva_train._checks import ConfigError, SylvaError
from sylva_train.targets import weight_device

from .factors import revive
from .hooks import Collector

__all__ = ["agree", "everyone", "from_first", "merge", "place", "settle", "together"]


def place() -> tuple[int, int]:
    """Return this process's rank, and how many processes there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def everyone(value: Any) -> list[Any]:
    """Return each process's value, by rank."""
    _, size = place()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def settle(error: Exception | None) -> None:
    """Raise in every process if one has failed: none must wait for it in vain."""
    failures = everyone(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            msg = f"stopped because process {rank} failed: {failure}"
            raise SylvaError(msg)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let no process go on from what fails in another: all wait here for each other."""
    error: Exception | None = None
    try:
        yield
    except Exception as failure:  # noqa: BLE001 - other processes must hear of any
        error = failure
    settle(error)


def agree(value: Any, what: str) -> None:
    """Raise `ConfigError` where processes have different values."""
    values = everyone(value)
    differ = [rank for rank, other in enumerate(values) if other != values[0]]
    if differ:
        msg = (
            f"process {differ[0]} has other {what} than process 0. Every process must be"
            " given the same model, options and batches, in the same order: they are dealt"
            " out afterwards, without a DistributedSampler."
        )
        raise ConfigError(msg)


def from_first(value: Any) -> Any:
    """Return process 0's value in all of them."""
    if place()[1] == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, 0)
    return found[0]


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
    _, size = place()
    result = revive(from_process(own.state(), 0))
    for rank in range(1, size):
        result.merge(revive(from_process(own.state(), rank)))
    return result


def merge(collector: Collector) -> None:
    """Add up what all processes have collected; all of them hold the result.

    Gradients and diagonal Fishers are sums, equal to those of one process to rounding.
    Factors are merged one by one, truncated as by an update.

    Raises
    ------
    ConfigError
        If layers share an input in one process and not in another.
    """
    if place()[1] == 1:
        return
    for name in sorted(set().union(*everyone(set(collector.sums)))):
        owners = {o for o in everyone(collector.owner.get(name)) if o is not None}
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
    for tensor in (sums.gradient, sums.fisher, sums.input_squares):
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
