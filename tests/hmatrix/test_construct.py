import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import hmatrix as hm
from tests.helpers import assert_close, assert_in, dense, error_ratio
from tests.strategies import square_matrices, trees


@st.composite
def matrices_with_trees(draw):
    n, levels = draw(trees())
    return draw(square_matrices(n)), levels


@given(matrices_with_trees(), st.floats(1e-12, 0.5))
def test_rtol_is_kept_and_the_error_reported_is_true(case, rtol):
    A, levels = case
    H = hm.from_dense(A, levels=levels, rtol=rtol)
    error = error_ratio(H.to_dense(), A)
    assert error <= rtol + 1e-13
    assert abs(error - H.error) <= 1e-13 + 1e-6 * error


@given(matrices_with_trees(), st.integers(0, 5))
def test_max_rank_is_kept_and_the_error_reported_is_true(case, max_rank):
    A, levels = case
    H = hm.from_dense(A, levels=levels, max_rank=max_rank)
    assert all(rank <= max_rank for rank in H.ranks)
    assert abs(error_ratio(H.to_dense(), A) - H.error) <= 1e-12


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-25), ("float64", 1e-200)])
@pytest.mark.parametrize("way", ["dense", "definite", "sparse"])
def test_errors_whose_squares_underflow_are_told(way, dtype, scale):
    t = np.linspace(0, 1, 64)
    A = (scale / (1 + 100 * (t[:, None] - t) ** 2)).astype(dtype)
    if way == "sparse":
        H = hm.from_sparse(sparse.csr_array(A), levels=3, rtol=1e-2)
    else:
        H = hm.from_dense(A, levels=3, rtol=1e-2, definite=way == "definite")
    error = error_ratio(H.to_dense() / scale, A / scale)
    assert 1e-4 < error <= 1e-2
    assert abs(error - H.error) <= 1e-3 * error


@given(matrices_with_trees())
def test_a_smaller_rtol_never_lowers_a_rank(case):
    A, levels = case
    coarse, fine = (hm.from_dense(A, levels=levels, rtol=r).ranks for r in (1e-2, 1e-6))
    assert all(a <= b for a, b in zip(coarse, fine, strict=True))


@given(matrices_with_trees())
def test_symmetry_is_found(case):
    A, levels = case
    assert hm.from_dense(A, levels=levels).symmetric == np.array_equal(A, A.T)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("place", [(0, 599), (599, 0), (598, 599), (250, 3)])
def test_one_entry_decides_symmetry(place, dtype):
    t = np.linspace(0, 1, 600)
    A = (np.exp(-abs(t[:, None] - t))).astype(dtype)
    assert hm.from_dense(A).symmetric
    A[place] += 1e-3
    for H in (hm.from_dense(A), hm.from_sparse(sparse.csr_array(A))):
        assert not H.symmetric
        assert abs(H[place] - A[place]) < 1e-5


def test_rounding_is_not_stored_at_full_rank():
    t = np.linspace(0, 1, 300)
    H = hm.from_dense(np.exp(-abs(t[:, None] - t)), rtol=1e-17)
    assert set(H.ranks) == {1}
    assert H.error < 10 * np.finfo(float).eps
    twice = hm.add(H, H)
    assert set(hm.truncate(twice, rtol=1e-17).ranks) == {1}
    assert set(hm.matmul(H, H, rtol=1e-17).ranks) == {2}
    assert set(hm.truncate(twice, rtol=0).ranks) == {2}


def test_it_stays_in_the_library_and_dtype(xp, dtype, rng):
    A = rng.standard_normal((21, 21))
    array = xp.asarray(A, dtype)
    H = hm.from_dense(array, levels=2, rtol=1e-6)
    assert_in(H.leaves, array)
    assert_close(H.to_dense(), A, (dtype, "exact"))


def test_it_does_not_alias_the_matrix(rng):
    A = rng.standard_normal((16, 16))
    H = hm.from_dense(A, levels=1, rtol=0)
    before = dense(H)
    A[:] = 0
    assert np.array_equal(dense(H), before)


def test_smooth_kernels_need_little_rank():
    t = np.linspace(0, 1, 256)
    H = hm.from_dense(np.exp(-abs(t[:, None] - t)), leaf_size=16, rtol=1e-10)
    assert H.ranks == (1, 1, 1, 1)
    assert H.nbytes < 0.2 * 8 * 256**2


def test_the_halving_is_given_once():
    A = np.eye(8)
    with pytest.raises(hm.ShapeError, match="Give one of"):
        hm.from_dense(A, levels=1, leaf_size=4)
    with pytest.raises(hm.ShapeError, match="`tree` is of 9 rows"):
        hm.from_dense(A, tree=hm.ClusterTree(9, 1))
    assert hm.from_dense(A, tree=hm.ClusterTree(8, 2)).tree.levels == 2


@pytest.mark.parametrize(
    ("A", "error", "match"),
    [
        (np.ones((3, 4)), hm.ShapeError, "`A` must be square"),
        (np.ones(3), hm.ShapeError, "`A` must have 2 axes"),
        (np.ones((0, 0)), hm.ShapeError, "`n` must be at least 1"),
        ([[1.0]], hm.BackendError, "`A` must be a NumPy, PyTorch or CuPy array"),
        (np.ones((3, 3), dtype=int), hm.DTypeError, "got int64"),
        (torch.ones(3, 3, dtype=torch.bfloat16), hm.DTypeError, "got bfloat16"),
        (np.full((3, 3), np.nan), hm.NonFiniteError, "`A` .* 9 NaN"),
        (np.full((3, 3), 1e200), hm.NonFiniteError, "values too large"),
    ],
)
def test_bad_matrices_are_refused(A, error, match):
    with pytest.raises(error, match=match):
        hm.from_dense(A, levels=0)


def test_false_symmetry_is_refused():
    for much in (1.0, 1e-9):
        A = np.ones((8, 8)) - much * np.tril(np.ones((8, 8)), -1)
        with pytest.raises(ValueError, match="`symmetric` or `definite` is true"):
            hm.from_dense(A, levels=1, symmetric=True)


def test_parts_of_other_dtypes_are_refused():
    H = hm.from_dense(np.ones((8, 8)), levels=1)
    upper = H.to(dtype="float32").upper
    with pytest.raises(hm.DTypeError, match="`upper` has dtype float32, expected flo"):
        hm.HODLR(H.tree, H.leaves, upper)
