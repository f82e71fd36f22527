"""The embedded layer whose adapters PEFT adds, switches and merges."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from sylva_train._checks import AdapterError, ConfigError
from sylva_train.layers import SparseEmbeddedLinear, values_dtype
from sylva_train.targets import weight_view

from .files import INDICES, VALUES

__all__ = ["SylvaLayer", "check_one"]


def check_one(adapter_names: str | list[str]) -> None:
    """Raise `ConfigError` if more than one adapter is named."""
    if not isinstance(adapter_names, str) and len(set(adapter_names)) > 1:
        msg = (
            "Sylva's adapters set weights to values of their own, so one at a time can be"
            f" active or merged; got {', '.join(map(repr, adapter_names))}."
        )
        raise ConfigError(msg)


class SylvaLayer(SparseEmbeddedLinear, BaseTunerLayer):  # type: ignore[misc]
    """A sparse embedded layer whose adapters PEFT adds, switches and merges."""

    adapter_layer_names = (VALUES,)
    other_param_names = (INDICES,)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = [adapter_name]

    def reserve(self, name: str, count: int, block_size: int) -> None:
        """Add an adapter whose blocks are still to be loaded: indices are −1."""
        weight = weight_view(self.base_layer)
        device, shape = weight.device, (count, block_size, block_size)
        values = torch.zeros(shape, device=device, dtype=values_dtype(weight))
        self.sylva_values[name] = nn.Parameter(values)
        table = torch.full((count, 2), -1, dtype=torch.int32, device=device)
        self.sylva_indices[name] = table

    def duplicate(self, source: str, name: str) -> None:
        """Add an adapter that starts with another's blocks and their values."""
        self.check_loaded(source)
        values = self.sylva_values[source].detach().clone()
        self.sylva_values[name] = nn.Parameter(values)
        self.sylva_indices[name] = self.sylva_indices[source].clone()

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter has its blocks, not only room for them."""
        table = self.sylva_indices[name]
        if table.is_meta or self.sylva_values[name].is_meta:
            return False
        # One that was checked as it is has no -1, and the host need not wait again.
        is_checked = self._checked.get(name) == (table.data_ptr(), table._version)
        return is_checked or not bool((table < 0).any())

    def active(self) -> str | None:
        """Name of the active adapter, if this layer has blocks of it."""
        # Asked in every forward pass, where the properties of this take longer.
        names: list[str] | str = self._active_adapter
        name = names if isinstance(names, str) else next(iter(names), None)
        return name if name is not None and name in self.sylva_values else None

    def wanted(self) -> str | None:
        """Name of the adapter that the weight is to show, or None for the base."""
        if self.merged_adapters:
            return self.merged_adapters[0]
        name = self.active()
        if self._disable_adapters or name is None:
            return None
        return name if name == self.shown.adapter or self.is_loaded(name) else None

    def set_adapter(
        self, adapter_names: str | list[str], inference_mode: bool = False
    ) -> None:
        """Make one adapter active, and show it in the weight.

        Raises
        ------
        ConfigError
            If several are asked for: two adapters may set the same weight.
        """
        check_one(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Show the active adapter in the weight, or the base weight, bit for bit."""
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()
        self.sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the base weight comes back if it was the one shown."""
        if self.shown.adapter == adapter_name:
            self.restore_()
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)
        self.sync()

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Keep an adapter in the weight, whichever is active, until `unmerge`.

        Raises
        ------
        ConfigError
            If several adapters are to be merged.
        ValueError
            If ``safe_merge`` and a value is NaN or infinite; nothing is merged then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.sylva_values]
        if not names:
            return
        check_one([*self.merged_adapters, *names])
        self.check_loaded(names[0])
        if safe_merge and not bool(self.sylva_values[names[0]].isfinite().all()):
            msg = f"adapter `{names[0]}` has NaN or infinite values; it was not merged."
            raise ValueError(msg)
        self.merged_adapters = names
        self.sync(force=True)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit, until the next forward pass."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        self.restore_()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer with the adapter in its weight, or as it was."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.merged_adapters = []
        if not self.merged_adapters:
            self.restore_()
        self.let_go()
        return self.base_layer

    def let_go(self) -> None:
        """Leave the base layer, which is taken out, as it is from now on."""
        super().let_go()
        self.merged_adapters, self._active_adapter = [], []

    def check_loaded(self, name: str) -> None:
        """Raise `AdapterError` if only room was made for an adapter's blocks."""
        if not self.is_loaded(name):
            msg = (
                f"the blocks of adapter `{name}` were never loaded: its configuration"
                " was used without its tensors. Use `peft.PeftModel.from_pretrained`,"
                " `sylva_train.load_adapter`, or a new configuration with `masks`."
            )
            raise AdapterError(msg)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if self.shown.adapter is None and not self._disable_adapters:
            name = self.active()
            if name is not None:
                self.check_loaded(name)
        return super().forward(*args, **kwargs)
