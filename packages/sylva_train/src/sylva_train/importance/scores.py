"""Scores of a model's weights, layer by layer: an artifact of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sylva_train._artifacts import Layers, read_tensors, write_tensors
from sylva_train._checks import ConfigError, NonFiniteError
from sylva_train.curvature import block_sums

__all__ = ["LayerScores", "Scores", "check_finite"]

FORMAT = "sylva-scores/2"


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer's weights, in the form its rule gives them.

    Parameters
    ----------
    shape : (int, int)
        ``(out, in)``.
    s_out, s_in : torch.Tensor, shapes (out,) and (in,), optional
        A rank-one score: weight ``[k, j]`` scores ``s_out[k] · s_in[j]``.
    grid : torch.Tensor, shape (rows, columns), optional
        Otherwise: scores summed over blocks of ``unit`` × ``unit`` weights.
    unit : int
        Side of the grid's blocks.
    additive : bool
        Whether a larger block scores the sum of what its parts do; if not, the grid is
        good for blocks of ``unit`` alone.
    """

    shape: tuple[int, int]
    s_out: torch.Tensor | None = None
    s_in: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    unit: int = 1
    additive: bool = True

    def blocks(self, block_size: int) -> torch.Tensor:
        """Sum the scores over blocks.

        Parameters
        ----------
        block_size : int
            Side of a block; a multiple of ``unit`` where the scores are a grid, and
            ``unit`` itself where they do not add up.

        Returns
        -------
        torch.Tensor, shape (ceil(out / block_size), ceil(in / block_size)), float64

        Raises
        ------
        ConfigError
            If a block does not fit the layer or the grid.
        """
        if block_size > min(self.shape):
            msg = (
                f"`block_size` {block_size} is larger than a layer of shape {self.shape};"
                f" take at most {min(self.shape)}, or leave the layer out."
            )
            raise ConfigError(msg)
        if self.grid is None:
            # A rank-one score's block sums are rank one: never the (out, in) matrix.
            assert self.s_out is not None
            assert self.s_in is not None
            rows = block_sums(self.s_out.double()[:, None], block_size)[:, 0]
            columns = block_sums(self.s_in.double()[None, :], block_size)[0]
            return torch.outer(rows, columns)
        if block_size % self.unit or not (self.additive or block_size == self.unit):
            multiple = "a multiple of " if self.additive else ""
            msg = (
                f"`block_size` {block_size} must be {multiple}{self.unit}, the blocks that"
                " these scores are of; score again with the one that you want."
            )
            raise ConfigError(msg)
        return block_sums(self.grid.double(), block_size // self.unit)


class Scores(Layers[LayerScores]):
    """Scores of a model's layers, by name.

    Parameters
    ----------
    layers : mapping of str to LayerScores
        The layers.
    metadata : mapping
        What is worth keeping (JSON): the rule and its options, the samples seen.
    """

    @property
    def rule(self) -> str:
        """Name of the rule."""
        return str(self.metadata["importance"])

    def __repr__(self) -> str:
        samples = self.metadata.get("samples")
        return f"Scores({self.rule}, {len(self)} layers, {samples} samples)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one safetensors file."""
        parts = ("s_out", "s_in", "grid")
        tensors = {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.items()
            for part in parts
            if getattr(layer, part) is not None
        }
        layers = {
            name: {"shape": s.shape, "unit": s.unit, "additive": s.additive}
            for name, s in self.items()
        }
        header = {"format": FORMAT, "layers": layers, "metadata": self.metadata}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read scores that `save` wrote.

        Raises
        ------
        AdapterError
            If the file is damaged, was changed, or is not a score file.
        """
        tensors, header = read_tensors(path, FORMAT, "score")
        layers = {
            name: LayerScores(
                tuple(info["shape"]),
                tensors.get(f"{name}.s_out"),
                tensors.get(f"{name}.s_in"),
                tensors.get(f"{name}.grid"),
                info["unit"],
                info["additive"],
            )
            for name, info in header["layers"].items()
        }
        return cls(layers, header["metadata"])


def check_finite(scores: Mapping[str, LayerScores]) -> None:
    """Raise `NonFiniteError` if a score is NaN or infinite."""
    for name, layer in scores.items():
        for part in (layer.s_out, layer.s_in, layer.grid):
            if part is not None and not bool(torch.isfinite(part).all()):
                msg = (
                    f"the scores of `{name}` are not finite: its weights, activations or"
                    " gradients overflow. Check the weights for NaN, or raise `damping`."
                )
                raise NonFiniteError(msg)
