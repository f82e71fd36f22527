import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import hmatrix as hm
from hmatrix.construct.probes import PROBES
from tests.helpers import (
    assert_in,
    assert_padding_is_zero,
    error_ratio,
    relative,
    to_numpy,
    traced,
)
from tests.strategies import SEEDS, square_matrices, trees


class Products:
    """A matrix that gives its products away, and counts them."""

    def __init__(self, A):
        self.A = A
        self.forward = self.backward = 0

    def matvec(self, x):
        self.forward += x.shape[1]
        return self.A @ x

    def rmatvec(self, x):
        self.backward += x.shape[1]
        return self.A.T.conj() @ x


def compress(A, **options):
    options = {"n": len(A), "dtype": A.dtype} | options
    return hm.from_matvec(lambda x: A @ x, lambda x: A.T.conj() @ x, **options)


def distances(n):
    return abs(np.arange(n)[:, None] - np.arange(n))


def known(name, n):
    t = np.linspace(0, 1, n)
    match name:
        case "inverse of tridiagonal":
            below, above = np.eye(n, k=-1), np.eye(n, k=1)
            return np.linalg.inv(2.5 * np.eye(n) - below - 0.7 * above)
        case "hilbert":
            return 1 / (1 + np.add.outer(np.arange(n), np.arange(n)))
        case "cauchy":
            return 1 / (t[:, None] - t - 0.4 / n)
        case "green's function":
            return np.log(distances(n) / n + 1e-3)
        case "toeplitz":
            return 1 / (1.0 + distances(n))
        case "oscillating":
            return np.exp(20j * distances(n) / n) / (1 + distances(n))


KNOWN = ["inverse of tridiagonal", "hilbert", "cauchy", "green's function", "toeplitz"]


@pytest.mark.parametrize("name", [*KNOWN, "oscillating"])
@pytest.mark.parametrize("rtol", [1e-3, 1e-8, 1e-12])
@pytest.mark.parametrize("leaf_size", [7, 64])
def test_the_promise_is_kept_with_ranks_near_the_best(name, rtol, leaf_size):
    A = known(name, 499)
    H = compress(A, rtol=rtol, leaf_size=leaf_size)
    best = hm.from_dense(A, rtol=rtol, leaf_size=leaf_size)
    assert relative(H, A) <= rtol
    assert all(a <= b + 3 for a, b in zip(H.ranks, best.ranks, strict=True))


@pytest.mark.parametrize("above", [1.0, 0.3])
def test_the_inverse_of_a_tridiagonal_matrix_is_exact_at_rank_one(above):
    A = np.linalg.inv(2.5 * np.eye(301) - np.eye(301, k=-1) - above * np.eye(301, k=1))
    H = compress(A, rtol=0, levels=4, symmetric=above == 1.0)
    assert H.ranks == (1, 1, 1, 1)
    assert relative(H, A) <= 1e-14


@st.composite
def cases(draw):
    n, levels = draw(trees())
    return draw(square_matrices(n)), levels


@given(cases(), st.floats(1e-12, 0.5), SEEDS)
def test_any_matrix_keeps_the_promise(case, rtol, seed):
    A, levels = case
    H = compress(A, levels=levels, rtol=rtol, seed=seed)
    assert relative(H, A) <= rtol + 1e-13
    assert H.error <= rtol


@given(cases(), st.integers(0, 6), st.floats(1e-6, 0.1))
def test_a_symmetric_matrix_needs_no_adjoint(case, seed, rtol):
    A, levels = case
    A = A + A.T
    H = hm.from_matvec(
        lambda x: A @ x, n=len(A), levels=levels, symmetric=True, seed=seed, rtol=rtol
    )
    assert H.symmetric
    assert relative(H, A) <= rtol
    assert np.array_equal(to_numpy(H.leaves), to_numpy(H.leaves).swapaxes(1, 2))


@given(cases(), st.integers(0, 4))
def test_the_cap_on_ranks_wins_and_the_error_is_told(case, max_rank):
    A, levels = case
    H = compress(A, levels=levels, max_rank=max_rank, rtol=1e-10)
    assert all(rank <= max_rank for rank in H.ranks)
    error = relative(H, A)
    assert abs(error - H.error) <= 0.9 * error + 1e-12


@pytest.mark.parametrize("max_rank", [2, 5, 8])
def test_errors_of_upper_levels_spoil_lower_ones_little(max_rank):
    A = known("toeplitz", 512)
    H = compress(A, max_rank=max_rank, leaf_size=8)
    best = hm.from_dense(A, max_rank=max_rank, leaf_size=8)
    assert relative(H, A) <= 2 * best.error


