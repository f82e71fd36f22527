"""Ill-conditioned matrices: every digit that is there, or an error, never a wrong sign."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from hmatrix._backend import inverse_lower, namespace
from tests.helpers import condition, dense, error_ratio, to_numpy
from tests.strategies import SEEDS

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
KINDS = ("general", "indefinite", "smooth", "small pivots")
#: Error of a determinant's log, of an inverse and its diagonal: multiple of epsilon times
#: the condition number. Dense LU is within 10 on these matrices.
FACTOR = 50


def kernel(n, rng):
    """A smooth kernel, not symmetric: of low rank off the diagonal, and anyway."""
    t = np.sort(rng.random(n))
    return np.exp(-(((t[:, None] - t - 0.02 * np.sin(9 * t)) / 0.1) ** 2))


def ill_conditioned(kind, exponent, rng, n=150):
    """Return a matrix of condition number about ``10**exponent``."""
    small = 10.0**-exponent
    if kind == "general":
        U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
        return U * small ** np.linspace(0, 1, n) @ V.T
    if kind == "indefinite":
        U = np.linalg.qr(rng.standard_normal((n, n)))[0]
        signs = np.where(rng.random(n) < 0.5, -1, 1)
        A = U * (signs * small ** np.linspace(0, 1, n)) @ U.T
        return (A + A.T) / 2
    K = kernel(n, rng)
    if kind == "smooth":
        return K + small * np.linalg.norm(K, 2) * np.eye(n)
    # the matrix is well conditioned, its leading half is not
    h = n // 2
    K[:h, h:] += np.eye(h, n - h)
    K[h:, :h] -= np.eye(n - h, h)
    K[h:, h:] *= 0.3
    return K + small * np.eye(n)


def exact_slogdet(A):
    """Elimination with pivots in extended precision."""
    A = A.astype(np.longdouble)
    sign, value = 1.0, np.longdouble(0)
    while len(A):
        pivot = np.argmax(abs(A[:, 0]))
        A[[0, pivot]] = A[[pivot, 0]]
        sign *= np.sign(A[0, 0]) * (-1 if pivot else 1)
        value += np.log(abs(A[0, 0]))
        A = A[1:, 1:] - A[1:, :1] / A[0, 0] * A[:1, 1:]
    return float(sign), float(value)


@st.composite
def matrices(draw, exponents=(2, 14)):
    kind = draw(st.sampled_from(KINDS))
    rng = np.random.default_rng(draw(SEEDS))
    A = ill_conditioned(kind, draw(st.integers(*exponents)), rng)
    return hm.from_dense(A, levels=draw(st.integers(0, 3)), rtol=1e-16)


@given(matrices(), st.sampled_from(["auto", "inversion", "orthogonal"]))
def test_no_determinant_has_a_wrong_sign(H, method):
    try:
        F = hm.factorize(H, method=method)
    except (hm.PrecisionError, hm.SingularBlockError):
        # the method's, or the matrix's own fault
        assert method == "inversion" or condition(dense(H)) > 1e12
        return
    sign, value = exact_slogdet(dense(H))
    assert F.slogdet()[0] == sign
    # "inversion" may lose digits up to its limit of 1e-4
    tolerance = FACTOR * EPS["float64"] * condition(dense(H)) + 1e-10
    assert abs(F.slogdet()[1] - value) <= max(
        tolerance, 1e-2 * (method != "orthogonal")
    )


@given(matrices(), SEEDS)
def test_orthogonal_elimination_is_stable(H, seed):
    """Backward; of the adjoint forward, whose residuals can be larger."""
    D = dense(H)
    try:
        F = hm.factorize(H, method="orthogonal")
    except hm.PrecisionError:
        assert condition(D) > 1e12
        return
    b = np.random.default_rng(seed).standard_normal((len(D), 2))
    x = F.solve(b)
    size = np.linalg.norm(D, 2) * np.linalg.norm(x) + np.linalg.norm(b)
    assert np.linalg.norm(D @ x - b) <= 1e-13 * size
    exact = np.diag(np.linalg.inv(D))
    tolerance = FACTOR * EPS["float64"] * condition(D) + 1e-12
    adjoint = F.solve(b, adjoint=True)
    assert error_ratio(adjoint, np.linalg.solve(D.T, b)) <= tolerance
    assert error_ratio(F.inverse_diagonal(), exact) <= tolerance
    assert error_ratio(F.inverse().T.diagonal(), exact) <= tolerance


@pytest.mark.parametrize("complex_", [False, True])
def test_the_inverse_of_a_lossy_block_inversion_is_refined(complex_, rng, tmp_path):
    """Its products are as good as solutions are, also after a round trip by a file."""
    A = ill_conditioned("small pivots", 5, rng) * (np.exp(1j) if complex_ else 1)
    F = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-15), method="inversion")
    exact = np.linalg.inv(A)
    hm.save(tmp_path / "F.safetensors", F)
    size = np.linalg.norm(exact)
    unrefined = F.solve(np.eye(len(A), dtype=A.dtype), refine=0)
    assert np.linalg.norm(unrefined - exact) > 1e-8 * size
    for G in (F, hm.load(tmp_path / "F.safetensors")):
        for X, E in ((G.inverse(), exact), (G.inverse().H, exact.conj().T)):
            assert np.linalg.norm(X.to_dense() - E) < 1e-11 * size


@pytest.mark.parametrize("exponent", [2, 6, 10, 14])
@pytest.mark.parametrize("kind", KINDS)
def test_any_condition_number(kind, exponent, rng):
    H = hm.from_dense(ill_conditioned(kind, exponent, rng), levels=2, rtol=1e-16)
    sign, value = exact_slogdet(dense(H))
    assert condition(dense(H)) > 10.0 ** (exponent - 1) or kind == "small pivots"
    tolerance = FACTOR * EPS["float64"] * condition(dense(H))
    found = hm.factorize(H, method="orthogonal").slogdet()
    assert found == (sign, pytest.approx(value, rel=1e-14, abs=tolerance))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_what_it_can(xp, kind, rng):
    """The log-determinant of a condition number of 1e4, to an error of 1e-2."""
    A = ill_conditioned(kind, 4, rng).astype(np.float32)
    H = hm.from_dense(xp.asarray(A), levels=2, rtol=1e-7)
    sign, value = exact_slogdet(dense(H))
    for method in ("auto", "orthogonal"):
        F = hm.factorize(H, method=method)
        tolerance = FACTOR * EPS["float32"] * condition(dense(H))
        if method == "auto":
            tolerance = max(tolerance, 2e-2)
        assert F.slogdet() == (sign, pytest.approx(value, rel=1e-6, abs=tolerance))
    diagonal = np.diag(np.linalg.inv(dense(H)))
    assert error_ratio(F.inverse_diagonal(), diagonal) <= tolerance
    b = xp.asarray(np.ones(len(A), np.float32))
    x = to_numpy(F.solve(b)).astype(float)
    size = np.linalg.norm(A, 2) * np.linalg.norm(x) + np.sqrt(len(A))
    assert np.linalg.norm(dense(H) @ x - 1) <= 1e-6 * size


def test_float32_says_when_it_cannot(rng):
    A = ill_conditioned("general", 9, rng).astype(np.float32)
    H = hm.from_dense(A, levels=2, rtol=1e-7)
    with pytest.raises(hm.PrecisionError, match=r"allowed is 0\.1 .* or float64\."):
        hm.factorize(H, method="orthogonal")
    with pytest.raises((hm.PrecisionError, hm.SingularBlockError)):
        hm.factorize(H)


def test_lost_digits_are_an_error_with_numbers(rng):
    H = hm.from_dense(ill_conditioned("smooth", 10, rng), levels=2, rtol=1e-14)
    match = r"differs from the identity by .* allowed is 0\.000122 .*\"orthogonal\""
    with pytest.raises(hm.PrecisionError, match=match) as caught:
        hm.factorize(H, method="inversion")
    assert caught.value.error > 1e-3
    assert isinstance(caught.value, ArithmeticError)
    assert type(hm.factorize(H)).__name__ == "HODLROrthogonal"


@pytest.mark.parametrize("seed", [7, 8, 12])
def test_auto_keeps_digits_of_what_is_not_refined(seed):
    """A leading half that is close to singular, of a well-conditioned matrix.

    Block inversion passes, since refinement converges; its inverse is not refined.
    """
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((40, 40))
    A[:20, :20] = 1e-5 * A[:20, :20] + np.outer(A[:20, 0], A[0, :20])
    assert condition(A) < 1e4
    H, exact = hm.from_dense(A, leaf_size=10, rtol=0), np.linalg.inv(A)
    F = hm.factorize(H)
    tolerance = FACTOR * EPS["float64"] * condition(A)
    assert abs(F.slogdet()[1] - np.linalg.slogdet(A)[1]) <= tolerance
    assert error_ratio(F.inverse_diagonal(), np.diag(exact)) <= 1e-9
    assert error_ratio(F.inverse() @ np.eye(40), exact) <= 1e-9
    assert error_ratio(hm.inverse(H, rtol=1e-8).to_dense(), exact) <= 1e-8
    G = hm.factorize(H, method="inversion")
    assert error_ratio(hm.inverse(G, rtol=1e-8).to_dense(), exact) <= 1e-8
    assert error_ratio(G.inverse_diagonal(), np.diag(exact)) <= 1e-9


@pytest.mark.parametrize("exponent", [5, 8, 9, 12])
def test_refined_solutions_by_inversion_are_right_or_refused(exponent, rng):
    A = rng.standard_normal((64, 64))
    A[:32, :32] = 10.0**-exponent * A[:32, :32] + np.outer(A[:32, 0], A[0, :32])
    H, b = hm.from_dense(A, levels=2, rtol=0), np.ones(64)
    try:
        x = hm.factorize(H, method="inversion").solve(b)
    except (hm.PrecisionError, hm.SingularBlockError):
        assert exponent > 5
        return
    size = np.linalg.norm(A, 2) * np.linalg.norm(x) + np.linalg.norm(b)
    assert np.linalg.norm(A @ x - b) <= 1e-8 * size


def test_elimination_refuses_what_refinement_makes_worse():
    """Close to singular, but for the eigenvalues: an error whose square is not small."""
    t = np.linspace(0, 1, 300)
    A = np.exp(-5 * abs(t[:, None] - t)) + np.triu(np.sin(3 * (t[:, None] + t)))
    H = hm.from_dense(A, rtol=1e-12)
    for method in ("auto", "orthogonal"):
        with pytest.raises(hm.PrecisionError, match="lost its digits"):
            hm.factorize(H, shift=0.31, method=method)


@pytest.mark.parametrize("method", ["auto", "inversion"])
def test_diagonals_of_inverses_whose_terms_cancel(xp, method, rng):
    """Small diagonal halves of a matrix that is orthogonal otherwise."""
    A, h = 1e-9 * rng.standard_normal((128, 128)), 64
    A[:h, h:], A[h:, :h] = (np.linalg.qr(rng.standard_normal((h, h)))[0] for _ in "BC")
    exact = np.linalg.inv(A)
    F = hm.factorize(hm.from_dense(xp.asarray(A), levels=3, rtol=0), method=method)
    off = abs(to_numpy(F.inverse_diagonal()) - np.diag(exact))
    assert off.max() <= 1e-7 * np.linalg.norm(exact, 2)


def test_inverses_found_from_solutions_have_the_digits_that_there_are(rng):
    H = hm.from_dense(ill_conditioned("general", 11, rng), levels=2, rtol=1e-16)
    exact, tolerance = np.linalg.inv(dense(H)), FACTOR * 1e11 * EPS["float64"]
    assert error_ratio(hm.inverse(H).to_dense(), exact) <= tolerance
    with pytest.raises(
        hm.ToleranceError, match="solutions in float64 have no more digits"
    ):
        hm.inverse(H, rtol=1e-9)


def test_stored_inverses_keep_a_tolerance_that_inversion_alone_does_not(rng):
    """Its halves, a thousand times smaller than the rest, cost it six digits."""
    A, h = 1e-3 * rng.standard_normal((128, 128)), 64
    A[:h, h:], A[h:, :h] = (np.linalg.qr(rng.standard_normal((h, h)))[0] for _ in "BC")
    H = hm.from_dense(A, levels=3, rtol=0)
    assert error_ratio(hm.inverse(H, rtol=1e-12).to_dense(), np.linalg.inv(A)) <= 2e-12


@pytest.mark.parametrize("name", sorted(EPS))
def test_elimination_of_nearly_unitary_matrices_loses_no_digits(name):
    """A Gaussian matrix as the random mixing of columns cost up to four of them."""
    for seed in (8, 11):
        rng = np.random.default_rng(seed)
        n, identity = 256, np.eye(256, dtype=name)
        A = np.eye(n)[rng.permutation(n)]
        A = A + np.outer(*rng.standard_normal((2, n))) * 1e-3 / n
        H = hm.from_dense(A.astype(name), leaf_size=8, rtol=1e-15)
        F = hm.factorize(H, method="orthogonal")
        error = np.linalg.norm(H @ F.solve(identity, refine=0) - identity)
        assert error <= 12 * EPS[name] * np.linalg.norm(identity)


@pytest.mark.parametrize("rtol", [None, 1e-4])
def test_stored_inverses_tell_digits_that_their_terms_have_lost(rtol):
    """A cyclic shift has singular blocks everywhere, and a small update hardly better ones."""
    for seed in range(6):
        u, v = np.random.default_rng(seed).standard_normal((2, 96))
        A = np.roll(np.eye(96), 1, axis=0) + np.outer(u, v) / 96
        H = hm.from_dense(A.astype(np.float32), leaf_size=12, rtol=0)
        X = hm.inverse(H, rtol=rtol)
        error = error_ratio(X.to_dense().astype(np.float64), np.linalg.inv(A))
        assert error <= 1.5 * X.error + 1e-6  # four random vectors find it
        assert error <= 1.2 * (rtol or math.sqrt(EPS["float32"]))


@pytest.mark.parametrize("method", ["auto", "inversion", "orthogonal"])
def test_inverses_that_overflow_are_an_error_without_warnings(method):
    V = np.vander(np.linspace(0.05, 0.9, 250), increasing=True).astype(np.float32)
    H = hm.from_dense(V, leaf_size=16, rtol=0)
    with pytest.raises((hm.SingularBlockError, hm.PrecisionError)):
        hm.factorize(H, method=method)


def test_their_errors_are_upper_bounds_too(rng):
    A = ill_conditioned("small pivots", 15, rng)
    H = hm.from_dense(A, levels=3, rtol=1e-4)
    X = hm.inverse(hm.factorize(H, method="orthogonal"))
    assert error_ratio(X.to_dense(), np.linalg.inv(A)) <= X.error < 1


def test_stored_inverses_of_ill_conditioned_matrices_need_no_elimination(rng):
    """What is lost is the matrix's own fault: no tolerance is broken."""
    t = np.sort(rng.random(150))
    A = np.exp(-(((t[:, None] - t) / 0.1) ** 2)) + 1e-7 * np.eye(150)
    X = hm.inverse(hm.from_dense(A, leaf_size=40, rtol=0))
    tolerance = FACTOR * EPS["float64"] * condition(A)
    assert error_ratio(X.to_dense(), np.linalg.inv(A)) <= tolerance


