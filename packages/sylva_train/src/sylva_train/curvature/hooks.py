"""Hooks of the target layers, and what they add up.

For a layer ``y = W x`` with output gradient ``g``: ``A = Σ x xᵀ`` (in, in), ``G = Σ g gᵀ``
(out, out), the gradient ``Σ g xᵀ`` (out, in), and the diagonal Fisher.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from sylva_train._checks import ConfigError, NonFiniteError
from sylva_train.config import SylvaConfig
from sylva_train.targets import Calls, is_same, layer_input, weight_device, weight_view

from .batches import batch_size
from .factors import DenseCovariance, Factor, accumulator, add_product, is_narrow
from .layer import Accumulators, LayerCurvature, block_sums

__all__ = ["Collector"]

#: Largest stack of per-sample gradients that is held at once, in numbers.
LARGEST_STACK = 1 << 24

#: Cross-attention layers that see the encoder's tokens from inside a decoder.
ENCODER_SIDE = re.compile(
    r".*(encdecattention|encoder_attn|cross_?attn|cross_?attention)"
    r".*(\bk|\bv|k_proj|v_proj|key|value|c_attn)(_proj)?",  # c_attn: GPT-2's, of both
    re.IGNORECASE,
)

#: Names of tensors that say how large each image is: such models may read the patches of all
#: images in a row, as Pixtral and LFM2-VL do.
SIZES = {"image_grid_thw", "image_sizes", "spatial_shapes", "video_grid_thw"}


def finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are finite; on a CPU ten times as fast as looking at each.

    The host waits for a device once, however many tensors there are.
    """
    found = [
        torch.isfinite(torch.stack(torch.aminmax(x))).all()
        for x in tensors
        if x.numel()
    ]
    return not found or bool(torch.stack([f.to(found[0].device) for f in found]).all())


