"""Second-order statistics of a model's layers, streamed through hooks.

For a layer ``y = W x`` with output gradient ``g``: the Kronecker factors
``A = E[x xᵀ]`` (in, in) and ``G = E[g gᵀ]`` (out, out) of its Fisher matrix, the mean
gradient ``Γ = E[dL/dW]`` (out, in), and the diagonal Fisher, one pass for all of them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train.config import SylvaConfig
from sylva_train.targets import find_targets, weight_view

from .factors import Factor, accumulator, describe

__all__ = ["LayerCurvature", "block_sums", "collect_curvature", "describe_factor"]

#: Largest stack of per-sample gradients that is held at once, in numbers.
LARGEST_STACK = 1 << 24

#: Cross-attention layers that see the encoder's tokens from inside a decoder.
ENCODER_SIDE = re.compile(
    r".*(encdecattention|encoder_attn|cross_?attn|cross_?attention)"
    r".*(\bk|\bv|k_proj|v_proj|key|value)",
    re.IGNORECASE,
)


def block_sums(matrix: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sum a matrix (..., out, in) over square blocks; the last ones may be cut off."""
    out, inputs = matrix.shape[-2:]
    matrix = F.pad(matrix, (0, -inputs % block_size, 0, -out % block_size))
    columns: torch.Tensor = matrix.unflatten(-1, (-1, block_size)).sum(-1)
    return columns.unflatten(-2, (-1, block_size)).sum(-2)  # type: ignore[no-any-return]


@dataclass
class LayerCurvature:
    """What a pass over the data tells about one layer.

    Attributes
    ----------
    A, G : Factor or None
        Kronecker factors of inputs and output gradients.
    gradient : torch.Tensor (out, in) or None
        Mean gradient Γ, float32.
    fisher : torch.Tensor or None
        Diagonal Fisher, mean of squared per-sample gradients, summed over blocks.
    input_squares : torch.Tensor (in,) or None
        Mean square of each input over the tokens, float32.
    """

    A: Factor | None = None
    G: Factor | None = None
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    input_squares: torch.Tensor | None = None


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return len(value)
    msg = "a batch must be a mapping with at least one tensor, its first axis samples."
    raise DataError(msg)


