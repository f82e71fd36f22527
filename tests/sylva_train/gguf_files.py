"""Tiny GGUF files, written as llama.cpp's converter writes LLaMA's."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

MERGES = ["g o", "o d", "go od", "Ġ good"]
END = "<|end|>"
TOKENS = [END, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
LLAMA = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
#: Names of llama.cpp's for those of transformers', part by part.
PARTS = {
    "model.norm": "output_norm", "model.": "", "layers.": "blk.", "embed_tokens": "token_embd", "lm_head": "output",
    "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "", "attn_o.": "attn_output.",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def llama(*, tied: bool = False, seed: int = 0, **options) -> LlamaForCausalLM:
    """Return a random model, which writes with its own or with its input vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(**LLAMA, tie_word_embeddings=tied, **options)
        return LlamaForCausalLM(config).eval()


def write_gguf(
    path, model, kind="F32", *, architecture="llama", tokenizer=True, more=None
):
    """Write a model's weights as float32, or its matrices as another type, and `more`."""
    kind = gguf.GGMLQuantizationType[kind]
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_chat_template(TEMPLATE)
    if more is not None:
        more(writer)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = turned(name, tensor.numpy(), config)
        if array.ndim == 1:
            writer.add_tensor(llama_cpp(name), array)
        else:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(llama_cpp(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp(name: str) -> str:
    """Return llama.cpp's name of a weight."""
    for part, other in PARTS.items():
        name = name.replace(part, other)
    return name


def turned(name: str, array: np.ndarray, config) -> np.ndarray:
    """Order the rows of queries and keys for llama.cpp's rotary positions."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return array
    pairs = array.reshape(heads, 2, -1, array.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def rounded(model, kind: str):
    """Round a model's matrices as a type of GGUF's does."""
    kind = gguf.GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            packed = gguf.quants.quantize(parameter.detach().numpy(), kind)
            values = gguf.quants.dequantize(packed, kind).astype(np.float32)
            parameter.data = torch.from_numpy(np.array(values))
    return model
