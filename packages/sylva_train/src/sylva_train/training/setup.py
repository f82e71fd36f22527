"""What surrounds the loop: checks, device, learning-rate schedule, seeds."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train.checkpoint import checkpoints, rng_state, set_rng_state
from sylva_train.config import TrainingConfig
from sylva_train.processes import rank_and_size

__all__ = [
    "check_parts",
    "make_scheduler",
    "pick_device",
    "place",
    "preserved_rng",
    "seed_everything",
]


def check_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: LRScheduler | None,
    output: str | os.PathLike[str] | None,
    *,
    resume: bool,
) -> None:
    """Raise `ConfigError` or `OutputExistsError` where arguments contradict."""
    if rank_and_size()[1] > 1 and isinstance(model, DistributedDataParallel):
        msg = (
            "`model` must be the bare one, without DistributedDataParallel around it: `train`"
            " adds the gradients of all processes up."
        )
        raise ConfigError(msg)
    if scheduler is not None and scheduler.optimizer is not optimizer:
        msg = "`scheduler` must be given together with the `optimizer` it was made for."
        raise ConfigError(msg)
    if isinstance(scheduler, ReduceLROnPlateau):
        msg = (
            "`scheduler` is a ReduceLROnPlateau, which needs a metric at each step; give"
            " one that goes by the number of steps."
        )
        raise ConfigError(msg)
    if isinstance(optimizer, torch.optim.LBFGS):
        msg = (
            "`optimizer` is an LBFGS, which computes the gradient itself, several times a"
            " step; give one that takes the gradient as it is."
        )
        raise ConfigError(msg)
    if resume and output is None:
        msg = "`resume` needs `output`, the folder with the checkpoints."
        raise ConfigError(msg)
    if output is not None and not resume and checkpoints(output):
        msg = (
            f"`output` `{output}` has checkpoints of another run; nothing was changed."
            " Go on with it (`resume=True`, `--resume`), or choose another folder."
        )
        raise OutputExistsError(msg)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is CUDA where there is one.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(1, device=device).item()  # not of every kind that has a name
    except (RuntimeError, AssertionError, ImportError) as error:
        msg = (
            '`device` must be "auto", "cpu", "cuda" or "cuda:<n>", or another one that'
            f" this PyTorch has; got {name!r}."
        )
        raise ConfigError(msg) from error
    if device.type == "cuda" and not cuda:
        msg = (
            f'`device` is {name!r}, but PyTorch {torch.__version__} sees no CUDA; use "cpu"'
            " or a CUDA build of PyTorch."
        )
        raise ConfigError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"`device` is {name!r}, but there are {torch.cuda.device_count()} GPUs."
        raise ConfigError(msg)
    if device.index is not None and (size := rank_and_size()[1]) > 1:
        msg = f'`device` is {name!r}, but each of {size} processes has its own: give "cuda".'
        raise ConfigError(msg)
    return device


def place(model: nn.Module, name: str) -> torch.device:
    """Move a model to the device of that name, and return where its inputs go.

    A model stays where ``"auto"`` or a name without a number finds it on devices of that
    kind, and one that is spread over several of them always does.
    """
    found = dict.fromkeys(p.device for p in model.parameters())
    if not found:
        return pick_device(name)  # nothing to move, nor to train, as the optimizer says
    first, *others = found
    if name == "auto" and all(d.type != "cpu" for d in found):
        return first
    device = pick_device(name)
    if any(d.type != device.type for d in found):
        model.to(device)
    elif ":" not in name:
        return first  # which need not be the current one
    elif not others:
        model.to(device)
    return device


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int
) -> LambdaLR:
    """Return a schedule: up from 0 over the warm-up, then as ``config.schedule`` says.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its learning rate is the peak.
    config : TrainingConfig
        ``warmup`` and ``schedule``: ``"linear"`` and ``"cosine"`` end at 0.
    steps : int
        Optimizer steps in all.
    """
    warmup = math.ceil(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.schedule == "constant":
            return 1.0
        left = max(0, steps - step) / max(1, steps - warmup)
        return (
            left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        )

    return LambdaLR(optimizer, factor)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the global random generators as they were."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the global random generators that `preserved_rng` restores."""
    # Not torch.manual_seed: it would seed every GPU, the ones not in use as well.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 what others draw from
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
