"""A layer of blocks alone computes what the dense layer with zeros elsewhere does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import ConfigError, TargetError
from sylva_train.baselines import BlockSparseLinear, make_block_sparse, prune
from sylva_train.masks import LayerMask
from tests.sylva_train.models import dense_blocks

MASKS = {
    "some": [[0, 1], [0, 3], [2, 0], [2, 1]],  # an empty row and an empty column
    "all": [[i, j] for i in range(3) for j in range(4)],
    "one": [[1, 2]],
}


def make(kind, indices, dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.Linear(32, 24) if kind == "Linear" else Conv1D(24, 32)
    with torch.no_grad():
        layer.bias.normal_()
    return layer.to(dtype), LayerMask((24, 32), 8, torch.tensor(indices))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_the_dense_layer_with_zeros(name, kind):
    layer, mask = make(kind, MASKS[name])
    sparse = BlockSparseLinear(layer, mask)
    prune(nn.ModuleDict({"0": layer}), {"0": mask})
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    dy = torch.randn(2, 5, 24, dtype=torch.float64)
    y, expected = sparse(x), layer(twin)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad)
    gradient = layer.weight.grad if kind == "Linear" else layer.weight.grad.T
    torch.testing.assert_close(sparse.blocks.grad, dense_blocks(gradient, mask))
    assert sparse.bias.grad is None
    assert [n for n, p in sparse.named_parameters() if p.requires_grad] == ["blocks"]


def test_it_learns():
    layer, mask = make("Linear", MASKS["some"], torch.float32)
    model = nn.Sequential(layer, nn.Linear(24, 2))
    make_block_sparse(model, {"0": mask})
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(4, 8, 8)]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    x, target = torch.randn(16, 32), torch.randint(2, (16,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_what_cannot_be_stored_in_blocks_is_refused():
    ragged = LayerMask((24, 30), 8, torch.tensor([[0, 0]]))
    with pytest.raises(ConfigError, match="must divide both sides"):
        BlockSparseLinear(nn.Linear(30, 24), ragged)
    with pytest.raises(TargetError, match="does not have"):
        make_block_sparse(nn.Sequential(nn.Linear(30, 24)), {"7": ragged})
