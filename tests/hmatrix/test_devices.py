"""What devices are spared: waiting hosts, and factorizations of matrices in turn."""

import sys

import numpy as np
import pytest
import torch

import hmatrix as hm
from hmatrix._backend import (
    batched,
    cholesky,
    inverse,
    linalg,
    orthonormal_parts,
    solve,
    try_cholesky,
)
from tests import cuda_like, cupy_like
from tests.helpers import Library, error_ratio, to_numpy

CUPY = Library("cupy")
EPS = {"float32": 1e-6, "float64": 1e-15, "complex64": 1e-6, "complex128": 1e-15}


def batch(kind, shape, dtype, rng):
    """Random matrices of some spectrum."""
    A = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    if kind == "graded":
        A = A * 10.0 ** -np.linspace(0, 20, shape[-1])
    elif kind == "deficient":
        A = A[..., :3] @ A[..., :3, :]
    elif kind == "zero":
        A[::2] = 0
    return (A if "complex" in dtype else A.real).astype(dtype)


def assert_orthonormal(Q, eps):
    Q = to_numpy(Q)
    gram = Q.conj().swapaxes(-2, -1) @ Q
    assert abs(gram - np.eye(gram.shape[-1])).max() < 100 * eps


@pytest.mark.parametrize("kind", ["full", "graded", "deficient", "zero"])
@pytest.mark.parametrize("shape", [(4, 9, 9), (2, 3, 12, 5), (4, 5, 12)])
def test_many_matrices_are_factorized_at_once(xp, dtype, kind, shape, rng):
    for name in (
        dtype,
        dtype.replace("float32", "complex64").replace("float64", "complex128"),
    ):
        if xp.name == "array_api_strict" and "complex" in name:
            continue
        A, eps = batch(kind, shape, name, rng), EPS[name]
        a = xp.asarray(A)
        for complete in (False, True):
            Q, R = batched.householder_qr(a, complete=complete)
            assert_orthonormal(Q, eps)
            assert error_ratio(to_numpy(Q) @ to_numpy(R), A) < 50 * eps
            assert np.array_equal(np.triu(to_numpy(R)), to_numpy(R))
        U, S, V = map(to_numpy, linalg.svd_by_eigh(a))
        assert_orthonormal(U, eps)
        assert_orthonormal(V, eps)
        exact = np.linalg.svd(A.astype(np.complex128), compute_uv=False)
        assert abs(S - exact).max() <= 50 * eps * exact.max()
        assert (np.diff(S) <= 0).all()
        product = (U * S[..., None, :]) @ V.conj().swapaxes(-2, -1)
        assert error_ratio(product, A) < 100 * eps


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_decompositions_survive_subnormal_numbers(dtype, rng):
    """MKL divides by them, as by what rounding leaves of a block of one row."""
    tiny = np.finfo(dtype).smallest_normal
    A = rng.standard_normal((200, 8, 5)) + 1j * rng.standard_normal((200, 8, 5))
    A[:, 1:] *= np.sqrt(tiny) / 50 * rng.random((200, 7, 1)) ** 20
    A[:100, 2:] *= np.sqrt(tiny)
    a = torch.from_numpy(A.astype(dtype))
    finite = [
        *linalg.qr(a),
        *linalg.complete_qr(a),
        linalg.triangle(a),
        *linalg.svd(a),
        *linalg.svd_by_eigh(a),
        *batched.householder_qr(a),
    ]
    assert all(bool(torch.isfinite(x).all()) for x in finite)
    for Q in (finite[0], finite[2], finite[5], finite[7], finite[8], finite[10]):
        assert_orthonormal(Q, EPS[dtype])


def test_a_cyclic_shift_has_a_stored_inverse_in_complex64():
    """The rows left of its blocks, one number each, once had a QR of NaN on torch."""
    A = torch.roll(torch.eye(61, dtype=torch.complex64), 1, 0)
    X = hm.inverse(hm.from_dense(A, leaf_size=8, rtol=0.0))
    assert error_ratio(X.to_dense(), A.T) < 1e-5


