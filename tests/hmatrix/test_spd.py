"""Positive definite matrices: symmetric factors, and compression that keeps them so."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from hmatrix.factor import climb
from tests.helpers import assert_in, definite_matrix, error_ratio, to_numpy
from tests.strategies import SEEDS, SIZES, cluster_trees, make_samples

DTYPES = ("float32", "float64", "complex64", "complex128")


def rounding(dtype):
    return 1e-5 if dtype in ("float32", "complex64") else 1e-13


@st.composite
def definite_cases(draw):
    """A definite HODLR matrix with its dense form, of any dtype, tree and rank."""
    tree, dtype = draw(cluster_trees()), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(SEEDS))
    A = definite_matrix(tree.n, rng, is_complex="complex" in dtype).astype(dtype)
    max_rank = draw(st.sampled_from([0, 1, 3, None]))
    H = hm.from_dense(A, tree=tree, rtol=1e-6, max_rank=max_rank, definite=True)
    shift = draw(st.sampled_from([0.0, 0.5]))
    D = to_numpy(H.to_dense()).astype(np.result_type(dtype, np.float64))
    return hm.factorize(H, shift, method="cholesky"), D + shift * np.eye(tree.n)


@given(definite_cases(), SEEDS)
def test_the_factor_times_its_adjoint_is_the_matrix(case, seed):
    F, D = case
    n, tolerance = len(D), rounding(F.space.name)
    W = F.sample(np.eye(n, dtype=F.space.dtype))
    assert_in(W, F.matrix.leaves)
    assert error_ratio(W @ W.conj().T, D) < tolerance
    x = np.random.default_rng(seed).standard_normal(n).astype(F.space.dtype)
    factor = 10 * tolerance * np.linalg.cond(D)
    assert error_ratio(F.whiten(F.sample(x)), x) < factor
    assert error_ratio(F.sample(F.whiten(x)), x) < factor
    energy = np.linalg.norm(F.whiten(x)) ** 2
    assert energy == pytest.approx(
        np.real(x.conj() @ np.linalg.solve(D, x)), rel=factor
    )


@given(definite_cases(), SEEDS)
def test_it_solves_and_inverts(case, seed):
    F, D = case
    n, factor = len(D), 10 * rounding(F.space.name) * np.linalg.cond(D)
    x = np.random.default_rng(seed).standard_normal((n, 2)).astype(F.space.dtype)
    b = (D @ x).astype(F.space.dtype)
    assert error_ratio(F.solve(b), x) < factor
    assert error_ratio(F.solve(b, refine=0, adjoint=True), x) < factor
    exact = np.linalg.inv(D)
    assert error_ratio(F.inverse_diagonal(), np.diag(exact)) < factor
    assert error_ratio(F.inverse().to_dense(), exact) < factor
    assert error_ratio(F.inverse().H.to_dense(), exact) < factor


@given(definite_cases())
def test_the_log_determinant_is_not_that_of_the_factor(case):
    F, D = case
    # a factor alone would give half of it
    exact = np.linalg.slogdet(D)[1]
    tolerance = rounding(F.space.name) * len(D) * np.linalg.cond(D)
    assert abs(F.logdet() - exact) < tolerance
    assert F.slogdet() == (1.0, F.logdet())
    assert isinstance(F.logdet(), float)


def test_every_library_gives_one_factor(xp, dtype, rng):
    A = definite_matrix(37, rng)
    H = hm.from_dense(xp.asarray(A, dtype), levels=2, rtol=1e-6, symmetric=True)
    F = hm.factorize(H, 0.1, method="cholesky")
    x = xp.asarray(rng.standard_normal(37), dtype)
    reference = hm.factorize(
        hm.from_dense(A, levels=2, rtol=1e-6, symmetric=True), 0.1, method="cholesky"
    )
    # compressions of two dtypes differ by as much as they may lose
    for name in ("sample", "whiten", "solve"):
        y = getattr(F, name)(x)
        assert_in(y, x)
        assert (
            error_ratio(y, getattr(reference, name)(to_numpy(x).astype(float))) < 1e-4
        )
    assert F.logdet() == pytest.approx(reference.logdet(), rel=1e-4, abs=1e-3)
    assert error_ratio(F.inverse_diagonal(), reference.inverse_diagonal()) < 1e-4


@given(SIZES, st.integers(0, 4), st.integers(1, 6), SEEDS)
def test_mlr_matrices_and_their_inverses_have_a_factor(n, levels, rank, seed):
    rng = np.random.default_rng(seed)
    levels = min(levels, n.bit_length() - 1)
    stream = hm.StreamingMLR(n, levels, rank)
    stream.update(make_samples("walk", 30, n, rng))
    F = hm.factorize(stream.result(), 0.1)
    D = to_numpy(F.matrix.to_dense()) + 0.1 * np.eye(n)
    for G, exact in (
        (F, D),
        (hm.factorize(F.inverse()), np.linalg.inv(D)),  # of sign −1
    ):
        W = G.sample(np.eye(n))
        tolerance = 1e-13 * np.linalg.cond(D)
        assert error_ratio(W @ W.T, exact) < tolerance
        assert error_ratio(G.whiten(W), np.eye(n)) < tolerance


def test_samples_have_the_covariance(rng):
    n = 24
    A = definite_matrix(n, rng)
    F = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-12), method="cholesky")
    X = F.sample(rng.standard_normal((n, 20_000)))
    # xᴴ A⁻¹ x of every sample is chi-squared
    energies = np.sum(F.whiten(X) ** 2, axis=0)
    assert scipy.stats.kstest(energies, scipy.stats.chi2(n).cdf).pvalue > 0.01
    assert error_ratio(X @ X.T / X.shape[1], A) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_samples_are_drawn_by_a_generator(dtype, xp, rng):
    n = 24
    A = xp.asarray(definite_matrix(n, rng).astype(dtype))
    F = hm.factorize(hm.from_dense(A, levels=2), method="cholesky")
    X = F.sample(np.random.default_rng(1), 20_000)
    assert (X.dtype, tuple(X.shape)) == (A.dtype, (n, 20_000))
    X, A = to_numpy(X), to_numpy(A)
    assert error_ratio(X @ X.conj().T / X.shape[1], A) < 0.05
    assert tuple(F.sample(np.random.default_rng(1)).shape) == (n,)
    with pytest.raises(TypeError, match="`size` goes with"):
        F.sample(xp.asarray(X[:, 0]), 3)


def test_scaled_bases_do_not_harm_the_factor(rng):
    """Neither wild scales in U and V nor dependent columns are the matrix's fault."""
    tree, A = hm.ClusterTree(32, 1), 2.0 * np.eye(32)
    u, v = rng.standard_normal((2, 16)) / 8
    A[:16, 16:] = np.outer(u, v)
    A[16:, :16] = A[:16, 16:].T
    U = np.stack([u * 1e12, u * 1e12, 0 * u], axis=1)[None]
    V = np.stack([v * 1e-12, v * 1e-12, v], axis=1)[None]
    block = hm.LowRank(U, np.array([[3.0, -2.0, 5.0]]), V)
    H = hm.HODLR(tree, np.stack([A[:16, :16], A[16:, 16:]]), (block,))
    F = hm.factorize(H, method="cholesky")
    W = F.sample(np.eye(32))
    assert error_ratio(W @ W.T, A) < 1e-14
    assert F.logdet() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-14)


