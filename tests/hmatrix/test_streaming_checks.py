"""What both accumulators accept and refuse."""

import numpy as np
import pytest
import torch

import hmatrix as hm
from tests.helpers import assert_close, dense

KINDS = [hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(kind, half):
    """1000 squares of 16 sum to more than float16 or bfloat16 can tell apart."""
    Z = torch.full((1000, 8), 16.0, dtype=half)
    Z[:, 1] = 1 / 16
    stream = kind(8, 1, 2, like=Z)
    stream.update(Z)
    exact = Z.double().T @ Z.double()
    assert stream.result().dtype == torch.float32
    assert_close(
        stream.result(normalize=False).to_dense(), exact, ("float32", "stream")
    )


def test_activations_too_large_for_half_squares(kind):
    Z = torch.full((4, 8), 30000.0, dtype=torch.float16)
    stream = kind(8, 1, 2, like=Z)
    stream.update(Z)
    assert float(stream.result().diagonal()[0]) == pytest.approx(9e8)


def test_half_numpy_arrays_too(kind):
    Z = np.ones((3, 8), dtype=np.float16)
    stream = kind(8, 1, 2)
    stream.update(Z)
    assert_close(stream.result().to_dense(), np.ones((8, 8)), ("float64", "stream"))


def test_narrower_floats_are_widened(kind, rng):
    Z = rng.standard_normal((3, 8)).astype(np.float32)
    stream = kind(8, 0, 2)
    stream.update(Z)
    exact = Z.astype(float).T @ Z.astype(float) / 3
    assert_close(stream.result().to_dense(), exact, ("float64", "exact"))


def test_graphs_are_not_kept(kind):
    Z = torch.ones(3, 8, requires_grad=True)
    stream = kind(8, 1, 2, like=Z)
    stream.update(Z)
    assert not stream.result().leaves.requires_grad


def test_strided_and_transposed_batches(kind, rng):
    X = rng.standard_normal((8, 30))
    for Z in (X.T, X.T[::2], torch.from_numpy(X).T):
        stream = kind(8, 1, 8, like=Z)
        stream.update(Z)
        exact = np.asarray(Z).T @ np.asarray(Z)
        assert_close(
            stream.result(normalize=False).to_dense(), exact, ("float64", "stream")
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_add_nothing(kind, bad, rng):
    X = rng.standard_normal((40, 16))
    stream = kind(16, 2, 2)
    stream.update(X)
    before = dense(stream.result())
    Z = X.copy()
    Z[-1, 3] = bad
    with pytest.raises(hm.NonFiniteError, match=r"`Z` .*\(40, 16\) holds 1 NaN or inf"):
        stream.update(Z)
    assert np.array_equal(dense(stream.result()), before)
    assert stream.count == 40


@pytest.mark.parametrize("size", [1e-14, 1e9])
@pytest.mark.parametrize("method", ["eigh", "randomized"])
@pytest.mark.parametrize("levels", [1, 3])
def test_losses_of_very_small_and_large_samples_are_counted(
    kind, xp, size, method, levels, rng
):
    """Their moments are float32 numbers, the squares of these are not."""
    options = {"method": method} if kind is hm.StreamingMLR else {}
    Z = rng.standard_normal((60, 96)).astype(np.float32) * np.float32(size)
    stream = kind(96, levels, 2, like=xp.asarray(Z), **options)
    for batch in np.split(Z, 3):
        stream.update(xp.asarray(batch))
    exact = Z.T.astype(float) @ Z
    held = stream.result(normalize=False)
    error = np.linalg.norm(dense(held) - exact)
    # randomized losses are estimates
    assert error / 2 < stream.discarded < 10 * np.linalg.norm(exact)
    assert hm.norm(held) == pytest.approx(np.linalg.norm(dense(held)), rel=1e-4)


def test_squares_that_overflow_are_refused(kind):
    stream = kind(4, 1, 2, dtype="float32")
    with pytest.raises(hm.NonFiniteError, match=r"values too large .* float32"):
        stream.update(np.full((2, 4), 1e25, dtype=np.float32))
    with pytest.raises(hm.NonFiniteError, match=r"values too large .* float32"):
        stream.update(np.ones((2, 4), dtype=np.float32), weight=1e39)


@pytest.mark.parametrize(
    ("Z", "error", "match"),
    [
        (np.ones(8), hm.ShapeError, r"\(samples, 8\), got \(8,\)"),
        (np.ones((2, 7)), hm.ShapeError, r"\(samples, 8\), got \(2, 7\)"),
        (np.ones((2, 3, 8)), hm.ShapeError, "flatten leading axes"),
        (np.ones((2, 8), dtype=int), hm.DTypeError, "`Z` has dtype int64"),
        (torch.ones(2, 8), hm.BackendError, "is a torch array, expected numpy"),
        ([[1.0] * 8], hm.BackendError, "got list"),
    ],
)
def test_batches_that_do_not_fit_are_refused(kind, Z, error, match):
    with pytest.raises(error, match=match):
        kind(8, 1, 2).update(Z)


def test_wider_floats_are_refused(kind):
    with pytest.raises(hm.DTypeError, match="float64, expected float32 or float16"):
        kind(8, 1, 2, dtype="float32").update(np.ones((2, 8)))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, "heavy"])
