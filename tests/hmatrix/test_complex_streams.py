"""Complex samples, and the Hermitian MLR and HODLR matrices they make."""

import numpy as np
import pytest

import hmatrix as hm
from tests.helpers import assert_in, error_ratio, to_numpy

TREES = [
    hm.ClusterTree(45, 2),
    hm.ClusterTree(30, 2, [9, 0, 14, 7], np.arange(30)[::-1]),
]
STREAMS = [
    (hm.StreamingMLR, {"method": "eigh"}),
    (hm.StreamingMLR, {"method": "randomized"}),
    (hm.StreamingSketch, {}),
    (hm.StreamingHODLR, {}),
]
streams = pytest.mark.parametrize(
    ("kind", "options"), STREAMS, ids=["eigh", "randomized", "sketch", "HODLR"]
)
trees = pytest.mark.parametrize("tree", TREES, ids=str)


def walk(c, n, rng):
    """Complex samples whose covariance has off-diagonal blocks of low rank."""
    X = rng.standard_normal((c, n)) + 1j * rng.standard_normal((c, n))
    return X.cumsum(axis=1) * np.exp(1j * np.arange(n) / 3) / np.sqrt(n)


@pytest.fixture(params=["complex64", "complex128"])
def single_or_double(request):
    """Dtype and what rounding may do in it."""
    return request.param, {"complex64": 1e-5, "complex128": 1e-12}[request.param]


def distance(H, exact):
    return error_ratio(H.to_dense() if hasattr(H, "to_dense") else H, exact)


@streams
@trees
def test_streams_hold_second_moments(xp, single_or_double, kind, options, tree, rng):
    dtype, rounding = single_or_double
    Z = walk(120, tree.n, rng)
    exact = Z.conj().T @ Z
    first, second = (
        kind(tree, rank=3, like=xp.asarray(Z, dtype), **options) for _ in range(2)
    )
    for part in np.split(Z, 3):
        first.update(xp.asarray(part, dtype))
    H = first.result(normalize=False)
    assert (H.space.name, H.leaves.dtype) == (dtype, xp.asarray(Z, dtype).dtype)
    D = to_numpy(H.to_dense())
    assert np.allclose(D, D.conj().T, atol=rounding * np.linalg.norm(exact))
    assert np.allclose(np.diag(D), np.diag(exact), rtol=10 * rounding)
    error = np.linalg.norm(D - exact)
    # one pass by few random vectors, without a look at what they miss
    loose = 3 if kind is hm.StreamingSketch else 1
    assert rounding < error / np.linalg.norm(exact) < 0.1 * loose
    if kind is not hm.StreamingSketch and options.get("method") != "randomized":
        assert error <= first.discarded * (1 + rounding)
    if kind is not hm.StreamingHODLR:
        assert np.linalg.eigvalsh(D)[0] > -10 * rounding * np.linalg.norm(exact)
    # in two halves, merged; and from a checkpoint
    second.update(xp.asarray(Z[:70], dtype))
    rank = 3 if kind is hm.StreamingSketch else 5  # sketches ask for equal ones
    other = kind(tree, rank=rank, like=xp.asarray(Z, dtype), **options)
    other.update(xp.asarray(Z[70:], dtype))
    second.merge(kind.from_state(other.state()))
    assert second.count == 120
    assert distance(second.result(), exact / 120) < 0.1 * loose
    assert distance(first.result(), exact / 120) == pytest.approx(
        error / np.linalg.norm(exact), rel=1e-2
    )


@streams
def test_enough_rank_is_exact(xp, kind, options, rng):
    A = rng.standard_normal((4, 40)) + 1j * rng.standard_normal((4, 40))
    Z = (rng.standard_normal((50, 4)) + 1j * rng.standard_normal((50, 4))) @ A
    stream = kind(40, 2, 4, like=xp.asarray(Z), **options)
    stream.update(xp.asarray(Z))
    assert distance(stream.result(normalize=False), Z.conj().T @ Z) < 1e-12


def test_real_samples_give_the_same_in_complex_numbers(rng):
    X = walk(60, 40, rng).real
    for kind in (hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR):
        real, same = (kind(40, 2, 3, dtype=d) for d in ("float64", "complex128"))
        real.update(X)
        same.update(X.astype(complex))
        assert distance(same.result(), real.result().to_dense()) < 1e-12


@trees
def test_mlr_matrices_against_dense_ones(xp, single_or_double, tree, rng, tmp_path):
    dtype, rounding = single_or_double
    Z = walk(80, tree.n, rng)
    stream = hm.StreamingMLR(tree, rank=4, like=xp.asarray(Z, dtype), method="eigh")
    stream.update(xp.asarray(Z, dtype))
    H = stream.result()
    D = to_numpy(H.to_dense()).astype(complex)
    X = xp.asarray(
        rng.standard_normal((tree.n, 2)) + 1j * rng.standard_normal((tree.n, 2)), dtype
    )
    x = to_numpy(X)
    assert_in(H @ X, X)
    for found, exact in (
        (H @ X, D @ x),
        (H.rmatmat(X), D @ x),
        (H.T @ X, D.T @ x),
        (H.__rmatmul__(X.T), x.T @ D),
        (H.diagonal(), np.diag(D)),
        (H.row(3), D[3]),
        (H.block([1, 5], [0, 7, 8]), D[np.ix_([1, 5], [0, 7, 8])]),
        (H.entries([1, 2], [3, 2]), D[[1, 2], [3, 2]]),
        (H + H, 2 * D),
        (hm.scale(H, 3.0), 3 * D),
        (hm.shift(H, 2.0), D + 2 * np.eye(tree.n)),
    ):
        assert distance(found, exact) < 10 * rounding
    assert H.trace() == pytest.approx(np.trace(D).real, rel=10 * rounding)
    assert hm.norm(H) == pytest.approx(np.linalg.norm(D), rel=10 * rounding)
    cut = hm.truncate(H, max_rank=1)
    assert np.allclose(to_numpy(cut.diagonal()), np.diag(D), rtol=10 * rounding)
    with pytest.raises(hm.DTypeError, match="is Hermitian: `diagonal` must be real"):
        hm.shift(H, 1j)

    F, E = hm.factorize(H, 0.5), D + 0.5 * np.eye(tree.n)
    inverse, tolerance = np.linalg.inv(E), 30 * rounding * np.linalg.cond(E)
    for found, exact in (
        (F.solve(X), inverse @ x),
        (F.inverse(), inverse),
        (F.inverse_diagonal(), np.diag(inverse)),
    ):
        assert distance(found, exact) < tolerance
    assert F.logdet() == pytest.approx(
        np.linalg.slogdet(E)[1], rel=tolerance, abs=tolerance
    )
    W = to_numpy(F.sample(xp.asarray(np.eye(tree.n), dtype)))
    assert distance(W @ W.conj().T, E) < tolerance
    assert distance(F.whiten(F.sample(X)), x) < tolerance
    hm.save(tmp_path / "F.safetensors", F)
    assert distance(hm.load(tmp_path / "F.safetensors").inverse(), inverse) < tolerance


@streams
def test_samples_whose_squares_are_subnormal_need_no_warnings(kind, options, rng):
    Z = 1e-21 * walk(60, 64, rng)
    stream = kind(64, 3, 4, dtype="complex64", **options)
    stream.update(Z.astype("complex64"))
    exact = np.sum(abs(Z) ** 2, axis=0)
    # of 1e-42 single precision has three digits
    np.testing.assert_allclose(stream.result(normalize=False).diagonal(), exact, 1e-2)