def test_the_trap_of_noise_that_adds_up_in_a_deep_tree(rng):
    A = known("toeplitz", 1024) + 1e-4 * rng.standard_normal((1024, 1024))
    H = compress(A, leaf_size=1, rtol=1e-3)
    assert H.tree.levels == 10
    assert relative(H, A) <= 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_number_of_products_is_as_documented(symmetric):
    A = np.exp(-distances(512) / 99)
    products = Products(A)
    options = {"symmetric": True} if symmetric else {"rmatvec": products.rmatvec}
    H = hm.from_matvec(products.matvec, n=512, leaf_size=32, rtol=1e-9, **options)
    columns = 2 * 8  # rank 1 fits in the first 8 columns, and the next 8 find that out
    assert H.ranks == (1, 1, 1, 1)
    assert products.forward == PROBES + 4 * 2 * columns + 32
    assert products.backward == (0 if symmetric else 4 * 2 * columns)


def test_the_number_of_products_grows_with_the_rank_not_with_n():
    counts = []
    for n in (512, 2048):
        products = Products(np.cos(distances(n) / n * 30.0))
        hm.from_matvec(products.matvec, products.rmatvec, n=n, levels=3, rtol=1e-8)
        counts.append((products.forward - n // 8, products.backward))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_it_stays_in_the_library_and_dtype(xp, dtype, rng):
    A = known("toeplitz", 67)
    if dtype.startswith("complex"):
        A = A * np.exp(1j * rng.standard_normal((67, 67)).cumsum(0) / 50)
    array = xp.asarray(A, dtype)
    H = hm.from_matvec(
        lambda x: array @ x,
        lambda x: xp.asarray(A.conj().T, dtype) @ x,
        n=67,
        like=array,
        levels=2,
        rtol=1e-4,
    )
    assert_in(H.leaves, array)
    assert relative(H, A) <= 1.1e-4


def test_a_hermitian_matrix_is_a_symmetric_one():
    t = np.linspace(0, 1, 90)
    A = np.exp(20j * np.subtract.outer(t, t)) / (1 + 90 * np.abs(t[:, None] - t))
    H = compress(A, symmetric=True, leaf_size=10, rtol=1e-9)
    assert H.symmetric
    assert relative(H, A) <= 1e-9


@pytest.mark.parametrize(
    "tree",
    [
        hm.ClusterTree.from_sizes([5, 0, 30, 8]),
        hm.ClusterTree(43, 3, permutation=np.random.default_rng(5).permutation(43)),
        hm.ClusterTree.from_sizes([1, 20, 20, 2], np.arange(43)[::-1]),
    ],
)
def test_rows_are_in_their_own_order_and_padding_is_zero(tree, rng):
    A = rng.standard_normal((43, 43))
    H = compress(A, tree=tree, rtol=1e-6)
    assert relative(H, A) <= 1e-6
    assert_padding_is_zero(H)


def test_the_same_seed_gives_the_same_matrix():
    A = known("toeplitz", 80)
    a, b, c = (compress(A, levels=2, seed=seed).to_dense() for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_tiny_matrices(n, rng):
    A = rng.standard_normal((n, n))
    assert relative(compress(A), A) <= 1e-14
    assert relative(compress(A, levels=n.bit_length() - 1, rtol=0), A) <= 1e-13


def test_the_zero_matrix_has_rank_zero():
    H = compress(np.zeros((50, 50)), levels=3)
    assert H.ranks == (0, 0, 0)
    assert H.error == 0
    assert not H.to_dense().any()


def test_a_linear_operator_goes_both_ways():
    A = known("cauchy", 200)
    H = hm.from_matvec(aslinearoperator(A), rtol=1e-9)
    assert relative(H, A) <= 1e-9
    again = hm.from_matvec(hm.aslinearoperator(H), rtol=1e-7)
    assert error_ratio(again.to_dense(), H.to_dense()) <= 1e-7
    on_torch = hm.from_matvec(aslinearoperator(A), like=torch.empty(0), rtol=1e-4)
    assert_in(on_torch.leaves, torch.empty(0))
    assert error_ratio(on_torch.to_dense(), A) <= 1e-4


def test_an_operator_of_integers_gives_floats():
    A = np.arange(100).reshape(10, 10)
    assert hm.from_matvec(aslinearoperator(A), levels=1).dtype == np.float64


def test_inverses_become_matrices(xp):
    A = np.eye(150) + known("toeplitz", 150)
    inverse = hm.factorize(hm.from_dense(xp.asarray(A), rtol=1e-13)).inverse()
    H = hm.from_matvec(inverse, rtol=1e-9)
    assert_in(H.leaves, xp.asarray(A))
    assert error_ratio(H.to_dense(), np.linalg.inv(A)) <= 1.1e-9
    assert hm.from_matvec(inverse, dtype="float32").space.name == "float32"


def test_a_promise_that_is_not_kept_is_told(rng):
    A = rng.standard_normal((64, 64))
    with pytest.raises(hm.ToleranceError, match=r"error of 1e-06 .* reached") as caught:
        hm.from_matvec(lambda x: A @ x, lambda x: A @ x, n=64, levels=2, rtol=1e-6)
    assert caught.value.asked == 1e-6
    assert caught.value.reached > 0.1
    with pytest.raises(ArithmeticError, match="symmetric"):
        compress(A, levels=2, symmetric=True)


def test_inexact_products_are_found_out(rng):
    A = known("toeplitz", 128)

    def noisy(x):
        y = A @ x
        return y + 1e-5 * np.abs(y).max() * rng.standard_normal(y.shape)

    with pytest.raises(hm.ToleranceError):
        hm.from_matvec(noisy, n=128, levels=2, symmetric=True, rtol=1e-9)
    H = hm.from_matvec(noisy, n=128, levels=2, symmetric=True, rtol=1e-9, max_rank=4)
    assert 1e-6 < H.error < 0.1


def test_atol_allows_more_than_rtol():
    A = known("toeplitz", 256)
    H = compress(A, rtol=0, atol=0.1, levels=3)
    assert 1e-3 < np.linalg.norm(H.to_dense() - A) <= 0.1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n": None}, hm.ShapeError, "`n`, the number of rows"),
        ({"n": 0}, hm.ShapeError, "`n` must be at least 1"),
        ({"matvec": np.eye(9)}, TypeError, "a function or operator, got ndarray"),
        ({"rmatvec": None}, ValueError, "`rmatvec`, products of the adjoint"),
        ({"matvec": lambda x: x[:, 0]}, hm.ShapeError, r"`matvec\(x\)` must have"),
        ({"matvec": lambda x: x * np.nan}, hm.NonFiniteError, r"`matvec\(x\)` .* NaN"),
        ({"rmatvec": lambda x: x * np.inf}, hm.NonFiniteError, r"`rmatvec\(x\)`"),
        ({"matvec": lambda x: x * 1j}, hm.DTypeError, "complex128, expected float64"),
        ({"matvec": lambda x: x.tolist()}, hm.BackendError, "got list"),
        ({"dtype": "int32"}, hm.DTypeError, "got int32"),
        ({"rtol": -1}, ValueError, "`rtol` must be at least 0"),
        ({"oversampling": 0}, hm.ShapeError, "`oversampling` must be at least 1"),
        ({"levels": 1, "leaf_size": 4}, hm.ShapeError, "Give one of"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    good = {"matvec": np.copy, "rmatvec": np.copy, "n": 9, "levels": 1}
    with np.errstate(invalid="ignore"), pytest.raises(error, match=match):
        hm.from_matvec(**(good | options))


def test_an_operator_that_is_not_square_is_refused():
    with pytest.raises(hm.ShapeError, match=r"shape \(n, n\), got \(3, 4\)"):
        hm.from_matvec(aslinearoperator(np.ones((3, 4))))
    with pytest.raises(hm.ShapeError, match="n = 5, got"):
        hm.from_matvec(aslinearoperator(np.eye(4)), n=5)


def test_imaginary_parts_are_neither_dropped_nor_forgotten():
    A = known("hilbert", 50)
    with pytest.raises(hm.DTypeError, match="gave complex128 products for a matrix of"):
        hm.from_matvec(aslinearoperator(1j * A), dtype="float64")
    for operator in (aslinearoperator(A), hm.from_dense(A, rtol=1e-14)):
        H = hm.from_matvec(operator, dtype="complex128", levels=2)
        assert H.space.name == "complex128"
        assert relative(H, A) <= 1e-7


def test_an_operator_without_adjoint_can_be_symmetric():
    A = known("hilbert", 100)
    operator = LinearOperator((100, 100), matvec=A.__matmul__, dtype=A.dtype)
    H = hm.from_matvec(operator, symmetric=True, rtol=1e-6)
    assert relative(H, A) <= 1e-6
    with pytest.raises(ValueError, match="products of the adjoint, is needed"):
        hm.from_matvec(operator)


def test_an_adjoint_beside_an_operator_is_used():
    A = np.triu(known("hilbert", 100))
    operator = LinearOperator((100, 100), matvec=A.__matmul__, dtype=A.dtype)
    H = hm.from_matvec(operator, A.T.__matmul__, rtol=1e-6)
    assert relative(H, A) <= 1e-6


def test_the_matrix_is_never_built():
    n = 2**14
    decay = np.exp(-np.arange(n) / n)

    def matvec(x):  # exp(-|i − j| / n), both triangles by cumulative sums
        lower = np.cumsum(x / decay[:, None], axis=0) * decay[:, None]
        upper = np.cumsum((x * decay[:, None])[::-1], axis=0)[::-1] / decay[:, None]
        return lower + upper - x

    H, peak = traced(lambda: hm.from_matvec(matvec, n=n, symmetric=True, rtol=1e-8))
    assert peak < 8 * n * n / 10
    assert H.ranks == (1,) * 8
    i = np.array([0, 77, 9000, n - 1])
    unit = np.zeros((n, 4))
    unit[i, range(4)] = 1
    expected = np.exp(-abs(np.arange(n)[:, None] - i) / n)
    assert error_ratio(H @ unit, expected) <= 1e-6
