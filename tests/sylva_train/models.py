"""Tiny models of every architecture that is tested, with blocks or without; batches."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from unittest import mock

import peft
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train.config import SylvaConfig
from sylva_train.kernels import plan
from sylva_train.layers import embed
from sylva_train.masks import LayerMask
from sylva_train.targets import find_targets, weight_view

VOCABULARY, LENGTH, BLOCK = 40, 6, 8
#: The files of an adapter.
TENSORS, OPTIONS = "adapter_model.safetensors", "adapter_config.json"

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 28,  # not a multiple of the block
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DECODER = ENCODER | {
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_labels": 3,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 28,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: name -> (class, configuration, its head, a pattern for some of its layers)
ARCHITECTURES: dict[str, tuple[type, Callable[[], object], str, list[str]]] = {
    "bert": (
        BertForSequenceClassification,
        lambda: BertConfig(**ENCODER),
        "classifier",
        ["query", "output.dense"],
    ),
    "roberta": (
        RobertaForSequenceClassification,
        lambda: RobertaConfig(**ENCODER),
        "classifier",
        ["value", "intermediate.dense"],
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(**GPT2, tie_word_embeddings=False),
        "lm_head",
        ["c_attn", "mlp.c_proj"],
    ),
    "gpt2-classifier": (
        GPT2ForSequenceClassification,
        lambda: GPT2Config(**GPT2),
        "score",
        ["c_fc"],
    ),
    "llama": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**DECODER),
        "lm_head",
        ["q_proj", "down_proj"],
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**DECODER),
        "lm_head",
        ["k_proj", "gate_proj"],
    ),
    "mistral": (
        MistralForCausalLM,
        lambda: MistralConfig(**DECODER),
        "lm_head",
        ["o_proj", "up_proj"],
    ),
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(**T5),
        "decoder.final_layer_norm",  # T5's head is always tied to its embedding
        ["q", "wo"],
    ),
}


def make_model(name: str = "bert", seed: int = 0) -> nn.Module:
    kind, config, _, _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config()).eval()


def make_batch(name: str = "bert", seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=generator)
    if not name.endswith(("bert", "roberta", "classifier")):
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}


def random_masks(
    model: nn.Module,
    targets: list[str] | str = "all-linear",
    fraction: float = 0.4,
    block_size: int = BLOCK,
    seed: int = 0,
) -> dict[str, LayerMask]:
    """Different numbers of blocks in each layer, at least one."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in find_targets(model, targets).items():
        shape = tuple(weight_view(module).shape)
        grid = [-(-n // block_size) for n in shape]
        chosen = torch.rand(grid, generator=generator) < fraction
        chosen.view(-1)[0] |= not chosen.any()
        masks[name] = LayerMask(shape, block_size, chosen.nonzero())
    return masks


def random(shape, dtype=torch.float32, seed=0):
    """Normal numbers, the same for the same seed in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def two_layers(block=4, **options):
    """Two linear layers with a tanh between them, and masks."""
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7, **options))
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, seed=seed)
    return model, random_masks(model, block_size=block)


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def train_step(model, batch, optimizer=None, steps: int = 1, lr: float = 0.05) -> None:
    """Steps of plain SGD, which moves whatever has a gradient, or of an optimizer."""
    if optimizer is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors agree in names, dtypes and every bit."""
    return first.keys() == second.keys() and all(
        t.dtype == second[name].dtype and torch.equal(t, second[name])
        for name, t in first.items()
    )


def dense_blocks(dense: torch.Tensor, mask: LayerMask) -> torch.Tensor:
    """The blocks of a dense (out, in) matrix, cut out one by one: the plain oracle."""
    b = mask.block_size
    blocks = torch.zeros((len(mask), b, b), dtype=dense.dtype)
    for block, (row, column) in zip(blocks, mask.indices.tolist(), strict=True):
        piece = dense[row * b : (row + 1) * b, column * b : (column + 1) * b]
        block[: piece.shape[0], : piece.shape[1]] = piece
    return blocks


def error(got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference relative to the root mean square of ``scale``."""
    if not got.numel():
        return 0.0
    size = scale.double().square().mean().sqrt().clamp(min=1e-30)
    return float((got.double() - expected.double()).abs().max() / size)


def make_peft(name="bert", seed=0, **options):
    """A tiny model with blocks and its head, not yet trained."""
    base = make_model(name)
    options = {"modules_to_save": [ARCHITECTURES[name][2]]} | options
    masks = random_masks(base, seed=seed)
    return peft.get_peft_model(base, SylvaConfig(masks=masks, **options)).eval()


def make_trained(name="bert", seed=0, **options):
    """The same after two steps."""
    model = make_peft(name, seed, **options)
    train_step(model, make_batch(name), steps=2)
    return model


@functools.cache
def transformers_loads_heads() -> bool:
    """Whether transformers' own ``load_adapter`` finds a saved head: 5.17 does not, even LoRA's."""
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(make_model(), config).eval()
    with torch.no_grad():
        model.base_model.classifier.modules_to_save["default"].weight += 1
    loaded = make_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded.load_adapter(folder)
    return torch.equal(logits(loaded, make_batch()), logits(model, make_batch()))


def make_plain(name="bert", seed=0):
    """The same without PEFT."""
    base = make_model(name)
    head = ARCHITECTURES[name][2]
    embed(base, random_masks(base, seed=seed), modules_to_save=[head])
    train_step(base, make_batch(name), steps=2)
    return base


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@st.composite
def layer_masks(draw, largest: int = 40, fitting: bool = False) -> LayerMask:
    """Any mask: odd sizes, ragged edges, no block, every block."""
    out, inputs = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    limit = min(out, inputs) if fitting else 9
    block = draw(st.integers(1, min(9, limit)))
    grid = torch.zeros((-(-out // block), -(-inputs // block)), dtype=torch.bool)
    kind = draw(st.sampled_from(["empty", "full", "some", "some", "some"]))
    if kind == "full":
        grid[:] = True
    elif kind == "some":
        share = draw(st.floats(0.05, 0.9))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        grid = torch.rand(grid.shape, generator=generator) < share
    return LayerMask((out, inputs), block, grid.nonzero())


__all__ = [
    "ARCHITECTURES",
    "BLOCK",
    "DTYPES",
    "OPTIONS",
    "TENSORS",
    "dense_blocks",
    "error",
    "layer_masks",
    "logits",
    "make_batch",
    "make_model",
    "make_peft",
    "make_plain",
    "make_trained",
    "random",
    "random_masks",
    "same",
    "snapshot",
    "train_step",
    "trainable",
    "two_layers",
]


def plans_of(tile):
    """Let programs of a kernel have one tile, or with None what the cost model chooses."""
    if tile is None:
        return contextlib.nullcontext()
    return mock.patch.object(plan, "tiles", return_value=[tile])
