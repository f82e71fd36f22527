"""Accumulators that keep a mean, and weights of samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, assert_in, dense, error_ratio, to_numpy
from tests.strategies import SEEDS, batches, fed, make_samples, trees

KINDS = [hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def weighed(X, weights):
    """Return the weighted mean and the covariance of samples, without samples zero."""
    if not sum(weights):
        return np.zeros(X.shape[1]), np.zeros((X.shape[1], X.shape[1]), dtype=X.dtype)
    mean = np.average(X, axis=0, weights=weights)
    D = X - mean
    return mean, (D * weights[:, None]).conj().T @ D / sum(weights)


@st.composite
def streams(draw):
    """Draw batches about a mean, a weight of each sample, levels, and an accumulator."""
    n, levels = draw(trees())
    rng = np.random.default_rng(draw(SEEDS))
    offset = draw(st.sampled_from([0.0, 1.0, 1e4])) * rng.standard_normal(n)
    data = [Z + offset for Z in draw(batches(n))]
    weights = [rng.integers(0, 3, len(Z)) * rng.random(len(Z)) for Z in data]
    return data, weights, levels, draw(st.sampled_from(KINDS))


def assert_that_of(stream, data, weights):
    """Check count, mean and covariance, up to the rounding of the samples themselves."""
    X, w = np.concatenate(data), np.concatenate(weights)
    mean, exact = weighed(X, w)
    assert stream.count == pytest.approx(w.sum())
    np.testing.assert_allclose(stream.mean, mean, rtol=1e-12, atol=1e-12)
    rounding, scale = 1e-15 * abs(X).max(initial=0), np.linalg.norm(exact)
    error = np.linalg.norm(dense(stream.result()) - exact)
    assert error <= 1e-12 * scale + len(exact) * rounding * (np.sqrt(scale) + rounding)


@given(streams())
def test_mean_and_covariance_are_those_of_all_samples(case):
    data, weights, levels, kind = case
    stream = kind(data[0].shape[1], levels, 200, center=True)
    for Z, w in zip(data, weights, strict=True):
        stream.update(Z, weight=w)
    assert_that_of(stream, data, weights)


@given(streams())
def test_where_a_stream_is_cut_and_merged_changes_nothing(case):
    data, weights, levels, kind = case
    n = data[0].shape[1]
    merged = kind(n, levels, 200, center=True)
    for Z, w in list(zip(data, weights, strict=True))[::-1]:
        part = kind(n, levels, 200, center=True)
        part.update(Z, weight=w)
        merged.merge(part)
    assert_that_of(merged, data, weights)


# a sketch estimates it
@given(streams().filter(lambda case: case[3] is not hm.StreamingSketch))
def test_discarded_bounds_the_error_about_the_mean(case):
    data, weights, levels, kind = case
    options = {"method": "eigh"} if kind is hm.StreamingMLR else {}
    stream = kind(data[0].shape[1], levels, 2, center=True, **options)
    for Z, w in zip(data, weights, strict=True):
        stream.update(Z, weight=w)
    X, w = np.concatenate(data), np.concatenate(weights)
    exact = weighed(X, w)[1] * w.sum()
    error = np.linalg.norm(dense(stream.result(normalize=False)) - exact)
    size = np.linalg.norm(exact) + abs(X).max(initial=0) * 1e-5
    assert error <= stream.discarded + 1e-7 * size


@given(streams())
def test_weights_of_samples_are_those_of_their_squares(case):
    data, weights, levels, kind = case
    n = data[0].shape[1]
    stream, rooted = kind(n, levels, 3), kind(n, levels, 3)
    for Z, w in zip(data, weights, strict=True):
        stream.update(Z, weight=w)
        rooted.update(np.sqrt(w)[:, None] * Z)
    assert stream.count == pytest.approx(sum(map(np.sum, weights)))
    found, expected = (dense(s.result(normalize=False)) for s in (stream, rooted))
    assert error_ratio(found, expected) < 1e-12


def test_merging_with_itself_changes_no_mean(kind, rng):
    X = rng.standard_normal((30, 20)) + 5
    stream = fed(kind, [X], 2, 20, center=True)
    stream.merge(stream)
    assert stream.count == 60
    np.testing.assert_allclose(stream.mean, X.mean(axis=0))
    assert_close(
        stream.result().to_dense(), weighed(X, np.ones(30))[1], ("float64", "stream")
    )


def test_a_constant_has_no_covariance(kind):
    X = np.full((50, 12), 0.1) * np.arange(1, 13)
    stream = fed(kind, np.split(X, 5), 2, 3, center=True)
    np.testing.assert_allclose(stream.mean, X[0], rtol=1e-15)
    assert hm.norm(stream.result()) < 1e-30
    assert stream.discarded < 1e-30


def test_rounding_is_that_of_deviations(kind, rng):
    """Of a mean a million times them: squares would have no digit of them left."""
    X = make_samples("walk", 500, 40, rng) + 1e6 * rng.standard_normal(40)
    stream = fed(kind, np.split(X, 10), 2, 40, center=True)
    exact = weighed(X, np.ones(500))[1]
    assert error_ratio(stream.result().to_dense(), exact) < 1e-9
    about_zero = fed(kind, np.split(X, 10), 2, 40).result().to_dense()
    late = about_zero - np.outer(X.mean(axis=0), X.mean(axis=0))
    assert error_ratio(late, exact) > 1e-5


def test_long_streams_keep_their_mean_in_float32(kind, rng):
    X = (100 + rng.standard_normal((20000, 16))).astype(np.float32)
    stream = fed(kind, np.split(X, 200), 1, 16, center=True)
    exact = weighed(X.astype(float), np.ones(20000))
    assert stream.mean.dtype == np.float32
    np.testing.assert_allclose(stream.mean, exact[0], rtol=3e-7)
    assert error_ratio(stream.result().to_dense(), exact[1]) < 1e-5


def test_it_forgets_about_a_mean_that_forgets_too(kind, rng):
    data = [rng.standard_normal((6, 16)) + i for i in range(5)]
    stream = kind(16, 2, 16, center=True)
    for Z in data:
        stream.scale(0.5)
        stream.update(Z)
    weights = np.repeat(0.5 ** np.arange(5)[::-1], 6)
    mean, exact = weighed(np.concatenate(data), weights)
    np.testing.assert_allclose(stream.mean, mean)
    assert_close(stream.result().to_dense(), exact, ("float64", "stream"))
    stream.scale(0)
    stream.update(data[0])  # as the first one
    np.testing.assert_allclose(stream.mean, data[0].mean(axis=0), rtol=1e-15)


def test_every_library_and_dtype(xp, kind, dtype, rng):
    X = make_samples("walk", 60, 50, rng) + 3
    tree = hm.ClusterTree(50, 2, [20, 0, 13, 17], rng.permutation(50))
    weights = rng.random(60)
    stream = kind(tree, rank=50, like=xp.asarray(X, dtype), center=True)
    for rows in (slice(0, 10), slice(10, 60)):
        stream.update(xp.asarray(X[rows], dtype), xp.asarray(weights[rows], dtype))
    assert_in(stream.mean, xp.asarray(X, dtype))
    mean, exact = weighed(X, weights)
    assert_close(stream.mean, mean, (dtype, "stream"))
    assert_close(stream.result().to_dense(), exact, (dtype, "stream"), 10)


def test_complex_samples(xp, kind, rng):
    Z = rng.standard_normal((40, 30)) + 1j * rng.standard_normal((40, 30)) + (2 - 5j)
    weights = rng.random(40)
    stream = kind(30, 2, 64, like=xp.asarray(Z), center=True)
    other = kind(30, 2, 64, like=xp.asarray(Z), center=True)
    stream.update(xp.asarray(Z[:15]), xp.asarray(weights[:15]))
    other.update(xp.asarray(Z[15:]), xp.asarray(weights[15:]))
    stream.merge(other)
    mean, exact = weighed(Z, weights)
    np.testing.assert_allclose(to_numpy(stream.mean), mean, rtol=1e-12)
    assert error_ratio(stream.result().to_dense(), exact) < 1e-12


def test_half_precision_is_centered_in_float32(kind):
    Z = (300 + torch.arange(8) + torch.arange(40)[:, None] % 2).to(torch.float16)
    stream = kind(8, 1, 2, like=Z, center=True)
    stream.update(Z, weight=torch.ones(40, dtype=torch.bfloat16))
    assert torch.equal(stream.mean, 300.5 + torch.arange(8))
    assert torch.allclose(stream.result().to_dense(), torch.full((8, 8), 0.25))


def test_going_on_from_a_state_changes_nothing(xp, kind, rng):
    X = xp.asarray(make_samples("walk", 60, 50, rng) + 2, "float32")
    whole = fed(kind, [X[:30, :]], 2, 6, center=True)
    resumed = kind.from_state(whole.state())
    for stream in (whole, resumed):
        stream.update(X[30:, :])
    assert np.array_equal(to_numpy(resumed.mean), to_numpy(whole.mean))
    assert np.array_equal(dense(resumed.result()), dense(whole.result()))
    assert "centered" in repr(resumed)
    lost = {name: x for name, x in whole.state().items() if name != "mean"}
    with pytest.raises(hm.FileFormatError, match=r"state\['mean'\].*\(50,\)"):
        kind.from_state(lost)


def test_the_mean_given_is_a_copy(xp, kind, rng):
    X = xp.asarray(rng.standard_normal((5, 8)))
    stream = fed(kind, [X], 1, 2, center=True)
    before = stream.mean
    stream.update(X + 1)
    assert_close(before, to_numpy(X).mean(axis=0), ("float64", "exact"))


def test_what_is_centered_is_not_merged_with_what_is_not(kind):
    stream, plain = kind(8, 1, 2, center=True), kind(8, 1, 2)
    with pytest.raises(ValueError, match="must have center=True"):
        stream.merge(plain)
    with pytest.raises(ValueError, match="must have center=False"):
        plain.merge(stream)
    with pytest.raises(ValueError, match="with `center=True` only"):
        plain.mean  # noqa: B018


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (np.array([1.0, -1.0]), ValueError, "`weight` must be at least 0.0, got -1.0"),
        (np.array([1.0, np.nan]), hm.NonFiniteError, "`weight` must be finite"),
        (np.array([1.0, np.inf]), hm.NonFiniteError, "`weight` must be finite"),
        (np.ones(3), hm.ShapeError, r"number or have shape \(2,\), got \(3,\)"),
        (np.ones((2, 1)), hm.ShapeError, r"shape \(2,\), got \(2, 1\)"),
        (np.ones(2, dtype=int), hm.DTypeError, "`weight` has dtype int64"),
        (np.ones(2, dtype=complex), hm.DTypeError, "`weight` has dtype complex128"),
        (torch.ones(2), hm.BackendError, "`weight` is a torch array"),
        ([1.0, 2.0], hm.DTypeError, "`weight` must be a real number, got list"),
    ],
)
@pytest.mark.parametrize("center", [False, True])
def test_weights_that_do_not_fit_are_refused(kind, center, weight, error, match):
    stream = kind(8, 1, 2, center=center)
    stream.update(np.ones((3, 8)))
    with pytest.raises(error, match=match):
        stream.update(np.ones((2, 8)), weight=weight)
    assert stream.count == 3


def test_samples_of_no_weight_leave_the_mean(kind, rng):
    X = rng.standard_normal((5, 8))
    stream = kind(8, 1, 8, center=True)
    stream.update(X, weight=0.0)
    assert stream.count == 0
    assert not stream.mean.any()
    stream.update(X)
    stream.update(X + 7, weight=np.zeros(5))
    np.testing.assert_allclose(stream.mean, X.mean(axis=0))
    assert_close(
        stream.result().to_dense(), weighed(X, np.ones(5))[1], ("float64", "stream")
    )