@given(definite_cases())
def test_a_factor_over_its_matrix_is_the_same(case):
    F, D = case
    H, b = F.matrix.map(lambda x: x.copy()), D[:, 0].astype(F.space.dtype)
    G = hm.factorize(H, F.shift, method="cholesky", overwrite=True)
    np.testing.assert_array_equal(G.solve(b), F.solve(b))
    # the one has leaves, the other their inverses
    tolerance = 10 * rounding(F.space.name) * np.linalg.cond(D)
    assert error_ratio(G.sample(b), F.sample(b)) < tolerance
    np.testing.assert_array_equal(G.inverse_diagonal(), F.inverse_diagonal())
    assert G.logdet() == F.logdet()
    assert (G.nbytes, G.shape) == (F.nbytes, F.shape)


def test_blocks_of_more_columns_than_rows_are_factorized(rng):
    tree, A = hm.ClusterTree(16, 2), 4.0 * np.eye(16)
    H = hm.from_dense(A, tree=tree, symmetric=True)
    wide = [
        hm.LowRank(
            rng.standard_normal((nodes, half, 11)) / 8,
            np.ones((nodes, 11)),
            rng.standard_normal((nodes, half, 11)) / 8,
        )
        for nodes, half in ((1, 8), (2, 4))
    ]
    H = hm.HODLR(tree, H.leaves, tuple(wide))
    W = hm.factorize(H, method="cholesky").sample(np.eye(16))
    assert error_ratio(W @ W.T, H.to_dense()) < 1e-14