def test_many_small_errors_are_no_lost_digits():
    """Of a large well-conditioned matrix in float32, the Frobenius norm alone is large."""
    n = 2**14
    t = np.arange(n, dtype=np.float32)
    H = hm.from_kernel(
        lambda x, y: np.exp(-abs(x - y) / 64) * (1 + 1e-3 * np.cos(x)), t, rtol=1e-6
    )
    F = hm.factorize(hm.shift(H, 1.0), method="inversion")
    assert error_ratio(H @ F.solve(t) + F.solve(t), t) < 1e-5


def test_singular_leaves_of_a_regular_matrix_do_no_harm(xp, rng):
    n = 40
    A = np.kron([[0, 1], [1, 0]], np.eye(n // 2)) + np.outer(
        rng.random(n), rng.random(n)
    )
    A[: n // 2, : n // 2] = 0
    H = hm.from_dense(xp.asarray(A), levels=2, rtol=1e-14)
    with pytest.raises(hm.SingularLeafError):
        hm.factorize(H, method="inversion")
    F = hm.factorize(H)
    assert F.slogdet() == (
        np.linalg.slogdet(A)[0],
        pytest.approx(np.linalg.slogdet(A)[1]),
    )
    np.testing.assert_allclose(
        to_numpy(F.inverse_diagonal()), np.diag(np.linalg.inv(A)), atol=1e-12
    )


@pytest.mark.parametrize("hermitian", [False, True])
def test_complex_matrices(hermitian, rng):
    n = 90
    A, B, C = (ill_conditioned("general", 8, rng, n) for _ in range(3))
    A = A + 1j * B
    A = (
        A @ np.diag(np.where(np.arange(n) % 2, 1, -1)) @ A.conj().T
        if hermitian
        else A @ C
    )
    H = hm.from_dense(A, levels=3, rtol=1e-16)
    F = hm.factorize(H, 0.0, method="orthogonal")
    D = to_numpy(H.to_dense())
    sign, value = np.linalg.slogdet(D)
    tolerance = FACTOR * EPS["float64"] * condition(D)
    assert F.slogdet()[0] == pytest.approx(sign, abs=tolerance)
    assert F.slogdet()[1] == pytest.approx(value, abs=tolerance)
    exact = np.linalg.inv(D)
    for X, E in ((F.inverse(), exact), (F.inverse().H, exact.conj().T)):
        difference = np.linalg.norm(to_numpy(X.to_dense()) - E)
        assert difference <= tolerance * np.linalg.norm(E)
        np.testing.assert_allclose(
            X.diagonal(), np.diag(E), rtol=0, atol=tolerance * abs(E).max()
        )


@pytest.mark.parametrize("given", ["matrix", "factorization"])
@pytest.mark.parametrize("kind", ["small pivots", "hermitian", "complex"])
def test_inverses_of_what_block_inversion_fails_on_are_stored_too(kind, given, rng):
    """Zeros on the diagonal of a matrix that is well conditioned all the same."""
    A = ill_conditioned("small pivots", 15, rng)
    if kind == "hermitian":
        h = len(A) // 2
        B = kernel(h, rng)[:, :20]  # leading zeros, of a quadratic program say
        A = np.block([[np.zeros((h, h)), np.eye(h)], [np.eye(h), np.eye(h) + B @ B.T]])
    A = A * np.exp(1j) if kind == "complex" else A
    H = hm.from_dense(A, levels=3, rtol=1e-14)
    with pytest.raises((hm.PrecisionError, hm.SingularBlockError)):
        hm.factorize(H, method="inversion")
    X = hm.inverse(H if given == "matrix" else hm.factorize(H), rtol=1e-9)
    assert isinstance(X, hm.HODLR)
    assert X.symmetric == H.symmetric
    exact = np.linalg.inv(A)
    assert np.linalg.norm(X.to_dense() - exact) <= 1e-9 * np.linalg.norm(exact)
    assert X.error >= 0
    default = hm.inverse(H)
    assert np.linalg.norm(default.to_dense() - exact) <= 2e-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 8, 9, 16, 18, 32])