def kernel_matrix(n, rtol=1e-9):
    t = np.linspace(0, 1, n)
    A = 1 / (1 + 9 * abs(t[:, None] - t)) + np.eye(n)
    return hm.from_dense(CUPY.asarray(A), leaf_size=16, rtol=rtol)


needs_stand_in = pytest.mark.skipif(
    not hasattr(sys.modules.get("cupy"), "stand_in"), reason="CuPy itself is here"
)


@needs_stand_in
def test_the_host_never_waits_for_products_and_solutions(rng):
    H = kernel_matrix(200)
    tree = hm.ClusterTree(200, 3, permutation=rng.permutation(200))
    stream = hm.StreamingMLR(tree, rank=4, like=H.leaves)
    stream.update(CUPY.asarray(rng.standard_normal((300, 200))))
    x = CUPY.asarray(rng.standard_normal((200, 2)))
    factorizations = [
        hm.factorize(H, method=method)
        for method in ("cholesky", "inversion", "orthogonal")
    ]
    M = stream.result()
    factorizations.append(hm.factorize(M, 0.1))
    cupy_like.seen["waits"] = 0
    for matrix in (H, M):
        matrix @ x
        matrix.rmatmat(x)
        matrix.diagonal()
    for F in factorizations:
        F.solve(x)
        F.solve(x, adjoint=True)
        if F is not factorizations[1]:  # which looks at whether its terms cancelled
            F.inverse_diagonal()
    factorizations[0].sample(x)
    factorizations[0].whiten(x)
    assert cupy_like.seen["waits"] == 0


@needs_stand_in
@pytest.mark.parametrize("method", ["cholesky", "inversion", "MLR"])
def test_the_host_waits_for_no_level_of_a_factorization(method, rng):
    t = np.linspace(0, 1, 200)
    A = np.exp(-abs(t[:, None] - t))

    def waits(levels):
        H = hm.from_dense(CUPY.asarray(A), levels=levels)
        stream = hm.StreamingMLR(200, levels, rank=4, like=H.leaves)
        stream.update(CUPY.asarray(rng.standard_normal((300, 200))))
        M = stream.result()
        cupy_like.seen["waits"] = 0
        F = hm.factorize(M, 0.1) if method == "MLR" else hm.factorize(H, method=method)
        if method != "inversion":
            F.sample(CUPY.asarray(t))  # whose factor an MLR matrix has yet to make
        return cupy_like.seen["waits"]

    assert waits(2) == waits(5) <= 3


@needs_stand_in
def test_a_zero_matrix_is_singular_at_its_leaf():
    zero = hm.from_dense(CUPY.asarray(np.zeros((8, 8))), levels=1)
    with pytest.raises(hm.SingularLeafError, match="Singular at leaf 0"):
        hm.factorize(zero, method="inversion")


@needs_stand_in
@pytest.mark.parametrize("spoilt", ["leaf", "node", "NaN"])
def test_what_a_device_is_asked_in_the_end_is_said_as_the_host_says_it(spoilt, rng):
    """Which block of which level has no Cholesky factor, in the same words."""
    t = np.linspace(0, 1, 120)
    A = np.exp(-abs(t[:, None] - t)) + 0.1 * np.eye(120)
    if spoilt == "leaf":
        A[70, 70] = -1
    if spoilt == "node":
        A[:60, 60:] *= 3
        A[60:, :60] *= 3
    H = hm.from_dense(A, leaf_size=16, symmetric=True)
    if spoilt == "NaN":
        H.leaves[3, 2, 2] = np.nan
    errors = []
    for matrix in (H, H.to(like=CUPY.asarray(A))):
        with pytest.raises(hm.HMatrixError) as caught:
            hm.factorize(matrix, method="cholesky")
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]).split(":")[0] == str(errors[1]).split(":")[0]


