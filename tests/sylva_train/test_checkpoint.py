"""Checkpoint folders: what they keep, whose they are, and damage to them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sylva_train._artifacts import flatten
from sylva_train._checks import ConfigError, OutputExistsError
from sylva_train.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sylva_train.checkpoint.files import STATE, TENSORS, read
from sylva_train.config import TrainingConfig
from sylva_train.training import train
from tests.sylva_train.counting import Allocations
from tests.sylva_train.models import same
from tests.sylva_train.toy import (
    CONFIG,
    HaltError,
    ToyLoader,
    interrupt,
    resume,
    stop_at,
    toy_base,
    toy_model,
    weights,
)


def test_the_last_two_checkpoints_are_kept_and_leftovers_go(tmp_path):
    leftover = tmp_path / ".checkpoint-3.x1y2"
    leftover.mkdir(parents=True)
    (leftover / TENSORS).write_bytes(b"half")
    train(toy_model(), ToyLoader(), CONFIG, output=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-12",
        "checkpoint-9",
    ]
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"state.json", "state.safetensors"}


def test_without_steps_between_them_checkpoints_are_made_after_epochs(tmp_path):
    config = TrainingConfig(lr=1e-2, epochs=2)
    train(toy_model(), ToyLoader(), config, output=tmp_path)
    assert list(checkpoints(tmp_path)) == [12, 6]


def test_another_run_is_not_written_over(tmp_path):
    interrupt(tmp_path, 4)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(OutputExistsError, match=r"`output` .*resume=True"):
        train(toy_model(), ToyLoader(), CONFIG, output=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


# -- another run's ---------------------------------------------------------------------


def changed_config(**options):
    return {"config": TrainingConfig(lr=1e-2, epochs=2, **options)}


OTHERS = {
    "frozen weights": lambda: {"model": toy_model(seed=1)},
    "sylva_values": lambda: {"model": toy_model(mask_seed=1)},
    "`weight_decay` is 0.01, here 0.5": lambda: changed_config(weight_decay=0.5),
    "`seed` is 0, here 3": lambda: changed_config(seed=3),
    "`batches` is 6, here 5": lambda: {"loader": ToyLoader(batch_size=5)},
    "here missing": lambda: {"model": toy_base()},
}


@pytest.mark.parametrize("says", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, says):
    interrupt(tmp_path, 4)
    parts = {"model": toy_model()} | OTHERS[says]()
    before = weights(parts["model"])
    with pytest.raises(CheckpointError, match=re.escape(says)) as info:
        resume(tmp_path, **parts)
    assert "checkpoint-3" in str(info.value)
    assert same(weights(parts["model"]), before)


def test_another_optimizer_is_refused(tmp_path):
    interrupt(tmp_path, 4)
    model = toy_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(CheckpointError, match="`class` is SparseAdamW, here SGD"):
        resume(tmp_path, model=model, optimizer=torch.optim.SGD(trained, 0.1))


def test_a_mask_with_as_many_other_blocks_is_another_run(tmp_path):
    interrupt(tmp_path, 4)
    model = toy_model()
    indices = model.bert.encoder.layer[0].attention.self.query.sylva_indices["default"]
    free = (
        ~model.bert.encoder.layer[0].attention.self.query.mask().dense()[::8, ::8]
    ).nonzero()
    indices[0] = free[0].int()
    with pytest.raises(CheckpointError, match=r"query\.sylva_values"):
        resume(tmp_path, model=model)


def test_what_changes_no_weight_may_change(tmp_path, whole):
    interrupt(tmp_path, 4)
    config = TrainingConfig(lr=1e-2, epochs=2, save_every=5, eval_every=2, device="cpu")
    assert same(weights(resume(tmp_path, config)[0]), whole[0])


# -- damage ----------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def tamper(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def replace_one_number(path):
    if path.name == STATE:
        text = path.read_text()
        path.write_text(text.replace('"batch": 6', '"batch": 5'))
    else:
        tensors = load_file(path)
        tensors["/parameters/classifier.bias"] += 1
        save_file(tensors, path)


@pytest.mark.parametrize("name", [TENSORS, STATE])
@pytest.mark.parametrize(
    "damage",
    [truncate, tamper, replace_one_number, Path.unlink, lambda p: p.write_bytes(b"")],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, whole, name, damage):
    interrupt(tmp_path, 7)
    damage(tmp_path / "checkpoint-6" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-6/{name}.*before it"):
        model, _ = resume(tmp_path)
    assert same(weights(model), whole[0])
    assert list(checkpoints(tmp_path)) == [12, 9]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    interrupt(tmp_path, 7)
    truncate(tmp_path / "checkpoint-6" / TENSORS)
    with pytest.warns(UserWarning, match="checkpoint-6"), pytest.raises(HaltError):
        resume(tmp_path, callbacks=[stop_at(6)])
    read(tmp_path / "checkpoint-6")


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_the_next(tmp_path):
    interrupt(tmp_path, 7)
    truncate(tmp_path / "checkpoint-6" / TENSORS)
    config = TrainingConfig(lr=1e-2, epochs=2, save_every=4)
    with pytest.warns(UserWarning, match="checkpoint-6"), pytest.raises(HaltError):
        resume(tmp_path, config, callbacks=[stop_at(4)])
    assert list(checkpoints(tmp_path)) == [4, 3]


def test_with_nothing_whole_left_nothing_is_changed(tmp_path):
    interrupt(tmp_path, 7)
    for step in (3, 6):
        truncate(tmp_path / f"checkpoint-{step}" / TENSORS)
    model = toy_model()
    before = weights(model)
    with (
        pytest.warns(UserWarning, match="checkpoint-"),
        pytest.raises(
            CheckpointError, match=r"no checkpoint in .* is whole.*checkpoint-3"
        ),
    ):
        resume(tmp_path, model=model)
    assert same(before, weights(model))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    tensors = {"values": torch.arange(9.0).reshape(3, 3), "step": torch.tensor(4)}
    return save_checkpoint(folder, Checkpoint(4, tensors, {"batch": 2}), {"data": {}})


@given(data=st.data())
def test_no_flipped_bit_goes_unnoticed(sample, data):
    good = read(sample)
    path = sample / data.draw(st.sampled_from([TENSORS, STATE]))
    original = path.read_bytes()
    content = bytearray(original)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    path.write_bytes(content)
    try:
        # White space between JSON values is no content.
        body, tensors = read(sample)
        right = path.name == STATE and body == good[0] and same(tensors, good[1])
    except CheckpointError as error:
        right = path.name in str(error)
    finally:
        path.write_bytes(original)
    assert right


# -- nesting ---------------------------------------------------------------------------

TENSORS_OF = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.int64, torch.bool]
).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(
        lambda shape: torch.ones(shape).to(dtype)
    )
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TENSORS_OF
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def alike(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return [*first] == [*second] and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    both_nan = isinstance(first, float) and math.isnan(first) and math.isnan(second)
    return both_nan or first == second


@given(tree=TREES)
def test_nested_state_comes_back_as_it_was(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("tree")
    save_checkpoint(folder, Checkpoint(1, {"tree": tree}, {}), {})
    loaded = load_checkpoint(folder, {})
    assert alike(loaded.state["tree"], tree)


@pytest.mark.parametrize("value", [{1, 2}, object(), {(1, 2): 3}, np.float32(1)])
def test_state_that_json_cannot_hold_is_named(value):
    with pytest.raises(ConfigError, match="the state `optimizer/odd` is a"):
        flatten({"optimizer": {"odd": value}}, {}, "")


def test_tensors_that_share_memory_come_back(tmp_path):
    shared = torch.arange(12.0)
    state = [shared, shared[1:], shared[::2], shared.view(3, 4).T, shared[:0]]
    save_checkpoint(tmp_path, Checkpoint(1, {"tree": state}, {}), {})
    assert alike(load_checkpoint(tmp_path, {}).state["tree"], state)


def test_no_other_tensor_is_copied(tmp_path):
    packed, other = torch.zeros(8, 4), torch.ones(5)
    state = {"packed": [*packed.split(2)], "other": other}
    with Allocations() as found:
        save_checkpoint(tmp_path, Checkpoint(1, state, {}), {})
    assert not found.shapes


def test_the_state_file_is_json_for_people(tmp_path):
    interrupt(tmp_path, 4)
    body = json.loads((tmp_path / "checkpoint-3" / STATE).read_text())["body"]
    assert body["step"] == 3
    assert body["record"]["batch"] == 3
    assert body["identity"]["config"]["lr"] == 1e-2
