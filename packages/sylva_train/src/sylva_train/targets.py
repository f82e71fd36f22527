"""Which layers of a model Sylva works on, and their weights as (out, in) matrices."""

from __future__ import annotations

import hashlib
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ._checks import ConfigError, TargetError

__all__ = [
    "check_block_size",
    "check_weights",
    "find_targets",
    "fingerprint",
    "first_reader",
    "input_owners",
    "is_inside",
    "is_plain",
    "is_same",
    "is_supported",
    "layer_input",
    "loaded_weight",
    "shared_inputs",
    "warn_of_others",
    "weight_device",
    "weight_view",
]


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a dense, floating-point weight."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # nn.MultiheadAttention reads its projection's weight and never calls the layer.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    # A parametrized weight (weight norm) is computed: writing into it would be lost.
    weight = module._parameters.get("weight")
    # Quantized linear layers subclass nn.Linear but keep packed integers.
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


#: Forward passes that are ``x Wᵀ + bias``, and classes that have such a one of their own.
PRODUCTS = (nn.Linear.forward, Conv1D.forward)
PRODUCT_CLASSES = {"FalconLinear"}


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer's class computes a product alone, and not a router's choice."""
    kind = type(module)
    return kind.forward in PRODUCTS or kind.__name__ in PRODUCT_CLASSES


def as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """View a tensor of the shape of a layer's weight as an (out, in) matrix."""
    return weight.t() if isinstance(module, Conv1D) else weight


def weight_view(module: nn.Module) -> torch.Tensor:
    """Return a layer's weight as an (out, in) matrix that shares its memory.

    `torch.nn.Linear` stores that already; GPT-2's ``Conv1D`` stores the transpose.
    """
    return as_matrix(module, module.weight.detach())  # type: ignore[operator]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a linear layer was called with, by position or by name."""
    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists hold the same tensors, not only equal ones."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def first_reader(name: str, inputs: Mapping[str, list[torch.Tensor]]) -> str:
    """Return the first layer that had the same input as another in each of its calls."""
    return next(n for n, others in inputs.items() if is_same(others, inputs[name]))


def weight_device(module: nn.Module) -> torch.device:
    """Return where a layer computes: where its weight is, or is brought to for it."""
    device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        device = torch.device(hook.execution_device)
    return device  # type: ignore[return-value]


def loaded_weight(module: nn.Module) -> torch.Tensor:
    """Return `weight_view`, brought here where accelerate keeps it elsewhere."""
    if not module.weight.is_meta:
        return weight_view(module)
    with align_module_device(module):
        return weight_view(module).clone()


def check_weights(model: nn.Module) -> None:
    """Raise `TargetError` unless the model computes with weights that it really has.

    Refused are quantized models, whose integers stand for weights, and models whose
    weights were never loaded. A weight that accelerate keeps on the CPU or on disk until
    its layer runs is there.
    """
    packed = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear4bit", "Linear8bitLt"}
        or (isinstance(module, nn.Linear | Conv1D) and is_packed(module))
    ]
    config = getattr(model, "config", None)
    if packed or getattr(config, "quantization_config", None) is not None:
        where = f"`{packed[0]}` holds" if packed else "it has"
        msg = (
            f"this {type(model).__name__} is quantized ({where} 8-bit or 4-bit weights):"
            " it cannot be scored. Score the model in bfloat16, float16 or float32; the"
            " masks then fit every copy of it."
        )
        raise TargetError(msg)
    for name, module in model.named_modules():
        empty = [
            n for n, p in module._parameters.items() if p is not None and p.is_meta
        ]
        parts = name.split(".")
        holders = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        hooks = (getattr(model.get_submodule(h), "_hf_hook", None) for h in holders)
        if empty and not any(getattr(hook, "offload", False) for hook in hooks):
            msg = (
                f"`{name}.{empty[0]}` is on the meta device and nothing loads it: read the"
                " weights first (`from_pretrained`), or dispatch the model with"
                " accelerate."
            )
            raise TargetError(msg)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is not of 16-bit floating-point numbers at least."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    return not weight.is_floating_point() or weight.element_size() < 2


def matches(name: str, patterns: str | Iterable[str] | None) -> bool:
    """Whether a module's name fits: whole-name regex, or a list of name endings."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            msg = f"{patterns!r} is not a regular expression: {error}."
            raise ConfigError(msg) from error
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def is_inside(name: str, endings: Iterable[str] | None) -> bool:
    """Whether a module, or one that holds it, has a name with one of the endings.

    PEFT finds ``modules_to_save`` by the bare ending of a name, without a dot before it.
    """
    parts = name.split(".")
    holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(holder.endswith(end) for end in endings or () for holder in holders)


def head_names(model: nn.Module) -> set[str]:
    """Names of modules that belong to the task's head rather than to the backbone."""
    heads = set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    backbone = getattr(model, "base_model", model)
    for name, module in model.named_modules():
        if module is output:
            heads.add(name)
    if backbone is not model:
        inside = {id(module) for module in backbone.modules()}
        heads |= {n for n, m in model.named_modules() if n and id(m) not in inside}
    return heads


def check_tied(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise `TargetError` if another module uses the same weight."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    memory = weight.data_ptr() or None  # on the meta device 0
    sharers = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if (parameter is weight or parameter.data_ptr() == memory)
        and other != f"{name}.weight"
    ]
    if sharers:
        msg = (
            f"the weight of `{name}` is shared with {', '.join(f'`{s}`' for s in sharers)}"
            " (tied weights): training blocks of it would silently change both. Leave the"
            " layer out of `target_modules`, or untie it first"
            " (`config.tie_word_embeddings=False`)."
        )
        raise TargetError(msg)


