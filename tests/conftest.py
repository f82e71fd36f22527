"""Hypothesis profiles and the fixtures of both packages' tests."""

from __future__ import annotations

import atexit
import importlib.metadata
import os

import hypothesis
import pytest
import torch
from packaging.version import Version

from tests import cuda_like, cupy_like
from tests.helpers import Library


def release(name: str) -> tuple[int, ...]:
    """Return the numbers of a package's version; of one that is missing (0,)."""
    try:
        return Version(importlib.metadata.version(name)).release
    except importlib.metadata.PackageNotFoundError:
        return (0,)


# Where there is no GPU, Triton's kernels are run step by step; Triton reads this once,
# when something imports it. That of Triton 3.6 and before fails with NumPy 2.4.
if not torch.cuda.is_available():
    if release("triton") >= (3, 7) or release("numpy") < (2, 4):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    cupy_like.install()
#: Of the tests for a GPU, `CUDA_LIKE=1 pytest -m gpu` runs those that it can on a stand-in.
if os.environ.get("CUDA_LIKE") and cuda_like.usable:
    STAND_IN = cuda_like.installed()
    STAND_IN.__enter__()
    atexit.register(STAND_IN.__exit__, None, None, None)

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True
)
# The default tests of a checkout: the same examples each time, and few of them.
hypothesis.settings.register_profile(
    "quick", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="CuPy itself is here")

LIBRARIES = [
    Library("numpy"),
    Library("array_api_strict"),
    Library("torch"),
    pytest.param(Library("cupy"), marks=NO_GPU),
    pytest.param(Library("torch", "cuda"), marks=pytest.mark.gpu),
    pytest.param(Library("cupy", "cuda"), marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items):
    """Skip GPU tests where there is no CUDA device; where there is one, they come first."""
    if all(item.get_closest_marker("gpu") is None for item in items):
        return
    if torch.cuda.is_available():
        # The compiler remembers from the first time whether there is a GPU.
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide GPUs from tests that are not for one: models would go there by default."""
    if item.get_closest_marker("gpu") or not torch.cuda.is_available():
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that they start
        return (yield)


# Session scope, since hypothesis runs many examples with one fixture.
@pytest.fixture(scope="session", params=LIBRARIES, ids=str)
def xp(request):
    """Array library under test, with `Library.asarray` to move NumPy arrays there."""
    if request.param.name != "torch":
        pytest.importorskip(request.param.name)
    return request.param


@pytest.fixture(scope="session", params=["float32", "float64"])
def dtype(request):
    """Dtype under test."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers that are the same in every run."""
    import numpy as np

    return np.random.default_rng(20240607)
