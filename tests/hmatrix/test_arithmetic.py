import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, dense, error_ratio, to_numpy
from tests.strategies import SEEDS, hodlr_matrices, mlr_matrix, square_matrices, trees


@st.composite
def pairs(draw):
    n, levels = draw(trees())
    return [
        hm.from_dense(draw(square_matrices(n)), levels=levels, max_rank=4)
        for _ in range(2)
    ]


@given(pairs(), st.floats(1e-10, 0.5))
def test_truncation_keeps_its_promise(pair, rtol):
    total = hm.add(*pair)
    cut = hm.truncate(total, rtol=rtol)
    assert error_ratio(cut.to_dense(), dense(total)) <= rtol + 1e-12
    assert all(a <= b for a, b in zip(cut.ranks, total.ranks, strict=True))


@given(pairs(), st.integers(0, 4))
def test_truncation_is_idempotent(pair, rank):
    once = hm.truncate(pair[0], max_rank=rank)
    again = hm.truncate(once, max_rank=rank)
    assert all(r <= rank for r in once.ranks)
    assert np.linalg.norm(dense(once) - dense(again)) <= 1e-12 * hm.norm(pair[0])


@given(pairs(), st.floats(-5, 5))
def test_scaling_and_shifting(pair, factor):
    H, _ = pair
    n = H.tree.n
    assert_close(
        hm.scale(H, factor).to_dense(), factor * dense(H), ("float64", "exact")
    )
    d = np.arange(n, dtype=float)
    shifted = dense(H) + np.diag(d)
    assert_close(hm.shift(H, d).to_dense(), shifted, ("float64", "exact"))
    shifted = dense(H) + factor * np.eye(n)
    assert_close(hm.shift(H, factor).to_dense(), shifted, ("float64", "exact"))


@given(hodlr_matrices(), st.floats(-5, 5), st.floats(-5, 5))
def test_complex_factors_and_shifts_end_symmetry_only_if_they_must(H, a, b):
    H = H.to(dtype="complex128")
    D, n = to_numpy(H.to_dense()), H.tree.n
    d = np.arange(n) * (a + 0j)
    for factor in (a, complex(a), complex(a, b)):
        real = not complex(factor).imag
        scaled, shifted = hm.scale(H, factor), hm.shift(H, factor)
        bound = 1e-14 * (1 + abs(factor)) * (hm.norm(H) + n)
        assert np.linalg.norm(scaled.to_dense() - factor * D) <= bound
        assert np.linalg.norm(shifted.to_dense() - D - factor * np.eye(n)) <= bound
        assert scaled.symmetric == shifted.symmetric == (H.symmetric and real)
    for vector in (d.real, d, d + 1j * b):
        shifted = hm.shift(H, vector)
        error = np.linalg.norm(shifted.to_dense() - D - np.diag(vector))
        assert error <= 1e-14 * (hm.norm(H) + np.linalg.norm(vector))
        assert shifted.symmetric == (H.symmetric and not np.any(vector.imag))
    assert (H * 1j * -1j).error == H.error


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_subnormal_numbers_have_norms(xp, dtype):
    """Complex division by them overflows."""
    smallest = np.finfo(dtype).smallest_subnormal
    H = hm.identity(9, levels=1, like=xp.asarray(np.zeros(1), dtype))
    for factor in (float(smallest), 7e3 * float(smallest)):
        x = xp.asarray(np.full(9, factor), dtype)
        assert hm.shift(H, x).trace() == pytest.approx(9)
        assert hm.norm(hm.scale(H, factor)) == pytest.approx(3 * factor, rel=1e-3)


@given(hodlr_matrices())
def test_to_complex_and_to_single_keep_scales_real(H):
    there = H.to(dtype="complex64")
    assert all(block.S.dtype == np.float32 for block in there.upper)
    error = np.linalg.norm(there.to_dense() - H.to_dense())
    assert error <= 1e-6 * hm.norm(H)
    with pytest.raises(hm.DTypeError, match="cannot hold the imaginary parts"):
        there.to(dtype="float32")


