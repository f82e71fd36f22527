"""Matrices whose inverses, ranks and determinants are known in closed form."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse

import hmatrix as hm
from tests.helpers import dense, error_ratio


def test_the_green_function_of_a_string_at_a_size_no_dense_method_reaches(rng):
    """``min(x, y) (1 − max(x, y))`` is the inverse of the second difference."""
    n = 50_000
    x = np.arange(1, n + 1) / (n + 1)

    def green(a, b):
        return np.minimum(a, b) * (1 - np.maximum(a, b))

    H = hm.from_kernel(green, x, rtol=1e-14)
    assert set(H.ranks) == {1}
    F = hm.factorize(H)
    # the second difference divided by h has determinant (n + 1) / hⁿ = (n + 1)ⁿ⁺¹
    assert F.logdet() == pytest.approx(-(n + 1) * np.log(n + 1), rel=1e-12)
    y = np.sin(3 * np.pi * x)
    second = (n + 1) * (2 * y - np.append(y[1:], 0) - np.append(0, y[:-1]))
    assert error_ratio(H @ second, y) < 1e-9
    z = rng.standard_normal(n)
    assert error_ratio(F.solve(H @ z), z) < 1e-5  # condition 1e9
    assert np.allclose(F.inverse_diagonal(), 2 * (n + 1), rtol=1e-5)


def test_the_determinant_of_exponential_kernels_at_a_size_no_dense_method_reaches(rng):
    x = np.sort(rng.random(100_000))
    H = hm.from_kernel(lambda a, b: np.exp(-abs(a - b)), x, rtol=1e-14)
    exact = np.log(-np.expm1(-2 * np.diff(x))).sum()
    assert hm.factorize(H).logdet() == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_inverses_of_tridiagonal_matrices_have_rank_one(n, rng):
    T = scipy.sparse.diags_array(
        [-rng.random(n - 1), 2 + rng.random(n), -rng.random(n - 1)], offsets=(-1, 0, 1)
    )
    exact = np.linalg.inv(T.toarray())
    H = hm.from_dense(exact, leaf_size=5, rtol=0.0, max_rank=1)
    assert error_ratio(dense(H), exact) < 1e-14
    X = hm.inverse(hm.from_sparse(T, leaf_size=5))
    assert set(X.ranks) <= {1}
    assert error_ratio(dense(X), exact) < 1e-13


def test_the_cauchy_determinant():
    n = 500
    x, y = np.arange(n) + 0.0, np.arange(n) + 0.5
    H = hm.from_entries(lambda i, j: 1 / (x[i] - y[j]), n, rtol=1e-13, leaf_size=32)
    assert not H.symmetric
    i, j = np.triu_indices(n, 1)
    exact = (
        np.log(abs((x[j] - x[i]) * (y[j] - y[i]))).sum()
        - np.log(abs(x[:, None] - y)).sum()
    )
    sign, value = hm.factorize(H).slogdet()
    assert sign == np.linalg.slogdet(1 / (x[:, None] - y))[0]
    assert value == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_the_hilbert_determinant(n):
    def factorials(m):
        return np.log(np.cumprod(np.arange(1.0, m))).sum()

    A = scipy.linalg.hilbert(n)
    F = hm.factorize(hm.from_dense(A, levels=min(2, n.bit_length() - 1), rtol=1e-16))
    exact = 4 * factorials(n) - factorials(2 * n)
    assert F.logdet() == pytest.approx(exact, rel=1e-7)


def test_a_local_tolerance_is_not_a_global_one():
    """Hundreds of blocks may each lose little, and the matrix much, if nobody counts."""
    n, rtol = 2048, 1e-6
    A = 1 / (1 + abs(np.subtract.outer(np.arange(n), np.arange(n))) ** 0.3)
    for H in (
        hm.from_dense(A, leaf_size=8, rtol=rtol),
        hm.from_entries(lambda i, j: A[i, j], n, leaf_size=8, rtol=rtol),
        hm.from_matvec(lambda x: A @ x, n=n, leaf_size=8, rtol=rtol, symmetric=True),
    ):
        assert error_ratio(dense(H), A) <= rtol


def test_a_vector_is_added_to_the_diagonal_in_the_order_of_the_matrix(rng):
    points, added = rng.random((300, 2)), rng.random(300)

    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum(axis=-1))

    H = hm.from_kernel(kernel, points, rtol=1e-12, leaf_size=20)
    assert not H.tree.plain
    shifted = hm.shift(H, added)
    assert np.allclose(shifted.diagonal(), 1 + added, rtol=1e-14)
    A = kernel(points[:, None], points) + np.diag(added)
    assert error_ratio(dense(shifted), A) < 1e-11
    assert error_ratio(hm.factorize(shifted).solve(A @ added), added) < 1e-8
