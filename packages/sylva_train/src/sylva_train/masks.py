"""Which blocks of which layers are trained: choosing them, keeping them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._checks import (
    ConfigError,
    check_choice,
    check_columns,
    check_density,
    check_integer,
    check_spread,
)
from ._files import read_tensors, write_tensors
from .config import SCOPES

if TYPE_CHECKING:
    from .importance import Scores

__all__ = ["LayerMask", "Masks", "select"]

FORMAT = "sylva-masks/1"


@dataclass(frozen=True)
class LayerMask:
    """The active blocks of one (out, in) weight.

    Parameters
    ----------
    shape : (int, int)
        ``(out, in)``.
    block_size : int
        Side of a block; the last row and column of blocks may be cut off.
    indices : torch.Tensor, shape (k, 2), int64
        Block row and block column of each active block, sorted by row, then column.

    Raises
    ------
    ConfigError
        If an index is outside the grid, or stands twice.
    """

    shape: tuple[int, int]
    block_size: int
    indices: torch.Tensor

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, 1)
        indices = torch.as_tensor(self.indices, dtype=torch.int64, device="cpu")
        indices = indices.reshape(-1, 2)
        rows, columns = self.grid_shape
        limits = torch.tensor([rows, columns])
        if bool(((indices < 0) | (indices >= limits)).any()):
            msg = (
                f"`indices` must lie in the {rows} × {columns} grid of blocks of a"
                f" {self.shape[0]} × {self.shape[1]} weight with `block_size`"
                f" {self.block_size}; got rows up to {int(indices[:, 0].max())} and"
                f" columns up to {int(indices[:, 1].max())}."
            )
            raise ConfigError(msg)
        flat = (indices[:, 0] * columns + indices[:, 1]).unique(sorted=True)
        if len(flat) != len(indices):
            msg = (
                f"`indices` must be distinct; {len(indices) - len(flat)} are repeated."
            )
            raise ConfigError(msg)
        indices = torch.stack([flat // columns, flat % columns], 1)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Number of block rows and block columns."""
        out, inputs = self.shape
        return math.ceil(out / self.block_size), math.ceil(inputs / self.block_size)

    @property
    def trainable(self) -> int:
        """Number of weights in the active blocks, cut-off blocks counted as they are."""
        first = self.indices * self.block_size
        size = (torch.tensor(self.shape) - first).clamp(max=self.block_size)
        return int(size.prod(1).sum())

    @property
    def total(self) -> int:
        """Number of weights of the layer."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        """Return the number of active blocks."""
        return len(self.indices)

    def dense(self) -> torch.Tensor:
        """Return the mask weight by weight: bool, shape (out, in)."""
        grid = torch.zeros(self.grid_shape, dtype=torch.bool)
        grid[self.indices[:, 0], self.indices[:, 1]] = True
        b = self.block_size
        full = grid.repeat_interleave(b, 0).repeat_interleave(b, 1)
        return full[: self.shape[0], : self.shape[1]]


class Masks(Mapping[str, LayerMask]):
    """Masks of a model's layers, by name.

    Parameters
    ----------
    layers : mapping of str to LayerMask
        Layers without an active block may be there; nothing is embedded in them.
    metadata : mapping, optional
        What is worth keeping with the masks (JSON): the rule, the data, the seed.
    """

    def __init__(
        self, layers: Mapping[str, LayerMask], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.layers = dict(layers)
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> LayerMask:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} layers, {sum(map(len, self.values()))} blocks,"
            f" {self.trainable:,} of {self.total:,} weights = {self.density:.2%})"
        )

    @property
    def trainable(self) -> int:
        """Number of weights in active blocks."""
        return sum(mask.trainable for mask in self.values())

    @property
    def total(self) -> int:
        """Number of weights of all layers."""
        return sum(mask.total for mask in self.values())

    @property
    def density(self) -> float:
        """Fraction of the layers' weights that is trained."""
        return self.trainable / self.total if self.total else 0.0

    def overlap(self, other: Masks) -> float:
        """Return the fraction of this one's blocks that ``other`` has as well."""
        common = 0
        for name in self.keys() & other.keys():
            mine, theirs = self[name], other[name]
            if (mine.shape, mine.block_size) != (theirs.shape, theirs.block_size):
                msg = (
                    f"`other` must have the same shape and block size in `{name}`: got"
                    f" {theirs.shape}, {theirs.block_size} against {mine.shape},"
                    f" {mine.block_size}."
                )
                raise ConfigError(msg)
            columns = mine.grid_shape[1]
            flat = [m.indices[:, 0] * columns + m.indices[:, 1] for m in (mine, theirs)]
            common += int(torch.isin(*flat).sum())
        blocks = sum(map(len, self.values()))
        return common / blocks if blocks else 1.0

    def digest(self) -> str:
        """Hash the blocks of all layers, to tell whether two choices are the same."""
        text = [
            [name, mask.shape, mask.block_size, mask.indices.tolist()]
            for name, mask in sorted(self.items())
        ]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to one safetensors file."""
        layers = {
            name: {"shape": mask.shape, "block_size": mask.block_size}
            for name, mask in self.items()
        }
        header = {"format": FORMAT, "layers": layers, "metadata": self.metadata}
        tensors = {name: mask.indices.to(torch.int32) for name, mask in self.items()}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks that `save` wrote.

        Raises
        ------
        AdapterError
            If the file is damaged, was changed, or is not a mask file.
        """
        tensors, header = read_tensors(path, FORMAT, "mask")
        layers = {
            name: LayerMask(tuple(info["shape"]), info["block_size"], tensors[name])
            for name, info in header["layers"].items()
        }
        return cls(layers, header["metadata"])


