"""Batches of all sorts: what one sample is, and how many terms the model's loss has."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from sylva_train._torch import on_device
from sylva_train.config import SylvaConfig
from sylva_train.curvature import loss_units, some_samples
from sylva_train.importance import score

SPEECH = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 28,
    "conv_dim": (8,),
    "conv_stride": (4,),
    "conv_kernel": (8,),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 8,
    "pad_token_id": 0,
}


def speech(reduction: str) -> nn.Module:
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(**SPEECH, ctc_loss_reduction=reduction)
    return tf.Wav2Vec2ForCTC(config).eval()


@pytest.mark.filterwarnings("ignore:Please use the new API")  # PyTorch 2.9 of itself
def test_the_mean_of_ctc_is_over_samples():
    """Each is divided by its own length; by tokens, long texts would count more."""
    model = speech("mean")
    waves = torch.randn(3, 120, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3], [4, -100, -100, -100]])
    whole = {"input_values": waves, "labels": labels}
    parts = [some_samples(whole, which) for which in (slice(2), slice(2, None))]
    units = [loss_units(model, part) for part in parts]
    assert units == [2, 1]
    with torch.no_grad():
        losses = torch.stack([model(**part).loss for part in parts])
        mean = (losses * torch.tensor(units)).sum() / sum(units)
        torch.testing.assert_close(mean, model(**whole).loss)
    options = SylvaConfig(importance="gradient", block_size=4)
    for layer in (divided := score(model, parts, options)):
        torch.testing.assert_close(
            divided[layer].blocks(4), score(model, [whole], options)[layer].blocks(4)
        )


def test_the_sum_of_ctc_is_one_term():
    batch = {"input_values": torch.zeros(3, 120), "labels": torch.ones(3, 4).long()}
    assert loss_units(speech("sum"), batch) == 1


def test_pixels_that_do_not_count_are_no_terms():
    model = nn.Module()
    model.config = tf.SegformerConfig(semantic_loss_ignore_index=255)
    pixels = torch.tensor([[[0, 1], [255, 255]], [[255, 2], [3, 4]]])
    assert loss_units(model, {"labels": pixels}) == 5
    assert loss_units(model, {"labels": torch.tensor([255, 3])}) == 2  # classes


class Patches(nn.Module):
    """Reads the patches of all images in a row, as Qwen2-VL does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, pixel_values, counts, labels):
        assert len(pixel_values) == counts.sum()
        means = [x.mean(0) for x in self.a(pixel_values).split(counts.tolist())]
        return nn.functional.cross_entropy(torch.stack(means), labels)


@pytest.mark.parametrize("samples", [2, 3])
def test_a_batch_of_patches_in_a_row_is_not_cut(samples):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(9, 8, generator=generator),
        "counts": torch.tensor([2, 4, 3]),
        "labels": torch.tensor([0, 1, 2]),
    }
    seen = []
    options = SylvaConfig(importance="gradient", block_size=4, samples=samples)
    score(
        Patches(),
        [batch, batch],
        options,
        loss=lambda model, batch: seen.append(len(batch["labels"])) or model(**batch),
    )
    assert seen == [3]


def test_objects_of_each_image_go_with_it():
    objects = [{"boxes": torch.ones(n, 4)} for n in range(3)]
    batch = {"pixel_values": torch.zeros(3, 1), "labels": objects, "size": [1, 1, 1]}
    some = some_samples(batch, slice(1, 3))
    assert [len(x["boxes"]) for x in some["labels"]] == [1, 2]
    assert some["size"] == [1, 1, 1]
    moved = on_device(batch, torch.device("meta"))
    assert moved["labels"][2]["boxes"].is_meta
    assert moved["pixel_values"].is_meta
