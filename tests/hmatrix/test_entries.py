"""Matrices from functions of entries and from kernels on points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
import hmatrix.construct.cross
from hmatrix._backend import namespace
from tests.helpers import assert_in, dense, error_ratio, relative, to_numpy, traced
from tests.strategies import SEEDS

KERNELS = {
    "exponential": lambda d: np.exp(-d),
    "gaussian": lambda d: np.exp(-(d**2) / 0.02),
    "matern": lambda d: (1 + 10 * d) * np.exp(-10 * d),
    "logarithm": lambda d: np.log(d + 1e-3),
    "inverse": lambda d: 1 / (d + 1e-2),
    "constant": lambda d: 0 * d + 2.0,
    "zero": lambda d: 0 * d,
}


@given(
    kind=st.sampled_from(sorted(KERNELS)),
    n=st.one_of(st.integers(1, 400), st.sampled_from([512, 521, 700])),
    rtol=st.sampled_from([1e-3, 1e-6, 1e-10]),
    leaf_size=st.sampled_from([1, 5, 16, 64]),
    seed=SEEDS,
)
def test_kernels_on_sorted_points_keep_the_tolerance(kind, n, rtol, leaf_size, seed):
    x = np.sort(np.random.default_rng(seed).random(n))
    H = hm.from_kernel(
        lambda a, b: KERNELS[kind](abs(a - b)), x, rtol=rtol, leaf_size=leaf_size
    )
    A = KERNELS[kind](abs(x[:, None] - x))
    assert H.symmetric
    assert relative(H, A) <= rtol
    assert H.error <= rtol


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_points_in_any_order_and_dimension(dims, rng):
    x = rng.random((700, dims))

    def kernel(a, b):
        return np.exp(-np.sqrt(((a - b) ** 2).sum(axis=-1)))

    nugget = rng.random(700)
    H = hm.from_kernel(kernel, x, nugget=nugget, rtol=1e-6, leaf_size=40)
    A = kernel(x[:, None], x) + np.diag(nugget)
    assert relative(H, A) <= 1e-6
    assert np.allclose(H @ nugget, A @ nugget, rtol=1e-5)
    assert np.allclose(H.diagonal(), np.diag(A), rtol=1e-14)


def test_the_promise_is_on_the_matrix_with_its_nugget(rng):
    x = np.sort(rng.random(300))

    def kernel(a, b):
        return 1e6 * (a == b) + np.exp(-abs(a - b))

    A = kernel(x[:, None], x) - (1e6 + 1) * np.eye(300)
    H = hm.from_kernel(kernel, x, nugget=-1e6 - 1, rtol=1e-4, levels=3)
    assert error_ratio(dense(H), A) <= 1e-4
    # nor is it taken for Hermitian without
    tilted = hm.from_kernel(
        lambda a, b: kernel(a, b) + 0j, x, nugget=np.full(300, 1j), levels=3
    )
    assert not tilted.symmetric


def test_every_library_and_dtype(xp, dtype, rng):
    x = xp.asarray(rng.random((300, 2)), dtype)
    tolerance = {"float32": 1e-4, "float64": 1e-9}[dtype]

    def kernel(a, b):
        d = a - b
        squares = d[..., 0] ** 2 + d[..., 1] ** 2
        return 1 / (1 + squares)

    H = hm.from_kernel(kernel, x, nugget=0.5, rtol=tolerance, leaf_size=30)
    assert_in(H.leaves, x)
    points = to_numpy(x).astype(np.float64)
    A = kernel(points[:, None], points) + 0.5 * np.eye(300)
    assert error_ratio(dense(H), A) <= tolerance


def test_general_and_complex_kernels(rng):
    x = np.sort(rng.random(500))

    def drift(a, b):
        return np.exp(-2 * (a - b)) / (1.5 + a)

    H = hm.from_kernel(drift, x, rtol=1e-9)
    assert not H.symmetric
    assert relative(H, drift(x[:, None], x)) <= 1e-9

    def wave(a, b):
        return np.exp(20j * abs(a - b)) / (0.1 + abs(a - b))

    H = hm.from_kernel(wave, x, rtol=1e-9)
    assert not H.symmetric  # symmetric, but not Hermitian
    assert relative(H, wave(x[:, None], x)) <= 1e-9

    def turning(a, b):
        return np.exp(5j * (a - b) - abs(a - b))

    H = hm.from_kernel(turning, x, rtol=1e-9)
    assert H.symmetric
    assert relative(H, turning(x[:, None], x)) <= 1e-9


def test_blocks_of_exactly_low_rank_cost_a_few_rows():
    """Peers look at each row in turn for more, and end with a block of full rank."""
    n, seen = 4096, 0
    x = np.linspace(0, 1, n)

    def kernel(a, b):
        nonlocal seen
        value = np.exp(-abs(a - b))
        seen += value.size
        return value

    H = hm.from_kernel(kernel, x, rtol=1e-10)
    assert set(H.ranks) == {1}
    levels = H.tree.levels
    # the leaves; what blocks as small as a sample, and the corners of others, are
    # compared with; and of each level some rows and columns of samples and blocks
    assert seen <= n * (H.tree.leaf_size + 160 + 8 * levels)


def test_small_matrices_take_few_calls_of_a_kernel():
    """There a call takes longer than the entries that it gives."""
    x, calls = np.linspace(0, 1, 4096), 0

    def kernel(a, b):
        nonlocal calls
        calls += 1
        return np.exp(-abs(a - b))

    H = hm.from_kernel(kernel, x, rtol=1e-10, leaf_size=32)
    # the leaves, symmetry and the pivots' search; for each larger level pivots, corners in
    # parts and other entries; smaller blocks in parts
    large, small = 4, 3
    assert len(H.ranks) == large + small
    assert calls <= 14 + 5 * large + 2 * small


@pytest.mark.parametrize("spikes", ["row", "column", "entry"])
def test_false_convergence_is_caught(spikes, rng):
    """Smooth blocks with something rough in them: wrong determinants elsewhere."""
    n = 512
    x = np.sort(rng.random(n))
    smooth = np.exp(-((x[:, None] - x) ** 2))
    rough = np.zeros((n, n))
    match spikes:
        case "row":
            rough[37] = rng.standard_normal(n)
        case "column":
            rough[:, 301] = rng.standard_normal(n)
        case "entry":
            rough[5, 300:] = 2.0
    A = smooth + rough + 20 * np.eye(n)
    H = hm.from_entries(lambda i, j: A[i, j], n, rtol=1e-10, leaf_size=32)
    assert relative(H, A) <= 1e-10
    sign, value = np.linalg.slogdet(A)
    assert hm.factorize(H).slogdet() == (sign, pytest.approx(value, rel=1e-9))


@pytest.mark.parametrize("seed", range(6))
def test_factors_of_very_different_scales_keep_all_digits(seed):
    """Clusters make rows of 1 and of 1e6, whose Gram matrix has no digits left."""
    rng = np.random.default_rng(seed)
    x = rng.random(4)[rng.integers(0, 4, 500)] + 1e-4 * rng.standard_normal(500)

    def kernel(a, b):
        return 1 / (abs(a - b) + 1e-6)

    H = hm.from_kernel(kernel, x, rtol=1e-13, leaf_size=16)
    assert relative(H, kernel(x[:, None], x)) <= 1e-13


@pytest.mark.parametrize("kind", ["exponential", "logarithm"])
def test_blocks_whose_singular_values_decay_slowly(kind, monkeypatch, rng):
    """In the plane a small step is followed by many more: too large for the SVD here."""
    monkeypatch.setattr(hmatrix.construct.cross, "DENSE", 0)
    x = rng.random((1200, 2))

    def kernel(a, b):
        return KERNELS[kind](np.sqrt(((a - b) ** 2).sum(axis=-1)))

    H = hm.from_kernel(kernel, x, rtol=1e-4)
    assert relative(H, kernel(x[:, None], x)) <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [-0.6, 0.499, 0.8])
def test_scales_whose_squares_are_no_numbers_are_refused(xp, dtype, power):
    """Norms that overflow allow any error, norms that underflow hide it."""
    n, scale = 300, float(np.finfo(dtype).max) ** power
    column = xp.asarray(scale / (1.0 + np.arange(n)), dtype)

    def function(i, j):
        return namespace(i).astype(0 * (i + j), column.dtype) + scale

    with pytest.raises(hm.NonFiniteError, match="rescale"), np.errstate(all="ignore"):
        hm.from_entries(function, n, like=column, leaf_size=16)
    with pytest.raises(hm.NonFiniteError, match="rescale"), np.errstate(all="ignore"):
        hm.from_toeplitz(column, leaf_size=16)
    with pytest.raises(hm.NonFiniteError, match="rescale"), np.errstate(all="ignore"):
        hm.from_matvec(
            lambda x: scale * x, n=n, like=column, leaf_size=16, symmetric=True
        )


def test_entries_far_below_the_tolerance_are_no_pivots(rng):
    """Subnormal ones would overflow the columns that are divided by them."""
    x = np.sort(rng.random(1000))

    def kernel(a, b):
        return np.exp(-((a - b) ** 2) / 1e-6)

    with np.errstate(over="raise", invalid="raise"):
        H = hm.from_kernel(kernel, x, rtol=1e-6, leaf_size=8)
    assert relative(H, kernel(x[:, None], x)) <= 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_one_row_that_is_not_symmetric_is_seen(seed, rng):
    """256 entries by chance have none of this row, or none that is not in a leaf."""
    n = 500
    x = np.sort(rng.random(n))
    A = np.exp(-abs(x[:, None] - x))
    A[37, 64:] += 1.0
    H = hm.from_entries(lambda i, j: A[i, j], n, rtol=1e-8, seed=seed)
    assert not H.symmetric
    assert relative(H, A) <= 1e-8


def test_a_matrix_without_structure_is_stored_whole(rng):
    A = rng.standard_normal((200, 200))
    H = hm.from_entries(lambda i, j: A[i, j], 200, rtol=1e-8, leaf_size=25)
    assert relative(H, A) <= 1e-8


def test_a_rank_cap_tells_what_is_lost(rng):
    x = np.sort(rng.random(600))
    H = hm.from_kernel(lambda a, b: np.log(abs(a - b) + 1e-4), x, rtol=0.0, max_rank=3)
    assert max(H.ranks) <= 3
    A = np.log(abs(x[:, None] - x) + 1e-4)
    assert H.error == pytest.approx(relative(H, A), rel=0.1)


def test_entries_that_no_check_confirms_are_an_error(monkeypatch):
    monkeypatch.setattr(hmatrix.construct.cross, "DENSE", 0)
    chance = np.random.default_rng(0)

    def noise(i, j):  # another value each time: no approximation can be right
        return 1.0 + 0.1 * chance.standard_normal(np.broadcast_shapes(i.shape, j.shape))

    with pytest.raises(hm.ToleranceError, match=r"was asked for.*max_rank"):
        hm.from_entries(noise, 300, rtol=1e-6, leaf_size=32)


def test_an_absolute_tolerance_may_allow_more(rng):
    x = np.sort(rng.random(500))
    A = np.exp(-((x[:, None] - x) ** 2) / 0.01)
    loose, tight = (
        hm.from_kernel(
            lambda a, b: np.exp(-((a - b) ** 2) / 0.01), x, rtol=1e-12, atol=atol
        )
        for atol in (1e-2, 0.0)
    )
    assert sum(loose.ranks) < sum(tight.ranks)
    assert np.linalg.norm(dense(loose) - A) <= 1e-2


def test_no_array_of_the_whole_matrix():
    n = 2**14
    x = np.linspace(0, 1, n)
    H, peak = traced(
        lambda: hm.from_kernel(lambda a, b: 1 / (1 + abs(a - b)), x, rtol=1e-8)
    )
    assert peak < 4 * H.nbytes < 8 * n * n / 20


def test_bad_functions_are_told_apart():
    with pytest.raises(hm.NonFiniteError, match="finite everywhere"):
        hm.from_entries(lambda i, j: np.where(i + j == 0, np.nan, 1.0), 100)
    with pytest.raises(hm.NonFiniteError, match="finite everywhere"):
        hm.from_entries(lambda i, j: np.where(abs(i - j) > 300, np.inf, 1.0), 1000)
    with pytest.raises(hm.NonFiniteError, match=r"infinity for 5 and 5; .* diagonal"):
        hm.from_entries(lambda i, j: np.where((i == 5) & (j == 5), np.inf, 1.0), 9)
    with pytest.raises(
        hm.NonFiniteError, match=r"infinity for \[1. 2.\] and \[0. 0.\]"
    ):
        hm.from_kernel(
            lambda a, b: np.where(a[..., 0] > b[..., 0], np.nan, 1.0),
            np.array([[0.0, 0.0], [1.0, 2.0]]),
        )
    with pytest.raises(hm.ShapeError, match="must give an array of shape"):
        hm.from_entries(lambda _i, _j: np.ones(3), 100)
    with pytest.raises(hm.BackendError, match="must give a numpy array"):
        hm.from_entries(lambda _i, _j: 1.0, 100)
    with pytest.raises(
        hm.DTypeError, match="complex128 entries for a matrix of float64"
    ):
        hm.from_entries(lambda i, j: np.exp(1j * (i - j)), 100)
    with pytest.raises(hm.ShapeError, match="`points` must have shape"):
        hm.from_kernel(lambda a, b: a * b, np.ones((2, 2, 2)))
    with pytest.raises(hm.NonFiniteError, match="points"):
        hm.from_kernel(lambda a, b: a * b, np.array([0.0, np.nan]))
    with pytest.raises(hm.ShapeError, match="`nugget` must have shape"):
        hm.from_kernel(lambda a, b: a * b, np.arange(4.0), nugget=np.ones(3))
    with pytest.raises(hm.NonFiniteError, match=r"`nugget` .* 4 NaN"):
        hm.from_kernel(lambda a, b: a * b, np.arange(4.0), nugget=np.full(4, np.nan))
    with pytest.raises(hm.DTypeError, match=r"`dtype` must be one of .*, got int64;"):
        hm.from_entries(lambda i, j: i + j, 4, dtype=int)
    with pytest.raises(hm.ShapeError, match="`seed` must be an integer, got NoneType"):
        hm.from_entries(lambda i, j: i + j, 4, seed=None)
    with pytest.raises(TypeError, match="`tree` must be a ClusterTree, got int"):
        hm.from_entries(lambda i, j: i + j, 4, tree=4)


def test_symmetry_is_not_believed_against_the_leaves():
    def decay(i, j):
        return np.exp((j - i) / 100)

    with pytest.raises(ValueError, match="differ from their adjoints by"):
        hm.from_entries(decay, 200, symmetric=True)
    # what the tolerance allows, in kernels that round differently, is no reason
    H = hm.from_entries(
        lambda i, j: 1 / (1 + abs(i - j) + 1e-11 * (i > j)), 200, symmetric=True
    )
    assert H.symmetric
    assert np.array_equal(H.leaves, H.leaves.mT)


@pytest.mark.parametrize("how", ["entries", "matvec"])
@pytest.mark.parametrize("max_rank", [0, 1])
def test_the_error_of_a_cap_is_relative_to_the_whole_matrix(how, max_rank, rng):
    A = rng.standard_normal((200, 200))
    options = {"levels": 3, "max_rank": max_rank}
    if how == "entries":
        H = hm.from_entries(lambda i, j: A[i, j], 200, **options)
    else:
        H = hm.from_matvec(lambda x: A @ x, lambda x: A.T @ x, n=200, **options)
    assert 0.8 <= H.error / relative(H, A) <= 1.5


@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.float32(0.5), np.array(0.5), 1 / 2]
)
def test_a_nugget_is_any_real_number(number):
    t = np.linspace(0, 1, 50)
    H = hm.from_kernel(lambda x, y: np.exp(-abs(x - y)), t, nugget=number, levels=1)
    np.testing.assert_allclose(H.diagonal(), 1.5)


def test_a_kernel_may_give_integers():
    t = np.linspace(0, 1, 50)
    H = hm.from_kernel(lambda x, y: abs(x - y) < 0.1, t, levels=2)
    assert H.dtype == np.float64
    np.testing.assert_allclose(H, abs(t[:, None] - t) < 0.1, atol=1e-12)


def test_compression_is_not_differentiated():
    torch = pytest.importorskip("torch")
    t = torch.linspace(0, 1, 60, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def kernel(x, y):
        return torch.exp(-rate * abs(x - y))

    for H in (
        hm.from_kernel(kernel, t, nugget=rate * torch.ones_like(t), leaf_size=10),
        hm.from_entries(lambda i, j: kernel(t[i], t[j]), 60, like=t, leaf_size=10),
    ):
        assert not H.leaves.requires_grad
        assert not H.upper[0].U.requires_grad


def test_kernels_that_forget_the_axis_of_coordinates_are_told(rng):
    with pytest.raises(hm.ShapeError, match="sum over the last axis"):
        hm.from_kernel(lambda x, y: np.exp(-abs(x - y)), rng.random((60, 2)))


def test_rounding_is_not_stored_at_full_rank(rng):
    t = np.sort(rng.random(1000)).astype(np.float32)
    H = hm.from_kernel(lambda x, y: np.exp(-((x - y) ** 2)), t, rtol=1e-10)
    assert max(H.ranks) < 10
    assert H.error < 10 * np.finfo(np.float32).eps


@pytest.mark.parametrize("small", [0.0, 1e-170, 1e-222, 1e-310])
def test_leaves_may_be_small_beside_the_rest(small):
    t = np.linspace(0, 1, 500)

    def kernel(x, y):
        return np.where(abs(x - y) < 0.3, small, 1 / (1 + abs(x - y)))

    H = hm.from_kernel(kernel, t, rtol=1e-6)
    assert relative(H, kernel(t[:, None], t)) <= 1e-6
    if small:
        with pytest.raises(hm.NonFiniteError, match="rescale it"):
            hm.from_kernel(lambda x, y: small / (1 + abs(x - y)), t, rtol=1e-6)


def test_entries_of_a_lower_precision_are_refused(xp):
    """Their rounding has full rank, and no error that is measured against them sees it."""
    like = xp.asarray(np.empty(0))

    def function(i, j):
        return 1 / (1 + namespace(i).astype(abs(i - j), namespace(i).float32))

    for dtype in ("float64", "complex128"):
        with pytest.raises(hm.DTypeError, match=f"gave float32 entries for .* {dtype}"):
            hm.from_entries(function, 300, like=like, dtype=dtype)
    assert hm.from_entries(function, 300, like=like, dtype="float32").error < 1e-3
    assert hm.from_entries(function, 300, like=like, rtol=1e-5).error < 1e-5
    whole = hm.from_entries(lambda i, j: i * j, 300, like=like)  # integers are exact
    assert whole.ranks == (1,) * 3


@pytest.mark.parametrize("seed", [1, 2, 4, 10])
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_rows_among_much_padding_are_not_missed(xp, seed, symmetric):
    """Blocks of 512 places, three of them rows: what goes by places seldom meets those."""
    n, rng = 250, np.random.default_rng(seed)
    t = np.sort(rng.random(n))
    A = np.exp(-4 * abs(t[:, None] - t)) + (0 if symmetric else np.outer(t, t**2))
    order = rng.permutation(n)
    tree = hm.ClusterTree.from_sizes([2, 1, 246, 1], leaf_size=3, permutation=order)
    B = xp.asarray(A)

    def entries(i, j):
        return namespace(B).reshape(B, (-1,))[i * n + j]

    H = hm.from_entries(entries, n, like=B, tree=tree, rtol=1e-9)
    assert relative(H, A) <= 1e-9
