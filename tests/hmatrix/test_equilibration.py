"""Rows and columns of very different size cost no digits."""

import numpy as np
import pytest
import torch

import hmatrix as hm
from tests.helpers import error_ratio, to_numpy

N, LEAF = 90, 16


def badly_scaled(what, exponent, rng, like, complex_=False):
    """Return a matrix whose rows, columns or both span powers of ten, and its scales."""
    scales = [10.0 ** rng.uniform(-exponent / 2, exponent / 2, N) for _ in range(2)]
    rows, columns = (
        x if what in (side, "both") else np.ones(N)
        for side, x in zip(("rows", "columns"), scales, strict=True)
    )
    U, V = rng.standard_normal((2, N, 3)) + (1j if complex_ else 0)
    d = 2 + rng.random(N)
    make = like.asarray
    H = hm.from_diagonal(make((rows * d * columns).astype(U.dtype)), leaf_size=LEAF)
    H = H + hm.LowRank(
        make(rows[:, None] * U), make(np.ones(3)), make(columns[:, None] * V)
    )
    return H, U @ V.conj().T + np.diag(d), rows, columns


@pytest.mark.parametrize("exponent", [12, 90])
@pytest.mark.parametrize("what", ["rows", "columns", "both"])
@pytest.mark.parametrize("method", ["auto", "inversion", "orthogonal"])
def test_scales_cost_no_digits(method, what, exponent, xp, rng, tmp_path):
    """Each entry is compared, relative to what its row and column are divided by."""
    H, A, rows, columns = badly_scaled(what, exponent, rng, xp)
    F = hm.factorize(H, method=method)
    hm.save(tmp_path / "F.safetensors", F)
    b, exact = rng.standard_normal((N, 2)), np.linalg.inv(A)
    down, across = rows[:, None], columns[:, None]
    for G in (F, hm.load(tmp_path / "F.safetensors", like=H.leaves)):
        x = to_numpy(G.solve(xp.asarray(down * b))) * across
        assert error_ratio(x, exact @ b) < 1e-11
        x = to_numpy(G.solve(xp.asarray(across * b), adjoint=True)) * down
        assert error_ratio(x, exact.T @ b) < 1e-11
        x = to_numpy(G.inverse() @ xp.asarray(down * b)) * across
        assert error_ratio(x, exact @ b) < 1e-7
        diagonal = to_numpy(G.inverse_diagonal()) * rows * columns
        assert error_ratio(diagonal, np.diag(exact)) < 1e-7
        sign, value = np.linalg.slogdet(A)
        value += np.log(rows).sum() + np.log(columns).sum()
        assert G.slogdet() == (sign, pytest.approx(value, abs=1e-7))


def test_complex_and_shifted(rng):
    H, A, rows, _ = badly_scaled("rows", 40, rng, np, complex_=True)
    H = H - 1e-30 * hm.identity(N, leaf_size=LEAF, like=H.leaves)
    F = hm.factorize(H, 1e-30)
    b = rng.standard_normal(N) + 1j
    assert error_ratio(F.solve(rows * b), np.linalg.solve(A, b)) < 1e-11
    value = np.log(rows).sum() + np.linalg.slogdet(A)[1]
    assert F.slogdet()[1] == pytest.approx(value, abs=1e-7)
    assert F.nbytes > hm.factorize(hm.shift(H, 1e30)).nbytes


def test_symmetric_and_indefinite(rng):
    """Scaled alike from both sides, and still stored as symmetric."""
    scales = 10.0 ** rng.uniform(-20, 20, N)
    t = np.sort(rng.random(N))
    A = np.exp(-abs(t[:, None] - t)) + np.diag(np.where(rng.random(N) < 0.5, -2, 2))
    small = hm.from_dense(A - np.ones((N, N)), leaf_size=N)
    D = small.to_dense() * scales[:, None] * scales
    H = hm.from_dense(D, leaf_size=N, symmetric=True)
    F = hm.factorize(H)
    assert F._factor.matrix.symmetric
    x = F.solve(scales * t) * scales
    assert error_ratio(x, np.linalg.solve(small.to_dense(), t)) < 1e-11


def test_stored_inverses(rng):
    H, A, _, columns = badly_scaled("columns", 30, rng, np)
    exact = np.linalg.inv(A) / columns[:, None]
    for given in (H, hm.factorize(H)):
        X = hm.inverse(given, rtol=1e-6)
        assert error_ratio(X.to_dense(), exact) < 1e-6


def test_what_is_singular_stays_so(rng):
    rows = 10.0 ** rng.uniform(-20, 20, N)
    H = hm.from_diagonal(np.where(np.arange(N) == 5, 0.0, rows), leaf_size=LEAF)
    with pytest.raises(hm.SingularLeafError, match="leaf 0"):
        hm.factorize(H)


def test_gradients(rng):
    H, A, rows, _ = badly_scaled("rows", 30, rng, torch)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    F = hm.factorize(hm.scale(H, factor))
    b = torch.from_numpy(rows)
    x = F.solve(b)
    (gradient,) = torch.autograd.grad(x.sum() + F.logdet(), factor)
    solved = np.linalg.solve(A, np.ones(N)).sum()
    assert float(gradient) == pytest.approx(N - solved, rel=1e-9)
