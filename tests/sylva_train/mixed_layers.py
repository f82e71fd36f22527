"""Layers of several shapes and dtypes, and gradients for an optimizer to follow."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sylva_train.layers import embed, embedded_layers
from sylva_train.targets import weight_view
from tests.sylva_train.models import dense_blocks, random, random_masks

#: Of values up to 4 after tens of steps, in float32: a few of their last bits, of which
#: fused multiplications and a GPU's quick square roots take more than the interpreter.
TOLERANCE = 4e-6
MODES = ["torch", "triton"]


def make(device, blocks=(16, 4, 4)):
    """Layers of several shapes and dtypes, one transposed, and a head."""
    model = nn.Sequential(
        nn.Linear(70, 50), nn.Linear(33, 20), Conv1D(24, 40), nn.Linear(5, 3)
    )
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, seed=seed)
    model[1].bfloat16()
    model[2].half()
    masks = {}
    for name, block in zip("012", blocks, strict=True):
        masks |= random_masks(model, [name], block_size=block)
    return embed(model.to(device), masks, modules_to_save=["3"]), masks


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def set_gradients(parameters, step, missing=True, scale=1.0):
    """Random gradients; every third one is missing, another one in each step."""
    for i, parameter in enumerate(parameters):
        parameter.grad = None
        if not (missing and (step + i) % 3 == 0):
            gradient = random(parameter.shape, seed=1000 * step + i)
            parameter.grad = (scale * gradient).to(parameter)


def twin_of(parameters):
    return [nn.Parameter(p.detach().clone()) for p in parameters]


def largest_difference(first, second):
    return max(
        float((a - b).detach().abs().max()) for a, b in zip(first, second, strict=True)
    )


def assert_weights_show_values(model, masks, before):
    for name, layer in embedded_layers(model).items():
        weight = weight_view(layer.base_layer).cpu()
        inside = masks[name].dense()
        assert torch.equal(weight[~inside], before[name][~inside])
        ones = dense_blocks(inside, masks[name])
        values = layer.sylva_values["default"].detach().cpu().to(weight.dtype)
        assert torch.equal(dense_blocks(weight, masks[name])[ones], values[ones])


def dense_weights(model):
    return {
        name: weight_view(layer.base_layer).cpu().clone()
        for name, layer in embedded_layers(model).items()
    }
