"""Blocks that are zero but for a few entries, which samples could miss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import relative
from tests.strategies import SEEDS


@pytest.mark.parametrize("length", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("kind", ["gaussian", "exponential", "rational"])
def test_kernels_much_narrower_than_the_blocks(kind, length, rng):
    """Most rows of a block are zeros but for rounding: no pivots to divide by."""
    x = np.sort(rng.random(1100))

    def kernel(a, b):
        d = abs(a - b) / length
        return {
            "gaussian": lambda: np.exp(-(d**2)),
            "exponential": lambda: np.exp(-d),
            "rational": lambda: 1 / (1 + d**2),
        }[kind]()

    for rtol in (1e-4, 1e-9):
        H = hm.from_kernel(kernel, x, rtol=rtol, leaf_size=16)
        assert relative(H, kernel(x[:, None], x)) <= rtol


def test_a_look_at_a_block_of_high_rank_serves_many_steps():
    """Where most rows are zeros, those that are not are known from the last look."""
    n, looked_at = 1024, 0
    x = np.sort(np.random.default_rng(1).random(n))

    def hat(a, b):
        nonlocal looked_at
        entries = np.maximum(1 - abs(a - b) / 0.2, 0.0)
        looked_at += entries.size
        return entries

    H = hm.from_kernel(hat, x, rtol=1e-10)
    assert looked_at < 3 * n * n
    assert max(H.ranks) > 100
    assert relative(H, hat(x[:, None], x)) <= 1e-10


@pytest.mark.parametrize("skew", [0.0, 0.5])
@pytest.mark.parametrize(("n", "leaf_size"), [(653, 16), (711, 16), (2001, 64)])
def test_corners_are_seen_where_the_last_leaf_is_padded(n, leaf_size, skew):
    """The trap of periodic bands: all that a block has is next to its padding."""

    def entries(i, j):
        d = (i - j) % n
        return 2.0 * (d == 0) - (d == 1) - (1 - skew) * (d == n - 1)

    H = hm.from_entries(entries, n, leaf_size=leaf_size, rtol=1e-8)
    assert H.tree.padded > n
    assert H.symmetric == (not skew)
    i = np.arange(n)
    assert relative(H, entries(i[:, None], i)) <= 1e-8


NARROW = {
    "hat": lambda d: np.maximum(1 - d, 0.0),
    "exponential": lambda d: np.exp(-d),
    "inverse square": lambda d: 1 / (d**2 + 1),
}


def touching(order, kind, length, dims, half, rtol, skew, seed):
    """Return the relative error for pairs of points that almost touch."""
    rng = np.random.default_rng(seed)
    y = rng.random((half, dims))
    x = np.concatenate([y, y + 1e-6 * rng.standard_normal(y.shape)])
    x = x[rng.permutation(2 * half)]

    def kernel(a, b):
        near = NARROW[kind](np.sqrt(((a - b) ** 2).sum(axis=-1)) / length)
        return near * (1 + skew * a[..., 0])

    tree = {"leaf_size": 32} if order == "tree" else {"levels": 3}
    H = hm.from_kernel(kernel, x, rtol=rtol, seed=seed, **tree)
    assert H.symmetric == (not skew)
    return relative(H, kernel(x[:, None], x))


@given(
    kind=st.sampled_from(sorted(NARROW)),
    length=st.sampled_from([1e-4, 1e-3, 1e-2]),
    dims=st.integers(1, 3),
    half=st.integers(150, 250),
    rtol=st.sampled_from([1e-3, 1e-8]),
    skew=st.sampled_from([0.0, 0.5]),
    seed=SEEDS,
)
@pytest.mark.parametrize("order", ["tree", "given"])
def test_points_that_almost_touch_across_clusters(
    order, kind, length, dims, half, rtol, skew, seed
):
    """A few entries of a block are all there is, anywhere in it."""
    assert touching(order, kind, length, dims, half, rtol, skew, seed) <= rtol


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("kind", sorted(NARROW))
@pytest.mark.parametrize("order", ["tree", "given"])
def test_points_that_almost_touch_in_blocks_too_large_to_check_whole(order, kind, dims):
    # The estimate may be a few times too low; a pair that is missed is a thousand times.
    assert touching(order, kind, 1e-3, dims, 550, 1e-8, 0.0, 0) <= 1e-7


def test_a_range_between_a_corner_and_a_block_takes_few_entries():
    """Of compact support, as tapers have: a search must not end in the rows of zeros."""
    n, evaluated = 8000, []
    x = np.sort(np.random.default_rng(0).random(n))

    def taper(a, b):
        entries = np.maximum(1 - 5 * abs(a - b), 0.0) ** 3
        evaluated.append(entries.size)
        return entries

    H = hm.from_kernel(taper, x, nugget=0.1, rtol=1e-6)
    assert H.error <= 1e-6
    assert max(H.ranks) < 32
    assert sum(evaluated) < 0.4 * n**2


def test_a_short_range_shows_in_the_corners_of_large_blocks():
    """Of neighbours alone, in blocks with thousands of rows between two of a sample."""
    n = 2**14
    x = np.arange(n) / n

    def hat(a, b):
        return np.maximum(1 - abs(a - b) * n / 4, 0.0)

    H = hm.from_kernel(hat, x, rtol=1e-10)
    assert set(H.ranks) == {3}
    middle = slice(n // 2 - 8, n // 2 + 8)
    np.testing.assert_allclose(
        H[middle, middle], hat(x[middle, None], x[middle]), atol=1e-14
    )


@given(seed=SEEDS, n=st.integers(65, 400), width=st.integers(1, 5))
def test_narrow_bands_and_sharp_peaks_are_seen(seed, n, width):
    """Blocks are zero but for a corner, which no row or entry by chance would meet."""
    rng = np.random.default_rng(seed)
    band = rng.random(2 * n) + 1.0
    i = np.arange(n)
    A = np.where(abs(i[:, None] - i) <= width, band[i[:, None] + i], 0.0)
    H = hm.from_entries(lambda i, j: A[i, j], n, rtol=1e-8, leaf_size=16, seed=seed)
    assert relative(H, A) <= 1e-8
    if n <= 256:  # every block is compared whole
        x = rng.integers(0, n // 5, n) / n  # many of them several times
        A = np.maximum(1 - 20 * abs(x[:, None] - x), 0.0)
        H = hm.from_entries(lambda i, j: A[i, j], n, rtol=1e-8, leaf_size=16, seed=seed)
        assert relative(H, A) <= 1e-8


def test_one_entry_of_a_small_matrix_is_seen():
    """Its mirror image is none: the matrix is not symmetric."""
    A = np.zeros((129, 129))
    A[18, 103] = 1
    H = hm.from_entries(lambda i, j: A[i, j], 129, leaf_size=16)
    assert not H.symmetric
    np.testing.assert_allclose(H.to_dense(), A, atol=1e-12)


@pytest.mark.parametrize(("kind", "length"), [("exponential", 2e-3), ("hat", 2e-2)])
def test_short_range_in_blocks_too_large_to_decompose(kind, length):
    """Ranks are small beside the blocks, but few of their rows have more than zeros."""
    x = np.random.default_rng(2).random((4200, 2))

    def kernel(a, b):
        return NARROW[kind](np.sqrt(((a - b) ** 2).sum(axis=-1)) / length)

    H = hm.from_kernel(kernel, x, rtol=1e-4, symmetric=True)
    # those where the largest blocks meet, of a tree that halves the first axis
    rows = np.argsort(abs(x[:, 0] - np.median(x[:, 0])))[:100]
    A = kernel(x[rows, None], x)
    assert np.linalg.norm(H[rows, :] - A) <= 1e-3 * np.linalg.norm(A)


def test_points_unlike_any_pivot_are_compared_whole():
    """Two entries of an outlying point were 5 times all that may be lost, unseen."""
    rng = np.random.default_rng(20)
    rng.integers(1100, 2000)  # the points are those after it
    clusters = [rng.normal(c, 0.02, (475, 2)) for c in rng.random((4, 2))]
    x = np.concatenate(clusters)

    def gaussian(x, y):
        return np.exp(-((x - y) ** 2).sum(-1) / 0.02**2)

    A = gaussian(x[:, None], x) + 0.01 * np.eye(1900)
    H = hm.from_kernel(gaussian, x, nugget=0.01, rtol=1e-6)
    assert relative(H, A) < 1e-6


def test_blocks_of_up_to_512_points_are_compared_whole():
    """A few pairs at one distance stand out, none of them close: no sample meets them."""
    x = np.random.default_rng(1).random((1000, 2))

    def kernel(a, b):
        d = np.sqrt(((a - b) ** 2).sum(axis=-1))
        return 1 / (1 + d**2) + (abs(d - 0.4) < 4e-6)

    H = hm.from_kernel(kernel, x, rtol=1e-4)
    assert relative(H, kernel(x[:, None], x)) <= 1e-4
