"""Rivals: the weights they train, and how many."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import TargetError
from sylva_train.baselines import (
    SerialAdapter,
    adapt,
    add_serial_adapters,
    parse_method,
    shira_config,
    supertuning_config,
)
from sylva_train.config import SylvaConfig, TrainingConfig
from sylva_train.targets import find_targets
from sylva_train.training import train
from tests.sylva_train.toy import ToyLoader, toy_base, weights

CONFIG = SylvaConfig(
    exclude_modules=["pooler.dense"], density=0.1, modules_to_save=["classifier"]
)
SHORT = TrainingConfig(steps=3, lr=1e-2, weight_decay=0.0)


def changed(before, model):
    """How many weights of each target are not what they were, once merged."""
    after = weights(model.merge_and_unload())
    return {
        name: int((before[f"{name}.weight"] != after[f"{name}.weight"]).sum())
        for name in find_targets(toy_base(), exclude_modules=["pooler.dense"])
    }


@pytest.mark.parametrize("name", ["shira", "supertuning"])
def test_a_rival_trains_as_many_single_weights_as_its_budget(name):
    base = toy_base(dropout=0.0)
    before = weights(base)
    total = sum(m.weight.numel() for m in find_targets(base, None).values())
    adapted = adapt(parse_method(name), base, CONFIG)
    assert adapted.head == 32 * 2 + 2
    train(adapted.model, ToyLoader(), SHORT, progress=False)
    moved = sum(changed(before, adapted.model).values())
    assert moved <= adapted.trainable
    # Some have a zero gradient, or take a step that float32 rounds away.
    assert moved > 0.9 * adapted.trainable
    assert adapted.trainable == pytest.approx(0.1 * total, rel=0.35)


def test_supertuning_trains_the_largest_weights():
    base = toy_base(dropout=0.0)
    before = weights(base)
    adapted = adapt(parse_method("supertuning"), base, CONFIG)
    train(adapted.model, ToyLoader(), SHORT, progress=False)
    after = weights(adapted.model.merge_and_unload())
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    moved = before[name] != after[name]
    assert before[name][moved].abs().min() >= before[name][~moved].abs().median()
    count = round(0.1 * moved.numel())
    largest = before[name].abs().flatten().topk(count).values.min()
    assert before[name][moved].abs().min() >= largest


def test_shira_follows_the_seed():
    found = []
    for seed in (0, 0, 1):
        base = toy_base(dropout=0.0)
        before = weights(base)
        config = dataclasses.replace(CONFIG, seed=seed)
        adapted = adapt(parse_method("shira"), base, config)
        train(adapted.model, ToyLoader(), SHORT, progress=False)
        after = weights(adapted.model.merge_and_unload())
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        found.append(before[name] != after[name])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_lora_follows_the_seed_and_takes_no_number_of_the_callers():
    before, found = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        config = dataclasses.replace(CONFIG, seed=seed)
        model = adapt(parse_method("lora"), toy_base(), config).model
        found.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["lora", "adapter", "sylva:random"])
def test_every_method_trains_and_counts_the_head_by_the_end_of_its_name(name):
    config = dataclasses.replace(CONFIG, modules_to_save=["ssifier"], block_size=8)
    adapted = adapt(parse_method(name), toy_base(), config)
    assert adapted.head == 32 * 2 + 2


def test_serial_adapters_begin_as_nothing_and_follow_the_seed():
    batch = next(iter(ToyLoader()))
    before = toy_base(dropout=0.0).eval()(**batch).logits
    found = []
    for seed in (0, 0, 1):
        config = dataclasses.replace(CONFIG, seed=seed)
        adapted = adapt(parse_method("adapter"), toy_base(dropout=0.0), config)
        model = adapted.model.eval()
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
        found.append(model.bert.encoder.layer[0].output.dense.down.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_serial_adapters_are_behind_each_sublayer_within_the_budget():
    base = toy_base(dropout=0.0)
    targets = find_targets(base, exclude_modules=["pooler.dense"])
    total = sum(m.weight.numel() for m in targets.values())
    before = weights(base)
    adapted = adapt(
        parse_method("adapter"), base, dataclasses.replace(CONFIG, density=0.2)
    )
    model = adapted.model
    made = [n for n, m in model.named_modules() if isinstance(m, SerialAdapter)]
    assert [name.partition("layer.")[2] for name in made] == [
        "0.attention.output.dense", "0.output.dense",
        "1.attention.output.dense", "1.output.dense",
    ]  # fmt: skip
    assert adapted.trainable == pytest.approx(0.2 * total, rel=0.05)
    train(model, ToyLoader(), SHORT, progress=False)
    after = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
    trained = {n for n in before if not torch.equal(before[n], after[n])}
    assert trained == {"classifier.weight", "classifier.bias"}
    layer = model.bert.encoder.layer[1].output.dense
    y = layer.base(x := torch.randn(3, 5, 48))
    expected = y + layer.up(torch.nn.functional.gelu(layer.down(y)))
    torch.testing.assert_close(layer(x), expected)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "intermediate_size": 32}
BEHIND = {
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
        {"attention.output.dense", "output.dense"},
    ),
    "albert": (
        lambda: AlbertForSequenceClassification(
            AlbertConfig(**SMALL, embedding_size=16)
        ),
        {"attention.dense", "ffn_output"},
    ),
    "phi": (
        lambda: PhiForCausalLM(PhiConfig(**SMALL)),
        {"self_attn.dense", "mlp.fc2"},
    ),
    "neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
        {"attention.dense", "mlp.dense_4h_to_h"},
    ),
}


@pytest.mark.parametrize("family", BEHIND)
def test_serial_adapters_are_behind_both_sublayers_and_not_in_the_head(family):
    make, endings = BEHIND[family]
    model = make()
    heads = ["classifier"] if hasattr(model, "classifier") else None
    size = sum(p.numel() for n, p in model.named_parameters() if "classifier" in n)
    config = SylvaConfig(density=0.3, modules_to_save=heads)
    adapted = adapt(parse_method("adapter"), model, config)
    made = {n for n, m in model.named_modules() if isinstance(m, SerialAdapter)}
    assert all(any(n.endswith(end) for n in made) for end in endings)
    assert all(any(n.endswith(end) for end in endings) for n in made)
    assert adapted.head == size


def test_blocks_in_few_columns_are_in_the_same_ones_of_one_input():
    config = dataclasses.replace(CONFIG, block_size=8, max_columns=0.25)
    base = toy_base(dropout=0.0)
    masks = adapt(parse_method("sylva:magnitude"), base, config, ToyLoader()).masks
    for layer in (0, 1):
        start = f"bert.encoder.layer.{layer}.attention.self."
        alike = [
            masks[start + part].indices[:, 1] for part in ("query", "key", "value")
        ]
        assert len(torch.cat(alike).unique()) == 1


def test_a_model_without_known_sublayers_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(TargetError, match="o_proj"):
        add_serial_adapters(model, find_targets(model), 0.1)


@pytest.mark.parametrize("make", [shira_config, supertuning_config])
def test_layers_that_peft_does_not_know_are_named(make):
    targets = {"a": nn.Linear(8, 8), "b": Conv1D(8, 8)}
    with pytest.raises(TargetError, match="`b` is a Conv1D"):
        make(targets, 0.1)


def test_shira_fits_into_the_smallest_layer():
    targets = {"a": nn.Linear(512, 512), "b": nn.Linear(8, 8)}
    assert shira_config(targets, 0.5).r == 4
    assert shira_config(targets, 1e-4).r == 1