def warn_of_others(model: nn.Module) -> None:
    """Warn where ``"all-linear"`` is the smaller part of a backbone's matrices.

    Experts of a mixture are often stored as stacks of matrices, not as linear layers.
    """
    heads, linear = head_names(model), 0
    others: dict[str, int] = {}
    for name, module in model.named_modules():
        if name in heads or isinstance(module, nn.Embedding):
            continue
        sizes = {
            n: p.numel()
            for n, p in module._parameters.items()
            if p is not None and p.dim() > 1
        }
        if is_supported(module) and is_plain(module):
            linear += sum(sizes.values())
        else:
            others |= {f"{name}.{n}": size for n, size in sizes.items()}
    total = linear + sum(others.values())
    if others and total > 2 * linear:
        largest = max(others, key=others.__getitem__)
        kind = type(model.get_submodule(largest.rpartition(".")[0])).__name__
        warnings.warn(
            f'"all-linear" is {linear / total:.0%} of the weight matrices of this'
            f" {type(model).__name__}: the others, like `{largest}` of a {kind}, belong to"
            " no linear layer and will not be trained.",
            stacklevel=4,
        )


def find_targets(
    model: nn.Module,
    target_modules: list[str] | str | None = "all-linear",
    exclude_modules: list[str] | str | None = None,
) -> dict[str, nn.Module]:
    """Find the layers that a pattern names.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; `transformers` models tell their head from their backbone.
    target_modules : list of str or str
        Names or name endings, a regular expression on whole names, or
        ``"all-linear"``: every `torch.nn.Linear` and ``Conv1D`` of the backbone, but
        subclasses with a forward pass of their own.
    exclude_modules : list of str or str, optional
        Layers to leave out, in the same form.

    Returns
    -------
    dict of str to torch.nn.Module
        The layers by name, in the model's order.

    Raises
    ------
    TargetError
        If nothing matches, or no linear layer is excluded where some should be, a match
        is not a linear layer with a dense weight, or its weight is tied to another
        module's.
    ConfigError
        If a regular expression is none.
    """
    everything = target_modules is None or target_modules == "all-linear"
    heads = head_names(model) if everything else set()
    found, excluded = {}, False
    for name, module in model.named_modules():
        if matches(name, exclude_modules):
            excluded |= is_supported(module)
            continue
        if everything:
            if is_supported(module) and is_plain(module) and name not in heads:
                found[name] = module
        elif matches(name, target_modules):
            if not is_supported(module):
                msg = (
                    f"`target_modules` matches `{name}`, a {type(module).__name__}; only"
                    " torch.nn.Linear and transformers' Conv1D with a dense"
                    " floating-point weight can hold trainable blocks."
                )
                raise TargetError(msg)
            found[name] = module
    endings = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if is_supported(m)}
    )
    if exclude_modules and found and not excluded:
        msg = (
            f"`exclude_modules`={exclude_modules!r} matches no linear layer of this"
            f" {type(model).__name__}; they end in {', '.join(map(repr, endings))}."
        )
        raise TargetError(msg)
    if not found:
        msg = (
            f"no layer of this {type(model).__name__} matches"
            f" `target_modules`={target_modules!r}"
            + (
                f" outside `exclude_modules`={exclude_modules!r}"
                if exclude_modules
                else ""
            )
            + (
                f"; its linear layers end in {', '.join(map(repr, endings))}."
                if endings
                else "; it has no linear layer at all."
            )
        )
        raise TargetError(msg)
    for name, module in found.items():
        check_tied(model, name, module)
    return found


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
    moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
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
    # the tensors are kept, or another might get the same identity
    inputs: dict[str, list[torch.Tensor]] = {}

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.setdefault(name, []).append(layer_input(args, kwargs))

        return before

    handles = [
        module.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, module in targets.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: first_reader(name, inputs) for name in inputs}


def check_block_size(targets: dict[str, nn.Module], block_size: int) -> None:
    """Raise `ConfigError` if a layer is smaller than a block."""
    small = {
        name: tuple(weight_view(module).shape)
        for name, module in targets.items()
        if block_size > min(weight_view(module).shape)
    }
    if small:
        name, shape = next(iter(small.items()))
        msg = (
            f"`block_size` {block_size} is larger than `{name}` of shape {shape}"
            + (f" and {len(small) - 1} other layers" if len(small) > 1 else "")
            + f"; take at most {min(min(s) for s in small.values())}, or exclude the"
            " layer with `exclude_modules`."
        )
        raise ConfigError(msg)


def fingerprint(model: nn.Module, exclude: Iterable[str] | None = None) -> str:
    """Identify a model by its weights: a hash of their names, shapes and values.

    Parameters
    ----------
    model : torch.nn.Module
        The model without adapters. The task's head does not count.
    exclude : iterable of str, optional
        Name endings of other modules that do not count (``modules_to_save``).

    Returns
    -------
    str
        Hexadecimal SHA-256. Values count up to their rounding to bfloat16, so that one
        checkpoint has the same fingerprint in float32 and in bfloat16.
    """
    exclude = list(exclude or ())
    heads = head_names(model)
    digest = hashlib.sha256()
    kind = getattr(getattr(model, "config", None), "model_type", "")
    digest.update(str(kind).encode())
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner in heads or is_inside(owner, exclude):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        kept = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(kept.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