def indefinite_node(value):
    """A definite leaf each, and at the root a block that is too large by ``value``."""
    A = np.eye(8)
    A[0, 4] = A[4, 0] = 1 + value
    return hm.from_dense(A, levels=1, symmetric=True)


@pytest.mark.parametrize("levels", [1, 2, 6])
def test_threads_and_pieces_do_not_change_the_factor(levels, rng, monkeypatch):
    A = definite_matrix(500, rng)
    H = hm.from_dense(A, levels=levels, rtol=1e-6, definite=True)
    whole = hm.factorize(H, method="cholesky")
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(climb, "default_workers", lambda _, w=workers: w)
        monkeypatch.setattr(climb, "SMALL", 1)
        monkeypatch.setattr(climb, "CACHE", 2**12)
        monkeypatch.setattr(climb, "PIECE", 2**10)
        found.append(hm.factorize(H, method="cholesky"))
    b = rng.standard_normal((500, 3))
    for F in found:
        assert error_ratio(F.solve(b), whole.solve(b)) < 1e-13
        assert error_ratio(F.sample(b), whole.sample(b)) < 1e-13
        np.testing.assert_allclose(F.logdet(), whole.logdet(), rtol=1e-12)
    bad = H - 2 * np.linalg.eigvalsh(A)[-1] * hm.from_diagonal(
        (np.arange(500) == 400) * 1.0, levels=levels
    )
    with pytest.raises(hm.NotPositiveDefiniteError, match=f"level {levels}, leaf") as e:
        hm.factorize(bad, method="cholesky")
    assert e.value.node == 400 // H.tree.leaf_size


def test_what_is_not_definite_is_named():
    A = np.diag([1.0, 1, 1, -0.5, 1, 1, 1, 1])
    with pytest.raises(
        hm.NotPositiveDefiniteError,
        match=r"level 2, leaf 1: smallest eigenvalue -0\.5 with `shift` = 0",
    ) as caught:
        hm.factorize(hm.from_dense(A, levels=2), method="cholesky")
    assert (caught.value.level, caught.value.node) == (2, 1)
    with pytest.raises(
        hm.NotPositiveDefiniteError,
        match=r"level 0, node 0: smallest eigenvalue -0\.25 with `shift` = 0",
    ):
        hm.factorize(indefinite_node(0.25), method="cholesky")
    assert hm.factorize(indefinite_node(0.25), 0.5, method="cholesky").logdet() > 0


@pytest.mark.parametrize("part", ["leaves", "S", "all"])
def test_nan_is_found(part, xp):
    A = definite_matrix(32, np.random.default_rng(0))
    H = hm.from_dense(xp.asarray(A, "float64"), levels=2, symmetric=True)
    bad = H.map(lambda x: x * np.nan)
    upper = {"leaves": H.upper, "all": bad.upper}.get(
        part,
        tuple(
            hm.LowRank(a.U, b.S, a.V) for a, b in zip(H.upper, bad.upper, strict=True)
        ),
    )
    H = hm.HODLR(H.tree, H.leaves if part == "S" else bad.leaves, upper)
    for method in ("cholesky", "auto"):
        with pytest.raises(hm.NonFiniteError, match="NaN or infinite values at level"):
            hm.factorize(H, method=method)


