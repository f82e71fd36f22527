"""GGUF files load as ordinary models: the same numbers, trained, saved, merged, reloaded."""

from __future__ import annotations

import copy
import json
import sys

import peft
import pytest
import torch

from sylva_train._checks import AdapterError, ModelError
from sylva_train.importance import score
from sylva_train.pretrained import load_model, load_tokenizer, saved_labels
from sylva_train.pretrained.loading import misshapen
from sylva_train.tuner import inspect_adapter
from sylva_train.workflow import load_folder
from tests.sylva_train.jobs import (
    SHORT,
    SMALL,
    sylva,
    sylva_config,
    told,
    write_data,
)

files = pytest.importorskip("tests.sylva_train.gguf_files")

IDS = torch.randint(
    1, len(files.TOKENS), (2, 9), generator=torch.Generator().manual_seed(0)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of 16-bit weights, of a name without an ending, and data."""
    path = tmp_path_factory.mktemp("gguf")
    files.write_gguf(path / "sha256-0", files.llama(tied=True), "F16")
    (path / "model.gguf").symlink_to(path / "sha256-0")
    write_data(path / "train.jsonl", 20)
    return path


@pytest.fixture(scope="module")
def run(place):
    """A fine-tuning of it."""
    sylva("finetune", place / "run", *source(place), *SHORT)
    return place / "run"


def source(place, model="model.gguf") -> list:
    data = ["--data", place / "train.jsonl", "--max-length", 24]
    return ["--model", place / model, "--task", "causal-lm", *data]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_file_computes_what_its_model_does(kind, tied, tmp_path):
    original = files.llama(tied=tied)
    path = files.write_gguf(tmp_path / "m.gguf", original, kind)
    model, tokenizer = load_model(path, task="causal-lm")
    expected = logits(files.rounded(original, kind))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings is tied
    assert model.name_or_path == str(path)
    assert tokenizer.decode(tokenizer("x good y")["input_ids"]) == "x good y"
    assert tokenizer.tokenize("x good") == ["x", "Ġgood"]
    assert tokenizer.eos_token == tokenizer.pad_token == files.END


def test_heads_may_be_wider_than_their_share(tmp_path):
    """As in Qwen 3 and Mistral Nemo, whose width transformers leaves out of the file."""
    original = files.llama(head_dim=16)

    def more(writer):
        writer.add_key_length(16)
        writer.add_value_length(16)

    path = files.write_gguf(tmp_path / "m.gguf", original, more=more)
    model, _ = load_model(path, task="causal-lm")
    assert model.config.head_dim == 16
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-6)
    path = files.write_gguf(tmp_path / "silent.gguf", original)
    with pytest.raises(
        ModelError, match=r"metadata say, .* in the format of transformers"
    ):
        load_model(path, task="causal-lm")


def test_weights_of_another_shape_than_their_layers_are_found():
    """As transformers 5.17 leaves them, without a word."""
    model = files.llama()
    assert not list(misshapen(model))
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight = torch.nn.Parameter(torch.zeros(64, 32))
    expected = layer.out_features, layer.in_features
    name = "model.layers.1.self_attn.q_proj.weight"
    assert list(misshapen(model)) == [(name, (64, 32), expected)]


def test_a_loaded_model_is_an_ordinary_one(place, tmp_path):
    model, tokenizer = load_model(place / "model.gguf", task="causal-lm")
    score(model, config=sylva_config())  # it is not taken for a quantized one
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, other = load_model(tmp_path, task="causal-lm")
    assert torch.equal(logits(again), logits(model))
    assert other.get_vocab() == tokenizer.get_vocab()
    assert other.chat_template == tokenizer.chat_template == files.TEMPLATE


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_a_classifier_takes_its_weights(pooling, place):
    path = place / "model.gguf"
    model, _ = load_model(path, labels=["no", "yes"], pooling=pooling)
    whole, _ = load_model(path, task="causal-lm")
    theirs = whole.model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    assert model.name_or_path == str(path)
    assert saved_labels(path) == []


def test_a_run_of_the_command_line(place, run, tmp_path):
    model, _, record = load_folder(run)
    base, _ = load_model(place / "model.gguf", task="causal-lm")
    assert not torch.equal(logits(model), logits(base))
    assert inspect_adapter(run / "adapter")["base"]["name"] == record["task"]["model"]
    first = json.loads(sylva("evaluate", run, "--json").stdout)
    sylva("merge", run, tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", task="causal-lm")
    assert torch.equal(logits(merged), logits(model))
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    moved = files.write_gguf(tmp_path / "b.gguf", files.llama(tied=True), "F16")
    again = sylva("evaluate", run, "--model", moved, "--json").stdout
    assert json.loads(again) == first
    sylva("predict", run, "--data", place / "train.jsonl", "--max-new-tokens", 2)


def test_scores_of_a_file_without_an_ending(place, tmp_path):
    scores = tmp_path / "s.safetensors"
    sylva("score", scores, *source(place, "sha256-0"), *SMALL)
    sylva("finetune", tmp_path / "run", *source(place), *SHORT, "--scores", scores)


def test_peft_loads_an_adapter_on_it(place, run):
    ours, _, _ = load_folder(run)
    base, _ = load_model(place / "model.gguf", task="causal-lm")
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    assert torch.equal(logits(theirs), logits(ours))


def test_another_files_weights_are_refused(run, tmp_path):
    other = files.write_gguf(tmp_path / "o.gguf", files.llama(tied=True, seed=1), "F16")
    with pytest.raises(AdapterError, match="made for the base model"):
        load_folder(run, base=str(other))


def test_the_package_that_reads_it_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        load_tokenizer(place / "model.gguf")


def test_files_that_cannot_be_used_are_refused(place, tmp_path):
    whole = (place / "model.gguf").read_bytes()
    (tmp_path / "no.gguf").write_bytes(b"PK" + whole)
    (tmp_path / "weights.bin").write_bytes(b"PK")
    for name in ("no.gguf", "weights.bin"):
        with pytest.raises(ModelError, match="no GGUF file"):
            load_model(tmp_path / name, task="causal-lm")
    with pytest.raises(ModelError, match="no folder or GGUF file"):
        load_model("missing/model.gguf", task="causal-lm")
    for size in (10, 200, len(whole) // 4, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cannot be loaded.*is whole"):
            load_model(tmp_path / "cut.gguf", task="causal-lm")
    options = {"architecture": "gptneox"}
    path = files.write_gguf(tmp_path / "other.gguf", files.llama(), **options)
    with pytest.raises(ModelError, match=r"gptneox.*architecture that"):
        load_model(path, task="causal-lm")
    path = files.write_gguf(tmp_path / "bare.gguf", files.llama(), tokenizer=False)
    with pytest.raises(ModelError, match="holds a tokenizer"):
        load_model(path, task="causal-lm")


def test_errors_of_the_command_line_are_a_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    model = ["--model", tmp_path / "m.gguf"]
    result = sylva("score", tmp_path / "s.safetensors", *model, code=1)
    assert "is whole" in told(result)
