"""A network whose blocks are trained, and its twin with masked dense weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sylva_train.layers import embed, embedded_layers
from sylva_train.targets import weight_view
from tests.sylva_train.models import dense_blocks, random_masks


@torch.compiler.disable  # before 2.13 the compiler refuses generators
def random(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


class MaskedLinear(nn.Linear):
    """A dense weight of which only the masked part is trained: the plain oracle."""

    def __init__(self, base, mask):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.bias.requires_grad_(False)
        self.inside = mask.dense()
        self.start = base.weight.detach().clone()

    def forward(self, x):
        # Weight decay reaches the whole parameter, but what is outside has no effect.
        weight = torch.where(self.inside, self.weight, self.start)
        return nn.functional.linear(x, weight, self.bias)


def make_pair(block=3, seed=0, dtype=torch.float32):
    """The same network twice: embedded, and with masked dense weights."""
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4))
    for i, parameter in enumerate(base.parameters()):
        parameter.data = random(parameter.shape, seed + i)
    masks = random_masks(base, block_size=block, seed=seed)
    dense = copy.deepcopy(base)
    dense[0] = MaskedLinear(base[0], masks["0"])
    dense[2] = MaskedLinear(base[2], masks["2"])
    return embed(base.to(dtype), masks), dense, masks


def loss_of(model, step, dtype=torch.float32):
    x, y = random((8, 7), 100 + step).to(dtype), random((8, 4), 200 + step)
    return (model(x).float() - y).square().mean()


def train(model, optimizer, steps, accumulate=1, clip=None, schedule=None):
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rates = []
    scheduler = None
    if schedule:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        for part in range(accumulate):
            (loss_of(model, accumulate * step + part) / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        if scheduler:
            scheduler.step()
    return rates


def assert_same_blocks(model, dense, masks, tolerance=1e-6):
    for name, layer in embedded_layers(model).items():
        expected = dense_blocks(dense[int(name)].weight.detach(), masks[name])
        values = layer.sylva_values["default"].detach()
        assert float((values - expected).abs().max()) <= tolerance
        assert torch.equal(
            dense_blocks(weight_view(layer.base_layer), masks[name]), values
        )
