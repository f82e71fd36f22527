from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, assert_in, dense, error_ratio, to_numpy
from tests.strategies import SEEDS, batches, fed, make_samples, moment, trees

stream_of = partial(fed, hm.StreamingHODLR)


def orthogonality(stream):
    """Largest entry of |UᵀU − I| over all blocks, columns of scale zero included."""
    grams = [x.swapaxes(-1, -2) @ x for x in stream._bases]
    return max(abs(g - np.eye(g.shape[-1])).max() for g in map(to_numpy, grams))


@st.composite
def streams(draw):
    n, levels = draw(trees())
    return draw(batches(n)), levels, draw(st.integers(1, 6))


@given(streams())
def test_leaves_are_exact(case):
    data, levels, rank = case
    H = stream_of(data, levels, rank).result(normalize=False)
    leaf = np.arange(H.tree.n) // H.tree.leaf_size
    inside = leaf[:, None] == leaf
    assert_close(dense(H) * inside, moment(data) * inside, ("float64", "stream"))


@given(streams())
def test_discarded_bounds_the_error(case):
    data, levels, rank = case
    stream = stream_of(data, levels, rank)
    A = moment(data)
    error = np.linalg.norm(dense(stream.result(normalize=False)) - A)
    assert error <= stream.discarded + 1e-12 * np.linalg.norm(A)


@given(streams())
def test_rank_that_suffices_makes_it_exact(case):
    data, levels, _ = case
    stream = stream_of(data, levels, rank=200)
    A = moment(data)
    assert error_ratio(stream.result(normalize=False).to_dense(), A) < 1e-12
    assert stream.discarded <= 1e-12 * np.linalg.norm(A)


@given(streams())
def test_bases_stay_orthonormal(case):
    data, levels, rank = case
    if any(len(Z) for Z in data) and levels:
        assert orthogonality(stream_of(data, levels, rank)) < 1e-13


@given(trees(), SEEDS, st.integers(1, 4))
def test_one_batch_is_the_svd_of_each_block(size, seed, c):
    n, levels = size
    X = make_samples("gaussian", c, n, np.random.default_rng(seed))
    H = stream_of([X], levels, 4).result(normalize=False)
    A = np.zeros((H.tree.padded,) * 2)
    A[:n, :n] = X.T @ X
    for k, block in enumerate(H.upper):
        half = H.tree.size(k + 1)
        exact = np.linalg.svd(A[:half, half : 2 * half], compute_uv=False)
        np.testing.assert_allclose(
            block.S[0], exact[: block.rank], atol=1e-12 * np.linalg.norm(A)
        )


@given(trees(), SEEDS)
def test_a_sample_in_the_span_is_not_dropped(size, seed):
    """The same sample again has no residual; its weight must still arrive."""
    n, levels = size
    X = make_samples("gaussian", 1, n, np.random.default_rng(seed))
    H = stream_of([X] * 5, levels, 1).result(normalize=False)
    assert_close(H.to_dense(), 5 * X.T @ X, ("float64", "stream"))


def test_scales_are_descending_and_not_negative(rng):
    H = stream_of([rng.standard_normal((50, 64))], 3, 5).result()
    for block in H.upper:
        assert np.all(np.diff(block.S, axis=-1) <= 0)
        assert np.all(block.S >= 0)


@pytest.mark.parametrize("kind", ["gaussian", "few", "decaying"])
def test_many_updates_do_not_wear_out_the_bases(kind, rng):
    stream = hm.StreamingHODLR(64, 2, 8)
    X = make_samples(kind, 600, 64, rng)
    for x in X:
        stream.update(x[None])
    assert orthogonality(stream) < 1e-13
    if kind == "few":
        H = stream.result(normalize=False)
        assert_close(H.to_dense(), X.T @ X, ("float64", "stream"))


@given(streams(), SEEDS)
def test_merging_adds(case, seed):
    data, levels, _ = case
    n = data[0].shape[1]
    X = make_samples("few", 7, n, np.random.default_rng(seed))
    a, b = stream_of(data, levels, 200), stream_of([X], levels, 3)
    a.merge(b)
    A = moment([*data, X])
    assert error_ratio(a.result(normalize=False).to_dense(), A) < 1e-12
    assert a.count == sum(map(len, data)) + 7


def test_the_error_is_that_of_the_best_within_a_factor(rng):
    X = make_samples("walk", 400, 128, rng)
    A = X.T @ X
    best = hm.from_dense(A, levels=3, max_rank=4).error
    held = stream_of(np.split(X, 8), 3, 4).result(normalize=False)
    assert error_ratio(held.to_dense(), A) < 2 * best


def test_every_library_and_dtype(xp, dtype, rng):
    X = make_samples("walk", 60, 50, rng)
    data = [xp.asarray(part, dtype) for part in (X[:10], X[10:])]
    H = stream_of(data, 2, 25).result(normalize=False)
    assert_in(H.upper[0].U, data[0])
    assert_close(H.to_dense(), moment([to_numpy(x) for x in data]), (dtype, "stream"))


def test_going_on_from_a_state_changes_nothing(xp, rng):
    X = xp.asarray(make_samples("walk", 60, 50, rng), "float32")
    whole = stream_of([X[:30, :]], 2, 6)
    resumed = hm.StreamingHODLR.from_state(whole.state())
    for stream in (whole, resumed):
        stream.update(X[30:, :])
    assert np.array_equal(dense(resumed.result()), dense(whole.result()))
    assert resumed.discarded == whole.discarded
