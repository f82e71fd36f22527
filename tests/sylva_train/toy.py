"""A model and data small enough to train in a blink, and runs that are interrupted."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sylva_train import layers
from sylva_train.config import TrainingConfig
from sylva_train.masks import LayerMask
from sylva_train.training import train


class ToyLoader:
    """Ten words, two classes; ordered by seed and epoch, resumable by position."""

    def __init__(self, samples: int = 22, batch_size: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(1, 10, (samples, 6), generator=generator)
        self.labels = (self.ids[:, 0] > 5).long()
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return math.ceil(len(self.ids) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0):
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.ids), generator=generator)
        for rows in order.split(self.batch_size)[start:]:
            ids = self.ids[rows]
            yield {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": self.labels[rows],
            }

    def __iter__(self):
        return iter(self.epoch(0))


def toy_base(dropout: float = 0.1, seed: int = 0) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def toy_model(dropout: float = 0.1, seed: int = 0, mask_seed: int = 0):
    """Half of the blocks of each query and intermediate layer, and the head."""
    model = toy_base(dropout, seed)
    generator = torch.Generator().manual_seed(mask_seed)
    masks = {}
    for name, module in model.named_modules():
        if name.endswith(("query", "intermediate.dense")):
            rows, columns = (n // 8 for n in module.weight.shape)
            chosen = torch.rand(rows, columns, generator=generator) < 0.5
            masks[name] = LayerMask(tuple(module.weight.shape), 8, chosen.nonzero())
    return layers.embed(model, masks, modules_to_save=["classifier"])


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, frozen ones included."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


#: Two epochs of six batches.
CONFIG = TrainingConfig(lr=1e-2, epochs=2, save_every=3, device="cpu")


class HaltError(Exception):
    """Raised by a callback."""


def stop_at(step):
    def callback(record):
        if record["step"] == step:
            raise HaltError

    return callback


def interrupt(folder, step, config=CONFIG, model=None, **parts):
    with pytest.raises(HaltError):
        train(
            model or toy_model(), ToyLoader(), config, output=folder,
            callbacks=[stop_at(step)], **parts,
        )  # fmt: skip


def resume(folder, config=CONFIG, model=None, loader=None, **parts):
    model = model or toy_model()
    loader = loader or ToyLoader()
    return model, train(model, loader, config, output=folder, resume=True, **parts)
