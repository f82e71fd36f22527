import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import hmatrix as hm
from hmatrix.construct import toeplitz
from tests.helpers import assert_in, assert_padding_is_zero, relative, to_numpy, traced
from tests.strategies import SEEDS, trees

DTYPES = ["float32", "float64", "complex64", "complex128"]
#: Trees of 43 rows that move rows or have leaves of several sizes.
AWKWARD = [
    hm.ClusterTree.from_sizes([5, 0, 30, 8]),
    hm.ClusterTree(43, 3, permutation=np.random.default_rng(5).permutation(43)),
    hm.ClusterTree.from_sizes([1, 20, 20, 2], np.arange(43)[::-1]),
]
N = 2**14
QUARTER = 8 * N * N / 4


def tolerance(dtype):
    return 1e-5 if dtype in {"float32", "complex64"} else 1e-13


def numbers(rng, dtype, *shape):
    x = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


# --- identity and diagonal


@pytest.mark.parametrize("n", [1, 2, 43, 64])
def test_the_identity(n):
    H = hm.identity(n, leaf_size=8)
    assert np.array_equal(H.to_dense(), np.eye(n))
    assert not any(H.ranks)
    assert H.error == 0


def test_the_identity_goes_where_it_is_told(xp):
    like = xp.asarray(np.zeros(1), "float32")
    H = hm.identity(10, like=like, levels=1)
    assert_in(H.leaves, like)
    assert hm.identity(10, like=like, dtype="complex128").space.name == "complex128"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diagonal_matrix(xp, dtype, rng):
    d = numbers(rng, dtype, 43)
    array = xp.asarray(d)
    for tree in AWKWARD:
        H = hm.from_diagonal(array, tree=tree)
        assert_in(H.leaves, array)
        assert np.array_equal(to_numpy(H.to_dense()), np.diag(d))
        assert H.symmetric == (not dtype.startswith("complex"))


def test_a_complex_diagonal_of_real_numbers_is_hermitian():
    assert hm.from_diagonal(np.arange(1, 9) + 0j, levels=1).symmetric


# --- low rank


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [0, 1, 3, 50])
def test_a_low_rank_matrix_is_exact_in_every_tree(xp, dtype, r, rng):
    U, V = (numbers(rng, dtype, 43, r) for _ in range(2))
    S = rng.standard_normal(r).astype(U.real.dtype)
    d = numbers(rng, dtype, 43)
    A = U * S @ V.conj().T + np.diag(d)
    for tree in (*AWKWARD, hm.ClusterTree(43, 0)):
        H = hm.from_low_rank(*map(xp.asarray, (U, V, S, d)), tree=tree, rtol=0)
        assert_in(H.leaves, xp.asarray(U))
        assert not H.symmetric
        assert all(rank <= r for rank in H.ranks)
        assert relative(H, A) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_factor_makes_a_symmetric_matrix(dtype, rng):
    U = numbers(rng, dtype, 43, 4)
    S = np.array([3, -2, 1, 0], U.real.dtype)
    for tree in AWKWARD:
        H = hm.from_low_rank(U, S=S, tree=tree, rtol=0)
        assert H.symmetric
        assert np.array_equal(H.leaves, H.leaves.conj().swapaxes(1, 2))
        assert relative(H, U * S @ U.conj().T) <= tolerance(dtype)
        assert_padding_is_zero(H)


def test_an_imaginary_diagonal_is_not_hermitian():
    U, d = np.ones((12, 1)) + 0j, np.full(12, 1j)
    H = hm.from_low_rank(U, diagonal=d, levels=1)
    assert relative(H, np.ones((12, 12)) + 1j * np.eye(12)) <= 1e-14


@given(trees(), st.integers(1, 60), SEEDS, st.floats(1e-12, 0.5))
def test_low_rank_keeps_the_promise_and_the_error_is_true(tree, r, seed, rtol):
    (n, levels), rng = tree, np.random.default_rng(seed)
    U, V = rng.standard_normal((2, n, r)) * np.logspace(0, -5, r)
    A = U @ V.T
    H = hm.from_low_rank(U, V, levels=levels, rtol=rtol)
    error = relative(H, A)
    assert error <= rtol + 1e-13
    assert abs(error - H.error) <= 1e-13 + 1e-6 * error


