"""Which blocks of which layers are trained, and keeping that in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._artifacts import Layers, read_tensors, write_tensors
from ._checks import ConfigError, check_integer

__all__ = ["LayerMask", "Masks"]

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

    @classmethod
    def from_flat(
        cls, shape: tuple[int, int], block_size: int, flat: torch.Tensor
    ) -> LayerMask:
        """Return the mask of blocks by their places in the grid, row by row: (k,)."""
        columns = math.ceil(shape[1] / block_size)
        indices = torch.stack([flat // columns, flat % columns], 1)
        return cls(shape, block_size, indices)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Number of block rows and block columns."""
        out, inputs = self.shape
        return math.ceil(out / self.block_size), math.ceil(inputs / self.block_size)

    @property
    def flat(self) -> torch.Tensor:
        """Place of each active block in the grid, row by row: int64 (k,)."""
        return self.indices[:, 0] * self.grid_shape[1] + self.indices[:, 1]

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


class Masks(Layers[LayerMask]):
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
        super().__init__(layers, metadata or {})

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} layers, {self.blocks} blocks,"
            f" {self.trainable:,} of {self.total:,} weights = {self.density:.2%})"
        )

    @property
    def blocks(self) -> int:
        """Number of active blocks of all layers."""
        return sum(map(len, self.values()))

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
        """Return the fraction of this one's blocks that ``other`` has as well.

        Raises
        ------
        ConfigError
            If a layer of both has different shapes or block sizes.
        """
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
            common += int(torch.isin(mine.flat, theirs.flat).sum())
        return common / self.blocks if self.blocks else 1.0

    def digest(self) -> str:
        """Hash the blocks of all layers, to tell whether two choices are the same."""
        # The JSON of a list of all layers, of which one at a time is text.
        total = hashlib.sha256()
        for number, (name, mask) in enumerate(sorted(self.items())):
            layer = [name, mask.shape, mask.block_size, mask.indices.tolist()]
            total.update(f"{', ' if number else '['}{json.dumps(layer)}".encode())
        total.update(b"]" if self else b"[]")
        return total.hexdigest()

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
