"""The PEFT tuner: registered, and made with all that is checked before."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from sylva_train._checks import ConfigError, TargetError
from sylva_train.config import SylvaConfig, SylvaType
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers
from sylva_train.masks import LayerMask, Masks
from sylva_train.options import NEEDS_DATA
from sylva_train.selection import select
from sylva_train.tuner import SylvaModel, load_adapter, save_adapter
from tests.sylva_train.models import (
    ARCHITECTURES,
    logits,
    make_batch,
    make_model,
    random_masks,
    same,
    snapshot,
    trainable,
)


def test_peft_knows_sylva_by_its_tables():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SYLVA"] is SylvaConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[SylvaType.SYLVA] is SylvaModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SYLVA"] == "sylva_"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_changes_no_output_and_trains_blocks_and_head(name):
    base, batch = make_model(name), make_batch(name)
    before, head = logits(base, batch), ARCHITECTURES[name][2]
    masks = random_masks(base)
    config = SylvaConfig(masks=masks, modules_to_save=[head])
    model = peft.get_peft_model(base, config)
    assert isinstance(model, peft.PeftModel)
    assert not model.get_base_model().training, "modes are kept"
    assert torch.equal(logits(model.eval(), batch), before)
    expected = {f"base_model.model.{n}.sylva_values.default" for n in masks}
    heads = f"base_model.model.{head}.modules_to_save.default"
    assert expected <= trainable(model)
    assert all(n.startswith(heads) for n in trainable(model) - expected)
    assert config.block_counts is None, "the caller's configuration is not written to"


@pytest.mark.parametrize("rule", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_rules_without_data_choose_on_the_spot(rule, scope):
    config = SylvaConfig(
        importance=rule, density=0.3, block_size=4, scope=scope, seed=5
    )
    base = make_model()
    expected = select(score(base, None, config), 0.3, 4, scope)
    model = peft.get_peft_model(base, config)
    layers = embedded_layers(model.get_base_model())
    assert layers.keys() == {n for n, m in expected.items() if len(m)}
    for name, layer in layers.items():
        assert torch.equal(layer.mask().indices, expected[name].indices)


@pytest.mark.parametrize("rule", sorted(NEEDS_DATA))
def test_rules_that_need_data_say_what_to_call(rule):
    base = make_model()
    with pytest.raises(ConfigError, match=r"sylva_train\.score.*sylva_train\.select"):
        peft.get_peft_model(base, SylvaConfig(importance=rule))
    assert not embedded_layers(base)


def test_masks_may_be_a_file(tmp_path):
    base = make_model()
    masks = Masks(random_masks(base))
    masks.save(tmp_path / "m.safetensors")
    config = SylvaConfig(masks=str(tmp_path / "m.safetensors"))
    layers = embedded_layers(peft.get_peft_model(base, config).get_base_model())
    assert {n: len(layer.mask()) for n, layer in layers.items()} == {
        n: len(m) for n, m in masks.items()
    }


def test_what_is_trained_whole_is_not_chosen_from():
    options = {"importance": "magnitude", "density": 0.3, "block_size": 8}
    whole = ["0.output.dense", "pooler"]
    for exclude in (None, ["key"], r".*\.key"):
        config = SylvaConfig(**options, modules_to_save=whole, exclude_modules=exclude)
        model = peft.get_peft_model(make_model(), config)
        names = embedded_layers(model.get_base_model())
        assert not any("pooler" in n or "0.output.dense" in n for n in names)
        assert any(n.endswith("key") for n in names) == (exclude is None)
        assert model.peft_config["default"].exclude_modules == exclude


def refused(kind, text, base, config):
    before = snapshot(base)
    with pytest.raises(kind, match=text):
        peft.get_peft_model(base, config)
    assert same(snapshot(base), before)
    assert not embedded_layers(base)


def test_masks_that_do_not_fit_are_refused_before_anything_is_changed():
    base = make_model()
    masks = random_masks(base)
    name = next(iter(masks))
    one = {"other": masks[name]}
    refused(TargetError, "`other`", base, SylvaConfig(masks=masks | one))
    wrong = {name: LayerMask((8, 8), 8, torch.tensor([[0, 0]]))}
    refused(ConfigError, r"\(8, 8\)", base, SylvaConfig(masks=masks | wrong))
    whole = SylvaConfig(masks=masks, modules_to_save=["query"])
    refused(ConfigError, "trains whole", base, whole)
    missing = SylvaConfig(masks=masks, modules_to_save=["nothing"])
    refused(TargetError, "'classifier'", base, missing)
    small = {name: LayerMask((16, 16), 4, torch.tensor([[0, 0]]))}
    refused(ConfigError, r"\[4, 8\]", base, SylvaConfig(masks=masks | small))
    tied = make_model("t5")
    mask = LayerMask((40, 16), 8, torch.tensor([[0, 0]]))
    refused(TargetError, "tied", tied, SylvaConfig(masks={"lm_head": mask}))
    refused(
        TargetError,
        "shared with",
        tied,
        SylvaConfig(masks=random_masks(tied), modules_to_save=["lm_head"]),
    )


class Nested(nn.Module):
    """Not a transformers model; names that are endings of others."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"q": nn.Linear(8, 8), "block": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 2)
        self.subhead = nn.Linear(2, 2)

    def forward(self, x):
        x = self.block["block"](torch.relu(self.block["q"](torch.relu(self.q(x)))))
        return self.subhead(self.head(x))


@pytest.mark.parametrize("door", ["peft", "plain"])
@pytest.mark.parametrize("other", ["peft", "plain"])
def test_names_that_are_endings_of_others(door, other, tmp_path):
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(3, 8)
    masks = {"q": LayerMask((8, 8), 4, torch.tensor([[0, 1], [1, 1]]))}
    fresh = copy.deepcopy(base)
    if door == "peft":
        config = SylvaConfig(masks=masks, modules_to_save=["head"])
        model = peft.get_peft_model(base, config)
    else:
        model = embed(base, masks, modules_to_save=["head"])
    assert len(embedded_layers(model)) == 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    save_adapter(model, tmp_path / "a")
    if other == "peft":
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "a")
    else:
        loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(loaded(x), model(x))
    layer = next(iter(embedded_layers(loaded).values()))
    assert torch.equal(layer.mask(layer.wanted()).indices, masks["q"].indices)