def test_columns_that_cancel_do_not_loosen_the_promise(rng):
    u, v = rng.standard_normal((2, 64))
    small = 1e-6 * rng.standard_normal(64)
    A = np.outer(small, v)
    H = hm.from_low_rank(
        np.stack([u + small, u], 1), np.stack([v, -v], 1), levels=2, rtol=1e-3
    )
    assert relative(H, A) <= 1e-3


# --- sparse


@st.composite
def sparse_matrices(draw):
    n, levels = draw(trees())
    rng = np.random.default_rng(draw(SEEDS))
    A = sparse.random_array((n, n), density=draw(st.floats(0, 0.2)), rng=rng)
    A = A.tolil()
    for line in draw(st.lists(st.integers(0, n - 1), max_size=3)):
        A[line, :] = rng.standard_normal(n)
        A[:, n - 1 - line] = rng.standard_normal(n)
    A = A.tocsr()
    return (A + A.T if draw(st.booleans()) else A), levels


@given(sparse_matrices(), st.floats(1e-12, 0.5))
def test_sparse_keeps_the_promise_and_the_error_is_true(case, rtol):
    A, levels = case
    H = hm.from_sparse(A, levels=levels, rtol=rtol)
    error = relative(H, A.toarray())
    assert error <= rtol + 1e-13
    assert abs(error - H.error) <= 1e-13 + 1e-6 * error
    assert H.symmetric == np.array_equal(A.toarray(), A.toarray().T)


@given(sparse_matrices())
def test_a_sparse_matrix_is_exact_at_rtol_zero(case):
    A, levels = case
    assert relative(hm.from_sparse(A, levels=levels, rtol=0), A.toarray()) <= 1e-14


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_every_format_and_its_matrix_class(kind, rng):
    A = sparse.random_array((30, 30), density=0.2, rng=rng)
    for form in (A, sparse.csr_matrix(A)):
        H = hm.from_sparse(form.asformat(kind), levels=2, rtol=0)
        assert relative(H, A.toarray()) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_of_every_dtype_goes_to_every_library(xp, dtype, rng):
    A = sparse.random_array((43, 43), density=0.2, rng=rng).tocsr()
    A.data = numbers(rng, "complex128", A.nnz) if "complex" in dtype else A.data
    like = xp.asarray(np.zeros(1), dtype)
    for tree in AWKWARD:
        H = hm.from_sparse(A, like=like, dtype=dtype, tree=tree, rtol=0)
        assert_in(H.leaves, like)
        assert relative(H, A.toarray()) <= tolerance(dtype)


def test_entries_given_twice_are_summed():
    A = sparse.coo_array(([1.0, 2.0, 4.0], ([0, 0, 5], [7, 7, 5])), shape=(8, 8))
    H = hm.from_sparse(A, levels=2)
    assert np.array_equal(H.to_dense().round(12), A.toarray())
    assert len(A.data) == 3


def test_a_tridiagonal_matrix_has_rank_one_exactly(rng):
    A = sparse.diags_array(
        rng.standard_normal((3, 1000)), offsets=[-1, 0, 1], shape=(1000, 1000)
    )
    H = hm.from_sparse(A, leaf_size=10, rtol=0)
    assert set(H.ranks) == {1}
    assert relative(H, A.toarray()) <= 1e-15


def test_a_dense_row_and_a_dense_column_in_one_block_need_rank_two():
    A = sparse.lil_array((256, 256))
    A[40, :] = 1.0
    A[:, 200] = 2.0
    H = hm.from_sparse(A, levels=1, rtol=0)
    assert H.ranks == (2,)
    assert relative(H, A.toarray()) <= 1e-14


def test_the_trap_of_two_hubs_takes_no_square_memory():
    lines = np.arange(N)
    rows = np.concatenate([np.full(N, 40), lines, lines])
    columns = np.concatenate([lines, np.full(N, N - 40), lines])
    A = sparse.coo_array((np.ones(3 * N), (rows, columns)), shape=(N, N))
    assert traced(lambda: hm.from_sparse(A))[1] < QUARTER / 8


