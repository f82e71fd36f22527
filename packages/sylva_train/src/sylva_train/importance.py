"""How much each weight matters: the paper's second-order rule, and its rivals."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._checks import ConfigError, NonFiniteError
from ._files import read_tensors, write_tensors
from .config import NEEDS_DATA, SylvaConfig
from .curvature import (
    LayerCurvature,
    Store,
    block_sums,
    collect_curvature,
    from_first,
    place,
    settings,
)
from .targets import check_block_size, check_weights, find_targets, loaded_weight

__all__ = ["LayerScores", "Scores", "score"]

FORMAT = "sylva-scores/1"

#: What a rule needs from the pass over the data.
STATISTICS = {
    "kfac": ("factors", "gradient"),
    "kfac-pruner": ("factors",),
    "fisher-diag": ("fisher",),
    "gradient": ("gradient",),
    "weight-gradient": ("gradient",),
}


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
    """

    shape: tuple[int, int]
    s_out: torch.Tensor | None = None
    s_in: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    unit: int = 1

    def blocks(self, block_size: int) -> torch.Tensor:
        """Sum the scores over blocks.

        Parameters
        ----------
        block_size : int
            Side of a block; a multiple of ``unit`` where the scores are a grid.

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
        if block_size % self.unit:
            msg = (
                f"`block_size` {block_size} must be a multiple of {self.unit}, the block"
                " size that these scores were summed over; score again."
            )
            raise ConfigError(msg)
        return block_sums(self.grid.double(), block_size // self.unit)


class Scores(Mapping[str, LayerScores]):
    """Scores of a model's layers, by name.

    Parameters
    ----------
    layers : mapping of str to LayerScores
        The layers.
    metadata : mapping
        What is worth keeping (JSON): the rule and its options, the samples seen.
    """

    def __init__(
        self, layers: Mapping[str, LayerScores], metadata: Mapping[str, Any]
    ) -> None:
        self.layers = dict(layers)
        self.metadata = dict(metadata)

    def __getitem__(self, name: str) -> LayerScores:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

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
        layers = {n: {"shape": s.shape, "unit": s.unit} for n, s in self.items()}
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
            )
            for name, info in header["layers"].items()
        }
        return cls(layers, header["metadata"])


def damped(layer: LayerCurvature, damping: float) -> tuple[float, float]:
    """Return λ_A and λ_G: ``damping`` times each factor's mean eigenvalue."""
    assert layer.A is not None
    assert layer.G is not None
    return damping * layer.A.mean_eigenvalue(), damping * layer.G.mean_eigenvalue()


