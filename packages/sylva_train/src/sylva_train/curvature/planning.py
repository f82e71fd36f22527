"""What the statistics of each layer take, and in how many passes they fit a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig, memory_bytes
from sylva_train.targets import weight_view

from .factors import accumulator

__all__ = ["Pass", "curvature_bytes", "plan_passes", "size_words"]


@dataclass(frozen=True)
class Pass:
    """Layers whose statistics are added up in one pass over the data.

    Attributes
    ----------
    names : tuple of str
        The layers.
    nbytes : int
        Bytes of their accumulators.
    """

    names: tuple[str, ...]
    nbytes: int


def size_words(size: float) -> str:
    """Print a number of bytes as people say it."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"


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
        Of ``"factors"``, ``"gradient"``, ``"fisher"``, ``"inputs"``.
    dtype : torch.dtype
        Of the layer's weight.

    Returns
    -------
    dict of str to int
        ``"A"``, ``"G"``, ``"gradient"``, ``"fisher"``, ``"inputs"``, as far as they are
        wanted. Layers that share their input share ``"A"``.

    Examples
    --------
    A layer of 4096 × 4096 weights, and the exact factors beside the default ones:

    >>> from sylva_train import SylvaConfig
    >>> from sylva_train.curvature import curvature_bytes
    >>> curvature_bytes((4096, 4096), SylvaConfig())["A"]
    6291516
    >>> curvature_bytes((4096, 4096), SylvaConfig(curvature="dense"))["A"]
    67108864
    """
    out, inputs = shape
    dtype = torch.promote_types(dtype, torch.float32)
    width = dtype.itemsize
    sizes: dict[str, int] = {}
    if "factors" in wanted:
        kind = (config.curvature, config.levels, config.rank, config.exact_below)
        sizes |= {
            "A": factor_bytes(inputs, dtype, *kind),
            "G": factor_bytes(out, dtype, *kind),
        }
    if "gradient" in wanted:
        sizes["gradient"] = out * inputs * width
    if "fisher" in wanted:
        rows, columns = (-(-n // config.block_size) for n in shape)
        sizes["fisher"] = rows * columns * width
    if "inputs" in wanted:
        sizes["inputs"] = inputs * width
    return sizes


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
        ``memory_budget`` and the kind of the factors.
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
    owner = dict(shared()) if "factors" in wanted else {}
    passes: list[Pass] = []
    names: list[str] = []
    held: set[str] = set()
    filled = 0
    for name, parts in sizes.items():
        alone, first = sum(parts.values()), owner.get(name, name)
        if alone > budget:
            detail = ", ".join(f"{part} {size_words(n)}" for part, n in parts.items())
            msg = (
                f"`memory_budget` is {size_words(budget)}, but `{name}` of shape"
                f" {tuple(weight_view(targets[name]).shape)} needs {alone:,} bytes by"
                f" itself ({detail}). Raise it, or take more `levels` or a smaller"
                " `rank`."
            )
            raise ConfigError(msg)
        more = alone - (parts["A"] if first in held else 0)
        if filled + more > budget:
            passes.append(Pass(tuple(names), filled))
            names, held, filled, more = [], set(), 0, alone
        names.append(name)
        held.add(first)
        filled += more
    return [*passes, Pass(tuple(names), filled)]
