"""What is not trained though nobody said so: left out, with a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import ConfigError
from sylva_train.baselines import adapt, parse_method
from sylva_train.config import SylvaConfig, TrainingConfig
from sylva_train.importance import score
from sylva_train.layers import embed
from sylva_train.selection import select
from sylva_train.training import train
from tests.sylva_train.models import DECODER, make_model, random, random_masks, snapshot
from tests.sylva_train.test_architectures import DATA, Small
from tests.sylva_train.test_architectures import loss as small_loss

NAMES = ["0.used", "0.tower", "0.gate", "1.used", "1.tower", "1.gate"]


class Part(nn.Module):
    """A layer that runs, one that only images would run, and a gate of one output."""

    def __init__(self):
        super().__init__()
        self.used, self.tower = nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate = nn.Linear(16, 1)

    def forward(self, x):
        return torch.tanh(self.used(x)) * torch.sigmoid(self.gate(x))


def model():
    built = nn.Sequential(Part(), Part())
    for seed, parameter in enumerate(built.parameters()):
        parameter.data = random(parameter.shape, seed=seed)
    return built


def config(**options):
    return SylvaConfig(**{"block_size": 8, "samples": 4, "damping": 0.1} | options)


def batches():
    return [
        {"x": random((2, 3, 16), seed=seed), "labels": torch.zeros(2)}
        for seed in (20, 21)
    ]


def loss(model, batch):
    return model(batch["x"]).square().mean()


def test_layers_without_room_for_a_block_are_left_out():
    with pytest.warns(
        UserWarning, match=r"of shape \(1, 16\) and 1 other layers, which will not"
    ):
        scores = score(model(), config=config(importance="magnitude"))
    assert list(scores) == [name for name in NAMES if "gate" not in name]
    assert scores.metadata["left_out"] == ["0.gate", "1.gate"]
    named = config(importance="magnitude", target_modules=["used", "gate"])
    with pytest.raises(ConfigError, match=r"leave them out: `exclude_modules=\['gate"):
        score(model(), config=named)


@pytest.mark.filterwarnings("ignore:`block_size`")
@pytest.mark.parametrize(
    ("rule", "budget"),
    [("kfac", None), ("kfac", "4KB"), ("gradient", "1.1KB"), ("kfac-diag", None)],
)
def test_layers_that_no_gradient_reaches_are_left_out(rule, budget):
    options = {"importance": rule, "curvature": "dense"}
    with pytest.warns(
        UserWarning, match=r"no gradient reached `0\.tower`.*will not be trained"
    ):
        found = score(
            model(), batches(), config(**options, memory_budget=budget), loss=loss
        )
    assert list(found) == ["0.used", "1.used"]
    assert found.metadata["left_out"] == ["0.gate", "0.tower", "1.gate", "1.tower"]
    named = config(**options, target_modules=["used"])
    expected = score(model(), batches(), named, loss=loss)
    assert "left_out" not in expected.metadata
    for name, layer in found.items():
        torch.testing.assert_close(layer.blocks(8), expected[name].blocks(8))
    masks = select(found, density=0.25, block_size=8)
    embedded = embed(model(), masks)
    loss(embedded, batches()[0]).backward()
    assert all(p.grad is not None for p in embedded.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:`block_size`")
def test_named_layers_that_no_gradient_reaches_are_refused():
    for options in (
        {"target_modules": ["used", "tower"]},
        {"target_modules": "1.tower"},
    ):
        with pytest.raises(ConfigError, match="loss does not depend on"):
            score(model(), batches(), config(**options), loss=loss)


@pytest.mark.parametrize("budget", [None, "4KB"])
def test_a_model_of_which_no_layer_is_reached_is_refused(budget):
    lost = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    options = config(curvature="dense", memory_budget=budget)
    with pytest.raises(ConfigError, match="loss does not depend on"):
        score(lost, batches(), options, loss=lambda _, batch: batch["x"].mean())


@pytest.mark.filterwarnings("ignore:`block_size`")
@pytest.mark.parametrize("name", ["lora", "shira", "supertuning"])
def test_rivals_leave_out_layers_without_room_for_a_block(name):
    adapted = adapt(parse_method(name), model(), config(density=0.25))
    trained = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained
    assert not [n for n in trained if "gate" in n]
    assert adapted.trainable <= 0.5 * 4 * 16 * 16


@pytest.mark.filterwarnings("ignore:`block_size`", "ignore:no gradient")
@pytest.mark.parametrize("budget", [None, "4KB"])
def test_finished_scoring_is_read_back_without_them(tmp_path, budget):
    options = config(curvature="dense", memory_budget=budget)
    first = score(model(), batches(), options, loss=loss, checkpoint=tmp_path)

    def never(*_):
        raise AssertionError

    again = score(model(), batches(), options, loss=never, checkpoint=tmp_path)
    assert list(again) == list(first)
    assert again.metadata == first.metadata
    for name, layer in again.items():
        assert torch.equal(layer.blocks(8), first[name].blocks(8))


def test_experts_that_are_no_linear_layers_are_named():
    options = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixture = tf.MixtralForCausalLM(tf.MixtralConfig(**options))
    plain = SylvaConfig(importance="magnitude", block_size=4)
    with pytest.warns(UserWarning, match=r"\d% of .* a MixtralExperts, belong to no"):
        score(mixture, None, plain)
    attention = nn.TransformerEncoderLayer(16, 2, 64)
    with pytest.warns(UserWarning, match=r"67% of .*`self_attn.in_proj_weight` of a"):
        score(attention, None, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = SylvaConfig(
            importance="magnitude", block_size=4, target_modules=["q_proj"]
        )
        score(mixture, None, some)
        for name in ("bert", "gpt2", "llama", "t5"):
            score(make_model(name), None, plain)


def test_blocks_that_no_step_reaches_are_named():
    model = Small(lambda m, x: F.linear(x, m.a.weight.detach()) + m.b(x))
    embed(model, random_masks(model, ["a", "b"], block_size=4))
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"1 layers, like `a\.sylva_values"):
        train(model, DATA, TrainingConfig(steps=2, lr=0.1), loss=small_loss)
    after = snapshot(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"b.base_layer.weight", "b.sylva_values.default"}
