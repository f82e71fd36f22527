"""Mixtures of experts: taking the experts apart, training them, putting them together."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf

import sylva_train as sylva
from sylva_train._checks import AdapterError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.layers import embedded_layers
from sylva_train.targets import find_targets, weight_view
from tests.sylva_train.models import (
    BLOCK,
    DECODER,
    VOCABULARY,
    dense_blocks,
    logits,
    random_masks,
    same,
    snapshot,
    train_step,
)

MIXTURE = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
#: Plain stacks, and transposed ones with biases and interleaved gates.
KINDS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MIXTURE)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**MIXTURE, head_dim=8)),
}
IDS = torch.arange(3, 15).view(2, 6) % VOCABULARY
BATCH = {"input_ids": IDS, "labels": IDS}
EXPERT = "model.layers.1.mlp.experts.3"


def mixture(kind="mixtral", split=True):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return sylva.split_experts(model) if split else model


@pytest.mark.parametrize("kind", KINDS)
def test_split_experts_compute_what_the_stacks_do(kind):
    stacked, split = mixture(kind, split=False), mixture(kind)
    torch.testing.assert_close(logits(split, BATCH), logits(stacked, BATCH))
    for model in (stacked, split):
        model(**BATCH).loss.backward()
    for name in ("gate_up_proj", "down_proj"):
        dense = stacked.model.layers[1].mlp.experts.get_parameter(name).grad[3]
        own = split.get_submodule(f"{EXPERT}.{name}").weight.grad
        torch.testing.assert_close(own, dense, rtol=1e-4, atol=1e-6)
    # The matrices were not copied, nor do they count each other's changes.
    first, last = (split.model.layers[0].mlp.experts.get_submodule(i) for i in "03")
    first, last = first.down_proj.weight, last.down_proj.weight
    assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    with torch.no_grad():
        first.mul_(1)
    assert last._version == 0


@pytest.mark.parametrize("kind", KINDS)
def test_joined_experts_are_as_they_were(kind):
    model = mixture(kind, split=False)
    model.requires_grad_(False)
    names, before = list(model.state_dict()), snapshot(model)
    expected = logits(model, BATCH)
    sylva.join_experts(sylva.split_experts(model))
    assert list(model.state_dict()) == names
    assert same(snapshot(model), before)
    assert torch.equal(logits(model, BATCH), expected)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_experts_from_scoring_to_a_saved_model(kind, tmp_path):
    model = mixture(kind)
    options = SylvaConfig(importance="gradient", block_size=4, samples=2)
    scores = sylva.score(model, [BATCH], options)
    reference = mixture(kind)
    reference(**BATCH).loss.backward()
    name = f"{EXPERT}.gate_up_proj"
    layer = reference.get_submodule(name)
    gradient = layer.weight.grad if kind == "mixtral" else layer.weight.grad.t()
    assert scores[name].shape == tuple(gradient.shape)
    total = gradient.abs().double().sum()
    torch.testing.assert_close(scores[name].blocks(4).sum(), total, rtol=1e-4, atol=0)
    masks = sylva.select(scores, density=0.3, block_size=4)
    wrapped = peft.get_peft_model(copy.deepcopy(model), SylvaConfig(masks=masks))
    wrapped(**BATCH).loss.backward()
    inner = wrapped.get_submodule(f"base_model.model.{name}")
    torch.testing.assert_close(
        inner.sylva_values["default"].grad,
        dense_blocks(gradient, masks[name]),
        rtol=1e-4,
        atol=1e-6,
    )
    train_step(wrapped, BATCH, steps=3)
    expected = logits(wrapped, BATCH)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = sylva.load_adapter(mixture(kind), tmp_path / "adapter")
    assert torch.equal(logits(loaded, BATCH), expected)
    merged = sylva.join_experts(sylva.merge(loaded))
    torch.testing.assert_close(logits(merged, BATCH), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert same(snapshot(again), snapshot(merged))
    base = sylva.join_experts(sylva.unload(wrapped))
    assert same(snapshot(base), snapshot(mixture(kind, split=False)))


def test_experts_without_a_token_have_scores_and_a_gradient():
    model = mixture()
    one = {"input_ids": IDS[:1, :2], "labels": IDS[:1, :2]}
    options = SylvaConfig(importance="kfac", block_size=4, samples=1)
    scores = sylva.score(model, [one], options)
    layers = [n for n in find_targets(model) if ".mlp.experts." in n]
    empty = [n for n in layers if not scores[n].blocks(4).any()]
    assert empty
    assert len(empty) < len(layers)
    sylva.embed(model, random_masks(model, [empty[0], layers[0]], block_size=4))
    model(**one).loss.backward()
    for layer in embedded_layers(model).values():
        assert layer.sylva_values["default"].grad is not None


def test_experts_without_memory_are_not_taken_for_tied():
    with torch.device("meta"):
        planned = sylva.split_experts(KINDS["mixtral"]())
    assert list(find_targets(planned)) == list(find_targets(mixture()))


def test_what_cannot_be_split_or_joined_is_refused(tmp_path):
    with pytest.raises(TargetError, match="nothing to split"):
        sylva.split_experts(tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)))
    with pytest.raises(TargetError, match="nothing to join"):
        sylva.join_experts(mixture(split=False))
    packed = mixture(split=False)
    for layer in packed.model.layers:
        stack = layer.mlp.experts.down_proj
        layer.mlp.experts.down_proj = torch.nn.Parameter(stack.to(torch.float8_e4m3fn))
    with pytest.raises(TargetError, match="nothing to split"):
        sylva.split_experts(packed)
    parallel = mixture(split=False)
    parallel.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(
        TargetError, match=r"`model\.layers\.1\.mlp\.experts` are spread"
    ):
        sylva.split_experts(parallel)
    model = mixture()
    sylva.embed(model, random_masks(model, ["down_proj"], block_size=BLOCK))
    with pytest.raises(TargetError, match=r"`merge` or `unload` the adapter before"):
        sylva.join_experts(model)
    sylva.save_adapter(model, tmp_path / "adapter")
    for load in (sylva.load_adapter, peft.PeftModel.from_pretrained):
        with pytest.raises(AdapterError, match=r"call `sylva_train\.split_experts"):
            load(mixture(split=False), tmp_path / "adapter")
    assert weight_view(model.get_submodule(f"{EXPERT}.down_proj.base_layer")).dim() == 2