def loss_units(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return how many terms the model's mean loss has.

    Samples for classification and regression; for a language model the tokens that
    count (label not -100), shifted by one for a causal one.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return batch_size(batch)
    if labels.dim() < 2 or labels.is_floating_point():
        return len(labels)
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return max(1, int((labels[:, 1:] if causal else labels).ne(-100).sum()))


@dataclass
class Accumulators:
    """Running sums of one layer; those that were not asked for stay None."""

    A: Any = None
    G: Any = None
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    input_squares: torch.Tensor | None = None
    rows: int = 0


@dataclass
class Collector:
    """Forward and backward hooks of the target layers, and what they add up."""

    targets: dict[str, nn.Module]
    config: SylvaConfig
    wanted: frozenset[str]
    sums: dict[str, Accumulators] = field(default_factory=dict)
    # Layers whose inputs are one and the same tensor (query, key, value) share A.
    owner: dict[str, str] = field(default_factory=dict)
    masks: list[torch.Tensor] = field(default_factory=list)
    units: int = 1
    step: int = 0
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, batch: Mapping[str, Any], units: int) -> None:
        """Take note of a batch's padding and of the scale of its loss."""
        names = ("attention_mask", "decoder_attention_mask")
        self.masks = [
            batch[name].bool() for name in names if batch.get(name) is not None
        ]
        if "decoder_attention_mask" not in batch and "decoder_input_ids" not in batch:
            # A seq2seq model shifts its labels into the decoder's input.
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.dim() == 2:
                self.masks.append(labels.ne(-100))
        self.units = units
        self.inputs.clear()
        self.step += 1

    def rows(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """Which rows of a layer's (batch, …) tensors are tokens and not padding."""
        masks = self.masks
        if len(masks) > 1 and "decoder" in name and not ENCODER_SIDE.fullmatch(name):
            masks = masks[::-1]
        for mask in masks:
            if g.shape[:-1] == mask.shape:
                return mask
            if g.dim() == 2 and g.shape[0] == mask.numel():
                return mask.flatten()
        if g.dim() == 2 and (not masks or len(g) == len(masks[0])):
            return torch.ones(len(g), dtype=torch.bool, device=g.device)  # pooled
        # Some other arrangement of tokens: padding gets no gradient.
        return g.ne(0).any(-1)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the layers hooked for the length of a block."""
        handles = []
        for name, module in self.targets.items():
            handles.append(module.register_forward_pre_hook(self.before))
            handles.append(module.register_forward_hook(self.hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.clear()

    @staticmethod
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        """Let gradients begin here where everything before is frozen."""
        x = args[0]
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_(True)

    def hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """Make the forward hook of a layer, which hooks its output's gradient."""

        def forward(_: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
            x = args[0]
            if not y.requires_grad:  # first pass of reentrant checkpointing
                return
            owner = self.owner.get(name)
            if owner is None:
                same = (o for o, other in self.inputs.items() if other is x)
                owner = self.owner[name] = next(same, name)
            if owner == name:
                self.inputs[name] = x
            elif self.inputs.get(owner) is not x:
                msg = (
                    f"`{name}` took the same input as `{owner}` in the first batch but"
                    " another one now; score it in a call of its own"
                    " (`target_modules`)."
                )
                raise ConfigError(msg)
            x = x.detach()
            y.register_hook(lambda g: self.add(name, x, g.detach()))

        return forward

    @torch.no_grad()
    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add one batch of a layer: inputs (..., in), output gradients (..., out)."""
        if not bool(torch.isfinite(g).all()):
            msg = (
                f"the output gradient of `{name}` is NaN or infinite in batch"
                f" {self.step} while scoring; check the data and the labels, and score in"
                " float32 or bfloat16 rather than float16."
            )
            raise NonFiniteError(msg)
        if not bool(torch.isfinite(x).all()):
            msg = f"an input of `{name}` is NaN or infinite in batch {self.step}."
            raise NonFiniteError(msg)
        x = x.unsqueeze(0) if x.dim() == 1 else x
        g = g.unsqueeze(0) if g.dim() == 1 else g
        sums = self.sums.setdefault(name, Accumulators())
        valid = self.rows(name, g)
        # The loss is a mean: its gradient times the terms is the sum of the samples'.
        x, g = x.float(), g.float() * self.units
        rows_x, rows_g = x[valid], g[valid]
        if "gradient" in self.wanted:
            if sums.gradient is None:
                sums.gradient = x.new_zeros(g.shape[-1], x.shape[-1])
            sums.gradient.addmm_(rows_g.T, rows_x)
        if "inputs" in self.wanted:
            squares = rows_x.square().sum(0)
            before = sums.input_squares
            sums.input_squares = squares if before is None else before + squares
            sums.rows += len(rows_x)
        if "fisher" in self.wanted:
            self.add_fisher(sums, x, g, valid)
        if "factors" in self.wanted:
            if self.config.tokens == "reduce" and g.dim() == 3:
                weight = valid.float()
                weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
                rows_x = torch.einsum("bt,bti->bi", weight, x)
                rows_g = torch.einsum("bt,bto->bo", weight, g)
            if sums.G is None:
                sums.G = accumulator(g.shape[-1], g, self.config)
                if self.owner[name] == name:
                    sums.A = accumulator(x.shape[-1], x, self.config)
            sums.G.update(rows_g)
            if sums.A is not None:
                sums.A.update(rows_x)

    def add_fisher(
        self, sums: Accumulators, x: torch.Tensor, g: torch.Tensor, valid: torch.Tensor
    ) -> None:
        """Add squared gradients of each sample, summed over blocks."""
        x, g = x * valid[..., None], g * valid[..., None]
        if x.dim() == 2:
            total = block_sums(g.square().T @ x.square(), self.config.block_size)
        else:
            x, g = x.flatten(1, -2), g.flatten(1, -2)
            size = max(1, LARGEST_STACK // (x.shape[-1] * g.shape[-1]))
            total = torch.zeros(())
            for some_x, some_g in zip(x.split(size), g.split(size), strict=True):
                squares = torch.bmm(some_g.mT, some_x).square().sum(0)
                total = total.to(squares) + block_sums(squares, self.config.block_size)
        sums.fisher = total if sums.fisher is None else sums.fisher + total

    def result(self, terms: int, samples: int) -> dict[str, LayerCurvature]:
        """Turn the sums into means."""
        layers = {}
        missing = [name for name in self.targets if name not in self.sums]
        if missing:
            msg = (
                f"no gradient reached {', '.join(f'`{name}`' for name in missing[:5])}"
                + (f" and {len(missing) - 5} other layers" if len(missing) > 5 else "")
                + ": the loss does not depend on them. Name them in `exclude_modules`."
            )
            raise ConfigError(msg)
        factors = {
            name: Factor(sums.A.result())
            for name, sums in self.sums.items()
            if sums.A is not None
        }
        for name in self.targets:
            sums = self.sums[name]
            layers[name] = LayerCurvature(
                A=factors.get(self.owner[name]),
                G=Factor(sums.G.result()) if sums.G is not None else None,
                gradient=None if sums.gradient is None else sums.gradient / terms,
                fisher=None if sums.fisher is None else sums.fisher / samples,
                input_squares=None
                if sums.input_squares is None
                else sums.input_squares / max(sums.rows, 1),
            )
        return layers


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, without gradients of its parameters."""
    modes = {module: module.training for module in model.modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that a `transformers` model computes from a batch with labels."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        msg = (
            "the model returned no loss: batches must have `labels`, or pass `loss`, a"
            " function of (model, batch)."
        )
        raise DataError(msg)
    return loss  # type: ignore[no-any-return]


def truncated(
    batch: Mapping[str, Any], size: int, device: torch.device
) -> dict[str, Any]:
    """Return the first samples of a batch, on a device."""
    full = batch_size(batch)
    result = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            whole = not value.dim() or len(value) != full
            result[name] = (value if whole else value[:size]).to(device)
    return result


def damage(model: nn.Module) -> str:
    """Say which parameter of a model is not finite, if one is, amid a message."""
    every = model.named_parameters()
    bad = next((n for n, p in every if not bool(torch.isfinite(p).all())), None)
    return "" if bad is None else f" `{bad}` itself has NaN or infinite values;"


def collect_curvature(
    model: nn.Module,
    targets: dict[str, nn.Module],
    dataloader: Iterable[Mapping[str, Any]],
    config: SylvaConfig,
    wanted: Iterable[str],
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, LayerCurvature], int]:
    """Run the model over labelled samples and gather its layers' statistics.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode (no dropout) and left as it was.
    targets : dict of str to torch.nn.Module
        From `find_targets`.
    dataloader : iterable of mappings
        Batches of tensors, sample by sample along the first axis, with ``labels``.
    config : SylvaConfig
        ``curvature``, ``levels``, ``rank``, ``tokens``, ``samples``, ``block_size``.
    wanted : iterable of str
        Of ``"factors"``, ``"gradient"``, ``"fisher"``, ``"inputs"``.
    loss : callable, optional
        Mean loss of (model, batch) instead of the model's own.
    progress : callable, optional
        Called with (samples done, samples in all).

    Returns
    -------
    dict of str to LayerCurvature, int
        The statistics, and the number of samples seen.

    Raises
    ------
    NonFiniteError
        If the loss, an input or a gradient is NaN or infinite.
    DataError
        If there is no sample, or no loss.
    """
    collector = Collector(targets, config, frozenset(wanted))
    device = weight_view(next(iter(targets.values()))).device
    seen, terms = 0, 0
    with frozen(model), collector.attached(), torch.enable_grad():
        for full in dataloader:
            batch = truncated(full, config.samples - seen, device)
            units = loss_units(model, batch)
            collector.start(batch, units)
            value = (loss or default_loss)(model, batch)
            number = float(value.detach())
            if not math.isfinite(number):
                msg = (
                    f"the loss is {number} in batch {collector.step} while scoring;"
                    f"{damage(model)} check the data, and score in float32 or bfloat16"
                    " rather than float16."
                )
                raise NonFiniteError(msg)
            value.backward()
            seen += batch_size(batch)
            terms += units
            if progress is not None:
                progress(seen, config.samples)
            if seen >= config.samples:
                break
    if not seen:
        msg = "`dataloader` gave no batch: there is nothing to score with."
        raise DataError(msg)
    return collector.result(terms, seen), seen


def describe_factor(
    model: nn.Module,
    name: str,
    dataloader: Iterable[Mapping[str, Any]],
    config: SylvaConfig,
    side: str = "in",
) -> dict[str, Any]:
    """Hold one layer's hierarchical Kronecker factor against the exact one.

    Parameters
    ----------
    model, dataloader, config
        As for `collect_curvature`.
    name : str
        The layer.
    side : str
        ``"in"`` for A, ``"out"`` for G.

    Returns
    -------
    dict
        JSON for the report: ``layer``, ``side``, and what `describe` gives.
    """
    targets = find_targets(model, [name])
    both = []
    for curvature in (config.curvature, "dense"):
        options = replace(config, curvature=curvature)
        layers, _ = collect_curvature(
            model, {name: targets[name]}, dataloader, options, ["factors"]
        )
        both.append(layers[name].A if side == "in" else layers[name].G)
    approximate, exact = both
    assert approximate is not None
    assert exact is not None
    return {"layer": name, "side": side} | describe(approximate, exact)
