"""What transformers leaves out of a GGUF file is read from it, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from sylva_train._checks import ModelError
from sylva_train.pretrained import load_model, load_tokenizer
from sylva_train.pretrained.header import Header, complete, read_header

files = pytest.importorskip("tests.sylva_train.gguf_files")

IDS = torch.arange(1, 25)[None]
#: How positions are scaled, for transformers: small lengths, so that it matters soon.
ROPES = {
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16, "attention_factor": 1.25,
    },
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


#: Weights large enough for attention to matter.
WIDE = {"initializer_range": 0.3}


def scaled(kind: str):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    return files.llama(rope_parameters=rope, **WIDE)


def write_scaled(path, model):
    """Write a model as llama.cpp's converter does: LLaMA 3's scaling as divisors."""
    rope = model.config.rope_parameters
    kind = rope["rope_type"]

    def more(writer):
        if kind == "llama3":
            plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
            divisors = plain / model.model.rotary_emb.inv_freq
            writer.add_tensor("rope_freqs.weight", divisors.numpy())
            return
        writer.add_string("llama.rope.scaling.type", kind)
        for name in {"short_factor", "long_factor"} & rope.keys():
            factors = torch.tensor(rope[name]).numpy()
            writer.add_tensor(
                f"rope_factors_{name.removesuffix('_factor')}.weight", factors
            )
        for name, key in {
            "factor": "factor",
            "attention_factor": "attn_factor",
        }.items():
            if name in rope:
                writer.add_float32(f"llama.rope.scaling.{key}", rope[name])
        if (length := rope.get("original_max_position_embeddings")) is not None:
            writer.add_uint32("llama.rope.scaling.original_context_length", length)

    return files.write_gguf(path, model, more=more)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions_are_those_of_the_file(kind, tmp_path):
    original = scaled(kind)
    loaded, _ = load_model(write_scaled(tmp_path / "m", original), task="causal-lm")
    torch.testing.assert_close(logits(loaded), logits(original), rtol=1e-4, atol=1e-4)
    assert (logits(original) - logits(files.llama(**WIDE))).abs().max() > 0.1
    loaded.save_pretrained(tmp_path / "whole")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again), logits(loaded))


def test_one_of_several_files_is_refused(tmp_path):
    def more(writer):
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)

    path = tmp_path / "m-00002-of-00003.gguf"
    files.write_gguf(path, files.llama(), more=more)
    with pytest.raises(ModelError, match=r"number 2 of 3.* m-00001-of-00003.gguf j"):
        load_tokenizer(path)


def test_a_header_is_that_of_the_file(tmp_path):
    model = files.llama()
    header = read_header(files.write_gguf(tmp_path / "m", model))
    assert header.fields["llama.embedding_length"] == 32
    assert header.fields["tokenizer.chat_template"] == files.TEMPLATE
    assert "tokenizer.ggml.tokens" not in header.fields
    assert header.vectors == {}


def completed(config, kind, **fields):
    """Complete a configuration by metadata of an architecture."""
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    fields = {f"{kind}.{key}": value for key, value in fields.items()}
    fields = {"general.architecture": kind, f"{kind}.context_length": 64, **fields}
    complete(config, Header(Path("m.gguf"), fields, {}))
    return config


def test_what_llama_cpp_knows_of_an_architecture_is_added():
    t5 = completed(tf.T5Config(is_gated_act=True), "t5")
    assert (t5.is_gated_act, t5.dense_act_fn) == (True, "gelu_new")
    assert completed(tf.GPT2Config(), "gpt2").n_positions == 64
    for layers, scale in ((62, 168), (34, 256)):
        gemma = tf.Gemma3TextConfig(
            hidden_size=5376, num_attention_heads=32, num_hidden_layers=layers
        )
        assert completed(gemma, "gemma3").query_pre_attn_scalar == scale


def test_rotations_are_those_of_the_file():
    theta = {"rope__freq_base": 1e6}
    config = completed(tf.Starcoder2Config(), "starcoder2", **theta)
    assert config.rope_parameters["rope_theta"] == 1e6
    config = completed(tf.Phi3Config(), "phi3", rope__dimension_count=72)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    rope = completed(tf.Gemma3TextConfig(), "gemma3", **linear).rope_parameters
    assert rope["full_attention"]["factor"] == 8
    assert rope["sliding_attention"]["rope_type"] == "default"
    plain = tf.LlamaConfig().rope_parameters
    linear["rope__scaling__factor"] = 1.0
    assert completed(tf.LlamaConfig(), "llama", **linear).rope_parameters == plain
    with pytest.raises(ModelError, match=r"'other'.*format of transformers"):
        completed(tf.LlamaConfig(), "llama", rope__scaling__type="other")
