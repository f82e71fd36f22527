"""A small BERT, batches with padding, and its statistics sample by sample."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

from sylva_train.config import SylvaConfig

LAYER = "bert.encoder.layer.1.intermediate.dense"


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def batches(sizes=(5, 4), padding=(9, 6), pad=0):
    """Batches whose rows have different lengths; ``pad`` fills the padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size, length in zip(sizes, padding, strict=True):
        lengths = torch.randint(2, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(1, 50, (size, length), generator=generator)
        ids = torch.where(mask.bool(), ids, pad)
        labels = torch.randint(0, 3, (size,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def config(**options):
    defaults = {"block_size": 8, "levels": 2, "rank": 4, "samples": 9}
    defaults |= {"exact_below": 0}
    return SylvaConfig(**{"exclude_modules": ["pooler.dense"], **defaults, **options})


def per_sample(model, data, name):
    """Inputs, output gradients and weight gradient of every sample, padding cut off."""
    module = model.get_submodule(name)
    model.double().eval()
    found = []
    for batch in data:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            kept = {}
            module.register_forward_hook(
                lambda _, args, y, kept=kept: kept.update(x=args[0], y=y)
            )
            one = {
                k: v[i : i + 1, :length] if v.dim() == 2 else v[i : i + 1]
                for k, v in batch.items()
            }
            loss = model(**one).loss
            module._forward_hooks.clear()
            g, w = torch.autograd.grad(loss, [kept["y"], module.weight])
            found.append((kept["x"].detach()[0], g[0], w))
    return found


def blocked(matrix, size):
    """Sums over whole blocks."""
    return matrix.unflatten(1, (-1, size)).sum(2).unflatten(0, (-1, size)).sum(1)
