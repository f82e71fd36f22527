from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from hmatrix._backend import eigh_descending
from tests.helpers import assert_close, assert_in, dense, error_ratio, to_numpy
from tests.strategies import SEEDS, batches, fed, make_samples, moment, trees

METHODS = ("auto", "eigh", "randomized")
ranks = st.integers(1, 6)


stream_of = partial(fed, hm.StreamingMLR)


@st.composite
def streams(draw):
    n, levels = draw(trees())
    return draw(batches(n)), levels, draw(ranks), draw(st.sampled_from(METHODS))


def leaf_blocks(tree):
    """Boolean mask (n, n) of the leaf blocks."""
    leaf = np.arange(tree.n) // tree.leaf_size
    return leaf[:, None] == leaf


@given(streams())
def test_leaf_blocks_are_exact_and_diagonal_entries_beside_themselves(case):
    data, levels, rank, method = case
    H = stream_of(data, levels, rank, method=method).result(normalize=False)
    A, inside = moment(data), leaf_blocks(H.tree)
    np.testing.assert_allclose(H.diagonal(), np.diag(A), rtol=1e-12)
    assert_close(dense(H) * inside, A * inside, ("float64", "stream"))


@given(streams())
def test_it_is_positive_semidefinite(case):
    data, levels, rank, method = case
    D = dense(stream_of(data, levels, rank, method=method).result())
    assert np.linalg.eigvalsh(D)[0] >= -1e-13 * np.linalg.norm(D)


@given(streams())
def test_discarded_bounds_the_error(case):
    data, levels, rank, _ = case
    stream = stream_of(data, levels, rank, method="eigh")
    A = moment(data)
    error = np.linalg.norm(dense(stream.result(normalize=False)) - A)
    # the loss of one step is the root of a difference: half the digits at best
    assert error <= stream.discarded + 1e-7 * np.linalg.norm(A)


@pytest.mark.parametrize("kind", ["gaussian", "walk", "decaying"])
def test_randomized_losses_are_estimated_well(kind, rng):
    X = make_samples(kind, 600, 512, rng)
    stream = stream_of([X], 3, 4, method="randomized")
    error = np.linalg.norm(dense(stream.result(normalize=False)) - moment([X]))
    assert 0.5 * error < stream.discarded < 2 * error


@given(trees(), SEEDS, st.sampled_from(METHODS))
def test_rank_that_suffices_makes_it_exact(size, seed, method):
    n, levels = size
    X = make_samples("few", 30, n, np.random.default_rng(seed))
    stream = stream_of([X[:10], X[10:]], levels, 3, method=method)
    assert error_ratio(stream.result(normalize=False).to_dense(), moment([X])) < 1e-7


@given(trees(), SEEDS)
def test_one_level_keeps_the_best_directions(size, seed):
    """With one batch, F of the root is the best rank-r part of the exact moment."""
    n, levels = size
    X = make_samples("gaussian", 3, n, np.random.default_rng(seed))
    stream = stream_of([X], levels, 2, method="eigh")
    if levels:
        F = stream.result(normalize=False).factors[0][0]
        best = np.linalg.svd(X)[1][:2] ** 2
        kept = np.linalg.svd(F)[1] ** 2
        np.testing.assert_allclose(kept[: len(best)], best, rtol=1e-9, atol=1e-12)


def test_randomized_is_nearly_as_good_as_eigh(rng):
    X = make_samples("walk", 800, 400, rng)
    errors = [
        error_ratio(
            stream_of([X], 3, 8, method=m).result(normalize=False).to_dense(), X.T @ X
        )
        for m in ("eigh", "randomized")
    ]
    assert errors[1] < 1.5 * errors[0] < 0.02


@given(streams(), streams())
def test_merging_keeps_what_is_exact(one, two):
    data, levels, rank, method = one
    n = data[0].shape[1]
    other = [np.resize(Z, (len(Z), n)) if Z.size else np.zeros((0, n)) for Z in two[0]]
    a = stream_of(data, levels, rank, method=method)
    b = stream_of(other, levels, two[2], method=method)
    a.merge(b)
    A, H = moment(data + other), a.result(normalize=False)
    inside = leaf_blocks(H.tree)
    assert a.count == sum(len(Z) for Z in data + other)
    assert_close(dense(H) * inside, A * inside, ("float64", "stream"))
    if method == "eigh":
        error = np.linalg.norm(dense(H) - A)
        assert error <= a.discarded + 1e-7 * np.linalg.norm(A)


