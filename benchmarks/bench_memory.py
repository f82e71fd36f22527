"""Bytes that a training step holds: measured, and by the memory model.

Bytes are exact on any device: what autograd keeps is counted by hooks on saved tensors,
each storage once, at its peak over forward and backward. Models have LLaMA's
architecture, bfloat16 weights and no dropout. LoRA has as many trainable weights as
Sylva, in float32 as PEFT has them by default, or in bfloat16. Full fine-tuning steps in
bfloat16, moments included.

Scores for Sylva's masks are of rank one with a heavy tail, drawn independently for each
layer. "Few columns" allows a quarter of a layer's block columns, or the density if that
is more, the same ones for layers that read one input. The memory model alone gives the
figures for LLaMA-7B. The last table has the second-order scores of MiniLM: what fewer
columns cost.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import peft
import torch
from _common import parser, setting, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sylva_train import SparseAdamW, SylvaConfig, embed, score, select, shared_inputs
from sylva_train.baselines import lora_config
from sylva_train.importance import Scores
from sylva_train.layers import inputs
from sylva_train.masks import Masks
from sylva_train.reproduce import staircase
from sylva_train.targets import find_targets, weight_view


class SavedBytes:
    """Bytes that autograd keeps, each storage once: now, and at most so far."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in tensors}
        self.uses: Counter[int] = Counter()
        self.live = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, Kept.tensor)
        Kept.counter = self

    def change(self, storage: torch.UntypedStorage, step: int) -> None:
        """Count one use of a storage more or less."""
        key = storage.data_ptr()
        if key in self.own:
            return
        before, after = self.uses[key], self.uses[key] + step
        self.uses[key] = after
        self.live += storage.nbytes() * ((after > 0) - (before > 0))
        self.peak = max(self.peak, self.live)


class Kept:
    """A saved tensor, counted while autograd holds it."""

    counter: SavedBytes

    def __init__(self, saved: torch.Tensor) -> None:
        self.saved = saved
        self.counter.change(saved.untyped_storage(), 1)

    def tensor(self) -> torch.Tensor:
        """Give autograd its tensor back."""
        return self.saved

    def __del__(self) -> None:
        self.counter.change(self.saved.untyped_storage(), -1)