def test_inverse_of_triangles(m, xp, rng):
    # well conditioned ones, and ones whose columns fade to 1e-8, in one batch
    L = np.tril(rng.standard_normal((9, m, m)), -1) + np.eye(m)
    L *= 10.0 ** (-np.linspace(0, 1, m) * np.arange(9)[:, None, None])
    X = to_numpy(inverse_lower(xp.asarray(L)))
    norms = np.linalg.norm(X, axis=(1, 2)) * np.linalg.norm(L, axis=(1, 2))
    residual = np.linalg.norm(L @ X - np.eye(m), axis=(1, 2))
    assert np.all(residual <= 4 * m * EPS["float64"] * norms)


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_inverses_of_triangles_whose_rows_fade_keep_their_digits(m, xp, rng):
    """Pivots would mix rows of many sizes."""
    unit = np.tril(rng.standard_normal((9, m, m)), -1) / m + np.eye(m)
    sizes = 2.0 ** np.round(np.linspace(-26, 0, m))
    X = to_numpy(inverse_lower(xp.asarray(unit * sizes[:, None])))
    np.testing.assert_allclose(X * sizes, np.linalg.inv(unit), atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elimination_keeps_no_more_rows_than_there_are_columns(rng, dtype):
    """Rounding below a full-rank block's last row once passed for rank."""
    for _ in range(20):
        U, V = (rng.standard_normal((256, 6)).astype(dtype) for _ in "UV")
        H = hm.from_low_rank(U, V, levels=3)
        F = hm.factorize(H, 1.0, method="orthogonal")
        left = sum(H.ranks)
        for step, rank in zip(F._steps, H.ranks[::-1], strict=True):
            assert step.M.shape[1] <= left
            left -= rank


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
def test_an_svd_that_does_not_converge_is_done_otherwise(library, monkeypatch, rng):
    """LAPACK's gesdd gives up on some finite blocks, those of a thin shell on a grid."""
    A = library.asarray(rng.standard_normal((100, 100)))
    expected = dense(hm.from_dense(A, leaf_size=30, max_rank=3))

    def fails(*args, **kwargs):
        raise library.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(namespace(A).linalg, "svd", fails)
    H = hm.from_dense(A, leaf_size=30, max_rank=3)
    assert np.allclose(dense(H), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_diagonals_of_inverses_of_fewer_rows_than_are_looked_at(xp, n, rng):
    A = rng.standard_normal((n, n)) + 3 * np.eye(n)
    F = hm.factorize(hm.from_dense(xp.asarray(A)), method="inversion")
    np.testing.assert_allclose(
        to_numpy(F.inverse_diagonal()), np.diag(np.linalg.inv(A))
    )


def walk(dtype, rng):
    """Covariance of a random walk and noise: condition number 1e4, no rank is low."""
    X = rng.standard_normal((173, 173)).cumsum(1)
    if np.dtype(dtype).kind == "c":
        X = X + 1j * rng.standard_normal((173, 173)).cumsum(1)
    A = (X @ X.conj().T / 173 + np.eye(173)).astype(dtype)
    return hm.from_dense(A, levels=2, symmetric=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_a_stored_inverse_has_the_digits_of_solutions(dtype, rng):
    """The steps of inversion lose what the factor of a definite matrix keeps."""
    H = walk(dtype, rng)
    F = hm.factorize(H)
    applied = F.inverse() @ np.eye(173, dtype=dtype)
    for of in (H, F):
        assert error_ratio(hm.inverse(of).to_dense(), applied) < 1e2 * H.space.eps


def test_a_stored_inverse_without_a_tolerance_says_what_was_reached(rng):
    H = walk(np.float32, rng)
    F = hm.factorize(H, method="orthogonal")
    X = hm.inverse(F)
    exact = np.linalg.inv(H.to_dense().astype(float))
    assert error_ratio(X.to_dense(), exact) < min(X.error, 0.01)
    with pytest.raises(hm.ToleranceError):
        hm.inverse(F, rtol=1e-6)
