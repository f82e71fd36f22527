"""Several processes that `torchrun` started work on one command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from sylva_train._checks import ConfigError

__all__ = ["check_alone", "joined"]

#: What a process finds the others by, beside WORLD_SIZE.
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def number_of_processes() -> int:
    """Return how many there are."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else 1


def check_alone() -> None:
    """Raise `ConfigError` in one of several processes that all write the same output."""
    if (size := number_of_processes()) > 1:
        msg = (
            "this command runs in one process, and this is one of several (WORLD_SIZE is"
            f" {size}) that would write the same output. Run it once, without torchrun and"
            " with WORLD_SIZE unset; `sylva score` and `sylva finetune` can share the work."
        )
        raise ConfigError(msg)


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Join the other processes, if there are any; yield whether to speak for all.

    Each has the GPU of its LOCAL_RANK where there are GPUs.

    Raises
    ------
    ConfigError
        If there are fewer GPUs than processes, or not what `torchrun` tells them.
    """
    if number_of_processes() == 1:
        yield True
        return
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        msg = (
            f"WORLD_SIZE is {number_of_processes()}, but {', '.join(missing)} is not set:"
            " start the processes by torchrun, or one without WORLD_SIZE."
        )
        raise ConfigError(msg)
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            msg = f"there are more processes than GPUs, {count}: give torchrun fewer of them."
            raise ConfigError(msg)
        torch.cuda.set_device(local)
    dist.init_process_group()
    try:
        yield dist.get_rank() == 0
        dist.barrier()  # none goes while another still needs it
    finally:
        dist.destroy_process_group()
