"""Dense blocks are cut as their singular value decomposition would, mostly without one."""

import math

import numpy as np
import pytest
import torch

import hmatrix as hm
from hmatrix.construct import sampled
from hmatrix.construct.sampled import cut_dense
from tests.helpers import relative


@pytest.fixture
def decomposed(monkeypatch):
    """Sizes of the matrices that have their singular value decomposition."""
    sizes, svd = [], sampled.svd

    def counted(a):
        sizes.append(min(a.shape[-2:]))
        return svd(a)

    monkeypatch.setattr(sampled, "svd", counted)
    return sizes


def decaying(rng, count, size, rate):
    """Blocks (count, size, size) with singular values ``rate**k``."""
    U, V = (np.linalg.qr(rng.standard_normal((count, size, size)))[0] for _ in range(2))
    return (U * rate ** np.arange(size)) @ V.mT


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1.0])
def test_ranks_and_losses_are_those_of_the_svd(rng, rate, dtype):
    blocks = decaying(rng, 3, 96, rate).astype(dtype)
    tolerance = 1e-3 * math.sqrt(96)
    found, lost, largest = cut_dense(blocks, tolerance, None)
    S = np.linalg.svd(blocks, compute_uv=False)
    tails = np.sqrt(np.cumsum(S[:, ::-1] ** 2, axis=1))[:, ::-1]
    assert found.ranks.tolist() == (tails > tolerance).sum(axis=1).tolist()
    error = found.to_dense() - blocks
    exact = np.linalg.norm(error, axis=(1, 2))
    rounding = 100 * np.finfo(dtype).eps * S[:, 0]
    assert np.all(abs(exact - lost) <= 0.01 * lost + rounding)
    assert np.all(lost <= tolerance)
    assert np.all(np.linalg.norm(error, 2, axis=(1, 2)) <= largest + rounding)
    eye = np.eye(found.rank)
    for x in (found.U, found.V):
        assert abs(x.mT.conj() @ x - eye).max() <= 1e3 * np.finfo(dtype).eps


def test_a_smooth_matrix_takes_no_large_svd(decomposed):
    t = np.linspace(0, 1, 600)
    A = 1 / (1 + abs(t[:, None] - t))
    for options in ({}, {"symmetric": False}, {"definite": True}):
        H = hm.from_dense(A, leaf_size=30, rtol=1e-9, **options)
        assert relative(H, A) == pytest.approx(H.error, rel=1e-3)
        assert H.error <= 1e-9
    assert max(decomposed) <= 64


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize("power", [0.0, 0.7])
def test_a_cap_on_the_ranks_loses_what_the_svd_does(rng, decomposed, rank, power):
    """Of blocks that nothing of low rank comes close to."""
    A = rng.standard_normal((512, 512)) * np.arange(1, 513) ** -power
    A = A @ A.T
    for options in ({}, {"rtol": 0.0}):
        H = hm.from_dense(A, levels=1, max_rank=rank, **options)
        S = np.linalg.svd(A[:256, 256:], compute_uv=False)
        best = math.sqrt(2 * sum(S[rank:] ** 2)) / np.linalg.norm(A)
        assert best * (1 - 1e-12) <= H.error <= 1.001 * best
        assert relative(H, A) == pytest.approx(H.error, rel=1e-9)
    assert max(decomposed) <= 2 * rank + 8


def test_one_rough_block_is_decomposed_alone(rng, decomposed):
    blocks = decaying(rng, 8, 64, 0.05)
    blocks[5] = rng.standard_normal((64, 64))
    found, lost, _ = cut_dense(blocks, 1e-6, None)
    assert decomposed[-1] == 64
    assert found.ranks[5] == 64
    assert max(np.delete(found.ranks, 5)) < 8
    assert np.all(np.linalg.norm(found.to_dense() - blocks, axis=(1, 2)) <= 1e-6)
    assert np.all(lost <= 1e-6)


@pytest.mark.parametrize("scale", [1e-290, 1e-160, 1e150])
def test_squares_that_leave_the_range_decide_nothing(rng, scale):
    A = scale * rng.standard_normal((128, 128))
    H = hm.from_dense(A, levels=1, rtol=1e-8)
    assert np.max(abs(H.to_dense() - A)) <= 1e-8 * 128 * scale


def test_a_cap_on_the_ranks_takes_no_svd_of_large_blocks(rng, monkeypatch):
    """Which took most of the time: what is cut off exceeds the tolerance every time."""
    sizes = []
    svd = np.linalg.svd

    def counted(a, *args, **kwargs):
        sizes.append(min(a.shape[-2:]))
        return svd(a, *args, **kwargs)

    x = rng.random((520, 2))

    def kernel(a, b):
        return np.exp(-np.sqrt(((a - b) ** 2).sum(axis=-1)))

    A = kernel(x[:, None], x)
    best = hm.from_dense(A, tree=hm.ClusterTree.from_points(x), max_rank=6)
    monkeypatch.setattr(np.linalg, "svd", counted)
    H = hm.from_kernel(kernel, x, max_rank=6)
    assert max(sizes) < 256
    assert max(H.ranks) == 6
    assert relative(H, A) <= 1.01 * best.error


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_kernels_of_many_ranks_are_called_few_times(rng, library):
    """With coordinates apart in memory, over which NumPy sums several times as fast."""
    xp = {"numpy": np, "torch": torch}[library]
    x, called = xp.asarray(rng.random((400, 2))), []

    def kernel(a, b):
        for points in map(np.asarray, (a, b)):
            if points.size > 4:  # less is a first look at what the kernel gives
                steps = zip(points.strides, points.shape, strict=True)
                assert points.strides[-1] == max(step for step, m in steps if m > 1)
        called.append(1)
        return xp.exp(-xp.sqrt(((a - b) ** 2).sum(axis=-1)))

    H = hm.from_kernel(kernel, x, rtol=1e-6)
    assert H.ranks[0] > 30
    assert len(called) < 200
    d = np.asarray(x)[:, None] - np.asarray(x)
    assert relative(H, np.exp(-np.linalg.norm(d, axis=-1))) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_single_precision_keeps_the_promise_for_torch(dtype):
    """What LAPACK decomposes in single is off by many epsilon where singular values vanish."""
    A = torch.ones((1000, 1000), dtype=dtype)
    A = A * (1 + 1j) if dtype.is_complex else A
    for rtol in (1e-5, 1e-6):
        H = hm.from_dense(A, rtol=rtol)
        assert H.leaves.dtype == dtype
        assert relative(H, np.asarray(A, dtype=complex)) <= rtol
        assert H.ranks == (1, 1, 1, 1)
