"""What one measurement is: options from JSON, checked before anything is built."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from sylva_train._checks import (
    ConfigError,
    check_choice,
    check_columns,
    check_density,
    check_integer,
)
from sylva_train.options import memory_bytes
from sylva_train.training import pick_device

from .subjects import DTYPES, MASKS, METHODS

__all__ = ["LayerSpec", "StepSpec"]

#: Methods of a lone layer, the order of their rows.
LAYER_METHODS = ("full", "lora", "kfac-pruner", "sylva", "frozen")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the measurements of a layer and of a model have in common.

    Parameters
    ----------
    batch, sequence : int
        Texts, and tokens of each.
    dtype : str
        Of weights and activations: float32, bfloat16 or float16.
    density, block_size, mask
        Fraction of the blocks that are trained, their side, and how they lie.
    repeats : int
        Timed repetitions.
    in_a_row : int
        Steps of one of them, which is their mean.
    device : str
        auto, cpu, cuda or cuda:N.
    threads : int, optional
        Of a CPU; by default as PyTorch has it.
    seed : int
        Of weights, masks and data.
    """

    batch: int = 1
    sequence: int = 512
    dtype: str = "float32"
    density: float = 0.05
    block_size: int = 64
    mask: str = "staircase"
    repeats: int = 9
    in_a_row: int = 1
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, spec: Mapping[str, Any]) -> Self:
        """Read a specification.

        Raises
        ------
        ConfigError
            If an option is unknown or missing, or has a value that cannot be used.
        """
        known = inspect.signature(cls).parameters
        needed = {
            name for name, option in known.items() if option.default is option.empty
        }
        if not needed <= spec.keys() <= known.keys():
            msg = (
                f"`spec` must have {', '.join(sorted(needed))} and may have"
                f" {', '.join(sorted(known.keys() - needed))}; got"
                f" {', '.join(sorted(spec)) or 'nothing'}."
            )
            raise ConfigError(msg)
        return cls(**spec)

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "block_size", "repeats", "in_a_row"):
            check_integer(name, getattr(self, name), 1)
        if self.threads is not None:
            check_integer("threads", self.threads, 1)
        check_integer("seed", self.seed, 0)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("mask", self.mask, MASKS)
        check_density(self.density)

    def check_methods(self, methods: list[str]) -> None:
        """Raise `ConfigError` unless all methods can run here."""
        for method in methods:
            check_choice("method", method, METHODS)
        device = pick_device(self.device)
        if (
            "kfac-pruner" in methods
            and device.type == "cpu"
            and self.dtype != "float32"
        ):
            msg = (
                "`dtype` must be 'float32' for the method 'kfac-pruner' on a CPU, which"
                f" has no block-sparse products of {self.dtype}."
            )
            raise ConfigError(msg)

    def prepare(self) -> torch.device:
        """Set threads and seed of this process, and return the device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        return pick_device(self.device)


@dataclass(frozen=True, kw_only=True)
class LayerSpec(Spec):
    """One linear layer.

    Parameters
    ----------
    in_features, out_features : int
        Its sizes.
    methods : list of str
        What is measured, in turns.
    """

    in_features: int
    out_features: int
    methods: list[str] = dataclasses.field(default_factory=lambda: [*LAYER_METHODS])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("in_features", "out_features"):
            check_integer(name, getattr(self, name), self.block_size)
        if not self.methods or "zero" in self.methods:
            msg = f"`methods` must be some of a layer's; got {self.methods!r}."
            raise ConfigError(msg)
        self.check_methods(self.methods)


@dataclass(frozen=True, kw_only=True)
class StepSpec(Spec):
    """A step of a whole model.

    Parameters
    ----------
    model : str
        A name in `MODELS`, or the path of a causal language model.
    method : str
        One of `METHODS`.
    rank : int, optional
        Of LoRA in every layer; by default it has as many weights as the blocks.
    max_columns : float
        Fraction of a layer's block columns that may have blocks.
    checkpointing : bool
        Gradient checkpointing.
    processes : int
        Each with a batch of its own, and a GPU of its own if there are any.
    memory_limit : int or str, optional
        Memory of a smaller device, such as ``"24GB"``: a step that takes more is out
        of memory.
    """

    model: str
    method: str
    repeats: int = 5
    rank: int | None = None
    max_columns: float = 1.0
    checkpointing: bool = False
    processes: int = 1
    memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("processes", self.processes, 1)
        if self.rank is not None:
            check_integer("rank", self.rank, 1)
        check_columns(self.max_columns, self.density)
        memory_bytes(self.memory_limit, "memory_limit")
        self.check_methods([self.method])
        count = torch.cuda.device_count()
        if pick_device(self.device).type == "cuda" and self.processes > count:
            msg = (
                f"`processes` must be at most the number of GPUs, {count}; got"
                f" {self.processes}."
            )
            raise ConfigError(msg)
