import numpy as np
import pytest
from scipy.sparse.linalg import cg, gmres, svds

import hmatrix as hm
from tests.helpers import assert_close, dense
from tests.strategies import make_samples


def test_it_is_the_operator_scipy_expects(xp, dtype, rng):
    H = hm.from_dense(rng.standard_normal((20, 20)), levels=2, max_rank=3)
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    operator, D = hm.aslinearoperator(H), dense(H)
    x, X = (
        rng.standard_normal(20).astype(dtype),
        rng.standard_normal((20, 3)).astype(dtype),
    )
    assert operator.dtype == dtype
    assert_close(operator @ x, D @ x, (dtype, "exact"))
    assert_close(operator @ X, D @ X, (dtype, "exact"))
    assert_close(operator.matvec(x[:, None]), D @ x[:, None], (dtype, "exact"))
    assert_close(operator.H @ x, D.T @ x, (dtype, "exact"))
    assert_close(operator.T @ X, D.T @ X, (dtype, "exact"))
    assert_close(operator.rmatvec(x[:, None]), D.T @ x[:, None], (dtype, "exact"))


def test_the_inverse_preconditions(rng):
    stream = hm.StreamingMLR(200, 3, 8)
    X = make_samples("walk", 400, 200, rng)
    stream.update(X)
    A, b = X.T @ X / 400 + 1e-2 * np.eye(200), rng.standard_normal(200)
    M = hm.aslinearoperator(hm.factorize(stream.result(), 1e-2).inverse())
    steps = []
    x, info = cg(A, b, M=M, rtol=1e-10, callback=lambda _: steps.append(1))
    assert info == 0
    assert_close(x, np.linalg.solve(A, b), ("float64", "solve"), 1e6)
    plain = []
    cg(A, b, rtol=1e-10, callback=lambda _: plain.append(1))
    assert len(steps) < len(plain)


def test_general_inverses_too(rng):
    A = rng.standard_normal((50, 50)) + 20 * np.eye(50)
    H = hm.from_dense(A, levels=2, max_rank=10)
    inverse = hm.aslinearoperator(hm.factorize(H).inverse())
    x, info = gmres(A, A @ np.ones(50), M=inverse, rtol=1e-10)
    assert info == 0
    np.testing.assert_allclose(x, 1, rtol=1e-8)


def test_singular_values_come_out(rng):
    H = hm.from_dense(rng.standard_normal((40, 40)), levels=2, max_rank=2)
    top = svds(hm.aslinearoperator(H), k=3, return_singular_vectors=False, rng=rng)
    exact = np.linalg.svd(dense(H), compute_uv=False)[:3]
    np.testing.assert_allclose(np.sort(top)[::-1], exact)


def test_only_operators_are_wrapped():
    with pytest.raises(TypeError, match="`H` must be a Operator, got ndarray"):
        hm.aslinearoperator(np.eye(3))