def top_blocks(
    blocks: torch.Tensor, count: int, preferred: torch.Tensor | None = None
) -> torch.Tensor:
    """Flat indices of the ``count`` largest entries; ties go to the smaller index.

    Entries that are not ``preferred`` (bool, the shape of ``blocks``) come after all
    that are.
    """
    order = blocks.flatten().sort(descending=True, stable=True).indices
    if preferred is not None:
        first = preferred.flatten()[order].long()
        order = order[first.sort(descending=True, stable=True).indices]
    return order[:count]


def best_columns(
    blocks: list[torch.Tensor], density: float, max_columns: float
) -> torch.Tensor:
    """Choose the block columns that layers with one input may have blocks in.

    A column is worth the most that it can give: the sum of its ``m`` best blocks, where
    ``m`` is the number of blocks to a column if the budget is spread evenly; over several
    layers the sum of that relative to the layer's mean block. For scores of rank one no
    other columns would allow a higher total.

    Parameters
    ----------
    blocks : list of torch.Tensor, shapes (rows, columns)
        The layers' block scores, with as many columns each.
    density, max_columns : float
        As in `select`.

    Returns
    -------
    torch.Tensor, shape (columns,), bool
    """
    columns = blocks[0].shape[1]
    count = max(
        math.floor(max_columns * columns + 1e-9), math.ceil(density * columns - 1e-9)
    )
    worth = torch.zeros(columns, dtype=torch.float64)
    for block in blocks:
        best = min(len(block), math.ceil(density * block.numel() / count))
        mean = block.mean()
        worth += block.topk(best, 0).values.sum(0) / (mean if mean > 0 else 1)
    chosen = torch.zeros(columns, dtype=torch.bool)
    chosen[top_blocks(worth, count)] = True
    return chosen


def concentrate(
    blocks: dict[str, torch.Tensor],
    density: float,
    max_columns: float,
    together: Iterable[Iterable[str]],
) -> dict[str, torch.Tensor]:
    """Rule blocks outside the best columns out: their scores become minus infinity."""
    groups = [[n for n in names if n in blocks] for names in together]
    single = blocks.keys() - {name for names in groups for name in names}
    for names in [*filter(None, groups), *([name] for name in sorted(single))]:
        if len({blocks[name].shape[1] for name in names}) > 1:
            msg = (
                "`together` must name layers with inputs of one size; got"
                f" {', '.join(f'`{n}`: {blocks[n].shape[1]} blocks' for n in names)}."
            )
            raise ConfigError(msg)
        chosen = best_columns([blocks[n] for n in names], density, max_columns)
        for name in names:
            blocks[name] = blocks[name].masked_fill(~chosen, -math.inf)
    return blocks


def spread_out(blocks: torch.Tensor, row_cap: int, column_cap: int) -> torch.Tensor:
    """Mark blocks that share their rows and columns with few better ones.

    Taken one by one from the best down, a block is marked if fewer than ``row_cap`` of
    its row and ``column_cap`` of its column are.

    Parameters
    ----------
    blocks : torch.Tensor, shape (rows, columns)
        Their scores; ties go to the smaller index.
    row_cap, column_cap : int
        At least 1.

    Returns
    -------
    torch.Tensor, shape (rows, columns), bool
    """
    size = blocks.numel()
    place = torch.empty(size, dtype=torch.int64)
    place[top_blocks(blocks, size)] = torch.arange(size)
    place = place.view(blocks.shape)
    marked = torch.zeros(blocks.shape, dtype=torch.bool)
    possible = torch.ones_like(marked)
    # All at once that are sure: those with room enough for every better one that is still
    # possible in their row and column. The best of these always is, so this comes to an
    # end, with what the greedy choice takes.
    while bool(possible.any()):
        ranked = torch.where(possible, place, size)
        in_row, in_column = (ranked.argsort(d).argsort(d) for d in (1, 0))
        room = row_cap - marked.sum(1, keepdim=True), column_cap - marked.sum(0)
        marked |= possible & (in_row < room[0]) & (in_column < room[1])
        full = (marked.sum(1, keepdim=True) >= row_cap) | (marked.sum(0) >= column_cap)
        possible &= ~(marked | full)
    return marked


