"""Several processes work together: who they are, and what they must agree on.

Without an initialised `torch.distributed` there is one process, and nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from ._checks import ConfigError, SylvaError

__all__ = ["agree", "everyone", "from_first", "is_first", "rank_and_size", "together"]


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank, and how many processes there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process writes files for all."""
    return rank_and_size()[0] == 0


def everyone(value: Any) -> list[Any]:
    """Return each process's value, by rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let no process go on from what fails in another: all wait here for each other."""
    error: Exception | None = None
    try:
        yield
    except Exception as failure:  # noqa: BLE001 - other processes must hear of any
        error = failure
    failures = everyone(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, words in enumerate(failures):
        if words is not None:
            msg = f"stopped because process {rank} failed: {words}"
            raise SylvaError(msg)


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
    if rank_and_size()[1] == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, 0)
    return found[0]