@needs_stand_in
@pytest.mark.parametrize("kind", ["repeated", "graded", "zero"])
def test_columns_that_one_decomposition_cannot_tell_apart(kind, rng):
    """Found in the end, and factored again with Householder's decompositions."""
    t = np.linspace(0, 1, 120)
    A = np.exp(-abs(t[:, None] - t)) + np.eye(120)
    H = hm.from_dense(A, leaf_size=16, symmetric=True)
    if kind == "repeated":
        upper = [
            hm.LowRank(*(np.concatenate([x, x], -1) for x in (b.U, b.S / 2, b.V)))
            for b in H.upper
        ]
    else:
        scale = 0.0 if kind == "zero" else 1e-12
        upper = [
            hm.LowRank(b.U * np.where(np.arange(b.rank) % 2, 1, scale), b.S, b.V)
            for b in H.upper
        ]
    H = hm.HODLR(H.tree, H.leaves, tuple(upper))
    x = rng.standard_normal((120, 2))
    F = hm.factorize(H.to(like=CUPY.asarray(A)), method="cholesky")
    assert (
        error_ratio(F.solve(CUPY.asarray(x)), np.linalg.solve(H.to_dense(), x)) < 1e-12
    )
    assert float(F.logdet()) == pytest.approx(
        np.linalg.slogdet(H.to_dense())[1], rel=1e-12
    )


@needs_stand_in
def test_the_host_waits_once_for_the_norms_of_all_levels(rng):
    A = CUPY.asarray(rng.standard_normal((200, 200)))
    Z = CUPY.asarray(rng.standard_normal((300, 200)))

    def waits(compute):
        cupy_like.seen["waits"] = 0
        compute()
        return cupy_like.seen["waits"]

    def of_levels(levels):
        H = hm.from_dense(A, levels=levels, max_rank=5)
        stream = hm.StreamingMLR(200, levels, rank=4, like=A)
        stream.update(Z)
        M = stream.result()
        computations = (
            lambda: hm.norm(H),
            lambda: hm.norm(M),
            lambda: H + H,
            lambda: hm.add_low_rank(H, A, A),
        )
        return [waits(compute) for compute in computations]

    assert of_levels(2) == of_levels(5)


@needs_stand_in
@pytest.mark.parametrize("kind", ["full", "graded", "deficient"])
def test_the_host_waits_once_for_orthonormal_columns(kind, rng):
    X = batch(kind, (3, 30, 6), "float64", rng)
    cupy_like.seen["waits"] = 0
    Q, T, R = orthonormal_parts(CUPY.asarray(X))
    assert cupy_like.seen["waits"] == 1
    assert_orthonormal(Q @ T, 1e-15)
    assert error_ratio(to_numpy(Q @ T @ R), X) < 1e-14


@needs_stand_in
@pytest.mark.parametrize("method", ["eigh", "randomized"])
@pytest.mark.parametrize("levels", [2, 5])
def test_the_host_waits_once_for_a_batch(method, levels, rng):
    like = CUPY.asarray(np.empty(0, dtype=np.float32))
    stream = hm.StreamingMLR(512, levels, 4, like=like, method=method)
    Z = CUPY.asarray(rng.standard_normal((700, 512)).astype(np.float32))
    stream.update(Z)
    cupy_like.seen["waits"] = 0
    stream.update(Z)
    assert cupy_like.seen["waits"] == 1  # for whether all numbers are finite


@needs_stand_in
def test_no_large_svd_is_batched(monkeypatch, rng):
    monkeypatch.setattr(batched, "MANY", 2)
    cupy_like.seen["svd"] = 0
    H = kernel_matrix(300, rtol=1e-12)
    G = hm.from_dense(
        CUPY.asarray(rng.standard_normal((300, 300))), levels=2, max_rank=40
    )
    hm.truncate(G + G, max_rank=30)
    hm.truncate(H + H, rtol=1e-6, definite=True)
    stream = hm.StreamingHODLR(300, 2, 30, like=H.leaves)
    stream.update(CUPY.asarray(rng.standard_normal((100, 300))))
    assert 0 < cupy_like.seen["svd"] <= cupy_like.BATCHED_SVD


