"""The linear sketch: what it keeps exactly, and that order does not matter."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, assert_in, dense, error_ratio, to_numpy
from tests.strategies import SEEDS, batches, fed, make_samples, moment, trees

stream_of = partial(fed, hm.StreamingSketch)
ranks = st.integers(1, 8)


@st.composite
def streams(draw):
    n, levels = draw(trees())
    return draw(batches(n)), levels, draw(ranks)


@given(streams())
def test_leaf_blocks_and_the_diagonal_are_exact(case):
    data, levels, rank = case
    H = stream_of(data, levels, rank).result(normalize=False)
    A = moment(data)
    leaf = np.arange(H.tree.n) // H.tree.leaf_size
    inside = leaf[:, None] == leaf
    scale = np.linalg.norm(A)
    assert abs(to_numpy(H.diagonal()) - np.diag(A)).max(initial=0) <= 1e-14 * scale
    assert_close(dense(H) * inside, A * inside, ("float64", "stream"))


@given(streams())
def test_it_is_positive_semidefinite(case):
    data, levels, rank = case
    D = dense(stream_of(data, levels, rank).result())
    assert np.linalg.eigvalsh(D)[0] >= -1e-13 * np.linalg.norm(D)


@given(streams(), SEEDS)
def test_order_cuts_and_merging_change_nothing_but_rounding(case, seed):
    data, levels, rank = case
    whole = stream_of(data, levels, rank)
    X = np.concatenate(data)
    X = X[np.random.default_rng(seed).permutation(len(X))]
    parts = [stream_of([part], levels, rank) for part in np.array_split(X, 3)]
    merged = parts[2]
    merged.merge(parts[0])
    merged.merge(parts[1])
    A = moment(data)
    for one, two in zip(whole._sketches, merged._sketches, strict=True):
        assert np.linalg.norm(one - two) <= 1e-13 * np.linalg.norm(A)
    assert merged.count == whole.count


def test_the_result_does_not_depend_on_the_order_either(rng):
    X = make_samples("decaying", 300, 150, rng)
    one = stream_of([X], 3, 10).result()
    two = stream_of(np.split(X[::-1], 50), 3, 10).result()
    assert error_ratio(dense(one), dense(two)) < 1e-9


@given(trees(), SEEDS)
def test_rank_that_suffices_makes_it_exact(size, seed):
    n, levels = size
    X = make_samples("few", 20, n, np.random.default_rng(seed))
    stream = stream_of([X], levels, 6)
    H = stream.result(normalize=False)
    assert error_ratio(dense(H), X.T @ X) < 1e-10
    assert stream.discarded <= 1e-9 * np.linalg.norm(X.T @ X)


@pytest.mark.parametrize("kind", ["gaussian", "walk", "decaying"])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_estimated_and_not_far_from_the_cascades(kind, rank, rng):
    X = make_samples(kind, 600, 256, rng)
    A = X.T @ X
    sketch = stream_of(np.split(X, 3), 3, rank)
    cascade = fed(hm.StreamingMLR, np.split(X, 3), 3, rank, method="eigh")
    error, other = (
        np.linalg.norm(dense(stream.result(normalize=False)) - A)
        for stream in (sketch, cascade)
    )
    assert sketch.discarded / 1.5 < error < 1.5 * sketch.discarded
    assert error < 10 * other


def test_every_library_and_dtype(xp, dtype, rng):
    X = make_samples("walk", 300, 150, rng)
    data = [xp.asarray(part, dtype) for part in (X[:10], X[10:])]
    H = stream_of(data, 2, 8).result(normalize=False)
    assert_in(H.leaves, data[0])
    assert_in(H.factors[0], data[0])
    A = moment([to_numpy(x) for x in data])
    assert_close(H.diagonal(), np.diag(A), (dtype, "stream"), 100)
    assert error_ratio(H.to_dense(), A) < 0.05
    F = hm.factorize(H, 1e-2 * H.trace() / 150)
    assert to_numpy(F.inverse_diagonal()).min() > 0


def test_float32_stays_definite_where_one_direction_is_all(xp, rng):
    """What is left beside it is a difference of numbers ten thousand times as large."""
    X = rng.standard_normal((500, 64)) + 100
    like = xp.asarray(X, "float32")
    H = stream_of([like], 2, 4).result()
    smallest = np.linalg.eigvalsh(dense(H).astype(float))[0]
    assert smallest > -1e-6 * H.trace()
    hm.factorize(H, 1e-4 * H.trace() / 64)


def test_going_on_from_a_state_changes_nothing(xp, rng):
    X = xp.asarray(make_samples("walk", 60, 50, rng), "float32")
    whole = stream_of([X[:30, :]], 2, 6, seed=3)
    resumed = hm.StreamingSketch.from_state(whole.state())
    for stream in (whole, resumed):
        stream.update(X[30:, :])
    assert np.array_equal(dense(resumed.result()), dense(whole.result()))
    assert resumed.discarded == whole.discarded


def test_sketches_by_other_vectors_are_not_added(rng):
    stream = stream_of([rng.standard_normal((5, 16))], 2, 3)
    before = dense(stream.result())
    for other in (hm.StreamingSketch(16, 2, 4), hm.StreamingSketch(16, 2, 3, seed=1)):
        with pytest.raises(ValueError, match="must have rank=3 and seed=0"):
            stream.merge(other)
    assert np.array_equal(dense(stream.result()), before)
    assert stream.count == 5


def test_vectors_are_shared_and_let_go(rng):
    one, two = (hm.StreamingSketch(64, 2, 3) for _ in range(2))
    X = rng.standard_normal((4, 64))
    for stream in (one, two):
        stream.update(X)
    assert one._vectors is two._vectors
    drawn = weakref.ref(one._drawn)
    del one, stream
    assert drawn() is two._drawn
    del two
    gc.collect()
    assert drawn() is None


def test_without_samples_it_is_zero(xp):
    stream = hm.StreamingSketch(10, 2, 3, like=xp.asarray(np.empty(0), "float32"))
    stream.update(xp.asarray(np.empty((0, 10)), "float32"))
    assert stream.count == stream.discarded == 0
    assert not dense(stream.result()).any()
