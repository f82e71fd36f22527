"""Factorization over the matrix: whose memory it takes, and that nobody uses that again."""

import numpy as np
import pytest

import hmatrix as hm
from hmatrix.factor import climb
from tests.helpers import definite_matrix, error_ratio, to_numpy


def test_overwriting_takes_the_memory_of_every_library(xp, rng):
    A = definite_matrix(64, rng)
    H = hm.from_dense(xp.asarray(A, "float64"), levels=2, rtol=1e-8, symmetric=True)
    x = xp.asarray(rng.standard_normal(64), "float64")
    exact = hm.factorize(H).solve(x)
    leaves, before = H.leaves, to_numpy(H.leaves).copy()
    F = hm.factorize(H, overwrite=True)
    assert error_ratio(F.solve(x), to_numpy(exact)) < 1e-12
    # the standard promises no memory to write to
    taken = not np.array_equal(to_numpy(leaves), before)
    assert taken == (xp.name != "array_api_strict")


def test_an_overwritten_matrix_refuses_use(tmp_path, rng):
    H = hm.from_dense(definite_matrix(32, rng), levels=2, symmetric=True)
    b = rng.standard_normal(32)
    F = hm.factorize(H, overwrite=True)
    uses = (
        lambda: H @ b,
        lambda: H + H,
        lambda: H.leaves,
        lambda: hm.norm(H),
        lambda: hm.factorize(H),
        lambda: F.solve(b, refine=1),
        lambda: F.solve(b, rtol=1e-12),
        lambda: hm.inverse(F),
        lambda: hm.save(tmp_path / "F.safetensors", F),
    )
    for use in uses:
        with pytest.raises(hm.OverwrittenError, match="overwrite=False"):
            use()
    assert repr(H) == "HODLR(n=32, levels=2, overwritten)"
    assert not hasattr(H, "no_such_thing")


def test_what_cannot_be_overwritten_is_said_or_copied(rng):
    A = np.eye(8)
    A[0, 4] = A[4, 0] = 1.5
    bad = hm.from_dense(A, levels=1, symmetric=True)
    with pytest.raises(hm.NotPositiveDefiniteError):
        hm.factorize(bad, overwrite=True)  # and not another method, of nothing
    with pytest.raises(hm.OverwrittenError):
        bad.diagonal()
    eye = hm.identity(16, levels=2)
    eye.leaves.flags.writeable = False
    F = hm.factorize(eye, 1.0, overwrite=True)
    assert F.logdet() == pytest.approx(16 * np.log(2))
    A = rng.standard_normal((16, 16)) + 16 * np.eye(16)
    H = hm.from_dense(A, levels=2)
    F = hm.factorize(H, overwrite=True)  # by inversion
    np.testing.assert_allclose(H @ F.solve(A[0]), A[0], rtol=1e-10)
    torch = pytest.importorskip("torch")
    wanting = hm.identity(16, levels=2, like=torch.ones(1)).map(
        lambda x: x.clone().requires_grad_()
    )
    with pytest.raises(ValueError, match="`overwrite` must be False"):
        hm.factorize(wanting, overwrite=True)
    wanting.diagonal()


def in_columns(x):
    """Copy an array with its first axis next to each other in memory."""
    return np.array(x, order="F")


def test_factors_in_column_order_are_overwritten_alike(rng, monkeypatch):
    A = definite_matrix(64, rng)
    H = hm.from_dense(A, levels=4, rtol=1e-8, definite=True)
    expected = hm.factorize(H).solve(A)
    # several levels above what is worked on at once
    monkeypatch.setattr(climb, "CACHE", 2**8)
    F = hm.factorize(H.map(in_columns), overwrite=True)
    np.testing.assert_allclose(F.solve(A), expected, rtol=1e-10, atol=1e-12)


def test_mlr_factors_in_column_order_give_the_same_samples(rng, monkeypatch):
    tree = hm.ClusterTree(64, 4)
    factors = tuple(
        in_columns(rng.standard_normal((tree.nodes(k), tree.size(k), 2)))
        for k in range(4)
    )
    M = hm.MLR(tree, np.broadcast_to(np.eye(4), (16, 4, 4)), factors)
    monkeypatch.setattr(climb, "CACHE", 2**8)
    W = hm.factorize(M).sample(np.eye(64))
    assert error_ratio(W @ W.T, M.to_dense()) < 1e-14


def test_an_older_factor_of_an_overwritten_matrix_refuses_too(rng):
    H = hm.from_dense(definite_matrix(64, rng), levels=2, symmetric=True)
    F, b = hm.factorize(H, method="cholesky"), rng.standard_normal(64)
    make = F._factor.again  # what samples are drawn by, made from the leaves
    hm.factorize(H, method="cholesky", overwrite=True)
    for use in (lambda: F.solve(b), lambda: F.sample(b), make):
        with pytest.raises(hm.OverwrittenError):
            use()