@pytest.mark.parametrize(
    "library", ["torch", pytest.param("cupy", marks=needs_stand_in)]
)
def test_singular_matrices_have_no_finite_inverse_and_raise_nothing(library):
    xp = Library(library)
    a = xp.asarray(np.array([np.eye(2), np.zeros((2, 2)), [[1.0, 2.0], [2.0, 4.0]]]))
    found = to_numpy(inverse(a))
    assert np.array_equal(found[0], np.eye(2))
    assert not np.isfinite(found[1:]).any()
    solve(a, a)
    assert cholesky(a) is None
    assert np.array_equal(to_numpy(cholesky(a, sure=True))[0], np.eye(2))
    assert not try_cholesky(a)[1]
    for fine in (a[:1], a[:, :0, :0]):
        assert try_cholesky(fine)[1]


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_devices_decompose_complex_numbers_in_double_precision(dtype, monkeypatch, rng):
    """Of complex64 a batched decomposition may return vectors that are not orthonormal."""
    A, seen, find = batch("full", (5, 9, 9), dtype, rng), [], linalg._eigh
    S = A + A.conj().swapaxes(-2, -1)

    def watched(a):
        seen.append(str(a.dtype))
        return find(a)

    monkeypatch.setattr(linalg, "_eigh", watched)
    values, vectors = linalg.eigh_descending(CUPY.asarray(S))
    assert seen == [{"float32": "float32", "complex64": "complex128"}[dtype]]
    assert (str(values.dtype), str(vectors.dtype)) == ("float32", dtype)
    values, vectors = to_numpy(values), to_numpy(vectors)
    assert_orthonormal(vectors, EPS[dtype])
    assert error_ratio(S @ vectors, vectors * values[:, None, :]) < 100 * EPS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("n", [8, 40, 100])
def test_devices_find_eigenvectors_and_singular_vectors(library, n, dtype, rng):
    """Of many matrices, by whichever library is to do it."""
    pytest.importorskip(library)
    A, eps = batch("full", (50, n, n), dtype, rng), EPS[dtype]
    S = A + A.conj().swapaxes(-2, -1)
    xp = Library(library, "cuda")
    values, vectors = map(to_numpy, linalg.eigh_descending(xp.asarray(S)))
    assert type(linalg.eigh_descending(xp.asarray(S))[1]) is type(xp.asarray(S))
    assert_orthonormal(vectors, eps)
    assert (np.diff(values) <= 0).all()
    assert error_ratio(S @ vectors, vectors * values[:, None, :]) < 100 * eps
    U, sizes, V = map(to_numpy, linalg.svd(xp.asarray(A)))
    assert_orthonormal(U, eps)
    assert_orthonormal(V, eps)
    product = (U * sizes[:, None, :]) @ V.conj().swapaxes(-2, -1)
    assert error_ratio(product, A) < 100 * eps


@pytest.mark.skipif(not cuda_like.usable, reason="no stand-in for CUDA")
def test_all_is_done_on_the_device_of_the_matrix(rng):
    """Not on the current one, or on the host."""
    t = np.linspace(0, 1, 40)
    K = np.exp(-3 * abs(t[:, None] - t)) + np.eye(40)
    X = rng.standard_normal((40, 3))
    with cuda_like.installed():
        A, x = (torch.asarray(a, device="cuda:1") for a in (K, X))
        x.requires_grad_()
        H = hm.from_dense(A, levels=2, rtol=1e-12)
        F = hm.factorize(H, method="inversion")
        stream = hm.StreamingMLR(40, 2, rank=4, like=A)
        stream.update(x.detach().mT)
        M, N = stream.result(), hm.matmul(H, H)
        found = [F.solve(x), H @ x, N @ x, hm.factorize(M, 1.0).solve(x)]
        assert {y.device for y in found} == {A.device}
        sum(y.sum() for y in found).backward()
        assert x.grad.device == A.device
        assert_close = torch.testing.assert_close
        assert_close(found[0].detach().cpu(), torch.asarray(np.linalg.solve(K, X)))
        assert_close(found[2].detach().cpu(), torch.asarray(K @ K @ X))
