"""What the statistics of each layer take, and in how many passes they fit a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.options import memory_bytes
from sylva_train.progress import size_words
from sylva_train.targets import weight_device, weight_view

from .factors import accumulator

__all__ = ["Pass", "curvature_bytes", "plan_passes"]


@dataclass(frozen=True)
class Pass:
    """Layers whose statistics are added up in one pass over the data.

    Attributes
    ----------
    names : tuple of str
        The layers.
    nbytes : int
        Bytes of their accumulators on the device, and of the gradient that is there while
        others are in main memory.
    host_bytes : int
        Bytes of their gradients in main memory; 0: they stay on the device.
    """

    names: tuple[str, ...]
    nbytes: int
    host_bytes: int = 0


def curvature_bytes(
    shape: tuple[int, int],
    config: SylvaConfig,
    wanted: Collection[str] = ("factors", "gradient"),
    dtype: torch.dtype = torch.float32,
) -> dict[str, int]:
    """Bytes of the accumulators of one layer, from its shape alone.

    Parameters
    ----------
    shape : (int, int)
        ``(out, in)``.
    config : SylvaConfig
        ``curvature``, ``levels``, ``rank``, ``exact_below``, ``block_size``.
    wanted : collection of str
        Of ``"factors"``, ``"gradient"``, ``"fisher"``, ``"inputs"``, ``"outputs"``.
    dtype : torch.dtype
        Of the layer's weight.

    Returns
    -------
    dict of str to int
        ``"A"``, ``"G"``, ``"gradient"``, ``"fisher"``, ``"inputs"``, ``"outputs"``, as far
        as they are wanted. Layers that share their input share ``"A"``.

    Examples
    --------
    A layer of 4096 × 4096 weights, and the exact factors beside the default ones:

    >>> from sylva_train import SylvaConfig
    >>> from sylva_train.curvature import curvature_bytes
    >>> curvature_bytes((4096, 4096), SylvaConfig())["A"]
    7471104
    >>> curvature_bytes((4096, 4096), SylvaConfig(curvature="dense"))["A"]
    67108864
    """
    out, inputs = shape
    dtype = torch.promote_types(dtype, torch.float32)
    rows, columns = (-(-n // config.block_size) for n in shape)
    numbers = {
        "gradient": out * inputs,
        "fisher": rows * columns,
        "inputs": inputs,
        "outputs": out,
    }
    sizes = {part: n * dtype.itemsize for part, n in numbers.items() if part in wanted}
    if "factors" not in wanted:
        return sizes
    kind = (config.curvature, config.levels, config.rank, config.exact_below)
    sides = {"A": inputs, "G": out}
    return {s: factor_bytes(n, dtype, *kind) for s, n in sides.items()} | sizes


@functools.cache
def factor_bytes(
    n: int, dtype: torch.dtype, curvature: str, levels: int, rank: int, exact_below: int
) -> int:
    """Bytes of one factor's accumulator; on the meta device it takes none."""
    config = SylvaConfig(
        curvature=curvature, levels=levels, rank=rank, exact_below=exact_below
    )
    like = torch.empty(0, device="meta", dtype=dtype)
    size: int = accumulator(n, like, config).nbytes
    return size


def plan_passes(
    targets: Mapping[str, nn.Module],
    config: SylvaConfig,
    wanted: Collection[str],
    shared: Callable[[], Mapping[str, str]],
) -> list[Pass]:
    """Divide layers, in their order, into passes that stay below the memory budget.

    Parameters
    ----------
    targets : mapping of str to torch.nn.Module
        The layers.
    config : SylvaConfig
        ``memory_budget``, ``host_budget`` and the kind of the factors.
    wanted : collection of str
        As for `curvature_bytes`.
    shared : callable
        Returns what `sylva_train.targets.input_owners` finds; called only where it makes a difference.

    Raises
    ------
    ConfigError
        If one layer alone is above the budget.
    """
    sizes = {
        name: curvature_bytes(tuple(weight.shape), config, wanted, weight.dtype)  # type: ignore[arg-type]
        for name, weight in ((n, weight_view(m)) for n, m in targets.items())
    }
    total = sum(sum(parts.values()) for parts in sizes.values())
    budget = memory_bytes(config.memory_budget)
    if budget is None or total <= budget:
        return [Pass(tuple(sizes), total)]
    for name, parts in sizes.items():
        check_alone(name, targets[name], parts, budget)
    owner = shared() if "factors" in wanted else {}
    passes = fill(sizes, owner, budget)
    host = memory_bytes(config.host_budget, "host_budget")
    # Gradients of a model on a CPU are in main memory as it is.
    elsewhere = any(weight_device(m).type != "cpu" for m in targets.values())
    if host is None or "gradient" not in wanted or not elsewhere:
        return passes
    away = fill(sizes, owner, budget, host)
    # One gradient alone may be above what there is.
    fits = max(part.host_bytes for part in away) <= host
    return away if fits and len(away) < len(passes) else passes


def check_alone(
    name: str, module: nn.Module, parts: Mapping[str, int], budget: int
) -> None:
    """Raise `ConfigError` if one layer alone is above the budget."""
    alone = sum(parts.values())
    if alone > budget:
        detail = ", ".join(f"{part} {size_words(n)}" for part, n in parts.items())
        less = (
            ", or take more `levels`, or a smaller `rank` or `exact_below`"
            if "A" in parts
            else ""
        )
        msg = (
            f"`memory_budget` is {budget:,} bytes, but `{name}` of shape"
            f" {tuple(weight_view(module).shape)} needs {alone:,} bytes by itself"
            f" ({detail}). Raise it{less}."
        )
        raise ConfigError(msg)


def fill(
    sizes: Mapping[str, Mapping[str, int]],
    owner: Mapping[str, str],
    budget: int,
    host: int = 0,
) -> list[Pass]:
    """Fill passes with layers, each as far as the budgets go; ``host``: main memory."""
    passes: list[Pass] = []
    # Of the pass that is being filled: its layers, the inputs they read, and bytes of the
    # factors, of the gradients on the device and of those in main memory.
    names: list[str] = []
    inputs: set[str] = set()
    factors = here = pinned = 0
    for name, parts in sizes.items():
        reader, gradient = owner.get(name, name), parts.get("gradient", 0)
        own = sum(parts.values()) - gradient
        # PyTorch pins powers of two.
        away = 1 << (gradient - 1).bit_length() if host else 0
        # Layers that read one input share its factor. Of gradients in main memory the one
        # that is being added to is on the device.
        after = factors + own - (parts.get("A", 0) if reader in inputs else 0)
        beside = max(here, gradient) if host else here + gradient
        if names and (after + beside > budget or pinned + away > host):
            passes.append(Pass(tuple(names), factors + here, pinned))
            names, inputs = [], set()
            after, beside, pinned = own, gradient, 0
        names.append(name)
        inputs.add(reader)
        factors, here, pinned = after, beside, pinned + away
    return [*passes, Pass(tuple(names), factors + here, pinned)]