def total(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(model: nn.Module, optimizer: Any, ids: torch.Tensor) -> dict[str, int]:
    """Take two steps, and count what the second holds."""
    for _ in range(2):
        saved = SavedBytes(model)
        with saved.hooks:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = total(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    state = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    return {
        "weights": total([*model.parameters(), *model.buffers()]),
        "activations": saved.peak,
        "gradients": gradients,
        "moments": total(state),
    }


@dataclass
class Trained:
    """What a method trains and keeps, for the memory model.

    Parameters
    ----------
    kept : dict of str to float
        Kept fraction of the inputs of the layers in `GROUPS`, the mean over the blocks;
        attention keeps the input of ``o_proj`` itself.
    extra : float
        Other bytes kept for each token and block: LoRA's inner activations and casts.
    weights, gradients, moments : int
        Bytes beside the frozen weights, and for the step.
    everything : bool
        Whether norms, embedding and head are trained as well.
    """

    kept: dict[str, float]
    extra: float = 0.0
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    everything: bool = False


def key_width(config: LlamaConfig) -> int:
    """Columns of the keys, and of the values."""
    return config.head_dim * config.num_key_value_heads


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the linear layers of a block."""
    h, f, k = config.hidden_size, config.intermediate_size, key_width(config)
    shapes = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    shapes |= dict.fromkeys(("q_proj", "o_proj"), (h, h))
    return shapes | dict.fromkeys(("k_proj", "v_proj"), (k, h))


def count_weights(config: LlamaConfig) -> int:
    """Weights of a model; an embedding that is the head as well counts once."""
    h, n = config.hidden_size, config.num_hidden_layers
    vocabularies = 1 if config.tie_word_embeddings else 2
    block = sum(o * i for o, i in layer_shapes(config).values()) + 2 * h
    return n * block + h + vocabularies * config.vocab_size * h


def memory_model(
    config: LlamaConfig, tokens: int, trained: Trained, *, checkpointing: bool
) -> dict[str, int]:
    """Bytes that a step with bfloat16 weights holds, worked out.

    For each token a layer keeps: of either norm its input in float32 (``4 H``) and a
    root mean square; of attention query, key, value and output (``2 · 4 H``, or less
    where queries share keys and values) and a float32 for each head; of the MLP gate, its activation and up (``2 · 3 F``); and of
    the inputs of linear layers the kept fractions of ``2 H`` (query, key and value),
    ``2 H`` (gate and up) and ``2 F`` (down). The loss keeps float32 log-probabilities of
    the vocabulary; a table of sines and one of cosines and the labels are kept once. A
    checkpointed model keeps ``2 H`` for each layer, and all of that for one at a time.
    """
    h, f, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    norm = 4 * h + 4 + (2 * h if trained.everything else 0)
    attention = 2 * (2 * h + 2 * key_width(config)) + 4 * config.num_attention_heads
    mlp = 2 * 3 * f
    kept = trained.kept
    linear = 2 * (kept["qkv"] * h + kept["mlp"] * h + kept["down"] * f)
    linear += trained.extra
    layer = 2 * norm + attention + mlp + linear
    # A frozen embedding needs no gradient through the first norm.
    first = 0 if trained.everything or checkpointing else norm
    head = norm + 4 * config.vocab_size + (2 * h if trained.everything else 0)
    kept_bytes = n * 2 * h + max(layer, head) if checkpointing else n * layer + head
    kept_bytes += 2 * 2 * config.head_dim + 8
    return {
        "weights": 2 * count_weights(config) + trained.weights,
        "activations": tokens * round(kept_bytes - first),
        "gradients": trained.gradients,
        "moments": trained.moments,
    }


#: Layers of a block that read one input.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def kept_columns(masks: Masks) -> dict[str, float]:
    """Fraction of its input that each group of layers keeps, the mean over the blocks."""
    found: dict[tuple[str, str], set[int]] = {}
    for name, mask in masks.items():
        body, _, layer = name.rpartition(".")
        for group, members in GROUPS.items():
            if layer in members:
                columns = found.setdefault((group, body), set())
                columns.update(mask.indices[:, 1].tolist())
    kept: dict[str, list[float]] = {group: [] for group in GROUPS}
    for (group, body), columns in found.items():
        mask = masks[f"{body}.{GROUPS[group][0]}"]
        share = len(columns) * mask.block_size / mask.shape[1]
        kept[group].append(share if share <= inputs.LARGEST_SHARE else 1.0)
    return {group: sum(shares) / len(shares) for group, shares in kept.items()}


def score_kept(scores: Scores, masks: Masks, plain: Masks) -> float:
    """Score of the chosen blocks over that of the best ones, the mean over the layers."""
    shares = []
    for name, layer in scores.items():
        blocks = layer.blocks(masks[name].block_size)
        sums = [float(blocks[m[name].indices.unbind(1)].sum()) for m in (masks, plain)]
        shares.append(sums[0] / sums[1] if sums[1] else 1.0)
    return sum(shares) / len(shares)


def sylva_method(
    model: nn.Module, scores: Scores, density: float, options: dict[str, Any]
) -> tuple[nn.Module, Any, Trained]:
    """Embed blocks in every linear layer."""
    masks = select(scores, density, BLOCK, **options)
    embed(model, masks)
    return model, SparseAdamW(model), sylva_trained(masks)


def sylva_trained(masks: Masks) -> Trained:
    """Return what the memory model has to know of masks."""
    count = sum(map(len, masks.values()))
    values = sum(len(mask) * mask.block_size**2 for mask in masks.values())
    return Trained(
        kept_columns(masks),
        # float32 values, and a row and a column for each block; the base's blocks under
        # the values are in the host's memory
        weights=4 * values + 8 * count,
        gradients=4 * values,
        moments=8 * values,
    )


def lora_method(
    model: nn.Module, density: float, *, wide: bool
) -> tuple[nn.Module, Any, Trained]:
    """Add LoRA to every linear layer, in float32 or in bfloat16."""
    options = lora_config(find_targets(model), density)
    trained = lora_trained(model.config, density, wide=wide)
    model = peft.get_peft_model(model, options, autocast_adapter_dtype=wide)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable), trained


def lora_trained(config: LlamaConfig, density: float, *, wide: bool) -> Trained:
    """Return what the memory model has to know of LoRA on every linear layer."""
    n, shapes = config.num_hidden_layers, layer_shapes(config).values()
    ranks = [max(1, round(density * o * i / (o + i))) for o, i in shapes]
    size = 4 if wide else 2
    extra = size * sum(ranks)
    if wide:
        # Every layer casts its input for itself.
        extra += size * sum(i for _, i in shapes)
    weights = n * size * sum(r * sum(s) for r, s in zip(ranks, shapes, strict=True))
    kept = dict.fromkeys(GROUPS, 0.0 if wide else 1.0)
    return Trained(kept, extra, weights, weights, 2 * weights)


def full_method(model: nn.Module) -> tuple[nn.Module, Any, Trained]:
    """Train everything."""
    size = total(model.parameters())
    whole = dict.fromkeys(GROUPS, 1.0)
    trained = Trained(whole, 0, 0, size, 2 * size, everything=True)
    return model, torch.optim.AdamW(model.parameters()), trained


BLOCK = 32
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
)
#: The library's defaults.
LLAMA_7B = LlamaConfig()


def compare(config: LlamaConfig, tokens: int, densities: list[float]) -> list[dict]:
    """Measure every method, with and without checkpointing, beside the model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(torch.bfloat16).train()
    ids = torch.randint(config.vocab_size, (1, tokens))
    targets = find_targets(base)
    scores = staircase({n: tuple(weight_view(m).shape) for n, m in targets.items()})
    together = shared_inputs(base, {"input_ids": ids[:, :2]})
    rows = []
    for density in [1.0, *densities]:
        few = {"max_columns": max(0.25, density), "together": together}
        methods = {
            "LoRA": lambda m, d=density: lora_method(m, d, wide=True),
            "LoRA, bfloat16": lambda m, d=density: lora_method(m, d, wide=False),
            "Sylva": lambda m, d=density: sylva_method(m, scores, d, {}),
            "Sylva, few columns": lambda m, d=density, few=few: sylva_method(
                m, scores, d, few
            ),
        }
        if density == 1:
            methods = {"full": full_method}
        for checkpointing in (False, True):
            for name, make in methods.items():
                model, optimizer, trained = make(copy.deepcopy(base))
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": True})
                    model.enable_input_require_grads()
                found = measure(model, optimizer, ids)
                expected = memory_model(
                    config, tokens, trained, checkpointing=checkpointing
                )
                row = {
                    "method": name,
                    "density": density,
                    "checkpointing": checkpointing,
                    **{part: round(n / 2**20, 2) for part, n in found.items()},
                    "total": round(sum(found.values()) / 2**20, 2),
                    "model over measured": round(
                        sum(expected.values()) / sum(found.values()), 3
                    ),
                    "model over measured, activations": round(
                        expected["activations"] / found["activations"], 3
                    ),
                }
                rows.append(row)
                print(row)
    return rows


def predict(config: LlamaConfig, tokens: int, densities: list[float]) -> list[dict]:
    """Work out the memory of a model that is never built."""
    n, shapes = config.num_hidden_layers, layer_shapes(config)
    scores = staircase({f"{i}.{k}": s for i in range(n) for k, s in shapes.items()})
    together = [
        [f"{i}.{k}" for k in GROUPS[group]]
        for i in range(n)
        for group in ("qkv", "mlp")
    ]
    size = 2 * count_weights(config)
    whole = dict.fromkeys(GROUPS, 1.0)
    methods = {("full", 1.0): Trained(whole, 0, 0, size, 2 * size, everything=True)}
    for density in densities:
        few = {"max_columns": max(0.25, density), "together": together}
        methods |= {
            ("LoRA", density): lora_trained(config, density, wide=True),
            ("LoRA, bfloat16", density): lora_trained(config, density, wide=False),
            ("Sylva", density): sylva_trained(select(scores, density, 64)),
            ("Sylva, few columns", density): sylva_trained(
                select(scores, density, 64, **few)
            ),
        }
    rows = []
    for (name, density), trained in methods.items():
        for checkpointing in (False, True):
            found = memory_model(config, tokens, trained, checkpointing=checkpointing)
            parts = {part: round(count / 2**30, 2) for part, count in found.items()}
            whole_row = {"total": round(sum(found.values()) / 2**30, 2)}
            rows.append(
                {"method": name, "density": density, "checkpointing": checkpointing}
                | parts
                | whole_row
            )
    return sorted(rows, key=lambda row: row["checkpointing"])


def columns_of_minilm(density: float) -> list[dict]:
    """Return what fewer columns cost under second-order scores of a trained model."""
    from sylva_train import Loader, load_data, load_model

    model, tokenizer = load_model("minilm", labels=["a", "b", "c", "d"])
    loader = Loader(load_data("e2e-rating", limit=128), tokenizer, 32, max_length=64)
    scores = score(model, loader, SylvaConfig(samples=128))
    together = shared_inputs(model, next(iter(loader)))
    shared = {name for names in together for name in names}
    grouped = [*together, *([n] for n in scores if n not in shared)]
    plain = select(scores, density, BLOCK)
    rows = []
    for limit in (1.0, 0.75, 0.5, 0.25, 0.125):
        masks = select(scores, density, BLOCK, max_columns=limit, together=together)
        used = [
            (set().union(*(masks[n].indices[:, 1].tolist() for n in names)), names[0])
            for names in grouped
        ]
        shares = [len(some) / masks[n].grid_shape[1] for some, n in used]
        row = {
            "max_columns": limit,
            "kept of an input": round(sum(shares) / len(shares), 3),
            "score kept": round(score_kept(scores, masks, plain), 3),
        }
        rows.append(row)
        print(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=512)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    results = {
        "setting": setting(packages=("transformers", "peft")),
        "model": {
            "hidden": CONFIG.hidden_size,
            "intermediate": CONFIG.intermediate_size,
            "layers": CONFIG.num_hidden_layers,
            "vocabulary": CONFIG.vocab_size,
            "tokens": options.tokens,
            "block size": BLOCK,
        },
        "MiB": compare(CONFIG, options.tokens, [0.01, 0.05, 0.1, 0.2]),
        "LLaMA-7B, 2048 tokens, GiB by the memory model": predict(
            LLAMA_7B, 2048, [0.01, 0.05, 0.1, 0.2]
        ),
        "fewer columns": columns_of_minilm(0.05),
    }
    off = [r for r in results["MiB"] if abs(r["model over measured"] - 1) > 0.05]
    if off:
        msg = f"the memory model is off by more than 5%: {off}"
        raise SystemExit(msg)
    print(write("memory", results))


if __name__ == "__main__":
    main()