def test_merging_with_itself_doubles_it(rng):
    X = make_samples("few", 20, 33, rng)
    stream = stream_of([X], 2, 3)
    stream.merge(stream)
    assert error_ratio(stream.result(normalize=False).to_dense(), 2 * X.T @ X) < 1e-7
    assert stream.count == 40


@given(streams(), st.floats(0, 10))
def test_weights_scale_the_samples(case, weight):
    data, levels, rank, method = case
    n = data[0].shape[1]
    stream = hm.StreamingMLR(n, levels, rank, method=method)
    for Z in data:
        stream.update(Z, weight=weight)
    A = weight * moment(data)
    H = stream.result(normalize=False)
    assert stream.count == pytest.approx(weight * sum(map(len, data)))
    assert_close(H.diagonal(), np.diag(A), ("float64", "stream"))


def test_result_is_the_weighted_mean(rng):
    X, Y = rng.standard_normal((5, 12)), rng.standard_normal((3, 12))
    stream = hm.StreamingMLR(12, 0, 2)
    stream.update(X, weight=2.0)
    stream.update(Y)
    assert_close(
        stream.result().to_dense(), (2 * X.T @ X + Y.T @ Y) / 13, ("float64", "exact")
    )


def test_without_samples_it_is_zero(xp):
    like = xp.asarray(np.empty(0), "float32")
    stream = hm.StreamingMLR(10, 2, 3, like=like)
    stream.update(xp.asarray(np.empty((0, 10)), "float32"))
    assert stream.count == stream.discarded == 0
    assert not dense(stream.result()).any()


@pytest.mark.parametrize("method", ["eigh", "randomized"])
def test_every_library_and_dtype(xp, dtype, method, rng):
    X = make_samples("walk", 300, 150, rng)
    data = [xp.asarray(part, dtype) for part in (X[:10], X[10:])]
    H = stream_of(data, 2, 6, method=method).result(normalize=False)
    assert_in(H.leaves, data[0])
    assert_in(H.factors[0], data[0])
    A = moment([to_numpy(x) for x in data])
    assert_close(H.diagonal(), np.diag(A), (dtype, "stream"))
    assert error_ratio(H.to_dense(), A) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_numbers(xp, method, rng):
    X = xp.asarray(make_samples("walk", 300, 150, rng), "float32")
    once, again = (stream_of([X, X], 2, 6, method=method, seed=5) for _ in "ab")
    assert np.array_equal(dense(once.result()), dense(again.result()))
    if method == "randomized":
        other = stream_of([X, X], 2, 6, method=method, seed=6)
        assert not np.array_equal(dense(once.result()), dense(other.result()))


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_state_changes_nothing(xp, method, rng):
    X = xp.asarray(make_samples("walk", 400, 150, rng), "float32")
    whole = stream_of([X[:150, :]], 2, 6, method=method, seed=3)
    resumed = hm.StreamingMLR.from_state(whole.state())
    for stream in (whole, resumed):
        stream.update(X[150:, :], weight=0.5)
    assert resumed.count == whole.count
    assert resumed.discarded == whole.discarded
    assert np.array_equal(dense(resumed.result()), dense(whole.result()))


def test_a_state_moves_between_libraries(xp, rng):
    stream = stream_of([rng.standard_normal((20, 30))], 2, 4)
    moved = hm.StreamingMLR.from_state(stream.state(), like=xp.asarray(np.empty(0)))
    assert_close(
        moved.result().to_dense(), dense(stream.result()), ("float64", "exact")
    )


def test_states_that_do_not_fit_are_refused(rng):
    state = stream_of([rng.standard_normal((20, 30))], 2, 4).state()
    for change, match in [
        ({"kind": "StreamingHODLR"}, "kind StreamingMLR"),
        ({"version": 2}, "version 2"),
        ({"leaves": None}, "`leaves`, got NoneType"),
        ({"factors.1": np.ones((2, 3))}, r"state\['factors.1'\]"),
        ({"n": "many"}, "damaged: ValueError"),
        ({"levels": -1}, "damaged: ShapeError: `levels` must be at least 0"),
        ({"count": None}, "damaged: DTypeError: `count`"),
        ({"method": "svd"}, "damaged: ValueError: `method` must be one of"),
    ]:
        with pytest.raises(hm.FileFormatError, match=match):
            hm.StreamingMLR.from_state({**state, **change})
    for name in ("seed", "count"):
        less = {key: value for key, value in state.items() if key != name}
        with pytest.raises(hm.FileFormatError, match=f"lacks '{name}'"):
            hm.StreamingMLR.from_state(less)


