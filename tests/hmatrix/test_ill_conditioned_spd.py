"""Ill-conditioned positive definite matrices: the digits that ``W Wᴴ`` keeps and loses."""

import itertools
import math

import numpy as np
import pytest

import hmatrix as hm
from tests.helpers import error_ratio, to_numpy


def test_ill_conditioned_kernels_keep_more_digits_than_by_inversion():
    t = np.linspace(0, 1, 512)
    A = np.exp(-(((t[:, None] - t) / 0.3) ** 2)) + 3e-5 * np.eye(512)
    H = hm.from_dense(A, levels=4, rtol=1e-13)
    D = to_numpy(H.to_dense())
    exact, b = np.linalg.slogdet(D)[1], np.cos(40 * t)
    residuals, errors = {}, {}
    for method in ("auto", "cholesky", "inversion"):
        try:
            F = hm.factorize(H, method=method)
        except hm.PrecisionError:
            # which leaves too few digits on some processors
            assert method == "inversion"
            residuals[method] = errors[method] = math.inf
            continue
        residuals[method] = error_ratio(H @ F.solve(b, refine=0), b)
        errors[method] = abs(F.slogdet()[1] / exact - 1)
    assert residuals["auto"] == residuals["cholesky"] < 1e-2 * residuals["inversion"]
    assert errors["auto"] == errors["cholesky"] < 1e-2 * errors["inversion"]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("nugget", [1e-6, 1e-10])
def test_samples_of_ill_conditioned_matrices_have_their_covariance(
    levels, nugget, tmp_path
):
    t = np.linspace(0, 1, 512)
    A = np.exp(-(((t[:, None] - t) / 0.1) ** 2)) + nugget * np.eye(512)
    H = hm.from_dense(A, levels=levels, rtol=1e-14, symmetric=True)
    F = hm.factorize(H, method="cholesky")
    hm.save(tmp_path / "F.safetensors", F)
    # of a leaf alone the rounding of its Cholesky factor, times the bases' condition above
    tolerance = 1e-14 if not levels else 1e-5 * np.sqrt(1e-16 / nugget)
    for G in (F, hm.load(tmp_path / "F.safetensors")):
        W = G.sample(np.eye(512))
        assert error_ratio(W @ W.T, H.to_dense()) < tolerance
    if not levels:
        return
    W = hm.factorize(H, overwrite=True).sample(np.eye(512))
    assert error_ratio(W @ W.T, A) < 100 * tolerance


def test_a_matrix_singular_to_rounding_is_not_called_definite():
    for levels, pivot in itertools.product((0, 1, 2), (0.0, 4 * np.finfo(float).eps)):
        A = np.ones((8, 8)) + pivot * np.eye(8)
        H = hm.from_dense(A, levels=levels)
        with pytest.raises(hm.NotPositiveDefiniteError):
            hm.factorize(H, method="cholesky")
        with pytest.raises((hm.SingularBlockError, hm.PrecisionError)):
            hm.factorize(H)


@pytest.mark.parametrize("m", [20, 40])
def test_a_matrix_that_rounding_alone_makes_definite_is_not_solved_with(m):
    """Solutions with the symmetric factor had residuals of 5 and of 262."""
    ends = np.zeros(m)
    ends[[0, -1]] = 1
    L = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1) - np.diag(ends)
    A = np.kron(L, np.eye(m)) + np.kron(np.eye(m), L)  # insulated: singular
    H = hm.from_dense(A, rtol=1e-12)
    singular = hm.PrecisionError, hm.SingularBlockError
    with pytest.raises(singular) as found:
        hm.factorize(H)
    with pytest.raises(singular):
        hm.inverse(H)
    try:
        F = hm.factorize(H, method="cholesky")
    except hm.NotPositiveDefiniteError:
        return  # as rounding has it
    assert 'alone, use method="cholesky"' in str(found.value)
    W = F.sample(np.eye(m * m))
    assert error_ratio(W @ W.T, A) < 1e-9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solutions_of_ill_conditioned_matrices_are_backward_stable(
    dtype, rng, tmp_path
):
    """Inverted triangles are not: a step of refinement follows where a pivot is small."""
    t = np.sort(rng.random(300))
    d = abs(t[:, None] - t) / 0.3
    nugget = np.finfo(dtype).eps ** 0.6
    A = ((1 + d) * np.exp(-d) + nugget * np.eye(300)).astype(dtype)
    H = hm.from_dense(A, levels=3, symmetric=True, rtol=1e-15)
    F = hm.factorize(H, method="cholesky")
    b = rng.standard_normal(300).astype(dtype)
    D = np.asarray(H, dtype=float)

    def backward_error(x):
        sizes = np.linalg.norm(D, 2) * np.linalg.norm(x) + np.linalg.norm(b)
        return np.linalg.norm(D @ x - b) / sizes

    x = F.solve(b)
    assert backward_error(x) < np.finfo(dtype).eps
    assert backward_error(x) < backward_error(F.solve(b, refine=0)) / 3
    hm.save(tmp_path / "F.safetensors", F)
    np.testing.assert_array_equal(hm.load(tmp_path / "F.safetensors").solve(b), x)

    G = hm.factorize(H, shift=0.1, method="cholesky")  # of pivots that are no cause
    np.testing.assert_array_equal(G.solve(b), G.solve(b, refine=0))


@pytest.mark.parametrize("seed", range(4))
def test_auto_leaves_a_symmetric_factor_that_has_lost_its_digits(seed):
    """A jitter of 1e-10 is small enough for that, and log-determinants were off by 1."""
    rng = np.random.default_rng(seed)
    t, b = np.sort(rng.random(127)), rng.standard_normal(127)
    A = np.exp(-50 * (t[:, None] - t) ** 2) + 1e-10 * np.eye(127)
    H = hm.from_dense(A, levels=1, rtol=1e-14)
    F, D = hm.factorize(H), np.asarray(H)
    exact, factor = np.linalg.inv(D), 100 * np.finfo(float).eps * np.linalg.cond(D)
    assert error_ratio(F.solve(b), exact @ b) < factor
    assert error_ratio(F.inverse_diagonal(), np.diag(exact)) < factor
    assert error_ratio(hm.inverse(H).to_dense(), exact) < factor
    assert F.logdet() == pytest.approx(np.linalg.slogdet(D)[1], abs=1e-2)

    with pytest.raises(TypeError, match=r'HODLROrthogonal has no .*method="cholesky"'):
        F.whiten(b)
    W = hm.factorize(H, method="cholesky").sample(np.eye(127))
    assert error_ratio(W @ W.T, D) < 1e-9
    assert isinstance(hm.factorize(H, shift=1e-3), hm.factor.HODLRCholesky)