def test_the_block_that_fails_is_named_whatever_the_scales():
    A = np.eye(8) * 1e-20
    A[:4, :4] = np.ones((4, 4)) + 1e-15 * np.eye(4)
    H = hm.from_dense(A, levels=1, symmetric=True)
    with pytest.raises(hm.NotPositiveDefiniteError, match="level 1, leaf 0"):
        hm.factorize(H, method="cholesky")


def test_tiny_columns_need_no_warnings(rng):
    A = np.eye(32, dtype="complex64")
    A[:16, 16:] = np.logspace(0, -30, 16) * rng.standard_normal((16, 16)) / 32
    A[16:, :16] = A[:16, 16:].conj().T
    tree, B = hm.ClusterTree(32, 1), A[None, :16, 16:]
    ones, eye = np.ones((1, 16), "float32"), np.eye(16, dtype="complex64")[None]
    H = hm.HODLR(tree, np.stack([eye[0], eye[0]]), (hm.LowRank(B, ones, eye),))
    W = hm.factorize(H, method="cholesky").sample(np.eye(32, dtype="complex64"))
    assert error_ratio(W @ W.conj().T, A) < 1e-6


def test_auto_inverts_what_is_not_definite(rng):
    F = hm.factorize(indefinite_node(0.25))
    D = to_numpy(F.matrix.to_dense())
    sign, log = np.linalg.slogdet(D)
    assert F.slogdet() == (sign, pytest.approx(log))
    assert sign == -1
    assert type(F).__name__ == "HODLRFactorization"
    b = rng.standard_normal(8)
    assert error_ratio(D @ F.solve(b), b) < 1e-13
    with pytest.raises(TypeError, match=r'no symmetric factor W.*method="cholesky"'):
        F.sample(b)


def test_methods_that_do_not_apply_are_refused(rng):
    general = hm.from_dense(np.triu(np.ones((8, 8))), levels=1)
    with pytest.raises(ValueError, match="`H` must be Hermitian"):
        hm.factorize(general, method="cholesky")
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'chol"):
        hm.factorize(general, method="lu")
    stream = hm.StreamingMLR(8, 1, 2)
    stream.update(rng.standard_normal((9, 8)))
    with pytest.raises(ValueError, match="`method` must be one of 'auto', got"):
        hm.factorize(stream.result(), method="cholesky")


# Compression that keeps definiteness


