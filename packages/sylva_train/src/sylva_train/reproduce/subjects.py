"""What is measured: masks, layers and models, made trainable by each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sylva_train._checks import ConfigError
from sylva_train.baselines import lora_config, make_block_sparse
from sylva_train.importance import LayerScores, Scores
from sylva_train.layers import embed
from sylva_train.masks import LayerMask
from sylva_train.optimizer import SparseAdamW
from sylva_train.pretrained import load_model
from sylva_train.selection import select
from sylva_train.targets import find_targets, shared_inputs, weight_view

__all__ = [
    "DTYPES",
    "LABELS",
    "MASKS",
    "METHODS",
    "MODELS",
    "adapt_model",
    "build_model",
    "draw_masks",
    "staircase",
]

#: Methods that train all or part of the linear layers, and how tables call them.
LABELS = {
    "full": "Full fine-tuning",
    "zero": "Full, ZeRO-2",
    "frozen": "Frozen",
    "lora": "LoRA",
    "lora-compiled": "LoRA, compiled",
    "sylva": "Sylva",
    "kfac-pruner": "K-FAC pruner",
}
METHODS = tuple(LABELS)
DTYPES = ("float32", "bfloat16", "float16")
#: How blocks lie: anywhere, on some rows and columns alone, or as scores of rank one
#: with a heavy tail choose them, which second-order scores resemble.
MASKS = ("random", "rectangle", "staircase")

#: Architectures, their weights drawn at random: those of the paper's figures, one between
#: them, and small ones.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-15m": {
        "n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 512,
        "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt2-tiny": {
        "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 96,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26},
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    },
    "llama-15m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "vocab_size": 2048,
    },
    "llama-tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 96,
    },
}  # fmt: skip


def staircase(shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> Scores:
    """Draw rank-one scores with a heavy tail, as the second-order rule gives them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.exp(1.5 * torch.randn(n, generator=generator, dtype=torch.float64))

    layers = {}
    for name, (out, inputs) in shapes.items():
        layers[name] = LayerScores((out, inputs), s_out=draw(out), s_in=draw(inputs))
    return Scores(layers, {"importance": "kfac"})


def draw_mask(
    shape: tuple[int, int], block: int, density: float, kind: str, seed: int
) -> LayerMask:
    """Draw blocks anywhere, or those of some rows and columns alone."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // block) for n in shape)
    if kind == "random":
        count = max(1, round(density * rows * columns))
        flat = torch.randperm(rows * columns, generator=generator)[:count]
        return LayerMask.from_flat(shape, block, flat)
    some = [
        torch.randperm(n, generator=generator)[: max(1, round(density**0.5 * n))]
        for n in (rows, columns)
    ]
    return LayerMask(shape, block, torch.cartesian_prod(*some))


def draw_masks(
    shapes: Mapping[str, tuple[int, int]],
    block: int,
    density: float,
    kind: str = "staircase",
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, LayerMask]:
    """Draw masks of layers, of one of the `MASKS`.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        ``(out, in)`` of each layer.
    block, density, kind, seed
        Side of a block, fraction of the blocks, how they lie.
    **options
        Of `sylva_train.select`, for a staircase.
    """
    if kind == "staircase":
        return dict(select(staircase(shapes, seed), density, block, **options))
    return {
        name: draw_mask(shape, block, density, kind, seed + number)
        for number, (name, shape) in enumerate(shapes.items())
    }


def build_model(
    name: str, device: torch.device, dtype: str, sequence: int, seed: int = 0
) -> Any:
    """Build a causal language model on a device, in training mode.

    Parameters
    ----------
    name : str
        One of `MODELS`, which get random weights, or the path of a model.
    device, dtype
        Of its weights.
    sequence : int
        Tokens of a text; the model must have positions for them.
    seed : int
        Of the weights.

    Raises
    ------
    ModelError
        If a path cannot be loaded.
    ConfigError
        If texts are too long.
    """
    if name in MODELS:
        kind = GPT2Config if name.startswith("gpt2") else LlamaConfig
        config = kind(**MODELS[name])
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype)
            )
        # GPT-2's class does not tell its loss, of which transformers would warn.
        model.loss_type = "ForCausalLM"
    else:
        path = Path(name).expanduser()
        model = load_model(path, task="causal-lm", dtype=dtype)[0].to(device)
    positions = model.config.max_position_embeddings
    if sequence > positions:
        msg = f"`sequence` must be at most {positions} for {name}; got {sequence}."
        raise ConfigError(msg)
    return model.train()


def low_rank(model: nn.Module, density: float, rank: int | None) -> peft.PeftModel:
    """Add LoRA of as many weights as blocks of a density, or of one rank.

    Its matrices are in the dtype of the weights, PEFT's fastest and leanest form.
    """
    options = lora_config(find_targets(model), density)
    if rank is not None:
        options.r, options.lora_alpha = rank, 2 * rank
        options.rank_pattern, options.alpha_pattern = {}, {}
    return peft.get_peft_model(model, options, autocast_adapter_dtype=False)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return PyTorch's fused AdamW of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def adapt_model(
    model: nn.Module,
    method: str,
    *,
    density: float,
    block_size: int,
    mask: str,
    rank: int | None = None,
    max_columns: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Make a model trainable by a method; return it with its optimizer.

    ``"zero"`` is ``"full"`` here: who has several processes shards it, and then makes
    the optimizer.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    method : str
        One of `METHODS`.
    density, block_size, mask, seed
        Of the blocks, see `draw_masks`.
    rank : int, optional
        Of LoRA in every layer; by default it has as many weights as the blocks.
    max_columns : float
        Of `sylva_train.select`, for a staircase: layers that read one input share the
        columns.
    """
    if method == "full":
        return model.requires_grad_(True), adamw(model)
    if method == "zero":
        return model.requires_grad_(True), None
    if method == "frozen":
        return model.requires_grad_(False), None
    if method.startswith("lora"):
        adapted: nn.Module = low_rank(model, density, rank)
        optimizer = adamw(adapted)
        if method == "lora-compiled":
            adapted.compile()
        return adapted, optimizer
    targets = find_targets(model)
    shapes = {}
    for name, module in targets.items():
        out, inputs = weight_view(module).shape
        shapes[name] = out, inputs
    options: dict[str, Any] = {"seed": seed}
    if max_columns < 1 and mask == "staircase":
        few = torch.zeros((1, 2), dtype=torch.long)
        together = shared_inputs(model, {"input_ids": few})
        options |= {"max_columns": max_columns, "together": together}
    masks = draw_masks(shapes, block_size, density, mask, **options)
    if method == "kfac-pruner":
        make_block_sparse(model, masks)
        return model, adamw(model)
    embed(model, masks)
    return model, SparseAdamW(model, lr=1e-4)
