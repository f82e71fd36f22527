import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from hmatrix import BackendError, LowRank, ShapeError
from hmatrix._backend import inverse_lower, svd, threads
from hmatrix.lowrank import cut_triplets, recompress
from tests.helpers import assert_close, assert_in, dense, error_ratio, to_numpy
from tests.strategies import SEEDS

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@given(shapes, SEEDS, st.floats(0, 3))
def test_each_block_loses_at_most_the_tolerance(shape, seed, tolerance):
    A = np.random.default_rng(seed).standard_normal(shape)
    block, lost, _ = cut_triplets(*svd(A), tolerance, None)
    error = np.linalg.norm(block.to_dense() - A, axis=(-2, -1))
    assert np.all(error <= tolerance + 1e-12)
    np.testing.assert_allclose(error, lost, atol=1e-12)


@given(shapes, SEEDS, st.integers(0, 9))
def test_capped_rank_is_the_best_of_that_rank(shape, seed, rank):
    A = np.random.default_rng(seed).standard_normal(shape)
    block, lost, _ = cut_triplets(*svd(A), 0.0, rank)
    tails = np.linalg.svd(A, compute_uv=False)[:, rank:]
    assert block.rank <= rank
    np.testing.assert_allclose(lost, np.linalg.norm(tails, axis=-1), atol=1e-12)


@given(shapes, SEEDS)
def test_recompressing_repeated_factors_gives_back_the_rank(shape, seed):
    rng = np.random.default_rng(seed)
    b, m, n = shape
    r = min(m, n, 2)
    U, V = rng.standard_normal((b, m, r)), rng.standard_normal((b, n, r))
    twice = LowRank(
        np.concatenate([U, U], -1), np.ones((b, 2 * r)), np.concatenate([V, V], -1)
    )
    block, *_ = recompress(twice, tolerance=1e-10)
    assert block.rank <= r
    assert_close(block.to_dense(), 2 * U @ V.swapaxes(-1, -2), ("float64", "exact"))


def test_tiny_blocks_do_not_underflow():
    A = np.diag([1e-200, 1e-201])[None]
    block, lost, _ = cut_triplets(*svd(A), 0.0, 1)
    assert block.largest_rank == 1
    assert float(lost[0]) == pytest.approx(1e-201)


def test_products_and_transpose(xp, dtype, rng):
    arrays = [rng.standard_normal(s) for s in ((2, 5, 3), (2, 3), (2, 4, 3))]
    block = LowRank(*(xp.asarray(x, dtype) for x in arrays))
    x = rng.standard_normal((2, 4, 6))
    assert_close(block @ xp.asarray(x, dtype), dense(block) @ x, (dtype, "exact"))
    transposed = to_numpy(block.T.to_dense()).swapaxes(-1, -2)
    assert_close(transposed, dense(block), (dtype, "exact"))


def test_products_with_vectors_and_from_the_right(xp, dtype, rng):
    block = LowRank(
        *(xp.asarray(rng.standard_normal(s), dtype) for s in ((5, 2), 2, (4, 2)))
    )
    for shape in ((4,), (4, 3), (4, 0)):
        x = xp.asarray(rng.standard_normal(shape), dtype)
        assert_close(block @ x, dense(block) @ to_numpy(x), (dtype, "exact"))
    for shape in ((5,), (3, 5)):
        x = xp.asarray(rng.standard_normal(shape), dtype)
        product = block.__rmatmul__(x)  # array-api-strict knows no other operands
        assert_close(product, to_numpy(x) @ dense(block), (dtype, "exact"))
    for shape in ((), (5,), (5, 4)):
        with pytest.raises(ShapeError, match=r"`x` must have shape \(4,\) or"):
            block @ xp.asarray(np.ones(shape), dtype)
    for shape in ((4,), (5, 4)):
        with pytest.raises(ShapeError, match=r"or \(\.\.\., q, 5\), got"):
            block.__rmatmul__(xp.asarray(np.ones(shape), dtype))
    with pytest.raises(ShapeError, match=r"`x` must have shape \(4,\)"):
        block @ block
    assert np.asarray(block).dtype == dtype
    assert np.asarray(block, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_products_with_matrices_stay_of_low_rank(complex_, rank, rng):
    n = 30
    U, V, A = (
        rng.standard_normal(s) + 1j * complex_ * rng.standard_normal(s)
        for s in ((n, rank), (n, rank), (n, n))
    )
    U, V, A = (x if complex_ else x.real for x in (U, V, A))
    block, H = (
        LowRank(U, np.arange(1.0, rank + 1), V),
        hm.from_dense(A, levels=2, rtol=0),
    )
    D = block.to_dense()
    other = LowRank(V[:, :2], np.ones(min(rank, 2)), U[:, :2])
    found = {
        "block @ H": (block @ H, D @ A),
        "H @ block": (H @ block, A @ D),
        "block @ block": (block @ other, D @ other.to_dense()),
        "inverse @ block": (hm.factorize(H).inverse() @ block, np.linalg.solve(A, D)),
    }
    for product, exact in found.values():
        assert isinstance(product, LowRank)
        assert product.rank <= rank
        difference = np.linalg.norm(product.to_dense() - exact)
        assert difference < 1e-9 * np.linalg.norm(exact)
    np.testing.assert_allclose((block - H).to_dense(), D - A, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(block), D)


def test_factors_must_fit():
    with pytest.raises(ShapeError, match=r"\(\.\.\., m, r\)"):
        LowRank(np.ones((3, 2)), np.ones(1), np.ones((4, 2)))
    with pytest.raises(BackendError, match="`U` must be a NumPy"):
        LowRank([[1.0]], np.ones(1), np.ones((4, 1)))


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("m", [0, 1, 7, 32, 45])
def test_inverses_of_triangles(count, m, xp, dtype, rng):
    L = np.tril(rng.standard_normal((count, m, m)) / 8) + 2 * np.eye(m)
    X = inverse_lower(xp.asarray(L, dtype))
    assert_in(X, xp.asarray(L, dtype))
    X = to_numpy(X)
    np.testing.assert_array_equal(np.triu(X, 1), 0)
    bound = {"float32": 1e-6, "float64": 1e-15}[dtype]
    assert error_ratio(X @ L, np.broadcast_to(np.eye(m), L.shape)) < bound


def test_blas_has_its_threads_back_after_the_last():
    """Whoever comes and goes in between, in whatever order."""

    def most():
        return {library["num_threads"] for library in threads._blas().info()}

    with threads._blas().limit(limits=2):
        first, second = threads.one_blas_thread(), threads.one_blas_thread()
        for one in (first, second):
            one.__enter__()
        assert most() == {1}
        first.__exit__(None, None, None)
        assert most() == {1}
        second.__exit__(None, None, None)
        assert most() == {2}


@pytest.mark.parametrize(("count", "m"), [(1, 512), (8, 256), (64, 128)])
def test_large_triangles_are_inverted_as_by_substitution(count, m):
    t = np.linspace(0, 1, 512)[:m]
    A = np.exp(-(((t[:, None] - t) / 0.1) ** 2)) + 1e-10 * np.eye(m)
    L = np.linalg.cholesky(A)
    X = inverse_lower(np.broadcast_to(L, (count, m, m)).copy())
    condition = np.linalg.norm(L) * np.linalg.norm(X[0])
    assert error_ratio(L @ X[0], np.eye(m)) < 1e-16 * condition