@st.composite
def semidefinite_matrices(draw):
    """Dense Hermitian matrices with eigenvalues from zero, and a tree."""
    tree, rng = draw(cluster_trees()), np.random.default_rng(draw(SEEDS))
    kind = draw(st.sampled_from(["samples", "kernel", "complex"]))
    if kind == "kernel":
        t = np.sort(rng.random(tree.n))
        A = np.exp(-(((t[:, None] - t) / 0.1) ** 2))
    else:
        X = rng.standard_normal((tree.n, max(1, tree.n // 3)))
        if kind == "complex":
            X = X + 1j * rng.standard_normal(X.shape)
        A = X @ X.conj().T
    return (A + A.conj().T) / 2, tree


def smallest_eigenvalue(A):
    """Relative to the norm."""
    return np.linalg.eigvalsh(A)[0] / np.linalg.norm(A, 2)


@given(semidefinite_matrices(), st.floats(1e-6, 0.5))
def test_compression_never_goes_below_a_definite_matrix(case, rtol):
    A, tree = case
    H = hm.from_dense(A, tree=tree, rtol=rtol, definite=True)
    D = to_numpy(H.to_dense())
    assert np.linalg.eigvalsh(D - A)[0] > -1e-13 * np.linalg.norm(A)
    assert smallest_eigenvalue(D) > -1e-13
    error = np.linalg.norm(D - A) / np.linalg.norm(A)
    assert error <= rtol + 1e-13
    assert abs(error - H.error) <= 1e-13 + 1e-6 * error


@given(semidefinite_matrices(), st.integers(0, 3))
def test_nor_does_it_with_capped_ranks(case, max_rank):
    A, tree = case
    H = hm.from_dense(A, tree=tree, max_rank=max_rank, definite=True)
    D = to_numpy(H.to_dense())
    assert np.linalg.eigvalsh(D - A)[0] > -1e-13 * np.linalg.norm(A)
    assert all(rank <= max_rank for rank in H.ranks)
    assert H.error == pytest.approx(
        np.linalg.norm(D - A) / np.linalg.norm(A), abs=1e-13
    )


@given(semidefinite_matrices(), st.floats(1e-6, 0.5))
def test_truncation_never_goes_below_either(case, rtol):
    A, tree = case
    H = hm.from_dense(A, tree=tree, rtol=1e-10, definite=True)
    G = hm.truncate(H, rtol=rtol, definite=True)
    D, E = to_numpy(H.to_dense()), to_numpy(G.to_dense())
    assert np.linalg.eigvalsh(E - D)[0] > -1e-13 * np.linalg.norm(A)
    assert np.linalg.norm(E - D) <= (rtol + 1e-13) * np.linalg.norm(D)
    assert np.linalg.norm(E - A) <= (G.error + 1e-13) * np.linalg.norm(A)
    assert all(a <= b for a, b in zip(G.ranks, H.ranks, strict=True))


def test_what_is_cut_and_what_is_added_for_it_share_the_tolerance():
    """Both as large as they may be: a block of equal singular values."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0]
    for size in (0.0705, 0.09):
        A = np.block([[np.eye(32), size * Q], [size * Q.T, np.eye(32)]])
        H = hm.from_dense(A, levels=1, rtol=0.1, definite=True)
        assert H.ranks == ((0,) if size < 0.1 / math.sqrt(2) else (32,))
        assert error_ratio(H.to_dense(), A) <= 0.1


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_without_it_definiteness_is_lost(xp, rtol):
    t = np.linspace(0, 1, 128)
    A = xp.asarray(np.exp(-(((t[:, None] - t) / 0.1) ** 2)) + 1e-8 * np.eye(128))
    plain, kept = (
        hm.from_dense(A, levels=4, rtol=rtol, definite=definite)
        for definite in (False, True)
    )
    assert smallest_eigenvalue(to_numpy(plain.to_dense())) < -1e-2 * rtol
    assert smallest_eigenvalue(to_numpy(kept.to_dense())) > 0
    with pytest.raises(hm.NotPositiveDefiniteError):
        hm.factorize(plain, method="cholesky")
    hm.factorize(kept, method="cholesky")
    fine = hm.from_dense(A, levels=4, rtol=1e-12)
    cut = hm.truncate(fine, rtol=rtol)
    assert smallest_eigenvalue(to_numpy(cut.to_dense())) < -1e-2 * rtol
    hm.factorize(hm.truncate(fine, rtol=rtol, definite=True), method="cholesky")


def test_only_hermitian_matrices_can_be_kept_definite(rng):
    general = np.triu(np.ones((8, 8)))
    with pytest.raises(ValueError, match="`definite` is true, but `A` differs"):
        hm.from_dense(general, levels=1, definite=True)
    with pytest.raises(ValueError, match="`definite` is true, but `H` is not stored"):
        hm.truncate(hm.from_dense(general, levels=1), definite=True)
    stream = hm.StreamingMLR(8, 1, 2)
    stream.update(rng.standard_normal((9, 8)))
    with pytest.raises(ValueError, match="not by `rtol` or `definite`"):
        hm.truncate(stream.result(), max_rank=1, definite=True)
