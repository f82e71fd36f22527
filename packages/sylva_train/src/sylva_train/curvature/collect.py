"""Second-order statistics of a model's layers, streamed through hooks.

For a layer ``y = W x`` with output gradient ``g``: the Kronecker factors
``A = E[x xᵀ]`` (in, in) and ``G = E[g gᵀ]`` (out, out) of its Fisher matrix, the mean
gradient ``Γ = E[dL/dW]`` (out, in), and the diagonal Fisher: all layers in one pass over
the data, or in several that stay below a memory budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train._torch import caching, on_device, preserved_modes, without_cache
from sylva_train.config import SylvaConfig
from sylva_train.model_classes import is_encoder_decoder
from sylva_train.options import EVERYTHING, samples_to_score
from sylva_train.processes import agree, rank_and_size, together
from sylva_train.progress import Report, size_words
from sylva_train.targets import exclusion, find_targets, input_owners, weight_device

from .batches import (
    batch_size,
    batches_of,
    default_loss,
    first_samples,
    loss_scale,
    loss_units,
    note,
)
from .factors import describe
from .hooks import Collector
from .layer import LayerCurvature
from .merging import merge
from .planning import plan_passes
from .state import Store

__all__ = [
    "Curvatures",
    "Loss",
    "collect_curvature",
    "damage",
    "describe_factor",
    "not_reached",
]

#: Mean loss of (model, batch).
Loss = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, without gradients of its parameters or a cache."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # PyTorch's encoder layer would not call its linear layers, having no gradient to take.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with preserved_modes(model), without_cache(caching(model)):
            model.eval().requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def damage(model: nn.Module) -> str:
    """Say which parameter of a model is not finite, if one is, amid a message."""
    every = ((n, p) for n, p in model.named_parameters() if not p.is_meta)
    bad = next((n for n, p in every if not bool(torch.isfinite(p).all())), None)
    return "" if bad is None else f" `{bad}` itself has NaN or infinite values;"


class Curvatures(Mapping[str, LayerCurvature]):
    """Statistics of layers, by name; asking for a layer runs the pass that it is in.

    Layers are meant to be asked for in their order. Under a memory budget each is let go
    when the next one is asked for.

    Attributes
    ----------
    plan : list of Pass
        The passes over the data.
    most : int
        Samples to see.
    samples : int
        Samples seen, once a pass is done.
    unreached : set of str
        Layers that were not named and that no gradient reached in the passes so far: they
        have no statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        dataloader: Iterable[Mapping[str, Any]],
        config: SylvaConfig,
        wanted: Iterable[str],
        *,
        loss: Loss | None = None,
        progress: Report | None = None,
        log: Callable[[str], None] | None = None,
        store: Store | None = None,
        known: Container[str] = (),
        data: str | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.targets, self.dataloader = model, targets, dataloader
        self.config, self.wanted = config, frozenset(wanted)
        self.most = samples_to_score(config.samples)
        self.loss = loss or default_loss
        self.progress, self.store, self.between = progress, store, between
        self.log = log or (lambda _: None)
        #: Digest of the batches, once a pass is done: all passes must see the same.
        self.data = data
        self.samples = self.terms = self.done = 0
        self.layers: dict[str, LayerCurvature] = {}
        self.named = config.target_modules not in EVERYTHING
        self.unreached: set[str] = set()
        self.collector = Collector(targets, config, self.wanted)
        rest = {name: m for name, m in targets.items() if name not in known}
        self.plan = plan_passes(rest, config, self.wanted, self.shared_inputs)
        self.announce()

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, name: str) -> LayerCurvature:
        if name not in self.targets:
            raise KeyError(name)
        if name not in self.layers:
            if self.config.memory_budget is not None:
                self.layers.clear()
            while name not in self.collector.names and name not in self.unreached:
                self.next_pass()
            if name in self.unreached:
                raise KeyError(name)
            taken = self.collector.take(name, self.terms, self.samples)
            self.layers[name] = taken
        return self.layers[name]

    def announce(self) -> None:
        """Say how many passes there will be, and what they hold."""
        most, several = max(p.nbytes for p in self.plan), len(self.plan) > 1
        hosted = max(p.host_bytes for p in self.plan)
        words = f"Statistics of {sum(len(p.names) for p in self.plan)} layers:"
        words += f" {size_words(most)}"
        words += f" at most in each of {len(self.plan)} passes" if several else ""
        words += f", and {size_words(hosted)} of main memory" if hosted else ""
        self.log(f"{words}.")
        if several and iter(self.dataloader) is self.dataloader:
            msg = (
                f"`memory_budget` asks for {len(self.plan)} passes over the data, but"
                " `dataloader` is an iterator, which can be run through once only: pass a"
                " list, a DataLoader or a Loader."
            )
            raise ConfigError(msg)

    def shared_inputs(self) -> dict[str, str]:
        """Run the first batch forward to see which layers share an input."""
        first = next(batches_of("dataloader", self.dataloader), None)
        if first is None:
            return {}
        batch = on_device(first_samples(first, self.most), self.device)
        with frozen(self.model):
            return input_owners(self.targets, lambda: self.loss(self.model, batch))

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return weight_device(next(iter(self.targets.values())))

    def next_pass(self) -> None:
        """Run the data through once more, for the layers that are next."""
        if self.done and self.between is not None:
            self.between()
        if self.done and self.store is not None:
            self.store.clear()  # or this pass would read, and check, all of them
        self.layers.clear()
        # The sums of the pass before go first: both are not to be held together.
        part = self.plan[self.done]
        self.collector = Collector(
            self.targets, self.config, self.wanted, part.names, part.host_bytes > 0
        )
        data = hashlib.sha256()
        with together():
            self.run(data)
        self.check_data(data.hexdigest())
        merge(self.collector)
        self.check_reached()
        self.done += 1

    def run(self, data: hashlib._Hash) -> None:
        """Add up what this process's share of the batches tells of some layers."""
        collector, (rank, processes) = self.collector, rank_and_size()
        skipped, before = self.store.load(collector) if self.store else (0, "")
        total, count = self.most * len(self.plan), 0
        self.samples = self.terms = 0
        with frozen(self.model), collector.attached(), torch.enable_grad():
            given = batches_of("dataloader", self.dataloader)
            for count, full in enumerate(given, 1):
                batch = first_samples(full, self.most - self.samples)
                units = max(1, loss_units(self.model, batch))
                note(batch, data)
                self.samples += batch_size(batch)
                self.terms += units
                if count == skipped:
                    check_same(data.hexdigest(), before, "before it stopped")
                if count > skipped and (count - 1) % processes == rank:
                    self.add(on_device(batch, self.device), units, count)
                    if self.store is not None and self.store.due():
                        self.store.save(collector, count, data.hexdigest())
                if self.progress is not None:
                    now = min(self.samples, self.most)
                    self.progress(self.done * self.most + now, total)
                if self.samples >= self.most:
                    break
        if not count:
            msg = "`dataloader` gave no batch: there is nothing to score with."
            raise DataError(msg)
        if count < skipped:
            check_same("", before, "before it stopped")

    def add(self, batch: Mapping[str, Any], units: int, step: int) -> None:
        """Run one batch forward and backward under the hooks."""
        seq2seq = is_encoder_decoder(self.model)
        scale = loss_scale(units)
        self.collector.start(batch, units / scale, step, seq2seq=seq2seq)
        value = self.loss(self.model, batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = getattr(value, "shape", None)
            msg = (
                "`loss` must return a batch's mean loss, a tensor of one number; got"
                f" {type(value).__name__ if got is None else tuple(got)}."
            )
            raise ConfigError(msg)
        number = float(value.detach())
        if not math.isfinite(number):
            why = (
                ""
                if loss_units(self.model, batch)
                else (
                    " no label in it counts, all are -100: leave such samples out, or cut"
                    " texts less short;"
                )
            )
            msg = (
                f"the loss is {number} in batch {step} while scoring;{why}"
                f"{damage(self.model)} check the data, and score in float32 or bfloat16"
                " rather than float16."
            )
            raise NonFiniteError(msg)
        if not value.requires_grad:
            if len(self.plan) > 1 and not self.named:
                return  # layers of other passes may be reached
            msg = (
                "the loss does not depend on any layer that is to be scored, or they ran"
                " under `torch.no_grad` or `torch.inference_mode`: name others in"
                " `target_modules`."
            )
            raise ConfigError(msg)
        # The products of the statistics are not to be rounded to 16 bits.
        with torch.autocast(self.device.type, enabled=False):
            self.collector.backward(value, scale)

    def check_data(self, data: str) -> None:
        """Raise `ConfigError` unless all passes and processes had the same batches."""
        agree(data, "batches")
        self.data = self.data or data
        check_same(data, self.data, "in the first pass")

    def check_reached(self) -> None:
        """Take note of layers that the loss does not depend on.

        Raises
        ------
        ConfigError
            If they were named, or there are no others.
        """
        missing = [n for n in self.collector.names if n not in self.collector.sums]
        self.unreached.update(missing)
        if missing and (self.named or len(self.unreached) == len(self.targets)):
            advice = exclusion(missing, self.targets)
            msg = f"{not_reached(missing)} Leave them out: {advice}."
            raise ConfigError(msg)


def not_reached(names: list[str]) -> str:
    """Say of layers that the loss does not depend on them."""
    others = f" and {len(names) - 5} other layers" if len(names) > 5 else ""
    return (
        f"no gradient reached {', '.join(f'`{name}`' for name in names[:5])}{others}: the"
        " loss does not depend on them, or takes their weights without calling them."
    )


def check_same(data: str, other: str, when: str) -> None:
    """Raise `ConfigError` where the batches are not those that were seen before."""
    if data != other:
        msg = (
            f"`dataloader` gave other batches than {when}: give it a fixed order"
            " (`shuffle=False`, or a generator that is seeded anew for each pass)."
        )
        raise ConfigError(msg)


def collect_curvature(
    model: nn.Module,
    targets: dict[str, nn.Module],
    dataloader: Iterable[Mapping[str, Any]],
    config: SylvaConfig,
    wanted: Iterable[str],
    **options: Any,
) -> Curvatures:
    """Run the model over labelled samples and gather its layers' statistics.

    Under an initialised `torch.distributed` every process is given the same batches, runs
    its share of them, and has the whole result.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode (no dropout) and left as it was.
    targets : dict of str to torch.nn.Module
        From `find_targets`.
    dataloader : iterable of mappings
        Batches of tensors, sample by sample along the first axis, with ``labels``.
    config : SylvaConfig
        ``curvature``, ``levels``, ``rank``, ``tokens``, ``samples``, ``block_size``,
        ``memory_budget``, ``host_budget``.
    wanted : iterable of str
        Of ``"factors"``, ``"gradient"``, ``"fisher"``, ``"inputs"``, ``"outputs"``.
    **options
        ``loss`` (mean loss of (model, batch) instead of the model's own), ``progress``
        (called with samples done and samples in all), ``log`` (called with lines of
        text), ``store`` (where the sums are kept meanwhile), ``known`` (layers to leave
        out), ``data`` (digest of the batches, where a pass was done before), ``between``
        (called between two passes).

    Returns
    -------
    Curvatures
        The statistics, of which the first pass is done.

    Raises
    ------
    NonFiniteError
        If the loss, an input or a gradient is NaN or infinite.
    DataError
        If there is no sample, or no loss.
    ConfigError
        If a layer alone is above the memory budget, no gradient reaches one that was
        named, or passes or processes are given different batches.
    """
    layers = Curvatures(model, targets, dataloader, config, wanted, **options)
    layers.next_pass()
    return layers


def describe_factor(
    model: nn.Module,
    name: str,
    dataloader: Iterable[Mapping[str, Any]],
    config: SylvaConfig,
) -> dict[str, Any]:
    """Hold a layer's hierarchical Kronecker factor of its inputs against the exact one.

    Parameters
    ----------
    model, dataloader, config
        As for `collect_curvature`.
    name : str
        The layer.

    Returns
    -------
    dict
        JSON for the report: ``layer``, ``side`` ("in"), and what `describe` gives.
    """
    targets = find_targets(model, [name])
    both = []
    for curvature in (config.curvature, "dense"):
        options = replace(
            config, curvature=curvature, exact_below=0, memory_budget=None
        )
        layers = collect_curvature(
            model, {name: targets[name]}, dataloader, options, ["factors"]
        )
        both.append(layers[name].A)
    approximate, exact = both
    assert approximate is not None
    assert exact is not None
    return {"layer": name, "side": "in"} | describe(approximate, exact)
