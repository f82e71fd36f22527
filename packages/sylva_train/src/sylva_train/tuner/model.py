"""Sylva as a PEFT tuner, and its entry in PEFT's tables."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import TaskType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig, SylvaType
from sylva_train.layers import check_unembedded, embedded_layers

from .base import base_fingerprint, base_in_place
from .files import INDICES, VALUES, checksum, own_tensors, verify
from .layer import SylvaLayer, check_one
from .plan import plan

__all__ = ["SylvaModel"]

#: Tasks whose head PEFT adds to the caller's ``modules_to_save`` once the layers are in.
NAMED_AFTERWARDS = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


class SylvaModel(BaseTuner):
    """Embed trainable blocks in a model, by PEFT's rules.

    Made by `peft.get_peft_model`, `peft.PeftModel.from_pretrained` and ``load_adapter``;
    see `sylva_train.SylvaConfig` for the options. The very configuration of an adapter
    that is in the model, ``model.peft_config[name]``, makes a copy of its blocks.
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
        if "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
            msg = (
                f"an adapter cannot be called {adapter_name!r}: parameters are named by it,"
                " which takes a name without dots that is no attribute of a"
                " torch.nn.ParameterDict."
            )
            raise ConfigError(msg)
        # A copy, so that the facts of this adapter stay out of the caller's object.
        given: Any = self.peft_config[adapter_name]
        if given.modules_to_save is None and given.task_type in NAMED_AFTERWARDS:
            given.modules_to_save = []  # the copy's as well
        # Preference optimization asks so for the reference that a trained adapter starts
        # from, and cannot copy the blocks itself.
        self._source = next(
            (
                n
                for n, c in self.peft_config.items()
                if c is given and n != adapter_name
            ),
            None,
        )
        config = copy.copy(given)
        self._masks = None
        if self._source is None:
            with base_in_place(model):
                self._masks = plan(model, config)
        self.peft_config[adapter_name] = config
        patterns = config.target_modules, config.exclude_modules
        config.target_modules, config.exclude_modules = list(config.block_counts), None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.target_modules, config.exclude_modules = patterns
            self._masks = self._source = None

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
        if self._source is not None:
            layer.duplicate(self._source, adapter_name)
        elif self._masks is None:
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

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse adapters by sample, for which PEFT calls this."""
        names = set(kwargs.get("adapter_names") or ())
        if names - set(self.active_adapters):
            msg = (
                "Sylva's adapters set the weights that all samples of a batch share, so"
                f" `adapter_names` cannot ask for others than the active"
                f" {self.active_adapters}; got {sorted(names)}. Call `set_adapter`, with"
                " one batch for each."
            )
            raise ConfigError(msg)
        yield

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
        warn_of_unsaved(model)
        kept = {}
        for name, layer in embedded_layers(model).items():
            # PEFT would add those of an output embedding, which show the values.
            for part in ("weight", "bias"):
                state_dict.pop(f"{name}.base_layer.{part}", None)
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
        known = own_tensors(file, config)
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


def warn_of_unsaved(model: nn.Module) -> None:
    """Warn of weights that are trained beside adapters, which PEFT does not save."""
    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    holders = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, kinds)
    )
    name = next(
        (
            n
            for n, p in model.named_parameters()
            if p.requires_grad and not n.startswith(holders)
        ),
        None,
    )
    if name is not None:
        warnings.warn(
            f"`{name}` requires a gradient, but an adapter holds blocks and"
            " `modules_to_save`, and fits a base with the other weights that this one has"
            " now: name modules that are trained whole in `modules_to_save`, or save the"
            " merged model.",
            stacklevel=4,
        )


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