def select(
    scores: Scores,
    density: float = 0.05,
    block_size: int = 32,
    scope: str = "layer",
    spread: float | None = None,
    *,
    max_columns: float = 1.0,
    together: Iterable[Iterable[str]] = (),
) -> Masks:
    """Choose the blocks with the highest scores: exactly as many as fit the budget.

    Parameters
    ----------
    scores : Scores
        From `sylva_train.score`.
    density : float
        Fraction of the blocks to train, in (0, 1]; rounded down to whole blocks.
    block_size : int
        Side of a block.
    scope : str
        ``"layer"``: each layer keeps that fraction of its blocks, as in the paper;
        ``"model"``: all blocks compete, each by its score over its layer's mean score;
        ``"absolute"``: all compete by their scores as they are, which shares the budget
        out by predicted decrease for rules that predict one (``"kfac-block"``,
        ``"kfac-natural"``, ``"gradient"``).
    spread : float, optional
        Lets no row and no column of blocks have more than this many times its share,
        ``density`` of its blocks, rounded up, while others have room: rank-one scores
        heap blocks onto a few outlying dimensions. At least 1; None: no limit.
    max_columns : float
        Largest fraction of a layer's block columns that may have blocks, at least
        ``density``; rounded down to whole columns, but to no fewer than ``density``
        needs. The backward pass keeps only these columns of the layer's input. Below 1
        the sum of the scores is lower: the best columns are chosen first, then the best
        blocks in them.
    together : iterable of iterables of str
        Layers that read the same input (`sylva_train.shared_inputs`), which are to have
        their blocks in the same columns if ``max_columns`` is below 1.

    Returns
    -------
    Masks

    Raises
    ------
    ConfigError
        If an option cannot be used, a layer is smaller than a block, or the density is
        too small for a single block.
    """
    check_density(density)
    check_integer("block_size", block_size, 1)
    check_choice("scope", scope, SCOPES)
    check_columns(max_columns, density)
    check_spread(spread)
    if spread is not None and max_columns < 1:
        msg = (
            "`spread` keeps blocks apart and `max_columns` together: give one of them."
        )
        raise ConfigError(msg)
    blocks = {name: layer.blocks(block_size) for name, layer in scores.items()}
    whole = dict(blocks)
    if max_columns < 1:
        blocks = concentrate(blocks, density, max_columns, together)
    preferred: dict[str, torch.Tensor | None] = dict.fromkeys(blocks)
    if spread is not None:
        for name, block in blocks.items():
            caps = [math.ceil(spread * density * n - 1e-9) for n in block.shape]
            preferred[name] = spread_out(block, row_cap=caps[1], column_cap=caps[0])
    if scope == "layer":
        chosen = {
            name: top_blocks(
                block, math.floor(density * block.numel() + 1e-9), preferred[name]
            )
            for name, block in blocks.items()
        }
    else:
        competing = []
        for name, block in blocks.items():
            mean = whole[name].mean() if scope == "model" else torch.tensor(1.0)
            competing.append((block / mean if mean != 0 else block).flatten())
        competitors = torch.cat(competing) if competing else torch.zeros(0)
        marks = [mark.flatten() for mark in preferred.values() if mark is not None]
        top = top_blocks(
            competitors,
            math.floor(density * len(competitors) + 1e-9),
            torch.cat(marks) if marks else None,
        )
        kept = torch.zeros(len(competitors), dtype=torch.bool)
        kept[top] = True
        parts = kept.split([block.numel() for block in blocks.values()])
        chosen = {
            name: part.nonzero()[:, 0] for name, part in zip(blocks, parts, strict=True)
        }
    if not any(len(flat) for flat in chosen.values()):
        counts = [block.numel() for block in blocks.values()]
        has = (
            f"the largest layer has {max(counts, default=0)}"
            if scope == "layer"
            else f"the model has {sum(counts)}"
        )
        share = ', or let the layers share a budget with `scope="model"`'
        msg = (
            f"`density` {density} leaves no whole block to train: {has} blocks of side"
            f" {block_size}. Raise `density`, or lower `block_size`"
            f"{share if scope == 'layer' else ''}."
        )
        raise ConfigError(msg)
    masks = {}
    for name, flat in chosen.items():
        columns = blocks[name].shape[1]
        indices = torch.stack([flat // columns, flat % columns], 1)
        masks[name] = LayerMask(scores[name].shape, block_size, indices)
    metadata = dict(scores.metadata) | {
        "density": density,
        "block_size": block_size,
        "scope": scope,
        "max_columns": max_columns,
        "spread": spread,
    }
    return Masks(masks, metadata)