def kfac_scores(
    layer: LayerCurvature, damping: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Score each output row and input column (paper, eq. 18-20).

    Cost of zeroing a column or a row of the mean gradient Γ under the Kronecker-factored
    Fisher matrix ``A ⊗ G``::

        s_in[j]  = Γ[:, j]ᵀ (G + λ_G I) Γ[:, j] / [(A + λ_A I)⁻¹]_jj
        s_out[k] = Γ[k, :]  (A + λ_A I) Γ[k, :]ᵀ / [(G + λ_G I)⁻¹]_kk

    Returns
    -------
    s_out, s_in : torch.Tensor, shapes (out,) and (in,), float64
    bad : int
        Entries of the two inverse diagonals that are not positive: none with exact or
        MLR factors; a truncated HODLR factor is in general indefinite.
    """
    assert layer.A is not None
    assert layer.G is not None
    assert layer.gradient is not None
    gradient = layer.gradient.double()
    if min(layer.A.mean_eigenvalue(), layer.G.mean_eigenvalue()) <= 0:
        # No input or no gradient ever reached the layer: nothing in it matters.
        out, inputs = gradient.shape
        return gradient.new_zeros(out), gradient.new_zeros(inputs), 0
    λ_A, λ_G = damped(layer, damping)
    squares = gradient.square()
    cost_in = (gradient * layer.G.product(gradient)).sum(0) + λ_G * squares.sum(0)
    cost_out = (gradient * layer.A.product(gradient.T).T).sum(1) + λ_A * squares.sum(1)
    inverse_A, inverse_G = layer.A.inverse_diagonal(λ_A), layer.G.inverse_diagonal(λ_G)
    bad = int((inverse_A <= 0).sum()) + int((inverse_G <= 0).sum())
    return cost_out / inverse_G, cost_in / inverse_A, bad


def pruner_scores(
    layer: LayerCurvature, weight: torch.Tensor, damping: float
) -> torch.Tensor:
    """Loss of removing each weight under K-FAC: ``W² / (diag A⁻¹ · diag G⁻¹)``.

    The saliency of the K-FAC pruner (optimal brain surgeon with Kronecker factors).
    """
    assert layer.A is not None
    assert layer.G is not None
    if min(layer.A.mean_eigenvalue(), layer.G.mean_eigenvalue()) <= 0:
        return torch.zeros_like(weight, dtype=torch.float64)
    λ_A, λ_G = damped(layer, damping)
    inverse_A, inverse_G = layer.A.inverse_diagonal(λ_A), layer.G.inverse_diagonal(λ_G)
    return weight.double().square() / torch.outer(inverse_G, inverse_A)


def score(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    config: SylvaConfig | None = None,
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 10.0,
) -> Scores:
    """Score the weights of a pretrained model by how much they matter for a task.

    Parameters
    ----------
    model : torch.nn.Module
        The pretrained model; nothing in it is changed. It is run in evaluation mode.
    dataloader : iterable of mappings, optional
        Batches with ``labels``, at least ``config.samples`` sequences of them or as many
        as there are. Not needed by the rules ``"magnitude"`` and ``"random"``.
    config : SylvaConfig, optional
        Targets, rule and its options.
    loss : callable, optional
        Mean loss of (model, batch), where the model does not compute its own.
    progress : callable, optional
        Called with (samples done, samples in all).
    log : callable, optional
        Called with lines of text: the number of passes over the data, and their bytes.
    checkpoint : path, optional
        Folder to keep the statistics in meanwhile. Scoring that was interrupted goes on
        with what is there, to the same scores; scoring that is finished is read back.
    checkpoint_minutes : float
        Time between two savings.

    Returns
    -------
    Scores

    Raises
    ------
    TargetError
        If no layer matches, one that matches cannot be used, or the model is quantized or
        has weights that were never loaded.
    ConfigError
        If a layer is smaller than a block or above the memory budget, the rule needs data
        and got none, passes or processes are given different batches, or ``checkpoint``
        has scoring with other settings.
    AdapterError
        If a file in ``checkpoint`` is damaged.
    DataError
        If the data is empty or has no labels.
    NonFiniteError
        If the loss, an activation or a gradient is NaN or infinite.

    Notes
    -----
    Rules, for a weight matrix ``W`` with mean gradient ``Γ``, each summed over blocks:
    ``"kfac"`` the product of row and column importance under the Kronecker-factored
    Fisher matrix (Mu et al. 2024, eq. 18-20); ``"fisher-diag"`` the mean squared
    per-sample gradient (Sung et al. 2021, FISH); ``"magnitude"`` ``|W|``; ``"gradient"``
    ``|Γ|``; ``"weight-gradient"`` ``|W ∘ Γ|`` (Molchanov et al. 2019, first order);
    ``"random"``; and ``"kfac-pruner"`` the saliency ``W² / (diag A⁻¹ · diag G⁻¹)``.

    Examples
    --------
    >>> import torch, sylva_train as sylva
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> config = sylva.SylvaConfig(importance="magnitude", block_size=16)
    >>> sylva.select(sylva.score(model, config=config), density=0.25, block_size=16)
    Masks(2 layers, 8 blocks, 2,048 of 8,192 weights = 25.00%)
    """
    config = config or SylvaConfig()
    rule = config.importance
    check_weights(model)
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    check_block_size(targets, config.block_size)
    kept = None
    if checkpoint is not None:
        must = settings(model, targets, config)
        kept = Unfinished(Path(checkpoint), checkpoint_minutes, must)
    scores, facts = ({}, {}) if kept is None else from_first(kept.load())
    bad, seen = facts.get("indefinite", 0), facts.get("samples", 0)
    layers: Mapping[str, LayerCurvature] = {}

    def keep() -> None:
        if kept is not None:
            data = getattr(layers, "data", None)
            kept.save(scores, {"samples": seen, "indefinite": bad, "data": data})

    if rule in NEEDS_DATA:
        if dataloader is None:
            msg = (
                f"`importance` {rule!r} needs labelled samples: pass `dataloader`, or use"
                ' "magnitude" or "random".'
            )
            raise ConfigError(msg)
        if len(scores) < len(targets):
            layers, seen = collect_curvature(
                model, targets, dataloader, config, STATISTICS[rule], loss=loss,
                progress=progress, log=log, known=scores, data=facts.get("data"),
                store=kept and kept.store, between=keep,
            )  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)
    for name, module in targets.items():
        if name in scores:
            continue
        weight = loaded_weight(module)
        shape = (weight.shape[0], weight.shape[1])
        if rule == "kfac":
            s_out, s_in, indefinite = kfac_scores(layers[name], config.damping)
            bad += indefinite
            scores[name] = LayerScores(shape, s_out=s_out.cpu(), s_in=s_in.cpu())
            continue
        if rule == "random":
            # The sum over a block is drawn as one number: all blocks are alike.
            rows, columns = (math.ceil(n / config.block_size) for n in shape)
            grid = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        elif rule == "fisher-diag":
            grid = layers[name].fisher  # type: ignore[assignment]
        else:
            if rule == "magnitude":
                full = weight.float().abs()
            elif rule == "kfac-pruner":
                full = pruner_scores(layers[name], weight, config.damping)
            else:
                full = layers[name].gradient.abs()  # type: ignore[union-attr]
                if rule == "weight-gradient":
                    full = full * weight.float().abs()
            grid = block_sums(full, config.block_size)
        scores[name] = LayerScores(shape, grid=grid.cpu(), unit=config.block_size)
    scores = from_first({name: scores[name] for name in targets})
    check_finite(scores)
    keep()
    if bad:
        warnings.warn(
            f"{bad} entries of the inverse diagonals are not positive: truncated HODLR"
            " factors are indefinite, and scores that divide by them are noise."
            ' `curvature="mlr"` stays positive definite.',
            stacklevel=2,
        )
    options = (
        "importance", "curvature", "levels", "rank", "exact_below", "tokens", "damping",
        "seed",
    )  # fmt: skip
    metadata = {name: getattr(config, name) for name in options}
    metadata |= {"samples": seen, "indefinite": bad}
    return Scores(scores, metadata)


class Unfinished:
    """The folder of unfinished scoring: scores of layers, and sums of the others.

    Parameters
    ----------
    folder : path
        The folder.
    minutes : float
        Time between two savings of the sums.
    options : mapping
        What must be the same when it goes on, from `sylva_train.curvature.settings`.
    """

    def __init__(
        self, folder: Path, minutes: float, options: Mapping[str, Any]
    ) -> None:
        self.store = Store(folder, minutes, options)
        self.path = folder / "scores.safetensors"

    def load(self) -> tuple[dict[str, LayerScores], dict[str, Any]]:
        """Return the scores of the layers that are done, and the facts beside them."""
        if not self.path.exists():
            return {}, {}
        found = Scores.load(self.path)
        self.store.check(found.metadata["settings"])
        return found.layers, found.metadata

    def save(self, scores: Mapping[str, LayerScores], facts: Mapping[str, Any]) -> None:
        """Keep the scores of the layers that are done."""
        if place()[0] == 0:
            Scores(scores, {**facts, "settings": self.store.settings}).save(self.path)


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
