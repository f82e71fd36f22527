"""What a training run consists of: taken down, put back, and told from another's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from sylva_train._artifacts import as_read
from sylva_train._torch import sampled, tensor_bytes
from sylva_train.config import TrainingConfig
from sylva_train.layers import embedded_layers

__all__ = ["capture", "identify", "restore", "rng_state", "set_rng_state"]

#: Options that may differ between a run and its continuation: none changes a weight.
IRRELEVANT = {"device", "eval_every", "save_every"}


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global random generators, the device's included."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        # The legacy generator is the one that other libraries draw from.
        "numpy": dict(np.random.get_state(legacy=False)),  # noqa: NPY002
    }
    inner = state["numpy"]["state"]
    state["numpy"]["state"] = inner | {"key": np.asarray(inner["key"]).tolist()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, dtype and shape."""
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    total.update(tensor_bytes(tensor))
    return total.hexdigest()


def buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's persistent buffers by name, but the tables of block indices."""
    for prefix, module in model.named_modules():
        if prefix.endswith(".sylva_indices"):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def frozen_digest(model: nn.Module) -> str:
    """Return a digest of a sample of each frozen weight: the base model's identity."""
    layers = embedded_layers(model).values()
    for layer in layers:
        layer.restore_()
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # PEFT keeps the head that it copied for training, random where it is new.
        if not parameter.requires_grad and ".original_module." not in name:
            part = digest(sampled(parameter))
            total.update(f"{name} {tuple(parameter.shape)} {part}".encode())
    for layer in layers:
        layer.sync()
    return total.hexdigest()


def identify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: TrainingConfig,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a run and its continuation must have in common.

    Parameters
    ----------
    model : torch.nn.Module
        Named, shaped and masked parameters, and a digest of the frozen ones.
    optimizer, scheduler
        Their classes, and which parameter stands where.
    config : TrainingConfig
        All but the options that change no weight.
    data : mapping
        What tells the data apart (JSON).

    Returns
    -------
    dict
        Strings, numbers, lists and dicts, as JSON gives them back.
    """
    masks = {
        f"{name}.sylva_values.{adapter}": digest(layer.sylva_indices[adapter])
        for name, layer in embedded_layers(model).items()
        for adapter in layer.sylva_values
    }
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    identity = {
        "parameters": {
            name: f"{tuple(p.shape)} {p.dtype} {masks.get(name, '')}".strip()
            for name, p in model.named_parameters()
            if p.requires_grad
        },
        "frozen weights": frozen_digest(model),
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "scheduler": type(scheduler).__name__,
        "config": {k: v for k, v in asdict(config).items() if k not in IRRELEVANT},
        "data": dict(data),
    }
    return as_read(identity)


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> dict[str, Any]:
    """Return the state of a run: a nested dict of tensors and numbers.

    Parameters
    ----------
    model, optimizer, scheduler
        Trained parameters and buffers (running statistics); state of the optimizer and
        of the scheduler.
    device : torch.device
        Whose random generator counts besides the CPU's.
    """
    return {
        "parameters": {n: p for n, p in model.named_parameters() if p.requires_grad},
        "buffers": dict(buffers(model)),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": rng_state(device),
    }


@torch.no_grad()
def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> None:
    """Put a run back into a state that `capture` returned.

    Embedded layers see that their values changed, and write them before they are used.
    """
    parameters, present = dict(model.named_parameters()), dict(buffers(model))
    for name, tensor in state["parameters"].items():
        parameters[name].copy_(tensor)
    for name, tensor in state["buffers"].items():
        present[name].copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    keep_dtypes(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    set_rng_state(state["rng"], device)


def keep_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo that PyTorch casts an optimizer's loaded state to its parameters' dtype.

    Float32 moments of bfloat16 parameters would lose the bits that they are kept for.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        state = optimizer.state[parameter]
        for key, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)
