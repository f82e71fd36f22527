"""No n×n array is built on the way."""

import tracemalloc
from functools import partial

import numpy as np
import pytest

import hmatrix as hm
from hmatrix.factor import climb
from tests.helpers import traced
from tests.strategies import make_samples

N, LEVELS, RANK = 4096, 6, 8


@pytest.mark.parametrize(
    "kind", [hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR]
)
def test_streaming_and_inverting_never_build_the_matrix(kind, rng):
    batch = make_samples("walk", 64, N, rng).astype(np.float32)

    def run():
        stream = kind(N, LEVELS, RANK, dtype="float32")
        stream.update(batch)
        H = stream.result()
        F = hm.factorize(H, 0.1)
        F.solve(batch[0])
        F.inverse_diagonal()
        F.logdet()
        H.diagonal()
        hm.norm(H)

    assert traced(run)[1] < 4 * N * N / 2.5


def test_a_large_batch_is_taken_in_pieces(rng):
    batch = make_samples("walk", 8192, 512, rng).astype(np.float32)
    stream = hm.StreamingMLR(512, 2, RANK, dtype="float32")
    assert traced(lambda: stream.update(batch))[1] < 120e6


def test_multiplying_and_inverting_into_blocks_never_build_the_matrix():
    t = np.linspace(0, 1, N)
    A = np.exp(-abs(t[:, None] - t)).astype(np.float32) + np.eye(N, dtype=np.float32)
    H = hm.from_dense(A, levels=LEVELS, rtol=1e-4)

    def run():
        hm.matmul(H, H.H, rtol=1e-4)
        hm.inverse(H, rtol=1e-4)
        hm.add_low_rank(H, A[:, :4])
        hm.norm(H, 2)
        H.row(N // 2)
        H.block(range(50), range(N))

    assert traced(run)[1] < 4 * N * N / 2.5


@pytest.mark.parametrize("kernel", ["exponential", "gaussian", "logarithm"])
def test_a_matrix_takes_the_memory_that_its_ranks_need(kernel, rng):
    """Blocks are padded to the largest rank of their level: little, on a line."""
    functions = {
        "exponential": lambda x, y: np.exp(-abs(x - y)),
        "gaussian": lambda x, y: np.exp(-50 * (x - y) ** 2),
        "logarithm": lambda x, y: np.log(abs(x - y) + 1e-3),
    }
    n = 2**13
    points = np.sort(rng.random(n))
    H = hm.from_kernel(functions[kernel], points, rtol=1e-8, leaf_size=64)
    assert H.symmetric  # one triangle
    needed = H.leaves.size
    for block in H.upper:
        rows, columns = block.shape[-2:]
        needed += int((block.ranks * (rows + columns + 1)).sum())
    assert H.nbytes <= 1.1 * 8 * needed


def test_constructing_holds_little_beside_the_matrix(rng):
    """Of the samples of all levels the pivots alone, of a level one factor too many."""
    points = np.sort(rng.random(2**16))

    def run():
        return hm.from_kernel(
            lambda x, y: np.exp(-50 * (x - y) ** 2),
            points,
            nugget=0.01,
            rtol=1e-10,
            leaf_size=32,
        )

    H, most = traced(run)
    assert most < 1.33 * H.nbytes


def test_factorizing_over_the_matrix_never_holds_both(rng, monkeypatch):
    """Matrix and factor are as large as each other; a worker's pieces come on top."""
    monkeypatch.setattr(climb, "default_workers", lambda _: 1)
    points = np.sort(rng.random(2**16))
    most = {}

    def run(overwrite):
        H = hm.from_kernel(
            lambda x, y: np.exp(-50 * (x - y) ** 2),
            points,
            nugget=0.01,
            rtol=1e-8,
            leaf_size=32,
        )
        size = H.nbytes
        tracemalloc.reset_peak()
        F = hm.factorize(H, overwrite=overwrite)
        assert F.nbytes < 1.05 * size
        most[overwrite] = tracemalloc.get_traced_memory()[1] / size

    for overwrite in (False, True):
        traced(lambda which=overwrite: run(which))
    assert most[False] > 2
    assert most[True] < 1.24


def test_what_a_factorization_works_on_is_small(rng, monkeypatch):
    """Beside factors of 10 MB too."""
    monkeypatch.setattr(climb, "default_workers", lambda _: 1)
    points = np.sort(rng.random(2**14))
    H = hm.from_kernel(
        lambda x, y: np.exp(-50 * (x - y) ** 2),
        points,
        nugget=0.01,
        rtol=1e-10,
        leaf_size=32,
    )
    F, most = traced(lambda: hm.factorize(H))
    assert most < 2.4 * F.nbytes


@pytest.mark.parametrize(("n", "dims"), [(4096, 1), (1024, 2)])
def test_entries_are_evaluated_and_compared_a_few_at_a_time(n, dims, rng):
    """Blocks of the deepest levels take turns, and so do rows of larger ones."""

    def matern(x, y):
        d = np.sqrt(3 * ((x - y) ** 2).sum(axis=-1))
        return (1 + d) * np.exp(-d)

    points = rng.random((n, dims))
    run = partial(hm.from_kernel, matern, points, nugget=0.01, leaf_size=32, rtol=1e-6)
    run()  # imports what it needs
    assert traced(run)[1] < 6.5e6
