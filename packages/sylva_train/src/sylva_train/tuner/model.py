"""Sylva as a PEFT tuner: the layer, the model, and their entry in PEFT's tables."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sylva_train._checks import AdapterError, ConfigError, TargetError
from sylva_train.config import NEEDS_DATA, SylvaConfig, SylvaType
from sylva_train.importance import score
from sylva_train.layers import (
    SparseEmbeddedLinear,
    check_embeddable,
    check_masks,
    check_unembedded,
    embedded_layers,
    find_saved,
    replace_module,
)
from sylva_train.masks import LayerMask, Masks, select
from sylva_train.targets import fingerprint, is_inside, matches, weight_view

from .files import INDICES, PREFIX, VALUES, checksum, read_adapter, verify

__all__ = ["SylvaLayer", "SylvaModel"]


class SylvaLayer(SparseEmbeddedLinear, BaseTunerLayer):  # type: ignore[misc]
    """A sparse embedded layer whose adapters PEFT adds, switches and merges."""

    adapter_layer_names = (VALUES,)
    other_param_names = (INDICES,)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = [adapter_name]
        self._loaded: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, count: int, block_size: int) -> None:
        """Add an adapter whose blocks are still to be loaded: indices are −1."""
        device = weight_view(self.base_layer).device
        values = torch.zeros((count, block_size, block_size), device=device)
        self.sylva_values[name] = nn.Parameter(values)
        table = torch.full((count, 2), -1, dtype=torch.int32, device=device)
        self.sylva_indices[name] = table

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter has its blocks, not only room for them."""
        table = self.sylva_indices[name]
        if table.is_meta or self.sylva_values[name].is_meta:
            return False
        seen = (table.data_ptr(), table._version)
        if self._loaded.get(name) != seen:
            if bool((table < 0).any()):
                return False
            self._loaded[name] = seen
        return True

    def active(self) -> str | None:
        """Name of the active adapter, if this layer has blocks of it."""
        name: str | None = next(iter(self.active_adapters), None)
        return name if name is not None and name in self.sylva_values else None

    def wanted(self) -> str | None:
        """Name of the adapter that the weight is to show, or None for the base."""
        if self.merged_adapters:
            return self.merged_adapters[0]
        name = self.active()
        if self._disable_adapters or name is None or not self.is_loaded(name):
            return None
        return name

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
        if self._written == adapter_name:
            self.restore_()
        super().delete_adapter(adapter_name)
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
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: ARG002
        """Say no: blocks are not low rank."""
        return False

    def check_loaded(self, name: str) -> None:
        """Raise `AdapterError` if only room was made for an adapter's blocks."""
        if not self.is_loaded(name):
            msg = (
                f"the blocks of adapter `{name}` were never loaded: its configuration"
                " was used without its tensors. Use `peft.PeftModel.from_pretrained`,"
                " `sylva_train.load_adapter`, or a new configuration with `masks`."
            )
            raise AdapterError(msg)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        name = self.active()
        if name is not None and not self._disable_adapters:
            self.check_loaded(name)
        return super().forward(x, *args, **kwargs)


def check_one(adapter_names: str | list[str]) -> None:
    """Raise `ConfigError` if more than one adapter is named."""
    if not isinstance(adapter_names, str) and len(set(adapter_names)) > 1:
        msg = (
            "Sylva's adapters set weights to values of their own, so one at a time can be"
            f" active or merged; got {', '.join(map(repr, adapter_names))}."
        )
        raise ConfigError(msg)


