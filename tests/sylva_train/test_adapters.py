"""Several adapters of a model: switched, merged, deleted, saved side by side."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertForQuestionAnswering, BertForTokenClassification

from sylva_train._checks import AdapterError, ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, merge, unload
from sylva_train.masks import LayerMask
from sylva_train.selection import select
from sylva_train.tuner import SylvaLayer, load_adapter, save_adapter
from tests.sylva_train.models import (
    TENSORS,
    logits,
    make_batch,
    make_model,
    make_trained,
    random_masks,
    same,
    snapshot,
    train_step,
    trainable,
)


def shown(model):
    """The base weights of all layers, as the model computes with them now."""
    return {
        name: layer.base_layer.weight.detach().clone()
        for name, layer in embedded_layers(model).items()
    }


def test_adapters_are_switched_exactly(pair):
    model, expected, _ = pair
    batch = make_batch()
    base = {n: make_model().get_submodule(n[17:]).weight for n in shown(model)}
    seen = {}
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        weights = shown(model)
        assert torch.equal(logits(model, batch), expected[name])
        assert same(seen.setdefault(name, weights), weights), "switched at once"
        with model.disable_adapter():
            assert all(torch.equal(w, base[n]) for n, w in shown(model).items())
            assert torch.equal(logits(model, batch), expected[None])
        assert same(shown(model), weights)
    live = trainable(model)
    assert live
    assert all(n.endswith("other") or ".other." in n for n in live)
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_an_adapter_added_later_starts_from_the_base(pair):
    model, expected, _ = pair
    base = make_model()
    model.add_adapter("third", SylvaConfig(masks=random_masks(base, seed=9)))
    assert torch.equal(logits(model, make_batch()), expected["default"])
    model.set_adapter("third")
    assert torch.equal(logits(model, make_batch()), expected[None])
    model.add_adapter(
        "fourth", SylvaConfig(importance="magnitude", block_size=8, density=0.5)
    )
    rule = SylvaConfig(importance="magnitude", block_size=8)
    chosen = select(score(base, None, rule), 0.5, 8)
    layers = embedded_layers(model.get_base_model())
    for name, mask in chosen.items():
        assert torch.equal(layers[name].mask("fourth").indices, mask.indices)


def test_a_new_adapter_is_not_taken_for_a_deleted_one_whose_memory_it_has():
    layer = SylvaLayer(nn.Linear(32, 32), "default")
    layer.add("default", LayerMask((32, 32), 8, torch.tensor([[0, 1], [2, 3]])))
    layer.sync()
    memory = layer.sylva_indices["default"].numpy()
    layer.delete_adapter("default")
    layer.reserve("default", 2, 8)
    memory[:] = -1
    layer.sylva_indices["default"] = torch.from_numpy(memory)
    assert not layer.is_loaded("default")


def test_a_deleted_adapter_leaves_nothing(pair):
    model, expected, _ = pair
    batch = make_batch()
    model.delete_adapter("other")
    assert torch.equal(logits(model, batch), expected["default"])
    assert not any("other" in key for key in model.state_dict())
    model.load_adapter(pair[2] / "other", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, batch), expected["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    weights = make_model()
    assert all(
        torch.equal(w, weights.get_submodule(n[17:]).weight)
        for n, w in shown(model).items()
    )


def test_two_active_adapters_are_refused(pair):
    model, expected, _ = pair
    with pytest.raises(ConfigError, match="one at a time"):
        model.base_model.set_adapter(["default", "other"])
    layer = next(iter(embedded_layers(model).values()))
    with pytest.raises(ConfigError, match="'default', 'other'"):
        layer.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="one at a time"):
        model.merge_adapter(["default", "other"])
    assert torch.equal(logits(model, make_batch()), expected["default"])


def test_merging_for_a_while(pair):
    model, expected, _ = pair
    batch = make_batch()
    model.merge_adapter()
    weights = shown(model)
    assert torch.equal(logits(model, batch), expected["default"])
    model.unmerge_adapter()
    base = make_model()
    assert all(
        torch.equal(w, base.get_submodule(n[17:]).weight)
        for n, w in shown(model).items()
    )
    assert torch.equal(logits(model, batch), expected["default"])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert same(shown(model), weights)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected[None])
    assert torch.equal(logits(model, batch), expected["default"])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert torch.equal(logits(model, batch), expected["other"])


def test_a_hundred_cycles_change_no_bit(pair):
    model, _, _ = pair
    model.to(torch.bfloat16)
    model.merge_adapter()
    first = shown(model)
    model.unmerge_adapter()
    for _ in range(50):
        model.merge_adapter()
        model.unmerge_adapter()
        with model.disable_adapter():
            pass
    assert same(shown(model), first)
    assert same(snapshot(model.unload()), snapshot(make_model().to(torch.bfloat16)))


@pytest.mark.parametrize("name", ["default", "other"])
def test_merging_for_good(pair, name):
    model, expected, _ = pair
    model.set_adapter(name)
    merged = model.merge_and_unload(safe_merge=True)
    assert snapshot(merged).keys() == snapshot(make_model()).keys()
    assert torch.equal(logits(merged, make_batch()), expected[name])
    assert not embedded_layers(merged)


def test_a_named_adapter_is_merged_whichever_is_active(pair):
    model, expected, _ = pair
    merged = model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(logits(merged, make_batch()), expected["other"])
    base = make_model()
    masks = random_masks(base, ["query", "pooler.dense"], 0.3, 4, seed=7)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            changed = merged.get_submodule(name).weight != module.weight
            inside = masks[name].dense() if name in masks else torch.zeros(())
            assert not bool((changed & ~inside.bool()).any())


def test_a_value_that_is_not_finite_is_not_merged_safely():
    model = make_trained()
    layer = next(iter(embedded_layers(model).values()))
    with torch.no_grad():
        layer.sylva_values["default"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)


def test_functions_of_the_package_take_peft_models_as_well(saved):
    path, expected = saved
    model = peft.PeftModel.from_pretrained(make_model(), path)
    merged = merge(copy.deepcopy(model))
    assert torch.equal(logits(merged, make_batch()), expected)
    assert not isinstance(merged, peft.PeftModel)
    assert same(snapshot(unload(model)), snapshot(make_model()))


def test_loading_over_an_adapter_replaces_it(pair):
    model, expected, folder = pair
    batch = make_batch()
    logits(model, batch)
    moved = make_trained(seed=4)
    counts = {n: len(m) for n, m in random_masks(make_model(), seed=4).items()}
    save_adapter(moved, folder / "moved")
    if counts != model.peft_config["default"].block_counts:
        with pytest.raises(AdapterError):
            model.load_adapter(folder / "moved", "default")
    before = logits(model, batch)
    assert torch.equal(before, expected["default"])
    base = make_model()
    masks = {
        name: LayerMask(m.shape, 8, torch.tensor(m.grid_shape) - 1 - m.indices)
        for name, m in random_masks(base).items()
    }
    same_counts = embed(base, masks, modules_to_save=["classifier"])
    train_step(same_counts, batch)
    save_adapter(same_counts, folder / "same")
    model.load_adapter(folder / "same", "default")
    assert torch.equal(logits(model, batch), logits(same_counts, batch))
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_several_adapters_are_saved_side_by_side(pair):
    model, expected, folder = pair
    model.save_pretrained(folder / "both")
    first = load_adapter(make_model(), folder / "both")
    second = load_adapter(make_model(), folder / "both" / "other")
    assert torch.equal(logits(first, make_batch()), expected["default"])
    assert torch.equal(logits(second, make_batch()), expected["other"])
    model.set_adapter("other")
    save_adapter(model, folder / "active")
    assert same(
        load_file(folder / "active" / TENSORS),
        load_file(folder / "both" / "other" / TENSORS),
    )


@pytest.mark.parametrize("name", ["layer", "bert", "dense"])
def test_an_adapter_may_have_a_modules_name(name, tmp_path):
    base = make_model()
    model = peft.get_peft_model(base, SylvaConfig(masks=random_masks(base)), name)
    other = SylvaConfig(masks=random_masks(make_model(), seed=2))
    model.add_adapter("second", other)
    for each in (name, "second"):
        model.set_adapter(each)
        train_step(model.eval(), make_batch())
        expected = logits(model, make_batch())
        save_adapter(model, tmp_path / each)
        loaded = load_adapter(make_model(), tmp_path / each)
        assert torch.equal(logits(loaded, make_batch()), expected)


@pytest.mark.parametrize("name", ["v1.2", "train", "keys"])
def test_a_name_that_parameters_cannot_have_is_refused(name):
    base = make_model()
    config = SylvaConfig(masks=random_masks(base))
    model = peft.get_peft_model(base, config)
    with pytest.raises(ConfigError, match=name):
        model.add_adapter(name, config)
    model.add_adapter("second", config)
    model.delete_adapter("second")


def test_adapters_by_sample_are_refused(pair):
    model, expected, _ = pair
    batch = make_batch()
    size = len(batch["input_ids"])
    for names in (["default"] * (size - 1) + ["other"], ["other"] * size):
        with pytest.raises(ConfigError, match="set_adapter"):
            model(**batch, adapter_names=names)
    named = model(**batch, adapter_names=["default"] * size)
    assert torch.equal(named.logits, expected["default"])


def test_peft_reports_on_the_model(pair):
    model, _, _ = pair
    status = model.get_model_status()
    assert status.peft_types == {"default": "SYLVA", "other": "SYLVA"}
    assert status.active_adapters == ["default"]
    blocks, total = model.get_nb_trainable_parameters()
    assert 0 < blocks < total
    assert all(isinstance(m, SylvaLayer) for m in embedded_layers(model).values())
    assert not model.supports_lora_conversion()


def test_classification_tasks_save_their_head_by_themselves(tmp_path):
    base = make_model()
    config = SylvaConfig(masks=random_masks(base), task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config).eval()
    assert any("classifier.modules_to_save" in n for n in trainable(model))
    train_step(model, make_batch())
    model.save_pretrained(tmp_path)
    expected = logits(model, make_batch())
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded, make_batch()), expected)
    assert torch.equal(
        logits(load_adapter(make_model(), tmp_path), make_batch()), expected
    )


@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        (BertForTokenClassification, "TOKEN_CLS", ("labels",)),
        (
            BertForQuestionAnswering,
            "QUESTION_ANS",
            ("start_positions", "end_positions"),
        ),
    ],
)
def test_tasks_whose_head_is_named_afterwards_save_it(tmp_path, kind, task, labels):
    settings = make_model().config
    settings.num_labels = 2
    base = kind(settings).eval()
    ids = make_batch()["input_ids"]
    places = ids % 2 if task == "TOKEN_CLS" else torch.tensor([0, 1, 2])
    batch = {"input_ids": ids, **dict.fromkeys(labels, places)}

    def outputs(model):
        with torch.no_grad():
            return torch.stack(model(**batch).to_tuple()[1:])

    config = SylvaConfig(masks=random_masks(base), task_type=task)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    assert any("modules_to_save" in n for n in trainable(model))
    train_step(model, batch)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    assert not torch.equal(outputs(base), expected)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded.eval()), expected)
    assert torch.equal(outputs(load_adapter(base, tmp_path)), expected)
