"""Moments in 8 bits: levels, rounding and what becomes of small values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylva_train.kernels.quantize import GROUP, decode, encode, noise
from tests.sylva_train.models import random

KINDS = [torch.int8, torch.uint8]


def store(x, dtype, seed=0):
    codes = torch.zeros(x.shape, dtype=dtype)
    scale = torch.zeros(-(-x.numel() // GROUP))
    encode(x, codes, scale, seed)
    return codes, scale


@given(
    st.integers(1, 700),
    st.sampled_from(KINDS),
    st.floats(-30, 30),
    st.integers(0, 2**20),
)
def test_values_keep_to_the_next_level(size, dtype, exponent, seed):
    x = random((size,), seed=seed) * 10**exponent
    x = x if dtype == torch.int8 else x.abs()
    codes, scale = store(x, dtype, seed)
    back = decode(codes, scale)
    assert back.shape == x.shape
    share = x.abs() / scale.repeat_interleave(GROUP)[:size]
    # One level is the derivative of the map, and what curves beyond it.
    most, power = (127, 2) if dtype == torch.int8 else (255, 4)
    step = ((share ** (1 / power) + 1 / most) ** power - share) * 1.001 + 1e-6
    assert bool(
        ((back - x).abs() <= step * scale.repeat_interleave(GROUP)[:size]).all()
    )
    assert torch.equal(back.sign(), torch.where(back == 0, 0, x.sign()))
    largest = x.abs().argmax()
    assert float((back[largest] - x[largest]).abs()) <= 1e-6 * float(x[largest].abs())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_rounding_is_right_on_average(dtype):
    x = torch.linspace(0.01, 1, GROUP)
    mean = torch.stack([decode(*store(x, dtype, seed)) for seed in range(1000)]).mean(0)
    assert float(((mean - x) / x).abs().max()) < 0.02


def test_a_second_moment_is_zero_only_if_it_was():
    x = torch.zeros(GROUP)
    x[:3] = torch.tensor([1.0, 1e-20, 0.0])
    codes, _ = store(x, torch.uint8)
    assert codes[:3].tolist() == [255, 1, 0]
    assert not decode(*store(torch.zeros(5), torch.uint8)).any()


def test_random_numbers_are_uniform_and_repeat_themselves():
    first = noise(20_000, 3, torch.device("cpu"))
    assert torch.equal(first, noise(20_000, 3, torch.device("cpu")))
    other = noise(20_000, 4, torch.device("cpu"))
    for numbers in (first, other):
        assert float(numbers.min()) >= 0
        assert float(numbers.max()) < 1
        counts = torch.histc(numbers, 10, 0, 1)
        assert float((counts / 2000 - 1).abs().max()) < 0.1
    correlation = torch.corrcoef(torch.stack([first, other, first.roll(1)]))
    assert float(correlation.triu(1).abs().max()) < 0.03
