"""Adapters that are damaged, or of another base or head."""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sylva_train._checks import AdapterError, ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.layers import embedded_layers
from sylva_train.tuner import base as base_module
from sylva_train.tuner import inspect_adapter, load_adapter
from tests.sylva_train.models import (
    OPTIONS,
    TENSORS,
    logits,
    make_batch,
    make_model,
    make_trained,
    random_masks,
    same,
    snapshot,
)


def edit_options(path, **changes):
    options = json.loads((path / OPTIONS).read_text()) | changes
    options = {k: v for k, v in options.items() if v != "remove"}
    (path / OPTIONS).write_text(json.dumps(options))


def edit_tensors(path, change):
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
NAME = QUERY.removeprefix("base_model.model.")


def cut(path):
    file = path / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def flip_bit(path):
    file = path / TENSORS
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def change_value(tensors):
    tensors[f"{QUERY}.sylva_values"][0, 0, 0] += 1e-3


def change_head(tensors):
    tensors["base_model.model.classifier.weight"][0, 0] += 1e-3


def move_block(tensors):
    table = tensors[f"{QUERY}.sylva_indices"]
    table[-1] = torch.tensor([1, 1]) if table[-1].tolist() != [1, 1] else table[-1] - 1


def leave_grid(tensors):
    tensors[f"{QUERY}.sylva_indices"][-1] = 7


def repeat_block(tensors):
    tensors[f"{QUERY}.sylva_indices"][:] = 0


def drop_layer(tensors):
    del tensors[f"{QUERY}.sylva_values"]


def drop_block(tensors):
    for part in ("values", "indices"):
        tensors[f"{QUERY}.sylva_{part}"] = tensors[f"{QUERY}.sylva_{part}"][:-1].clone()


def lower_precision(tensors):
    tensors[f"{QUERY}.sylva_values"] = tensors[f"{QUERY}.sylva_values"].half()


def add_layer(tensors):
    tensors["base_model.model.bert.new.sylva_values"] = torch.zeros(1, 8, 8)


def counts(**changes):
    def change(path):
        options = json.loads((path / OPTIONS).read_text())
        edit_options(path, block_counts=options["block_counts"] | changes)

    return change


DAMAGE = {
    "truncated": cut,
    "one bit": flip_bit,
    "empty file": lambda path: (path / TENSORS).write_bytes(b""),
    "no tensors": lambda path: (path / TENSORS).unlink(),
    "a value": lambda path: edit_tensors(path, change_value),
    "the head": lambda path: edit_tensors(path, change_head),
    "another block": lambda path: edit_tensors(path, move_block),
    "outside the grid": lambda path: edit_tensors(path, leave_grid),
    "repeated blocks": lambda path: edit_tensors(path, repeat_block),
    "a layer missing": lambda path: edit_tensors(path, drop_layer),
    "a block missing": lambda path: edit_tensors(path, drop_block),
    "other precision": lambda path: edit_tensors(path, lower_precision),
    "a layer too many": lambda path: edit_tensors(path, add_layer),
    "no counts": lambda path: edit_options(path, block_counts="remove"),
    "wrong counts": counts(**{NAME: 1}),
    "an unknown layer": counts(**{"bert.unknown": 1}),
    "no checksum": lambda path: edit_options(path, checksum="remove"),
    "other checksum": lambda path: edit_options(path, checksum="0" * 64),
    "no shapes": lambda path: edit_options(path, layer_shapes="remove"),
    "other block size": lambda path: edit_options(path, block_size=4),
    "impossible option": lambda path: edit_options(path, density=7),
    "other base": lambda path: edit_options(path, base_fingerprint="0" * 64),
}
BROKEN_OPTIONS = {
    "no options": lambda path: (path / OPTIONS).unlink(),
    "cut options": lambda path: (path / OPTIONS).write_text('{"peft_type": "SYL'),
    "a list": lambda path: (path / OPTIONS).write_text("[]"),
    "no kind": lambda path: edit_options(path, peft_type="remove"),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *BROKEN_OPTIONS])
def test_damage_is_found_before_the_model_is_touched(saved, tmp_path, damage):
    path = tmp_path / "a"
    shutil.copytree(saved[0], path)
    (DAMAGE | BROKEN_OPTIONS)[damage](path)
    base = make_model()
    before = snapshot(base)
    with pytest.raises(AdapterError):
        load_adapter(base, path)
    assert same(snapshot(base), before)
    assert not embedded_layers(base)
    assert all(p.requires_grad for p in base.parameters())
    if damage != "other base":  # which is only wrong for a model
        with pytest.raises(AdapterError):
            inspect_adapter(path)
    if damage in DAMAGE:
        unchecked = {"no counts", "no tensors"}  # PEFT cannot tell, or says it itself
        kind = Exception if damage in unchecked else AdapterError
        kind = (AdapterError, ConfigError) if damage == "impossible option" else kind
        with pytest.raises(kind):
            peft.PeftModel.from_pretrained(base, path)
        if damage not in unchecked:
            assert same(snapshot(base), before)
            assert not embedded_layers(base)