def test_batches_may_be_cut_anywhere(rng):
    """Cutting changes the off-diagonal part only, and only within the losses."""
    X = make_samples("walk", 500, 120, rng)
    for cuts in ([100], [1, 2, 3], [499]):
        stream = stream_of(np.split(X, cuts), 2, 5, method="eigh")
        H = stream.result(normalize=False)
        assert_close(H.diagonal(), np.diag(X.T @ X), ("float64", "stream"))
        assert np.linalg.norm(dense(H) - X.T @ X) <= stream.discarded


def test_the_result_is_not_changed_by_later_updates(rng):
    stream = stream_of([rng.standard_normal((20, 30))], 2, 4)
    H = stream.result(normalize=False)
    before = dense(H)
    stream.update(rng.standard_normal((20, 30)))
    assert np.array_equal(dense(H), before)


def test_the_batch_is_not_changed(rng):
    X = rng.standard_normal((300, 200))
    before = X.copy()
    stream_of([X], 1, 4, method="randomized")
    assert np.array_equal(X, before)


def test_long_streams_stay_exact_in_float32(rng):
    stream = hm.StreamingMLR(64, 2, 4, dtype="float32")
    total = np.zeros(64)
    for _ in range(200):
        X = make_samples("walk", 16, 64, rng).astype(np.float32)
        stream.update(X)
        total += (X.astype(float) ** 2).sum(axis=0)
    diagonal = stream.result(normalize=False).diagonal()
    assert_close(diagonal, total, ("float32", "stream"), 0.1)


def test_eigenvectors_survive_subnormal_numbers():
    """MKL's float32 solver gives NaN for one of these, as for gradients of a model."""
    torch = pytest.importorskip("torch")
    grams = []
    for seed in range(100):
        random = np.random.default_rng(seed)
        M = random.standard_normal((24, 30)) * 10 ** random.uniform(-25, -4, size=30)
        M = M.astype(np.float32)
        grams.append(M.T @ M)
    a = torch.from_numpy(np.stack(grams))
    values, vectors = eigh_descending(a)
    restored = (vectors * values[:, None, :]) @ vectors.mT
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    error = (restored - a).norm(dim=(1, 2)) / a.norm(dim=(1, 2))
    assert float(error.max()) < 1e-5


def test_eigenvectors_survive_rows_of_many_magnitudes():
    """MKL's float32 solver fails for about 1 of 100 of these on some processors."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    M = random.standard_normal((2000, 22, 18))
    M *= 10.0 ** random.uniform(-22, 0, size=(2000, 22, 1))
    M *= 10.0 ** random.uniform(-20, 0, size=(2000, 1, 18))
    M[random.random((2000, 22)) < 0.4] = 0
    gram = M @ M.transpose(0, 2, 1)
    gram /= np.abs(gram).max(axis=(1, 2), keepdims=True)
    for a in (gram.astype(np.float32), torch.from_numpy(gram.astype(np.float32))):
        values, vectors = (np.asarray(x) for x in eigh_descending(a))
        assert values.dtype == vectors.dtype == np.float32
        restored = (vectors * values[:, None, :]) @ vectors.transpose(0, 2, 1)
        assert np.abs(restored - gram).max() < 1e-5


def test_factors_that_do_not_fit_are_refused():
    """Complex ones lost their imaginary part, and levels too many were left out."""
    good = [np.ones((1, 8, 2)), np.ones((2, 4, 1))]
    for bad, error in (
        ([*good, np.ones((4, 2, 1))], hm.ShapeError),
        ([np.ones((2, 4, 1))], hm.ShapeError),
        (np.ones((8, 2)), hm.ShapeError),
        ([[1.0]], hm.BackendError),
        ([1j * good[0]], hm.DTypeError),
        ([good[0] * np.nan], hm.NonFiniteError),
    ):
        stream = hm.StreamingMLR(8, 2, 4)
        with pytest.raises(error, match="`factors`"):
            stream.add_factors(bad)
        assert hm.norm(stream.result()) == 0
    stream.add_factors(good)
    exact = 2 * np.ones((8, 8)) + np.kron(np.eye(2), np.ones((4, 4)))
    np.testing.assert_allclose(stream.result().to_dense(), exact, atol=1e-14)
    whole = hm.StreamingMLR(8, 0, 4)
    whole.add_factors(good[:1])
    np.testing.assert_allclose(whole.result().to_dense(), 2 * np.ones((8, 8)))
