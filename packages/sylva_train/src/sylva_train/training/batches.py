"""What a run takes its batches from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, Protocol, cast

from sylva_train._checks import ConfigError, DataError
from sylva_train.config import TrainingConfig

from .gradient import Batch

__all__ = ["BatchLoader", "Batches", "in_epochs", "number_of_steps"]


class Batches(Protocol):
    """Batches to run through again and again: a list, or a DataLoader."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""

    def __iter__(self) -> Any:
        """Begin an epoch."""


class BatchLoader(Protocol):
    """Batches whose order depends on the epoch and on nothing else.

    `sylva_train.Loader` is one. What its attribute ``identity`` (JSON) says, if it has
    one, must not change between a run and its continuation.
    """

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        """Return an epoch's batches from the one numbered ``start`` on."""


class Passes:
    """The epochs of a list or a DataLoader, of which no order is promised."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]:  # noqa: ARG002
        """Return the batches of one more pass."""
        return itertools.islice(iter(self.batches), start, None)


def in_epochs(loader: BatchLoader | Batches, *, kept: bool) -> BatchLoader:
    """Return what gives a run's batches epoch by epoch.

    Raises
    ------
    ConfigError
        If the loader is none, or has no order of its epochs and the run is ``kept`` in
        checkpoints.
    """
    if not hasattr(loader, "__len__"):
        msg = (
            "`loader` must have a length: a list of batches, a DataLoader of data with a"
            f" length, or a `sylva_train.Loader`; got a {type(loader).__name__}."
        )
        raise ConfigError(msg)
    if hasattr(loader, "epoch"):
        return cast("BatchLoader", loader)
    if kept:
        msg = (
            "with `output`, `loader` must have a method `epoch(epoch, start)` as well, so"
            " that the run can be resumed at any batch; got one of type"
            f" {type(loader).__name__}. Take a `sylva_train.Loader`, give it that, or leave"
            " `output` out."
        )
        raise ConfigError(msg)
    if not hasattr(loader, "__iter__"):
        msg = f"`loader` must be batches; got a {type(loader).__name__}."
        raise ConfigError(msg)
    return Passes(loader)


def number_of_steps(loader: BatchLoader, config: TrainingConfig) -> int:
    """Return the optimizer steps of a run.

    Raises
    ------
    DataError
        If there is no batch.
    """
    if not len(loader):
        msg = "`loader` has no batch: there is nothing to train on."
        raise DataError(msg)
    return config.steps or config.epochs * math.ceil(len(loader) / config.accumulate)