def test_the_grid_laplacian_is_never_dense():
    one = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(128, 128))
    A = sparse.kronsum(one, one)
    H, peak = traced(lambda: hm.from_sparse(A, rtol=0))
    assert peak < H.nbytes + QUARTER / 3
    assert H.symmetric
    assert max(H.ranks) == 128
    x = np.random.default_rng(0).standard_normal(N)
    assert np.allclose(H @ x, A @ x, rtol=0, atol=1e-12)


def test_symmetry_of_sparse_matrices_can_be_told(rng):
    A = sparse.random_array((40, 40), density=0.1, rng=rng).tocsr()
    S = A + A.T
    assert not hm.from_sparse(S, levels=2, symmetric=False).symmetric
    S[0, 39] += 1e-15
    H = hm.from_sparse(S, levels=2, symmetric=True, rtol=0)
    assert H.symmetric
    assert relative(H, S.toarray()) <= 1e-14
    with pytest.raises(ValueError, match=r"`symmetric`.* is true"):
        hm.from_sparse(A, levels=2, symmetric=True)


def test_tiny_sparse_matrices_are_not_taken_for_symmetric():
    """The squares of their differences underflow."""
    A = 1e-200 * sparse.csr_array(np.triu(np.ones((40, 40))))
    H = hm.from_sparse(A, levels=2)
    assert not H.symmetric
    assert np.allclose(to_numpy(H.to_dense()), A.toarray(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("A", "error", "match"),
    [
        (np.eye(3), hm.BackendError, "must be a SciPy sparse matrix, got ndarray"),
        (sparse.csr_array((3, 4)), hm.ShapeError, "`A` must be square"),
        (sparse.csr_array(np.eye(3, dtype=int)), hm.DTypeError, "got int64"),
        (sparse.csr_array(np.diag([1, np.nan])), hm.NonFiniteError, "1 NaN"),
    ],
)
def test_bad_sparse_matrices_are_refused(A, error, match):
    with pytest.raises(error, match=match):
        hm.from_sparse(A)


def test_numbers_of_sparse_matrices_are_cast_only_where_nothing_is_lost():
    ones = sparse.eye_array(8, dtype=int)
    assert hm.from_sparse(ones, dtype="float32").space.name == "float32"
    with pytest.raises(hm.DTypeError, match="`A` is complex"):
        hm.from_sparse(1j * ones, dtype="float64")


# --- Toeplitz


def columns(name, n):
    k = np.arange(n)
    match name:
        case "smooth":
            return 1 / (1.0 + k)
        case "oscillating":
            return np.exp(0.3j * k) / (1 + k)
        case "zero":
            return np.zeros(n)
        case "last":  # all weight far from the diagonal
            return np.where(k == n - 1, 1.0, 0.0)
        case "random":
            return np.random.default_rng(3).standard_normal(n)


@pytest.mark.parametrize("name", ["smooth", "oscillating", "zero", "last", "random"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 31, 97, 128, 129, 500, 501])
@pytest.mark.parametrize("rtol", [1e-3, 1e-12])
def test_toeplitz_matrices_keep_the_promise(name, n, rtol):
    c = columns(name, n)
    for r in (None, 0.5 * c, np.flip(c)):
        levels = min(3, n.bit_length() - 1)
        H = hm.from_toeplitz(c, r, levels=levels, rtol=rtol)
        A = scipy.linalg.toeplitz(c, c.conj() if r is None else r)
        assert relative(H, A) <= rtol
        assert H.error <= rtol
        assert H.symmetric == np.array_equal(A, A.conj().T)
        assert_padding_is_zero(H)


@pytest.mark.parametrize("n", [500, 512])
def test_toeplitz_ranks_are_near_the_best(n):
    c = columns("smooth", n)
    H = hm.from_toeplitz(c, rtol=1e-8, leaf_size=16)
    best = hm.from_dense(scipy.linalg.toeplitz(c), rtol=1e-8, leaf_size=16)
    assert all(a <= b + 2 for a, b in zip(H.ranks, best.ranks, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_toeplitz_of_every_dtype_and_library(xp, dtype):
    c = columns("oscillating", 90)
    c = (c if dtype.startswith("complex") else c.real).astype(dtype)
    array = xp.asarray(c)
    for r in (None, xp.asarray(c[::-1].copy())):
        H = hm.from_toeplitz(array, r, levels=3, rtol=1e-4)
        assert_in(H.leaves, array)
        A = scipy.linalg.toeplitz(c, c.conj() if r is None else c[::-1])
        assert relative(H, A) <= 1.1e-4


def test_the_cap_on_toeplitz_ranks_wins():
    c = columns("smooth", 200)
    H = hm.from_toeplitz(c, levels=3, max_rank=2, rtol=1e-10)
    assert H.ranks == (2, 2, 2)
    assert relative(H, scipy.linalg.toeplitz(c)) == pytest.approx(H.error, rel=0.3)


def test_a_large_toeplitz_matrix_is_never_dense():
    c = columns("smooth", N - 5)
    H, peak = traced(lambda: hm.from_toeplitz(c, rtol=1e-10))
    assert peak < QUARTER / 8
    assert H.symmetric
    x = np.random.default_rng(0).standard_normal(N - 5)
    expected = scipy.linalg.matmul_toeplitz(c, x)
    assert np.linalg.norm(H @ x - expected) <= 1e-8 * np.linalg.norm(expected)


def test_the_work_for_toeplitz_grows_as_n(monkeypatch):
    work = 0
    convolve = toeplitz._convolve

    def counted(kernels, x):
        nonlocal work
        work += x.size
        return convolve(kernels, x)

    monkeypatch.setattr(toeplitz, "_convolve", counted)
    for n in (2**10, 2**16):
        work = 0
        H = hm.from_toeplitz(columns("smooth", n), rtol=1e-8)
        assert work <= (16 + 2 * (max(H.ranks) + 16)) * n


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"row": np.ones(7)}, hm.ShapeError, r"`row` must have shape \(8,\)"),
        ({"row": np.ones(8, "float32")}, hm.DTypeError, "`row` has dtype float32"),
        ({"row": torch.ones(8).double()}, hm.BackendError, "`row` is a torch array"),
        ({"column": np.full(8, np.nan)}, hm.NonFiniteError, "`column` .* 8 NaN"),
        ({"row": np.full(8, np.inf)}, hm.NonFiniteError, "`row` .* 8 NaN"),
        ({"column": np.ones((8, 1))}, hm.ShapeError, "`column` must have 1 axes"),
        ({"column": np.arange(8)}, hm.DTypeError, "got int64"),
        ({"column": np.ones(0)}, hm.ShapeError, "`n` must be at least 1"),
        ({"tree": hm.ClusterTree.from_sizes([1, 7])}, hm.ShapeError, "keep the order"),
    ],
)
def test_bad_toeplitz_matrices_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        hm.from_toeplitz(**({"column": np.ones(8)} | options))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: hm.identity(0), hm.ShapeError, "`n` must be at least 1"),
        (lambda: hm.identity(3, dtype="int64"), hm.DTypeError, "got int64"),
        (lambda: hm.from_diagonal(np.ones(0)), hm.ShapeError, "at least 1"),
        (
            lambda: hm.from_diagonal([1.0]),
            hm.BackendError,
            "`diagonal` must be a NumPy",
        ),
        (lambda: hm.from_diagonal(np.array([np.inf])), hm.NonFiniteError, "`diagonal`"),
        (
            lambda: hm.from_low_rank(np.ones((4, 2)), np.ones((4, 3))),
            hm.ShapeError,
            r"`V` must have shape \(4, 2\) .* got \(4, 3\)",
        ),
        (
            lambda: hm.from_low_rank(np.ones((4, 2)), S=np.ones(4)),
            hm.ShapeError,
            "`S` must have shape",
        ),
        (
            lambda: hm.from_low_rank(np.ones((4, 2)), diagonal=np.ones(2)),
            hm.ShapeError,
            "`diagonal` must have shape",
        ),
        (
            lambda: hm.from_low_rank(np.ones((4, 2)) + 0j, S=np.ones(2) * 1j),
            hm.DTypeError,
            "`S` has dtype complex128, expected float64",
        ),
        (
            lambda: hm.from_low_rank(np.full((4, 2), np.nan)),
            hm.NonFiniteError,
            "`U` .* 8 NaN",
        ),
        (
            lambda: hm.from_low_rank(np.full((4, 2), 1e100), levels=1),
            hm.NonFiniteError,
            r"norm of the matrix is 8e\+200",
        ),
    ],
)
def test_bad_structured_matrices_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