@given(trees(), SEEDS)
def test_mlr_sums_scales_and_shifts(size, seed):
    H, G = mlr_matrix(*size, seed), mlr_matrix(*size, seed // 2)
    D = dense(H)
    assert_close(hm.add(H, G).to_dense(), D + dense(G), ("float64", "exact"))
    assert_close(hm.scale(H, 2.5).to_dense(), 2.5 * D, ("float64", "exact"))
    assert_close(
        hm.shift(H, 2.0).to_dense(), D + 2 * np.eye(len(D)), ("float64", "exact")
    )


@given(trees(), SEEDS)
def test_truncating_an_mlr_keeps_its_diagonal(size, seed):
    H = mlr_matrix(*size, seed)
    cut = hm.truncate(H, max_rank=2)
    assert all(r <= 2 for r in cut.ranks)
    assert_close(cut.diagonal(), H.diagonal(), ("float64", "stream"))
    inverse = hm.factorize(H, 0.1).inverse()
    cut = hm.truncate(inverse, max_rank=2)
    assert_close(cut.diagonal(), inverse.diagonal(), ("float64", "stream"))


def test_norms_of_inverses(rng):
    inverse = hm.factorize(mlr_matrix(40, 3, 0), 0.5).inverse()
    assert hm.norm(inverse) == pytest.approx(np.linalg.norm(dense(inverse)))


def test_what_does_not_match_is_refused():
    H, G = (hm.from_dense(np.eye(8), levels=k) for k in (1, 2))
    with pytest.raises(hm.ShapeError, match="`G` must have ClusterTree"):
        hm.add(H, G)
    with pytest.raises(TypeError, match="`G` must be a HODLR, got MLR"):
        hm.add(H, mlr_matrix(8, 1, 0))
    with pytest.raises(hm.DTypeError, match="`G` has dtype float32"):
        hm.add(H, H.to(dtype="float32"))
    with pytest.raises(ValueError, match="`factor` must be at least 0"):
        hm.scale(mlr_matrix(8, 1, 0), -1.0)
    with pytest.raises(ValueError, match="truncated by `max_rank`"):
        hm.truncate(mlr_matrix(8, 1, 0), rtol=1e-3)
    with pytest.raises(ValueError, match="`G` must have sign 1, got -1"):
        hm.add(mlr_matrix(8, 1, 0), hm.factorize(mlr_matrix(8, 1, 0), 1.0).inverse())
    with pytest.raises(hm.DTypeError, match="`factor` is complex, the matrix float64"):
        hm.scale(H, 1j)
    with pytest.raises(hm.DTypeError, match="`diagonal` has dtype complex128"):
        hm.shift(H, np.ones(8) * 1j)
    with pytest.raises(hm.DTypeError, match="`factor` must be a number, got str"):
        hm.scale(H, "two")
    with pytest.raises(hm.DTypeError, match=r"got ndarray; `@` multiplies vectors"):
        H * np.ones(8)
    with pytest.raises(hm.DTypeError, match=r"got list; a vector must be an array"):
        hm.shift(H, [1.0] * 8)
    with pytest.raises(hm.NonFiniteError, match="`diagonal` must be finite"):
        hm.shift(H, np.nan)
    with pytest.raises(hm.ShapeError, match=r"`diagonal` must have shape \(8,\)"):
        hm.shift(H, np.ones(7))
    with pytest.raises(TypeError, match="`G` must be a HODLR, got int; `shift`"):
        H - 1
    with pytest.raises(TypeError, match="`G` must be a HODLR, got ndarray"):
        np.eye(8) + H
    with pytest.raises(hm.ShapeError, match="`U` must have 2 axes"):
        hm.add_low_rank(H, np.ones(8))


@pytest.mark.parametrize("where", ["leaves", "U", "S"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_neither_truncated_nor_factorized(rng, where, value):
    H = hm.from_dense(rng.standard_normal((40, 40)), levels=2)
    array = H.leaves if where == "leaves" else getattr(H.lower[1], where)
    array[1, ..., 2] = value
    with pytest.raises(hm.NonFiniteError, match="holds NaN or infinite values"):
        hm.truncate(H, rtol=1e-3)
    for method in ("auto", "inversion", "orthogonal"):
        with pytest.raises(hm.NonFiniteError, match="holds NaN or infinite values"):
            hm.factorize(H, method=method)
