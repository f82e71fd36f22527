"""Linear layers that can hold blocks, and their weights as (out, in) matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import TargetError

__all__ = [
    "as_matrix",
    "check_embeddable",
    "check_unscaled",
    "check_weights",
    "holders",
    "is_packed",
    "is_patched",
    "is_plain",
    "is_sharded",
    "is_supported",
    "loaded_weight",
    "stands_for_others",
    "weight_device",
    "weight_view",
]


#: Dtypes of weights that can hold trained values.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def holders(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold one, the outermost first, and its own."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a dense, floating-point weight."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # nn.MultiheadAttention reads its projection's weight and never calls the layer.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    # A parametrized weight (weight norm) is computed: writing into it would be lost.
    weight = module._parameters.get("weight")
    if weight is None or stands_for_others(weight):
        return False
    # Quantized linear layers subclass nn.Linear but keep packed integers.
    return weight.dim() == 2 and weight.is_floating_point()


#: Forward passes that are ``x Wᵀ + bias``, and classes that have such a one of their own.
PRODUCTS = (nn.Linear.forward, Conv1D.forward)
PRODUCT_CLASSES = {"FalconLinear"}


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a part of a larger one, between processes (a `DTensor`)."""
    return hasattr(tensor, "device_mesh")


def stands_for_others(tensor: object) -> bool:
    """Whether a tensor has integers inside and tells the dtype that they stand for.

    torchao's quantized weights do.
    """
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer's class computes a product alone, and not a router's choice."""
    kind = type(module)
    return kind.forward in PRODUCTS or kind.__name__ in PRODUCT_CLASSES


def is_patched(module: nn.Module) -> bool:
    """Whether a module was given a forward pass that is not its class's."""
    # accelerate's moves tensors only.
    return "forward" in module.__dict__ and not hasattr(module, "_hf_hook")


def as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """View a tensor of the shape of a layer's weight as an (out, in) matrix."""
    return weight.t() if isinstance(module, Conv1D) else weight


def weight_view(module: nn.Module) -> torch.Tensor:
    """Return a layer's weight as an (out, in) matrix that shares its memory.

    `torch.nn.Linear` stores that already; GPT-2's ``Conv1D`` stores the transpose.
    """
    return as_matrix(module, module.weight.detach())  # type: ignore[operator]


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


def check_embeddable(layer: nn.Module) -> None:
    """Raise `TargetError` unless a layer's weight can hold trained values."""
    if is_packed(layer):
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        kind = type(weight).__name__ if stands_for_others(weight) else weight.dtype
        msg = (
            f"`base_layer` is a {type(layer).__name__} with a quantized weight ({kind}),"
            " but blocks are written into dense ones. Load the model in bfloat16, float16"
            " or float32; quantize it after `sylva_train.merge`."
        )
        raise TargetError(msg)
    if not is_supported(layer) or weight_view(layer).dtype not in DTYPES:
        found = getattr(layer, "weight", None)
        msg = (
            "`base_layer` must be a torch.nn.Linear or Conv1D with a dense float64,"
            f" float32, bfloat16 or float16 weight; got a {type(layer).__name__}"
            + (f" of {found.dtype}." if isinstance(found, torch.Tensor) else ".")
        )
        raise TargetError(msg)


def check_unscaled(model: nn.Module) -> None:
    """Raise `TargetError` if a model multiplies its weights in place, between its modes.

    RWKV does, against overflow in float16; blocks would be put back as they were.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled") and module.config.rescale_every:  # type: ignore[union-attr]
            msg = (
                f"a {type(module).__name__} divides weights in place in evaluation mode,"
                " which blocks in them would undo: load the model with"
                " `rescale_every=0`, which changes its outputs by rounding alone."
            )
            raise TargetError(msg)


def check_weights(model: nn.Module) -> None:
    """Raise `TargetError` unless the model computes with weights that it really has.

    Refused are quantized models, whose integers stand for weights, models whose weights
    were never loaded or have no shape yet, sharded ones, those in TorchScript and those of
    `check_unscaled`. A weight that accelerate keeps on the CPU or on disk until its layer
    runs is there.
    """
    check_unscaled(model)
    script = next(
        (n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)),
        None,
    )
    if script is not None:
        msg = (
            f"{f'`{script}`' if script else 'the model'} is in TorchScript, whose layers"
            " cannot be replaced: pass the module that it was made of."
        )
        raise TargetError(msg)
    lazy = next((n for n, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        msg = f"`{lazy}` has no shape yet: run the model once, which gives it one."
        raise TargetError(msg)
    packed = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear4bit", "Linear8bitLt"} or is_packed(module)
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
    sharded = next((n for n, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        msg = (
            f"`{sharded}` is sharded (FSDP, tensor parallelism): score the whole model, as"
            " each process holds it, before it is sharded."
        )
        raise TargetError(msg)
    for name, module in model.named_modules():
        empty = [
            n for n, p in module._parameters.items() if p is not None and p.is_meta
        ]
        around = (model, *map(model.get_submodule, holders(name)))
        hooks = (getattr(module, "_hf_hook", None) for module in around)
        if empty and not any(getattr(hook, "offload", False) for hook in hooks):
            msg = (
                f"`{name}.{empty[0]}` is on the meta device and nothing loads it: read the"
                " weights first (`from_pretrained`), or dispatch the model with"
                " accelerate."
            )
            raise TargetError(msg)


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is not of 16-bit floating-point numbers at least."""
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear | Conv1D) or weight is None:
        return False
    numbers = weight.is_floating_point() or weight.is_complex()
    wide = numbers and weight.element_size() >= 2
    return not wide or stands_for_others(weight)
