"""Layers that read the same tensor: query, key and value; gate and up."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sylva_train._torch import on_device

from .finding import find_targets

__all__ = ["Calls", "input_owners", "is_same", "layer_input", "shared_inputs"]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a linear layer was called with, by position or by name."""
    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists hold the same tensors, not only equal ones."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


class Calls:
    """What layers were called with, call by call.

    Attributes
    ----------
    inputs : dict of str to list of torch.Tensor
        By layer. They are kept alive, or another tensor might get one's identity.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = {}
        # Layers by the input of their first call: a mixture may have ten thousand.
        self._readers: dict[int, list[str]] = {}

    def note(self, name: str, x: torch.Tensor) -> None:
        """Take note of a layer's next call."""
        if name not in self.inputs:
            self.inputs[name] = []
            self._readers.setdefault(id(x), []).append(name)
        self.inputs[name].append(x)

    def first_reader(self, name: str) -> str:
        """Return the first layer that had the same input as another in each of its calls."""
        own = self.inputs[name]
        readers = self._readers[id(own[0])]
        return next(n for n in readers if is_same(self.inputs[n], own))

    def clear(self) -> None:
        """Let go of the inputs."""
        self.inputs.clear()
        self._readers.clear()


def shared_inputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    target_modules: list[str] | str | None = "all-linear",
    exclude_modules: list[str] | str | None = None,
) -> list[list[str]]:
    """Find the layers that read the same tensor: query, key and value; gate and up.

    Parameters
    ----------
    model : torch.nn.Module
        The model, without adapters.
    batch : mapping
        Arguments of one forward pass, as small as can be.
    target_modules, exclude_modules
        As in `SylvaConfig`.

    Returns
    -------
    list of list of str
        Names of two layers or more, in the order of the forward pass.

    Raises
    ------
    TargetError
        As `find_targets`.
    """
    device = next(model.parameters()).device
    moved = on_device(batch, device)
    targets = find_targets(model, target_modules, exclude_modules)
    readers: dict[str, list[str]] = {}
    for name, owner in input_owners(targets, lambda: model(**moved)).items():
        readers.setdefault(owner, []).append(name)
    return [names for names in readers.values() if len(names) > 1]


def input_owners(
    targets: Mapping[str, nn.Module], run: Callable[[], Any]
) -> dict[str, str]:
    """Find layers whose inputs are the same tensors in all calls: query, key and value.

    Parameters
    ----------
    targets : mapping of str to torch.nn.Module
        The layers.
    run : callable
        Runs the model once.

    Returns
    -------
    dict of str to str
        For each layer that ran the first one that had its input.
    """
    calls = Calls()

    def look(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        calls.note(name, layer_input(args, kwargs))

    handles = [
        module.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, module in targets.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls.first_reader(name) for name in calls.inputs}