@dataclass
class Collector:
    """Forward and backward hooks of the target layers, and what they add up.

    Parameters
    ----------
    targets : dict of str to torch.nn.Module
        All the layers that are scored.
    config : SylvaConfig
        Kind of the factors, and its options.
    wanted : frozenset of str
        Of ``"factors"``, ``"gradient"``, ``"fisher"``, ``"inputs"``, ``"outputs"``.
    names : collection of str
        The layers whose statistics are added up this time.
    hosted : bool
        Whether their gradients are summed in main memory.
    """

    targets: dict[str, nn.Module]
    config: SylvaConfig
    wanted: frozenset[str]
    names: Collection[str] = ()
    hosted: bool = False
    sums: dict[str, Accumulators] = field(default_factory=dict)
    # Layers whose inputs are the same tensors (query, key, value) share A.
    owner: dict[str, str] = field(default_factory=dict)
    masks: list[torch.Tensor] = field(default_factory=list)
    units: float = 1
    step: int = 0
    # Samples of the batch, and the first two axes of its tensors: samples, their parts.
    samples: int = 1
    parts: set[tuple[int, int]] = field(default_factory=set)
    # Whether what comes in one row may be of all images, rather than what they share.
    packed: bool = False
    # Factors that layers of one input share, finished.
    finished: dict[str, Factor] = field(default_factory=dict)
    seen: Calls = field(default_factory=Calls)
    # Inputs that gradients were made to begin at, with the gradients they had.
    leaves: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)
    # How often each layer was called, and inputs and gradients of those called again.
    calls: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict
    )

    def start(
        self,
        batch: Mapping[str, Any],
        units: float,
        step: int = 1,
        *,
        seq2seq: bool = False,
    ) -> None:
        """Take note of a batch's padding, of the scale of its loss, and its number.

        ``seq2seq``: the model shifts its labels into the decoder's input. Other models
        read tokens that have no label, such as a prompt.
        """
        names = ("attention_mask", "decoder_attention_mask")
        self.masks = [
            batch[name].bool() for name in names if batch.get(name) is not None
        ]
        given = "decoder_attention_mask" in batch or "decoder_input_ids" in batch
        if seq2seq and not given:
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.dim() == 2:
                self.masks.append(labels.ne(-100))
        self.samples = batch_size(batch)
        self.parts = {
            (len(value), value.shape[1])
            for value in batch.values()
            if isinstance(value, torch.Tensor) and value.dim() > 1
        }
        self.packed = not SIZES.isdisjoint(batch)
        self.units = units
        self.release()
        self.step = step

    def rows(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """Which rows of a layer's (batch, …) tensors are tokens and not padding."""
        masks = self.masks
        if len(masks) > 1 and "decoder" in name and not ENCODER_SIDE.fullmatch(name):
            masks = masks[::-1]
        for mask in masks:
            if g.shape[:-1] == mask.shape:
                rows = mask.to(g.device, copy=True)
                # What has a gradient is no padding, or the loss depends on it.
                if g.device.type == "cpu":
                    rows[~rows] = g[~rows].ne(0).any(-1)
                    return rows
                # How many rows a mask picks, the host would wait to be told.
                return rows | g.ne(0).any(-1)
        # Without a mask there is no padding; with one, a row for each sample is pooled.
        if not masks or (g.dim() == 2 and len(g) == len(masks[0])):
            return torch.ones(g.shape[:-1], dtype=torch.bool, device=g.device)
        # Some other arrangement of tokens: padding gets no gradient.
        return g.ne(0).any(-1)

    def by_samples(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return a layer's tensor (…, n) with the samples along its first axis.

        Some models call a layer with the tokens of all samples in a row, with windows of
        them, or with the time before the samples; what all samples share, like positions,
        is a sample of its own. None: which rows are of which sample cannot be told, as of
        an expert's tokens, or patches of images of many sizes.
        """
        if len(x) == self.samples:
            return x
        for shape in self.parts:
            if len(x) == math.prod(shape):
                return x.unflatten(0, shape)  # type: ignore[no-any-return]
        if self.samples == 1:
            return x[None]
        time_first = x.dim() > 2 and x.shape[1] == self.samples
        windows = x.dim() > 2 and not len(x) % self.samples
        if time_first and (not windows or (self.samples, len(x)) in self.parts):
            return x.transpose(0, 1)
        if windows and not time_first:
            return x.unflatten(0, (self.samples, -1))  # type: ignore[no-any-return]
        shared = len(x) == 1 and x.dim() > 2 and not self.packed
        return x if shared else None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the layers hooked for the length of a block."""
        handles = []
        for name, module in self.targets.items():
            # Of all layers, so that autograd does the same work in every pass: kernels
            # that differ with and without gradients would round differently.
            handles.append(
                module.register_forward_pre_hook(self.before, with_kwargs=True)
            )
            if name in self.names:
                # Before hooks of others, which may change what comes out.
                handles.append(
                    module.register_forward_hook(
                        partial(self.after, name), with_kwargs=True, prepend=True
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.release()

    def release(self) -> None:
        """Let go of a batch's inputs; one may be a buffer or a parameter of the model."""
        for x, gradient in self.leaves:
            x.requires_grad_(False).grad = gradient
        self.leaves.clear()
        self.seen.clear()
        self.calls.clear()
        self.waiting.clear()

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        """Run a batch's loss backward, scaled, and add what has to wait for the end."""
        # Now: checkpointed layers run again in the backward pass.
        self.calls = {name: len(inputs) for name, inputs in self.seen.inputs.items()}
        loss.backward(torch.full_like(loss, scale))
        for name, calls in self.waiting.items():
            fisher = self.sums[name].fisher
            assert fisher is not None
            for samples in {len(x) for x, _ in calls}:
                same = [pair for pair in calls if len(pair[0]) == samples]
                x, g = (torch.cat(tensors, 1) for tensors in zip(*same, strict=True))
                self.add_fisher(fisher, x, g)
        self.waiting.clear()

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Let gradients begin here where everything before is frozen."""
        x = layer_input(args, kwargs)
        if torch.is_grad_enabled() and not x.requires_grad:
            self.leaves.append((x, x.grad))
            x.grad = None
            x.requires_grad_(True)

    def after(
        self, name: str, _: nn.Module, args: Any, kwargs: Any, y: torch.Tensor
    ) -> None:
        """Take note of a layer's input, and hook the gradient of its output."""
        x = layer_input(args, kwargs)
        if not y.requires_grad:  # first pass of reentrant checkpointing
            return
        self.seen.note(name, x)
        x, shape = x.detach(), y.shape
        # An activation in place takes a view's hooks away, but not its base's.
        base = y if y._base is None else y._base
        whole = base.numel() == y.numel()
        plain = whole and base.is_contiguous() and y.is_contiguous()
        (base if plain else y).register_hook(
            lambda g: self.add(name, x, g.detach().reshape(shape))
        )

    @torch.no_grad()
    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add one batch of a layer: inputs (..., in), output gradients (..., out)."""
        if not finite(g, x):
            self.refuse(name, g)
        x = x.unsqueeze(0) if x.dim() == 1 else x
        g = g.unsqueeze(0) if g.dim() == 1 else g
        x, g = self.arranged(name, x), self.arranged(name, g)
        valid = self.rows(name, g)
        wide = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
        # The input of a layer that a device map put elsewhere may still be where the
        # layer before it is.
        x = x.to(g.device)
        places = valid.flatten().nonzero()[:, 0]  # for which the host waits once
        # Of rows alone, which are taken in the model's own type: copies of all that are wider
        # take more than the batch. The loss is a mean: its gradient times the terms is the
        # sum of the samples'.
        own = tuple(t.flatten(0, -2).index_select(0, places) for t in (x, g))
        rows_x, rows_g = (t.to(wide) for t in own)
        rows_g *= self.units
        self.find_owner(name)
        sums = self.sums.get(name) or self.begin(name, rows_g)
        if sums.gradient is not None:
            # One in main memory comes here and goes back, which the host waits for; one
            # that is here is what `to` returns.
            gradient = sums.gradient.to(g.device, non_blocking=True)
            if is_narrow(*own):
                add_product(gradient, own[1], own[0], self.units)
            else:
                gradient.addmm_(rows_g.T, rows_x)
            sums.gradient.copy_(gradient)
        if sums.input_squares is not None:
            sums.input_squares += rows_x.square().sum(0)
        if sums.output_squares is not None:
            sums.output_squares += rows_g.square().sum(0)
        sums.rows += len(rows_x)
        by_sample = (
            self.config.tokens == "reduce" and sums.G is not None and g.dim() > 2
        )
        if sums.fisher is not None or by_sample:
            x, g = x.to(wide), g.to(wide) * self.units
        if sums.fisher is not None:
            counted = [tensor * valid[..., None] for tensor in (x, g)]
            parts_x, parts_g = (
                tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]
                for tensor in counted
            )
            if self.calls.get(name) == 1:
                self.add_fisher(sums.fisher, parts_x, parts_g)
            else:
                # A sample's gradient is the sum of all the calls'.
                self.waiting.setdefault(name, []).append((parts_x, parts_g))
        if sums.G is not None:
            if by_sample:
                weight = valid.flatten(1).to(wide)
                weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
                rows_x = torch.einsum("bt,bti->bi", weight, x.flatten(1, -2))
                rows_g = torch.einsum("bt,bto->bo", weight, g.flatten(1, -2))
            for factor, rows, kept, scale in (
                (sums.G, rows_g, own[1], self.units),
                (sums.A, rows_x, own[0], 1.0),
            ):
                as_they_are = not by_sample and is_narrow(kept)
                if isinstance(factor, DenseCovariance) and as_they_are:
                    factor.update(kept, scale)
                elif factor is not None:
                    factor.update(rows)

    def arranged(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return `by_samples`, or the tensor as it is where no statistic goes by samples."""
        arranged = self.by_samples(x)
        if arranged is None and "fisher" in self.wanted:
            msg = (
                f'`importance="fisher-diag"` goes by the gradient of each sample, but in'
                f" `{name}` the rows of a tensor of shape {tuple(x.shape)} cannot be told"
                f" apart by the {self.samples} samples of a batch: score with batches of"
                " one sample, or leave the layer out (`exclude_modules`)."
            )
            raise ConfigError(msg)
        if arranged is None and len(x) == 1:
            return x.flatten(0, -2)  # rows of several samples, each by itself
        return x if arranged is None else arranged

    def refuse(self, name: str, g: torch.Tensor) -> NoReturn:
        """Say which numbers of a layer are not finite."""
        if finite(g):
            msg = f"an input of `{name}` is NaN or infinite in batch {self.step}."
        else:
            msg = (
                f"the output gradient of `{name}` is NaN or infinite in batch"
                f" {self.step} while scoring; check the data and the labels, and score in"
                " float32 or bfloat16 rather than float16."
            )
        raise NonFiniteError(msg)

    def find_owner(self, name: str) -> None:
        """See who reads the same input, call by call, once a batch has run forward."""
        owner = self.owner.get(name)
        if owner is None:
            owner = self.owner[name] = self.seen.first_reader(name)
        inputs = self.seen.inputs
        if not is_same(inputs.get(owner, []), inputs[name]):
            msg = (
                f"`{name}` took the same input as `{owner}` in the first batch but"
                " another one now; score it in a call of its own (`target_modules`)."
            )
            raise ConfigError(msg)

    def begin(self, name: str, like: torch.Tensor) -> Accumulators:
        """Make a layer's sums, zero, in single precision at least where ``like`` is."""
        out, inputs = weight_view(self.targets[name]).shape
        size = self.config.block_size
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        sums = self.sums[name] = Accumulators()
        if "gradient" in self.wanted:
            sums.gradient = self.placed(like.new_zeros(out, inputs))
        if "fisher" in self.wanted:
            sums.fisher = like.new_zeros(-(-out // size), -(-inputs // size))
        if "inputs" in self.wanted:
            sums.input_squares = like.new_zeros(inputs)
        if "outputs" in self.wanted:
            sums.output_squares = like.new_zeros(out)
        if "factors" in self.wanted:
            sums.G = accumulator(out, like, self.config)
            if self.owner[name] == name:
                sums.A = accumulator(inputs, like, self.config)
        return sums

    def placed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a layer's gradient where it is summed; pinned, a GPU copies it fast."""
        if not self.hosted or gradient.device.type == "cpu":
            return gradient
        pinned = gradient.device.type == "cuda"
        there = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=pinned)
        return there.copy_(gradient)

    def add_fisher(
        self, fisher: torch.Tensor, x: torch.Tensor, g: torch.Tensor
    ) -> None:
        """Add squared gradients of samples (samples, parts, …), summed over blocks."""
        if x.shape[1] == 1:
            x, g = x[:, 0], g[:, 0]
            fisher += block_sums(g.square().T @ x.square(), self.config.block_size)
            return
        size = max(1, LARGEST_STACK // (x.shape[-1] * g.shape[-1]))
        for some_x, some_g in zip(x.split(size), g.split(size), strict=True):
            squares = torch.bmm(some_g.mT, some_x).square().sum(0)
            fisher += block_sums(squares, self.config.block_size)

    def take(self, name: str, terms: int, samples: int) -> LayerCurvature:
        """Turn a layer's sums into means, and let go of them.

        Raises
        ------
        KeyError
            If they were taken before.
        """
        sums = self.sums.pop(name)
        owner, gradient = self.owner[name], sums.gradient
        device = weight_device(self.targets[name])
        if "factors" in self.wanted and owner not in self.finished:
            holder = sums if owner == name else self.sums[owner]
            self.finished[owner] = Factor(holder.A.result())
            holder.A = None

        def mean(total: torch.Tensor | None) -> torch.Tensor | None:
            return None if total is None else total / max(sums.rows, 1)

        return LayerCurvature(
            A=self.finished.get(owner),
            G=Factor(sums.G.result()) if sums.G is not None else None,
            gradient=None if gradient is None else gradient.to(device).div_(terms),
            fisher=None if sums.fisher is None else sums.fisher / samples,
            input_squares=mean(sums.input_squares),
            output_squares=mean(sums.output_squares),
        )
