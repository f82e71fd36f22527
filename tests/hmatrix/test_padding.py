"""Padded rows of every matrix that the package makes are zero, to the last bit."""

import numpy as np
import pytest
import scipy.sparse

import hmatrix as hm
from tests.helpers import assert_padding_is_zero as check
from tests.strategies import make_samples

TREES = [
    hm.ClusterTree(97, 3),
    hm.ClusterTree(13, 3),
    hm.ClusterTree(97, 2, [20, 0, 30, 47]),
    hm.ClusterTree(13, 3, [1, 3, 2, 1, 0, 0, 5, 1]),
    hm.ClusterTree(53, 2, [50, 1, 1, 1], np.random.default_rng(0).permutation(53)),
]
KINDS = ("full", "kernel", "low rank")


def make(kind, n):
    rng = np.random.default_rng(n)
    t = np.sort(rng.random(n))
    if kind == "full":
        return rng.standard_normal((n, n))
    if kind == "kernel":
        return np.exp(-100 * (t[:, None] - t) ** 2)
    return np.outer(t, t)


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrices_and_arithmetic(xp, kind, tree):
    rtol = 0  # vectors of rounding errors are kept
    A = xp.asarray(make(kind, tree.n))
    H = hm.from_dense(A, tree=tree, rtol=rtol)
    check(H, hm.truncate(H, rtol=rtol), hm.truncate(H, rtol=0, max_rank=2))
    check(H + H, hm.add(H, H, rtol=rtol), hm.shift(H, 2.0), H.H)
    check(hm.add_low_rank(H, A[:, :2], rtol=rtol))
    check(H @ H, hm.matmul(H, H, rtol=rtol), hm.inverse(H, shift=30.0, rtol=rtol))
    if kind != "full":
        check(hm.truncate(H, rtol=1e-3, definite=True))
        check(hm.from_dense(A, tree=tree, rtol=1e-3, definite=True))


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_constructors(kind, tree):
    A = make(kind, tree.n)
    check(hm.from_entries(lambda i, j: A[i, j], tree.n, tree=tree, rtol=1e-12))
    check(hm.from_low_rank(A[:, :2], A[:, 1:3], tree=tree))
    check(hm.from_sparse(scipy.sparse.csr_array(A * (abs(A) > 0.9)), tree=tree))
    H = hm.from_dense(A, tree=tree, rtol=1e-14)
    check(hm.from_matvec(H, tree=tree, rtol=1e-10, symmetric=H.symmetric))
    check(hm.from_toeplitz(np.cos(A[0]), levels=2), hm.identity(tree.n, tree=tree))


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "few"])
def test_streams(xp, kind, tree, rng):
    X = xp.asarray(make_samples(kind, 40, tree.n, rng))
    for stream in (
        hm.StreamingMLR(tree, rank=3, like=X),
        hm.StreamingSketch(tree, rank=3, like=X),
        hm.StreamingHODLR(tree, rank=9, like=X),
    ):
        stream.update(X)
        H = stream.result()
        check(H, hm.truncate(H, max_rank=2), hm.inverse(H, shift=1.0))
        check(hm.inverse(H, shift=1.0, max_rank=1))