def test_bad_weights_are_refused(kind, weight):
    with pytest.raises((ValueError, TypeError), match="`weight` must be"):
        kind(8, 1, 2).update(np.ones((2, 8)), weight=weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 8, "levels": 4}, "`levels` = 4"),
        ({"n": 8, "levels": 1, "rank": 0}, "`rank` must be at least 1"),
        ({"n": 8, "levels": 1, "dtype": "int32"}, "`dtype` must be one of float32"),
        ({"n": 8, "levels": 1, "dtype": "float16"}, "got float16"),
        ({"n": 8, "levels": 1, "like": 3.0}, "`like` must be a NumPy"),
        ({"n": 8, "levels": 1, "seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_bad_options_are_refused(kind, options, match):
    with pytest.raises(hm.HMatrixError, match=match):
        kind(**options)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'eigh'"):
        hm.StreamingMLR(8, 1, method="magic")


def test_what_does_not_match_is_not_merged(kind):
    stream = kind(8, 1, 2)
    other = next(k for k in KINDS if k is not kind)(8, 1, 2)
    with pytest.raises(TypeError, match="`other` must be a Streaming"):
        stream.merge(other)
    with pytest.raises(hm.ShapeError, match="ClusterTree"):
        stream.merge(kind(8, 2, 2))
    with pytest.raises(hm.DTypeError, match="`other` has dtype float32"):
        stream.merge(kind(8, 1, 2, dtype="float32"))


def test_nbytes_are_those_of_what_is_held(kind):
    """At n = 4096, K = 6, r = 32 less than a fifth of the dense factor."""
    Z = torch.zeros(1, 4096)
    stream = kind(4096, 6, 32, like=Z)
    assert stream.nbytes < 4 * 4096**2 / 5
    arrays = [x for x in stream.state().values() if isinstance(x, torch.Tensor)]
    # torch keeps the whole storage of a view: count that
    assert sum(x.untyped_storage().nbytes() for x in arrays) == stream.nbytes


def test_updates_do_not_keep_their_temporaries(kind, rng):
    Z = torch.from_numpy(rng.standard_normal((400, 300)).astype(np.float32))
    for method in ("eigh", "randomized") if kind is hm.StreamingMLR else (None,):
        stream = kind(300, 2, 5, like=Z, **({"method": method} if method else {}))
        stream.update(Z)
        arrays = [x for x in stream.state().values() if isinstance(x, torch.Tensor)]
        assert sum(x.untyped_storage().nbytes() for x in arrays) == stream.nbytes


def test_scaling_forgets_exponentially(kind, rng):
    batches = rng.standard_normal((5, 3, 16))
    stream, exact, count = kind(16, 2, 4), 0.0, 0.0
    for Z in batches:
        stream.scale(0.5)
        stream.update(Z)
        exact, count = exact / 2 + Z.T @ Z, count / 2 + 3
    assert stream.count == count
    half = kind(16, 2, 4)
    half.merge(stream)
    half.scale(0.5)
    assert 0 < half.discarded == pytest.approx(stream.discarded / 2)
    found = dense(stream.result(normalize=False))
    assert np.linalg.norm(found - exact) <= stream.discarded
    assert_close(dense(half.result()), found / count, ("float64", "stream"))
    assert_close(np.diag(found), np.diag(exact), ("float64", "stream"))
    with pytest.raises(ValueError, match="`factor` must be at least"):
        stream.scale(-1)


def test_a_state_is_not_changed_by_later_updates(kind, xp, rng):
    X = xp.asarray(rng.standard_normal((20, 30)))
    stream = kind(30, 2, 4, like=X, center=True)
    stream.update(X)
    before, state = dense(stream.result()), stream.state()
    stream.update(X + 1)
    stream.merge(stream)
    stream.scale(0.5)
    assert np.array_equal(dense(kind.from_state(state).result()), before)
