"""Entries, rows and blocks against the dense form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, assert_in, error_ratio, to_numpy
from tests.strategies import SEEDS, hodlr_matrices, mlr_matrix, trees

matrices = st.one_of(
    hodlr_matrices(),
    st.builds(lambda size, seed: mlr_matrix(*size, seed), trees(), SEEDS),
)


def indices(n, shape, seed):
    return np.random.default_rng(seed).integers(-n, n, shape)


@given(matrices, SEEDS)
def test_entries_broadcast(H, seed):
    D, n = to_numpy(H.to_dense()), H.tree.n
    i, j = indices(n, (4, 1), seed), indices(n, 5, seed // 2)
    norm = np.linalg.norm(D)
    assert H.entries(i, j).shape == (4, 5)
    assert np.linalg.norm(H.entries(i, j) - D[i, j]) <= 1e-13 * norm
    assert H.entries(0, n - 1).shape == ()
    assert abs(H.entries(0, n - 1) - D[0, n - 1]) <= 1e-13 * norm


@given(matrices, SEEDS)
def test_all_entries_make_the_matrix(H, seed):
    D, n = to_numpy(H.to_dense()), H.tree.n
    assert error_ratio(H.entries(*np.indices((n, n))), D) <= 1e-13
    assert error_ratio(H.block(range(n), range(n)), D) <= 1e-13


@given(matrices, SEEDS, st.integers(0, 7), st.integers(0, 7))
def test_blocks_of_any_rows_and_columns(H, seed, a, b):
    D, n = to_numpy(H.to_dense()), H.tree.n
    i, j = indices(n, a, seed), indices(n, b, seed // 2)
    block = H.block(i, j)
    assert block.shape == (a, b)
    assert np.linalg.norm(block - D[np.ix_(i, j)]) <= 1e-13 * np.linalg.norm(D)


@given(matrices, SEEDS)
def test_rows_and_columns_are_products_with_unit_vectors(H, seed):
    n = H.tree.n
    i = int(indices(n, (), seed))
    unit = np.zeros(n, H.dtype)
    unit[i] = 1
    scale = 1e-13 * hm.norm(H)
    assert np.linalg.norm(H.column(i) - H @ unit) <= scale
    assert np.linalg.norm(H.row(i) - unit @ H) <= scale


def test_brackets_mean_what_they_mean_for_dense_arrays(rng):
    tree = hm.ClusterTree.from_sizes([3, 6, 2, 5], rng.permutation(16))
    H = hm.from_dense(rng.standard_normal((16, 16)), tree=tree)
    D = H.to_dense()
    for key in [
        (3, 4),
        (-1, 0),
        ([0, 2], [5, 6]),
        (np.array([[1], [2]]), [3, 4]),
        (slice(None), 3),
        (5, slice(2, 9)),
        (slice(1, 12, 3), slice(None, None, -1)),
        ([9, 1, 1], slice(4)),
        7,
        [7, 2],
    ]:
        np.testing.assert_allclose(H[key], D[key], atol=1e-13)


def test_every_library(xp, dtype, rng):
    H = hm.from_dense(rng.standard_normal((13, 13)), levels=2, max_rank=2)
    D = to_numpy(H.to_dense())
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    i, j = rng.integers(0, 13, (2, 6))
    assert_in(H.entries(i, j), H.leaves)
    assert_close(H.entries(xp.asarray(i), j), D[i, j], (dtype, "exact"), 5)
    assert_close(H.block(i, xp.asarray(j)), D[np.ix_(i, j)], (dtype, "exact"), 5)
    assert_close(H.row(3), D[3], (dtype, "exact"), 5)


def test_blocks_of_rank_zero(xp):
    H = hm.from_dense(xp.asarray(np.eye(10)), levels=2)
    assert H.ranks == (0, 0)
    assert_close(H.block(range(10), range(10)), np.eye(10), ("float64", "exact"))
    assert_close(H.row(2), np.eye(10)[2], ("float64", "exact"))


def test_gradients_reach_the_factors(rng):
    import torch

    H = hm.from_dense(torch.asarray(rng.standard_normal((12, 12))), levels=1)
    H = H.map(lambda x: x.requires_grad_())
    H.entries([0, 1], [11, 1]).sum().backward()
    assert float(H.leaves.grad.sum()) == 1
    assert float(H.upper[0].V.grad.abs().sum()) > 0


@pytest.mark.parametrize("H", [hm.from_dense(np.eye(8), levels=1), mlr_matrix(8, 1, 0)])
def test_wrong_indices_are_refused(H):
    with pytest.raises(hm.EntryError, match=r"`rows` must be from -8 to 7, got 0 to 8"):
        H.entries([0, 8], 1)
    with pytest.raises(IndexError, match="`columns` must be from -8 to 7, got -9"):
        H[0, -9]
    with pytest.raises(hm.EntryError, match="`rows` must be from -8 to 7"):
        H.entries(
            np.array([2**64 - 1], dtype=np.uint64), 0
        )  # -1, if it were cast first
    with pytest.raises(hm.EntryError, match="`rows` must be integers, got float64"):
        H.block([0.5], [1])
    with pytest.raises(hm.EntryError, match="must be integers, got object; use range"):
        H.block(slice(3), [0])
    with pytest.raises(hm.EntryError, match="`columns` must be integers, got bool"):
        H[:, np.ones(8, bool)]
    with pytest.raises(hm.EntryError, match="`i` must be one integer"):
        H.row([1, 2])
    with pytest.raises(hm.ShapeError, match="must broadcast"):
        H.entries([1, 2, 3], [1, 2])
    with pytest.raises(hm.ShapeError, match="must be vectors"):
        H.block(1, [1, 2])
    with pytest.raises(hm.EntryError, match="two indices at most, got 3"):
        H[0, 1, 2]
    assert np.array_equal(to_numpy(H[0,]), to_numpy(H[0]))
