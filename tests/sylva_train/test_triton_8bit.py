"""Moments of 8 bits in the fused optimizer: the kernel's, the reference's, and files."""

from __future__ import annotations

import copy

import pytest
import torch

from sylva_train._checks import ConfigError
from sylva_train.optimizer import SparseAdamW
from tests.sylva_train.mixed_layers import (
    MODES,
    assert_weights_show_values,
    dense_weights,
    largest_difference,
    make,
    set_gradients,
    trained,
)

pytest.importorskip("triton")


def eight_bit_pair(device):
    """The same model twice, with the kernel's and the reference's optimizer."""
    model, masks = make(device)
    return model, copy.deepcopy(model), masks


def test_8_bit_moments_of_the_kernel_are_the_references(triton_device, monkeypatch):
    model, twin, masks = eight_bit_pair(triton_device)
    before = dense_weights(model)
    options = {"lr": 0.01, "eps": 1e-3, "moments": "8bit", "decay_towards": "base"}
    ours, theirs = SparseAdamW(model, **options), SparseAdamW(twin, **options)
    for step in range(5):
        for each, optimizer, mode in ((model, ours, "triton"), (twin, theirs, "torch")):
            monkeypatch.setenv("SYLVA_KERNELS", mode)
            set_gradients(trained(each), step)
            optimizer.step()
    for a, b in zip(trained(model)[:3], trained(twin)[:3], strict=True):
        for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            mine, other = ours.state[a][name], theirs.state[b][name]
            assert mine.dtype == other.dtype == dtype
            # Where a number is on a level, another rounding may tell it apart.
            apart = (mine.int() - other.int()).abs()
            assert int(apart.max()) <= 1
            assert float(apart.float().mean()) < 1e-2
    for a, b in zip(trained(model), trained(twin), strict=True):
        # By a level, a step is off by some of it.
        apart = (a - b).detach().abs()
        assert float((apart > 1e-4).float().mean()) < 1e-2
        assert float(apart.max()) < 1e-2
    assert_weights_show_values(model, masks, before)


@pytest.mark.parametrize("mode", MODES)
def test_8_bit_moments_train_like_32_bits(triton_device, monkeypatch, mode):
    monkeypatch.setenv("SYLVA_KERNELS", mode)
    model, twin, _ = eight_bit_pair(triton_device)
    start = [p.detach().clone() for p in trained(model)]
    for each, moments in ((model, "8bit"), (twin, "32bit")):
        optimizer = SparseAdamW(each, lr=0.01, moments=moments)
        for step in range(10):
            set_gradients(trained(each), step % 4, missing=False)
            optimizer.step()
    for a, b, old in zip(trained(model), trained(twin), start, strict=True):
        path = (b - old).detach().norm()
        assert float((a - b).detach().norm() / path) < 0.05
        assert float(path) > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_8_bit_states_are_saved_and_go_on(triton_device, monkeypatch, mode):
    monkeypatch.setenv("SYLVA_KERNELS", mode)
    model, twin, _ = eight_bit_pair(triton_device)
    optimizer = SparseAdamW(model, lr=0.01, moments="8bit")

    def run(each, optimizer, steps):
        for step in steps:
            set_gradients(trained(each), step, missing=False)
            optimizer.step()

    run(model, optimizer, range(3))
    resumed = SparseAdamW(twin, lr=0.5, moments="8bit")
    with torch.no_grad():
        for a, b in zip(trained(twin), trained(model), strict=True):
            a.copy_(b)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, range(3, 5))
    run(twin, resumed, range(3, 5))
    assert largest_difference(trained(model), trained(twin)) == 0
    wide = SparseAdamW(twin, lr=0.01)
    with pytest.raises(ConfigError, match="another number of bits"):
        wide.load_state_dict(optimizer.state_dict())
    run(twin, wide, range(1))
    with pytest.raises(ConfigError, match="another number of bits"):
        resumed.load_state_dict(wide.state_dict())
    with pytest.raises(ConfigError, match="amsgrad"):
        SparseAdamW(model, moments="8bit", amsgrad=True)
