"""Masks: what they count, how they are chosen, and that they come back from disk."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sylva_train._checks import AdapterError, ConfigError
from sylva_train.masks import LayerMask, Masks
from tests.sylva_train.models import layer_masks


@given(layer_masks())
def test_a_mask_counts_the_weights_it_covers(mask):
    dense = mask.dense()
    assert dense.shape == mask.shape
    assert mask.trainable == int(dense.sum())
    assert mask.total == dense.numel()
    assert len(mask) == len(mask.indices)


@given(layer_masks())
def test_blocks_tile_the_weight(mask):
    rows, columns = mask.grid_shape
    full = LayerMask(mask.shape, mask.block_size, torch.ones(rows, columns).nonzero())
    assert full.trainable == full.total
    assert bool(full.dense().all())


@given(layer_masks(), st.randoms())
def test_indices_are_sorted_whatever_their_order(mask, random):
    shuffled = mask.indices.tolist()
    random.shuffle(shuffled)
    indices = torch.tensor(shuffled, dtype=torch.int32).reshape(-1, 2)
    again = LayerMask(mask.shape, mask.block_size, indices)
    assert torch.equal(again.indices, mask.indices)
    assert again.indices.dtype == torch.int64


@pytest.mark.parametrize("index", [(-1, 0), (0, -1), (3, 0), (0, 2)])
def test_indices_outside_the_grid_are_refused(index):
    with pytest.raises(ConfigError, match="3 × 2 grid"):
        LayerMask((9, 5), 4, torch.tensor([index]))


def test_indices_that_repeat_are_refused():
    with pytest.raises(ConfigError, match="distinct; 1"):
        LayerMask((8, 8), 4, torch.tensor([[0, 1], [1, 1], [0, 1]]))


def test_a_block_has_a_size():
    with pytest.raises(ConfigError, match="`block_size`"):
        LayerMask((8, 8), 0, torch.zeros((0, 2)))


masks_of = st.dictionaries(
    st.sampled_from(["a", "a.b", "encoder.0.q"]), layer_masks(), min_size=1
)


@given(layers=masks_of)
def test_masks_come_back_from_disk(tmp_path_factory, layers):
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    masks = Masks(layers, {"importance": "random", "seed": 3})
    masks.save(path)
    again = Masks.load(path)
    assert again.metadata == masks.metadata
    assert again.keys() == masks.keys()
    for name, mask in masks.items():
        assert (again[name].shape, again[name].block_size) == (
            mask.shape,
            mask.block_size,
        )
        assert torch.equal(again[name].indices, mask.indices)
    assert (again.trainable, again.total) == (masks.trainable, masks.total)


def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    Masks({"a": LayerMask((8, 8), 4, torch.tensor([[0, 0], [1, 1]]))}).save(path)
    return path


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_found_out(tmp_path, keep):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="damaged"):
        Masks.load(path)


def rewrite(path, header=None, indices=None):
    """Change a file that was saved, as anything but `Masks.save` would."""
    with safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["sylva"])
        tensors = {name: file.get_tensor(name) for name in kept["layers"]}
    if indices is not None:
        tensors["a"] = torch.tensor(indices, dtype=torch.int32)
    save_file(tensors, path, metadata={"sylva": json.dumps(kept | (header or {}))})


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"format": "other"}},
        {"header": {"layers": {"b": {"shape": [8, 8], "block_size": 4}}}},
        {"header": {"layers": {"a": {"shape": [8], "block_size": 4}}}},
        {"header": {"layers": {"a": {"shape": [8, 8], "block_size": 0}}}},
        {"header": {"layers": {"a": {"shape": ["x", 8], "block_size": 4}}}},
        {"header": {"layers": None}},
        {"header": {"layers": {"a": {}}}},
        {"indices": ((0, 0), (2, 0))},
        {"indices": ((0, 0), (-1, 0))},
        {"indices": ((0, 0), (0, 0))},
        {"indices": ((0, 0), (1, 0))},
        {"header": {"layers": {"a": {"shape": [8, 7], "block_size": 4}}}},
        {"header": {"sha256": None}},
        {"header": {"metadata": {"density": 0.5}}},
    ],
)
def test_a_changed_file_is_found_out(tmp_path, change):
    path = saved(tmp_path)
    rewrite(path)
    assert len(Masks.load(path)["a"]) == 2
    rewrite(path, **change)
    with pytest.raises(AdapterError):
        Masks.load(path)


def test_a_file_of_something_else_or_no_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(AdapterError, match="not a mask file"):
        Masks.load(path)
    for other in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(AdapterError, match=f"mask file `{other}` cannot be read"):
            Masks.load(other)


@given(layer_masks(), layer_masks())
def test_overlap_is_the_shared_fraction(first, second):
    other = LayerMask(first.shape, first.block_size, first.indices[::2])
    a, b = Masks({"x": first}), Masks({"x": other})
    if len(first):
        assert a.overlap(b) == pytest.approx(len(other) / len(first))
        assert b.overlap(a) == 1
    if (first.shape, first.block_size) != (second.shape, second.block_size):
        with pytest.raises(ConfigError, match="`x`"):
            a.overlap(Masks({"x": second}))
    assert a.overlap(Masks({})) == (0 if len(first) else 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_digest_is_of_all_layers_and_makes_one_of_them_text_at_a_time(
    count, monkeypatch
):
    layers = {
        str(i): LayerMask((8, 8), 2, torch.tensor([[i, 1]])) for i in range(count)
    }
    whole = [[n, m.shape, m.block_size, m.indices.tolist()] for n, m in layers.items()]
    expected = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    texts = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda x: texts.append(x) or dumps(x))
    assert Masks(layers).digest() == expected
    assert len(texts) == count