def test_adapters_of_other_kinds_are_named(tmp_path):
    lora = peft.LoraConfig(target_modules=["query"])
    peft.get_peft_model(make_model(), lora).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="LORA"):
        load_adapter(make_model(), tmp_path)
    with pytest.raises(AdapterError, match="nowhere"):
        load_adapter(make_model(), tmp_path / "nowhere")


def add_second(base, path):
    masks = random_masks(base)
    model = peft.get_peft_model(base, SylvaConfig(masks=masks), "mine")
    try:
        model.load_adapter(path, "theirs")
    finally:
        assert list(model.peft_config) == ["mine"]
        model.unload()


@pytest.mark.parametrize(
    "door",
    [
        load_adapter,
        peft.PeftModel.from_pretrained,
        lambda base, path: base.load_adapter(path),
        add_second,
    ],
    ids=["plain", "peft", "transformers", "second"],
)
def test_another_base_is_refused_by_name(saved, door):
    path, _ = saved
    base = make_model(seed=1)
    base.name_or_path = "some/other-model"
    before = snapshot(base)
    message = r"made for the base model .* but this one is `some/other-model` \("
    with pytest.raises(AdapterError, match=message):
        door(base, path)
    assert same(snapshot(base), before)
    assert not embedded_layers(base)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"bert.pooler.dense": [16, 8]}, r"\(16, 8\), but the model has \(16, 16\)"),
        ({"bert.nothing": [16, 16]}, "no such layer"),
        ({"bert.embeddings.word_embeddings": [40, 16]}, "no such layer"),
    ],
)
def test_a_model_without_the_adapters_layers_is_refused(shapes, text):
    config = SylvaConfig(layer_shapes=shapes, base_model_name_or_path="some/base")
    with pytest.raises(AdapterError, match=text):
        base_module.check_base(make_model(), config)


@pytest.mark.parametrize("change", ["head", "classes"])
def test_a_head_of_its_own_does_not_make_another_base(tmp_path, change):
    # The adapter brings no head.
    model = make_trained(modules_to_save=None)
    model.save_pretrained(tmp_path)
    base = make_model()
    if change == "classes":
        base.classifier = nn.Linear(16, 7)
    else:
        base.classifier.weight.data += 1
    batch = {"input_ids": make_batch()["input_ids"]}
    hidden = {}
    for key, each in (
        ("first", model.get_base_model()),
        ("plain", load_adapter(copy.deepcopy(base), tmp_path)),
        ("peft", peft.PeftModel.from_pretrained(base, tmp_path).get_base_model()),
    ):
        with torch.no_grad():
            hidden[key] = each.bert(**batch).pooler_output
    assert torch.equal(hidden["plain"], hidden["first"])
    assert torch.equal(hidden["peft"], hidden["first"])


def test_the_adapters_head_replaces_whatever_head_there_is(saved):
    path, expected = saved
    for door in (load_adapter, peft.PeftModel.from_pretrained):
        base = make_model()
        base.classifier.weight.data += 1
        assert torch.equal(logits(door(base, path), make_batch()), expected)


def test_a_head_with_other_labels_is_refused(saved):
    path, _ = saved
    base = make_model()
    base.classifier = nn.Linear(16, 7)
    before = snapshot(base)
    with pytest.raises(
        AdapterError, match=r"`classifier.*\(3, 16\)|\(3,\).*same labels"
    ):
        load_adapter(base, path)
    assert same(snapshot(base), before)


def test_the_base_is_hashed_once(saved, tmp_path, monkeypatch):
    calls = []
    real = base_module.fingerprint
    monkeypatch.setattr(
        base_module, "fingerprint", lambda *a: (calls.append(1), real(*a))[1]
    )
    trained = make_trained()
    assert not calls
    for i in range(3):
        trained.save_pretrained(tmp_path / str(i))
    assert len(calls) == 1
    loaded = peft.PeftModel.from_pretrained(make_model(), saved[0])
    loaded.save_pretrained(tmp_path / "again")
    assert len(calls) == 2


def test_a_configuration_without_its_tensors_cannot_run(saved):
    config = SylvaConfig.from_pretrained(saved[0])
    model = peft.get_peft_model(make_model(), config).eval()
    with pytest.raises(AdapterError, match="never loaded"):
        logits(model, make_batch())
    with pytest.raises(AdapterError, match="never loaded"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(
            logits(model, make_batch()), logits(make_model(), make_batch())
        )


def test_a_configuration_may_be_used_for_several_models():
    config = SylvaConfig(importance="magnitude", density=0.2, block_size=8)
    for seed in (0, 1):
        model = peft.get_peft_model(make_model(seed=seed), config)
        peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert model.peft_config["default"].base_fingerprint
    assert config.base_fingerprint is None