@contextlib.contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Take every adapter out of a model for a while: its modules and its weights."""
    wrapped = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, SparseEmbeddedLinear | AuxiliaryTrainingWrapper)
    ]
    try:
        for name, module in wrapped:
            if isinstance(module, SparseEmbeddedLinear):
                module.restore_()
                replace_module(model, name, module.base_layer)
            else:
                replace_module(model, name, module.original_module)
        yield
    finally:
        for name, module in wrapped:
            replace_module(model, name, module)


def base_fingerprint(model: nn.Module, modules_to_save: list[str] | None) -> str:
    """Identify the base of a model that may have adapters in it."""
    with base_in_place(model):
        return fingerprint(model, modules_to_save)


def base_name(model: nn.Module) -> str | None:
    """Name or path that a model was loaded from."""
    return getattr(model, "name_or_path", None) or None


def check_base(model: nn.Module, config: SylvaConfig) -> None:
    """Raise `AdapterError` unless an adapter was made for this model's weights.

    Parameters
    ----------
    model : torch.nn.Module
        Without adapters.
    config : SylvaConfig
        Of the adapter, with its layers' shapes and its base's fingerprint.
    """
    theirs = config.base_fingerprint
    known = f"`{config.base_model_name_or_path}` ({str(theirs)[:12]}…)"
    if theirs is not None:
        ours = fingerprint(model, config.modules_to_save)
        if ours != theirs:
            msg = (
                f"the adapter was made for the base model {known}, but this one is"
                f" `{base_name(model)}` ({ours[:12]}…). Its weights differ; load the base"
                " that the adapter was trained on (in float32 or bfloat16, as then)."
            )
            raise AdapterError(msg)
    modules = dict(model.named_modules())
    for name, shape in (config.layer_shapes or {}).items():
        try:
            check_embeddable(modules[name])
            found = tuple(weight_view(modules[name]).shape)
        except (KeyError, TargetError):
            found = None
        if found != tuple(shape):
            msg = (
                f"the adapter has blocks for `{name}` of shape {tuple(shape)}, but the"
                f" model has {found or 'no such layer'}; it was made for {known}."
            )
            raise AdapterError(msg)


def choose_masks(model: nn.Module, config: SylvaConfig) -> Mapping[str, LayerMask]:
    """Return the masks of a new adapter: those given, or chosen now without data.

    Raises
    ------
    ConfigError
        If the rule needs data.
    """
    masks = config.masks
    if isinstance(masks, str | os.PathLike):
        return Masks.load(masks)
    if masks is not None:
        return masks
    if config.importance in NEEDS_DATA:
        msg = (
            f'`importance="{config.importance}"` needs data to choose blocks by: call'
            " `scores = sylva_train.score(model, dataloader, config)` and"
            " `sylva_train.select(scores, ...)` first, and pass the result as `masks`."
        )
        raise ConfigError(msg)
    if config.modules_to_save:
        config = copy.copy(config)
        whole = [
            n for n, _ in model.named_modules() if is_inside(n, config.modules_to_save)
        ]
        exclude = config.exclude_modules or []
        if isinstance(exclude, str):
            exclude = [n for n, _ in model.named_modules() if matches(n, exclude)]
        config.exclude_modules = [*exclude, *whole]
    scores = score(model, None, config)
    return select(scores, config.density, config.block_size, config.scope)


def plan(model: nn.Module, config: SylvaConfig) -> Mapping[str, LayerMask] | None:
    """Check everything about a new adapter, and write its layers into ``config``.

    Parameters
    ----------
    model : torch.nn.Module
        Without adapters.
    config : SylvaConfig
        A copy of the user's, changed in place.

    Returns
    -------
    mapping of str to LayerMask, or None
        None for an adapter that was saved, whose blocks are loaded afterwards.
    """
    if config.masks is None and config.block_counts is not None:
        if config.folder and (config.folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            read_adapter(config.folder)
        check_base(model, config)
        return None
    masks = choose_masks(model, config)
    layers = check_masks(model, masks, config.modules_to_save)
    find_saved(model, config.modules_to_save)
    masks = {name: masks[name] for name in layers}
    sizes = {mask.block_size for mask in masks.values()}
    if len(sizes) > 1:
        msg = f"`masks` of one adapter must have one block size; got {sorted(sizes)}."
        raise ConfigError(msg)
    config.masks, config.base_fingerprint, config.checksum = None, None, None
    config.block_size = sizes.pop()
    config.block_counts = {name: len(mask) for name, mask in masks.items()}
    config.layer_shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return masks


class SylvaModel(BaseTuner):
    """Embed trainable blocks in a model, by PEFT's rules.

    Made by `peft.get_peft_model`, `peft.PeftModel.from_pretrained` and ``load_adapter``;
    see `sylva_train.SylvaConfig` for the options.
    """

    prefix = "sylva_"
    tuner_layer_cls = SylvaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter's layers to the model, once everything about it was checked.

        Raises
        ------
        ConfigError, TargetError
            If the options or masks do not fit the model, or the rule needs data.
        AdapterError
            If a saved adapter is damaged or was made for another base.
        """
        if any(not isinstance(m, SylvaLayer) for m in embedded_layers(model).values()):
            check_unembedded(model)
        # A copy, so that the facts of this adapter stay out of the caller's object.
        config: Any = copy.copy(self.peft_config[adapter_name])
        with base_in_place(model):
            self._masks = plan(model, config)
        self.peft_config[adapter_name] = config
        patterns = config.target_modules, config.exclude_modules
        config.target_modules, config.exclude_modules = list(config.block_counts), None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.target_modules, config.exclude_modules = patterns
            self._masks = None

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        # By whole names: one layer's name may be the ending of another's.
        return key in (peft_config.block_counts or {})

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        layer = target
        if not isinstance(layer, SylvaLayer):
            layer = SylvaLayer(target, self.active_adapters[0])
            layer.train(target.training)
        if self._masks is None:
            assert peft_config.block_counts is not None
            count = peft_config.block_counts[current_key]
            layer.reserve(adapter_name, count, peft_config.block_size)
        else:
            layer.add(adapter_name, self._masks[current_key])
        if layer is not target:
            setattr(parent, target_name, layer)

    def _replace_module(
        self,
        parent: nn.Module,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,  # noqa: ARG002
    ) -> None:
        # PEFT's own also copies ``child.weight``, which a head of several layers has not.
        setattr(parent, child_name, new_module)

    def set_adapter(
        self, adapter_name: str | list[str], inference_mode: bool = False
    ) -> None:
        """Make one adapter active; see `SylvaLayer.set_adapter`."""
        check_one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Return the base model with an adapter's values and head in it."""
        if adapter_names:
            self.set_adapter(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Return the base model, all its weights and its head as they were."""
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])
        return super().unload()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],  # noqa: ARG003
    ) -> dict[str, torch.Tensor]:
        """Select an adapter's blocks, and write its identity into ``config``."""
        kept = {}
        for name, layer in embedded_layers(model).items():
            if adapter_name in layer.sylva_values:
                assert isinstance(layer, SylvaLayer)
                layer.check_loaded(adapter_name)
                for part in (VALUES, INDICES):
                    key = f"{name}.{part}.{adapter_name}"
                    own = getattr(layer, part)[adapter_name]
                    kept[key] = state_dict.get(key, own.detach())
        if config.base_fingerprint is None:
            inner: Any = getattr(model, "get_base_model", lambda: model)
            base = inner()
            config.base_fingerprint = base_fingerprint(base, config.modules_to_save)
        plain = {
            cls._remove_adapter_name_from_key(k, adapter_name): kept[k] for k in kept
        }
        for name, module in saved_wrappers(model, adapter_name).items():
            start = f"{name}."
            own = {k.removeprefix(start): t for k, t in state_dict.items()}
            for key, tensor in module.adapter_state_dict(adapter_name, own).items():
                plain[f"{name}.{key}"] = tensor
        config.checksum = checksum(plain, config)
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Verify an adapter's tensors, and name them as the model does.

        Raises
        ------
        AdapterError
            If tensors are missing or do not fit the configuration; or were changed, which
            only the first load of a configuration can tell: a trained model's own has the
            checksum of another file.
        """
        file = dict(state_dict)
        for name, module in saved_wrappers(model, adapter_name).items():
            for key, inner in module.adapter_state_dict_load_map(adapter_name).items():
                file[f"{name}.{key}"] = file.pop(f"{name}.{inner}")
        endings = config.modules_to_save
        known = {
            key: tensor
            for key, tensor in file.items()
            if key.endswith((VALUES, INDICES))
            or is_inside(key.removeprefix(PREFIX).rpartition(".")[0], endings)
        }
        layers = embedded_layers(model).values()
        fresh = all(
            isinstance(layer, SylvaLayer) and not layer.is_loaded(adapter_name)
            for layer in layers
            if adapter_name in layer.sylva_values
        )
        if not fresh:
            config = copy.copy(config)
            config.checksum = checksum(known, config)
        verify(known, config, adapter_name)
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def saved_wrappers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """PEFT's wrappers of the modules that an adapter trains whole, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        and adapter_name in module._adapters
    }


#: PEFT looks a method up by its key in these three tables; ours compares and hashes as the
#: string that is written to ``adapter_config.json``.
KEY: Any = SylvaType.SYLVA
PEFT_TYPE_TO_CONFIG_MAPPING[KEY] = SylvaConfig
PEFT_TYPE_TO_TUNER_MAPPING[KEY] = SylvaModel
PEFT_TYPE_TO_PREFIX_MAPPING[KEY] = SylvaModel.prefix
