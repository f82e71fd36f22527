"""The sparse embedded linear layer: values of blocks, written into a frozen weight."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Self

import torch
from torch import nn
from torch.func import functional_call

from sylva_train._checks import AdapterError, ConfigError, TargetError
from sylva_train._torch import is_transformed
from sylva_train.kernels import gather_blocks, is_capturing, scatter_blocks_
from sylva_train.masks import LayerMask
from sylva_train.targets import as_matrix, check_embeddable, layer_input, weight_view

from .gradient import BlockGradient, WeightGradient, is_product
from .inputs import Reader
from .shown import Shown
from .storage import Masters, Tables, own_weight, watch, watch_optimizers

__all__ = ["SparseEmbeddedLinear", "values_dtype"]

NO_TRANSFORMS = (
    "`torch.func` transforms cannot go through embedded blocks, which are written into the"
    " dense weight: take gradients by `backward` or `torch.autograd.grad`, one sample at a"
    " time where each is to have its own, or transform a copy that was merged"
    " (`sylva_train.merge`)."
)
# While a layer has another weight for a pass, of which other threads must know nothing.
_exchange = threading.RLock()


def values_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of a weight's trained values: float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def show_loaded(layer: SparseEmbeddedLinear, _: Any) -> None:
    """Write loaded values at once: compiled passes do not look whether there are any."""
    # What is wrong with them is said where they are used.
    with contextlib.suppress(AdapterError, TargetError):
        if layer._was_shown:
            layer.sync()


class SparseEmbeddedLinear(nn.Module):
    """A linear layer some of whose blocks of weights can be trained.

    Parameters
    ----------
    base_layer : torch.nn.Linear or Conv1D
        The layer; its weight and bias are kept as they are, and frozen.

    Attributes
    ----------
    sylva_values : torch.nn.ParameterDict
        For each adapter the values of its blocks, (k, b, b), float32 for a weight of
        16 or 32 bits and float64 for one of 64, zero beyond a ragged edge.
    sylva_indices : mapping of str to torch.Tensor
        For each adapter the block rows and block columns, (k, 2), int32.

    Raises
    ------
    TargetError
        If the layer's weight is not a dense matrix of floats (`check_embeddable`).

    Notes
    -----
    The values reach the dense weight after every step of a ``torch.optim`` optimizer,
    before the next forward pass, and when `sync` is called. A change is seen by the
    tensors' version counters; values changed through ``.data`` need `sync`, unless the
    mode changes after it. A forward pass that was compiled does not look for changes:
    values that are changed by hand need `sync` then, and a backward pass that finds it
    was left out raises RuntimeError.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        check_embeddable(base_layer)
        watch_optimizers()
        self.base_layer = base_layer.requires_grad_(False)
        self.sylva_values = Masters()
        self.sylva_indices = Tables()
        self.shown = Shown()
        self._checked: dict[str, tuple[int, int]] = {}
        self._readers: dict[str, Reader] = {}
        self.embedded: str | None = None
        self.is_out = False
        self._was_shown = False
        self.register_load_state_dict_post_hook(show_loaded)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the base layer stores it, up to date.

        What is computed with it has a gradient for the blocks' values.
        """
        self.sync()
        values = self.trained()
        if values is None:
            return self.base_layer.weight  # type: ignore[return-value]
        return self.differentiable(values)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Number of rows of the (out, in) weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Number of columns of the (out, in) weight."""
        return self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out, inputs = weight_view(self.base_layer).shape
        return out, inputs

    def mask(self, name: str = "default") -> LayerMask:
        """Return the mask of an adapter."""
        values = self.sylva_values[name]
        return LayerMask(self.shape, values.shape[-1], self.sylva_indices[name])

    def add(self, name: str, mask: LayerMask) -> None:
        """Add an adapter whose values start as the base weight's.

        Raises
        ------
        ConfigError
            If the mask is for a weight of another shape.
        """
        if mask.shape != self.shape:
            msg = f"`mask` must be for a {self.shape} weight; got one for {mask.shape}."
            raise ConfigError(msg)
        self.restore_()
        weight = weight_view(self.base_layer)
        # Not the mask's own, which would keep what is worked out to gather its blocks.
        indices = mask.indices.to(weight.device, copy=True)
        values = gather_blocks(weight, indices, mask.block_size)
        values = values.to(values_dtype(weight))
        self.sylva_values[name] = nn.Parameter(values)
        self.sylva_indices[name] = indices.to(torch.int32)

    def original(self) -> torch.Tensor:
        """Return the base weight's blocks under the written adapter: (k, b, b).

        They are in the host's memory until they are asked for, then on the device.
        """
        return self.shown.original(self.base_layer.weight)  # type: ignore[arg-type]

    def wanted(self) -> str | None:
        """Name of the adapter that the weight is to show, or None for the base."""
        return self.embedded

    def parts(self, name: str) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
        """Return an adapter's values, the weight as it is stored, and the indices.

        Not as attributes: a module takes long to find these, and every layer is asked in
        every forward pass and step.
        """
        values = self._modules["sylva_values"]._parameters[name]  # type: ignore[union-attr]
        weight = self._modules["base_layer"]._parameters["weight"]  # type: ignore[union-attr]
        indices = self._modules["sylva_indices"]._buffers[name]  # type: ignore[union-attr]
        return values, weight, indices  # type: ignore[return-value]

    def values_of(self, name: str) -> torch.Tensor:
        """Return an adapter's values, as fast as `parts`."""
        values = self._modules["sylva_values"]._parameters.get(name)  # type: ignore[union-attr]
        # A replica's are no parameters.
        return self.sylva_values[name] if values is None else values

    def check_indices(self, name: str, *, again: bool = False) -> None:
        """Raise `AdapterError` unless an adapter's indices are blocks of this weight.

        Those of the adapter that is in the weight are compared with where it is; ``again``
        also if no change of them was seen.
        """
        table = self.sylva_indices[name]
        seen = (table.data_ptr(), table._version)
        is_known = self._checked.get(name) == seen
        if is_known and not again:
            return
        if name == self.shown.adapter:
            written = self.shown.indices.to(table.device)  # type: ignore[union-attr]
            if not torch.equal(written, table.long()):
                msg = (
                    f"the block indices of adapter `{name}` changed while its blocks"
                    " were in the weight. For another mask, `sylva_train.unload` and"
                    " embed again; an average of weights must leave buffers out"
                    " (`use_buffers=False`), since it rounds integers down."
                )
                raise AdapterError(msg)
        if is_known:
            return
        try:
            mask = LayerMask(self.shape, self.sylva_values[name].shape[-1], table)
            sound = torch.equal(mask.indices, table.cpu().long())
        except ConfigError:
            sound = False
        if not sound:
            msg = (
                f"the block indices of adapter `{name}` do not fit this"
                f" {self.shape} weight; the adapter is damaged or for another model."
            )
            raise AdapterError(msg)
        self._checked[name] = seen
        self._readers[name] = Reader(table, mask.block_size, self.shape[1])

    def sync(self, *, force: bool = False) -> None:
        """Make the dense weight show the wanted adapter's values.

        Parameters
        ----------
        force : bool
            Write even if no change was seen (values changed through ``.data``).
        """
        wanted = self.wanted()
        if torch.compiler.is_compiling():
            # What is checked below is of the host, and steps have written the weight.
            if wanted != self.shown.adapter:
                msg = "call `sylva_train.sync(model)` before the model is compiled."
                raise RuntimeError(msg)
            return
        shown = self.shown
        if wanted != shown.adapter:
            self.restore_()
        elif not force and (wanted is None or self.is_current(wanted)):
            return
        if wanted is None:
            return
        if self.__dict__.get("_is_replica"):
            self.write_replica(wanted)
            return
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        values = self.values_of(wanted)
        if is_transformed(values):
            raise RuntimeError(NO_TRANSFORMS)
        with _exchange:
            weight = own_weight(base)
        is_written = wanted == shown.adapter and shown.is_current(values, weight)
        if is_written and not force:
            return
        # Averages copy integers through ``.data``, which leaves no trace. To look waits
        # for the device.
        again = (force or shown.is_due) and not is_capturing(weight.device)
        self.check_indices(wanted, again=again)
        reader = self._readers[wanted]
        shown.write(base, weight, wanted, reader.table, values)
        watch(values, self)
        # The same values again, another adapter having been shown: a forward pass may be
        # under way that gradient checkpointing is going to recompute.
        if reader.version != values._version:
            reader.update_columns(values._version)

    def update_columns(self) -> None:
        """Keep for backward passes to come what is known by now to be read together."""
        name = self.shown.adapter
        if name is not None:
            self._readers[name].update_columns(self.values_of(name)._version)

    def write_replica(self, name: str) -> None:
        """Write an adapter's values into the weight of a copy that lives for one pass.

        It may be a copy of the weight as it was before the layer's own `sync`.
        """
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        if not self.shown.is_in(weight):
            matrix = as_matrix(self.base_layer, weight.detach())
            table, values = self.sylva_indices[name], self.values_of(name)
            scatter_blocks_(matrix, table, values.detach())

    def is_current(self, name: str) -> bool:
        """Whether neither weight nor values are seen to have changed since the last write.

        The first thing that every forward pass asks; it waits for no other thread.
        """
        values = self._modules["sylva_values"]._parameters.get(name)  # type: ignore[union-attr]
        weight = self._modules["base_layer"]._parameters.get("weight")  # type: ignore[union-attr]
        # Replicas have neither among their parameters.
        return (
            values is not None
            and weight is not None
            and self.shown.is_current(values, weight)
        )

    def note_written(self) -> None:
        """Take note that a kernel changed the values and wrote them into the weight.

        Kernels leave the tensors' versions as they are, by which changes are seen.
        """
        name = str(self.shown.adapter)
        values, weight, _ = self.parts(name)
        torch.autograd.graph.increment_version((values, weight))
        self.shown.note_written(values, weight)
        self._readers[name].update_columns(values._version)

    def restore_(self) -> None:
        """Put the base weight back, bit for bit."""
        self.shown.restore_(self.base_layer)

    def forget(self, name: str) -> None:
        """Forget an adapter that is deleted; one of its name may get its memory."""
        self.shown.forget(name)
        self._checked.pop(name, None)
        self._readers.pop(name, None)

    def let_go(self) -> None:
        """Leave the base layer, which is taken out, as it is from now on."""
        self.embedded, self.shown = None, Shown()
        self.is_out = True

    def check_shown(self, values: torch.Tensor) -> None:
        """Raise RuntimeError if values were not in the weight that forward used."""
        shown = self.shown
        if shown.is_stale(values) or (
            shown.is_behind() and not shown.holds(self.base_layer, values)
        ):
            msg = (
                "values were changed without being written into the dense weight that"
                " the forward pass used. After changing values by hand, or by wrapping"
                " the model in DistributedDataParallel, call `sylva_train.sync(model)`"
                " before a compiled forward pass, and never between a forward pass and its"
                " backward pass."
            )
            raise RuntimeError(msg)

    def trained(self) -> torch.Tensor | None:
        """Return the values that the weight shows, if they are to have a gradient."""
        name = self.shown.adapter
        if name is None or not torch.is_grad_enabled():
            return None
        values = self.values_of(name)
        if not (values.requires_grad and values.shape[0]):
            return None
        if not torch.compiler.is_compiling() and is_transformed():
            raise RuntimeError(NO_TRANSFORMS)
        return values

    def differentiable(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weight as the base layer stores it, as a function of its values."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        indices = self.shown.indices.to(weight.device)  # type: ignore[union-attr]
        is_turned = as_matrix(self.base_layer, weight) is not weight
        return WeightGradient.apply(weight, values, indices, is_turned)  # type: ignore[no-untyped-call, no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        self.sync()
        values = self.trained()
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        if values is not None and not is_product(base):
            alone = not torch.compiler.is_compiling()
            with _exchange if alone else contextlib.nullcontext():
                weights = {"weight": self.differentiable(values)}
                return functional_call(base, weights, args, kwargs)  # type: ignore[no-any-return]
        y: torch.Tensor = base(*args, **kwargs)
        if values is not None:
            reader = self._readers[str(self.shown.adapter)]
            kept, indices = reader.keep(layer_input(args, kwargs), y.dtype, values)
            y = BlockGradient.apply(y, kept, values, indices)  # type: ignore[no-untyped-call]
        return y

    def _replicate_for_data_parallel(self) -> Self:
        """Let the copies that `torch.nn.DataParallel` makes know what is written."""
        self.sync()
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call, no-any-return]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and write again if it changes, so that evaluation is exact."""
        if mode != self.training and self.shown.adapter is not None:
            self.sync()
            self.shown.is_due = True
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save a weight that shows the values as they are now."""
        self.sync(force=True)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load values, and keep this layer's own base weight under them.

        A saved weight shows the values that were written into it. What lies under them
        is only known here, so it is put into the weight before that is loaded.
        """
        self._was_shown = self.shown.adapter is not None
        self.restore_()
        key, own = f"{prefix}base_layer.weight", weight_view(self.base_layer)
        for name in self.sylva_indices:
            table = state_dict.get(f"{prefix}sylva_indices.{name}")
            if table is None or key not in state_dict or own.is_meta:
                continue
            # Indices that do not fit are found out when they are used.
            with contextlib.suppress(ConfigError):
                size = self.sylva_values[name].shape[-1]
                inside = LayerMask(self.shape, size, table).dense().to(own.device)
                shown = as_matrix(self.base_layer, state_dict[key].detach()).to(own)
                if shown.shape == own.shape:
                    clean = torch.where(inside, own, shown)
                    state_dict[key] = as_matrix(self.base_layer, clean)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say how much of the weight is trainable."""
        parts = []
        for name, values in self.sylva_values.items():
            count, side, _ = values.shape
            fraction = min(1.0, values.numel() / (self.shape[0] * self.shape[1]))
            parts.append(f"{name}: {count} blocks of {side}×{side} ({fraction:.1%})")
        return ", ".join(parts)
