"""Solve, inverse, its diagonal and log-determinant against dense linear algebra."""

import itertools
from functools import partial

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import (
    assert_close,
    assert_in,
    condition,
    dense,
    error_ratio,
    to_numpy,
)
from tests.strategies import (
    SEEDS,
    batches,
    fed,
    invertible_matrices,
    make_samples,
    mlr_matrix,
    trees,
)


@st.composite
def factored(draw, *kinds):
    """Draw a HODLR or MLR matrix with its factorization and dense form."""
    n, levels = draw(trees())
    if draw(st.sampled_from(kinds or (hm.MLR, hm.HODLR))) is hm.MLR:
        data, rank = draw(batches(n)), draw(st.integers(1, 5))
        H = fed(hm.StreamingMLR, data, levels, rank).result()
        shift = draw(st.sampled_from([0.01, 1.0])) * (1 + hm.norm(H))
    else:
        A = draw(invertible_matrices(n))
        H = hm.from_dense(A, levels=levels, rtol=1e-3)
        shift = draw(st.sampled_from([0.0, 0.3, 10.0]))
    return H, hm.factorize(H, shift), dense(H) + shift * np.eye(n)


@given(factored(), SEEDS)
def test_solve(case, seed):
    H, F, D = case
    X = np.random.default_rng(seed).standard_normal((H.tree.n, 2))
    solved = F.solve(D @ X)
    assert_close(solved, X, ("float64", "solve"), 100 * condition(D))
    assert_close(
        F.solve(D @ X[:, 0]), X[:, 0], ("float64", "solve"), 100 * condition(D)
    )


@pytest.mark.parametrize("kind", ["inversion", "orthogonal", "cholesky", "mlr"])
def test_operands_are_left_alone(kind, xp, rng):
    # sums are built up in memory, which must be nobody else's
    Z = rng.standard_normal((80, 64))
    if kind == "mlr":
        stream = hm.StreamingMLR(64, 3, 4, like=xp.asarray(Z[:0]))
        stream.update(xp.asarray(Z))
        H = stream.result()
        F = hm.factorize(H, 0.1)
    else:
        H = hm.from_dense(xp.asarray(Z.T @ Z), levels=3, symmetric=kind == "cholesky")
        F = hm.factorize(H, 0.1, method=kind)
    operations = [H.__matmul__, H.T.__matmul__]
    for refine, adjoint in itertools.product((0, 1), (False, True)):
        operations.append(partial(F.solve, refine=refine, adjoint=adjoint))
    if kind in ("cholesky", "mlr"):
        operations += [F.sample, F.whiten]
    X, before = rng.standard_normal((64, 5)), dense(H)
    for operation in operations:
        x = xp.asarray(X.copy())
        operation(x)
        np.testing.assert_array_equal(to_numpy(x), X)
    np.testing.assert_array_equal(dense(H), before)


@given(factored())
def test_inverse_both_sides_and_diagonal(case):
    _, F, D = case
    inverse = F.inverse()
    exact = np.linalg.inv(D)
    factor = 100 * condition(D)
    assert_close(inverse.to_dense(), exact, ("float64", "solve"), factor)
    assert_close(inverse.T.to_dense(), exact.T, ("float64", "solve"), factor)
    assert_close(F.inverse_diagonal(), np.diag(exact), ("float64", "solve"), factor)
    assert_close(inverse.diagonal(), np.diag(exact), ("float64", "solve"), factor)
    x = np.arange(1.0, len(D) + 1)
    assert_close(inverse @ x, exact @ x, ("float64", "solve"), factor)
    assert_close(x @ inverse, x @ exact, ("float64", "solve"), factor)


@given(factored())
def test_slogdet(case):
    _, F, D = case
    sign, value = F.slogdet()
    exact_sign, exact = np.linalg.slogdet(D)
    assert sign == exact_sign
    assert abs(value - exact) <= 1e-13 * len(D) * condition(D)
    assert F.logdet() == value


@given(factored(hm.MLR))
def test_factoring_the_mlr_inverse_gives_back_the_matrix(case):
    _, F, D = case
    back = hm.factorize(F.inverse())
    tolerance = ("float64", "solve")
    assert_close(back.inverse().to_dense(), D, tolerance, 1e3 * condition(D))
    assert abs(back.logdet() + F.logdet()) <= 1e-13 * len(D) * condition(D)
    assert F.inverse().sign == -1
    assert back.inverse().sign == 1


@given(trees(), SEEDS)
def test_the_diagonal_of_an_mlr_inverse_is_positive(size, seed):
    n, levels = size
    X = make_samples("decaying", 30, n, np.random.default_rng(seed)).astype(np.float32)
    stream = hm.StreamingMLR(n, levels, 4, dtype="float32")
    stream.update(X)
    H = stream.result()
    diagonal = hm.factorize(H, 1e-3 * H.trace() / n).inverse_diagonal()
    assert np.all(to_numpy(diagonal) > 0)


def test_negative_determinants(rng):
    A = np.diag(np.where(np.arange(20) % 2, 2.0, -3.0)) + 0.01 * rng.random((20, 20))
    A[:1] *= -1
    F = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-14))
    sign, value = np.linalg.slogdet(A)
    assert F.slogdet() == (sign, pytest.approx(value))
    with pytest.raises(ValueError, match=r"determinant has sign -1.*slogdet"):
        F.logdet()


@pytest.mark.parametrize("kind", ["hodlr", "general", "mlr"])
def test_every_library_and_dtype(xp, dtype, kind, rng):
    n = 37
    if kind == "mlr":
        H = mlr_matrix(n, 2, rng, rank=4)
    else:
        A = rng.standard_normal((n, n))
        A = A + A.T if kind == "hodlr" else A
        H = hm.from_dense(A + 20 * np.eye(n), levels=2, max_rank=5)
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    F = hm.factorize(H, 0.5)
    D = dense(H) + 0.5 * np.eye(n)
    b = xp.asarray(rng.standard_normal(n), dtype)
    factor = 10 * condition(D)
    assert_in(F.solve(b), b)
    exact = scipy.linalg.solve(D, to_numpy(b).astype(float))
    assert_close(F.solve(b), exact, (dtype, "solve"), factor)
    diagonal = np.diag(scipy.linalg.inv(D))
    assert_close(F.inverse_diagonal(), diagonal, (dtype, "solve"), factor)
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    assert F.slogdet()[1] == pytest.approx(np.linalg.slogdet(D)[1], rel=tolerance)


def test_refinement_makes_up_for_inverted_leaves(rng):
    """A truncated covariance is indefinite: its sub-blocks can be badly conditioned."""
    stream = hm.StreamingHODLR(256, 3, 8)
    stream.update(make_samples("decaying", 60, 256, rng)[:, rng.permutation(256)])
    H = stream.result()
    shift = 1e-4 * H.trace() / 256
    F, b = hm.factorize(H, shift), rng.standard_normal(256)

    def residual(x):
        return error_ratio(H @ x + shift * x, b)

    assert residual(F.solve(b)) < 1e-11
    assert residual(F.solve(b)) <= residual(F.solve(b, refine=0))


def test_singular_leaves_are_named():
    A = np.eye(16)
    A[5, 5] = 0
    H = hm.from_dense(A, levels=2)
    with pytest.raises(
        hm.SingularLeafError, match=r"leaf 1: .* inf in float64"
    ) as caught:
        hm.factorize(H)
    assert (caught.value.level, caught.value.node) == (2, 1)
    assert isinstance(caught.value, np.linalg.LinAlgError)
    assert hm.factorize(H, shift=0.1).logdet() == pytest.approx(
        15 * np.log(1.1) + np.log(0.1)
    )


def test_singular_inner_nodes_are_named():
    H = hm.from_dense(np.ones((8, 8)), levels=0)
    with pytest.raises(hm.SingularLeafError, match="leaf 0"):
        hm.factorize(H)
    A = np.block([[np.eye(4), np.eye(4)], [np.eye(4), np.eye(4)]])
    with pytest.raises(hm.SingularBlockError, match="node 0 of level 0") as caught:
        hm.factorize(hm.from_dense(A, levels=1))
    assert not isinstance(caught.value, hm.SingularLeafError)


def test_matrices_that_are_not_positive_definite_are_named():
    leaves = np.stack([np.eye(3), np.diag([1.0, -2.0, 1.0])])
    H = hm.MLR(hm.ClusterTree(6, 1), leaves, (np.ones((1, 6, 1)),))
    match = "level 1, leaf 1: smallest eigenvalue -2 with `shift` = 0"
    with pytest.raises(hm.NotPositiveDefiniteError, match=match):
        hm.factorize(H)
    assert hm.factorize(H, shift=2.5).slogdet()[0] == 1
    H = hm.MLR(
        hm.ClusterTree(6, 1), np.stack([np.eye(3)] * 2), (np.ones((1, 6, 1)),), -1
    )
    with pytest.raises(hm.NotPositiveDefiniteError, match="level 0, node 0"):
        hm.factorize(H)


def test_failing_torch_leaves_are_named_too():
    import torch

    H = hm.MLR(hm.ClusterTree(4, 1), -torch.ones(2, 2, 2), (torch.zeros(1, 4, 1),))
    with pytest.raises(hm.NotPositiveDefiniteError, match="smallest eigenvalue -2"):
        hm.factorize(H)


def test_zero_matrices_need_a_shift():
    H = hm.from_dense(np.zeros((10, 10)), levels=2)
    assert H.ranks == (0, 0)
    with pytest.raises(hm.SingularLeafError, match="Use a `shift`"):
        hm.factorize(H)
    F = hm.factorize(H, 2.0)
    assert F.logdet() == pytest.approx(10 * np.log(2))
    np.testing.assert_allclose(F.inverse_diagonal(), 0.5, rtol=1e-15)


def test_wrong_arguments_are_refused():
    F = hm.factorize(hm.from_dense(np.eye(6), levels=1))
    with pytest.raises(hm.ShapeError, match=r"`b` must have shape \(6,\) or \(6, q\)"):
        F.solve(np.ones(5))
    with pytest.raises(hm.DTypeError, match="`b` has dtype float32"):
        F.solve(np.ones(6, dtype=np.float32))
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR, got ndarray"):
        hm.factorize(np.eye(6))
    with pytest.raises(hm.NonFiniteError, match="`shift` must be finite"):
        hm.factorize(hm.from_dense(np.eye(6), levels=1), shift=np.nan)


def test_repr_says_what_it_is():
    F = hm.factorize(hm.from_dense(np.eye(6), levels=1))
    assert repr(F) == "HODLRCholesky(n=6, levels=1, float64, numpy)"
    # the inverse of L, bases of rank 0, the log-determinant
    assert F.nbytes == 8 * (2 * 3 * 3 + 1)
    assert repr(F.inverse()) == "HODLRInverse(n=6, levels=1, float64, numpy)"


@given(factored(), SEEDS)
def test_adjoint_solves(case, seed):
    H, F, D = case
    X = np.random.default_rng(seed).standard_normal((H.tree.n, 2))
    factor = 100 * condition(D)
    for refine in (0, 1):
        solved = F.solve(D.T @ X, adjoint=True, refine=refine)
        assert_close(solved, X, ("float64", "solve"), factor)


def test_adjoint_solves_of_complex_matrices(rng):
    A = rng.standard_normal((30, 30)) + 1j * rng.standard_normal((30, 30))
    A = A + 20 * np.eye(30)
    F = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-14), 0.5)
    b = rng.standard_normal(30) + 1j * rng.standard_normal(30)
    exact = np.linalg.solve(A.conj().T + 0.5 * np.eye(30), b)
    for rtol in (None, 1e-13):
        x = F.solve(b, adjoint=True, rtol=rtol)
        np.testing.assert_allclose(x, exact, rtol=1e-11)


def test_the_determinant_of_a_complex_hermitian_matrix_is_real(rng):
    X = rng.standard_normal((40, 40)) + 1j * rng.standard_normal((40, 40))
    A = X + X.conj().T + np.diag(np.where(np.arange(40) % 3, 30.0, -30.0))
    sign, value = hm.factorize(hm.from_dense(A, levels=3, rtol=1e-14)).slogdet()
    exact_sign, exact = np.linalg.slogdet(A)
    assert type(sign) is float
    assert (sign, value) == (np.sign(exact_sign.real), pytest.approx(exact))


def badly_conditioned():
    """A kernel matrix of which block inversion loses digits."""
    t = np.linspace(0, 1, 256)
    A = np.exp(-((t[:, None] - t) ** 2)) + 1e-2 * np.eye(256)
    return hm.from_dense(A, levels=3, rtol=1e-13), np.stack([t, np.cos(40 * t)], axis=1)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_rounding_does_not_make_a_determinant_complex(dtype, rng):
    # Hermitian to rounding, as a product of two arrays is: not stored as such
    Z = rng.standard_normal((40, 40)) + 1j * rng.standard_normal((40, 40))
    A = (Z @ Z.conj().T + 40 * np.eye(40)).astype(dtype)
    F = hm.factorize(hm.from_dense(A, levels=2, rtol=0, symmetric=False))
    assert F.logdet() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-5)
    F = hm.factorize(hm.from_dense(A * np.exp(0.1j), levels=2, rtol=0))
    with pytest.raises(ValueError, match="no real log"):
        F.logdet()


def test_refinement_goes_on_until_the_residual_is_small(xp):
    H, b = badly_conditioned()
    H, b = H.to(like=xp.asarray(b)), xp.asarray(b)
    F = hm.factorize(H, method="inversion")

    def residual(x):
        columns = np.linalg.norm(to_numpy(b - (H @ x)), axis=0)
        return np.max(columns / np.linalg.norm(to_numpy(b), axis=0))

    assert residual(F.solve(b, refine=0)) > 1e-11
    x = F.solve(b, refine=0, rtol=1e-11)
    assert_in(x, b)
    assert residual(x) <= 1e-11


def test_a_tolerance_out_of_reach_is_an_error_with_numbers():
    H, b = badly_conditioned()
    F = hm.factorize(H.to(dtype="float32"))
    match = r"`rtol` = 1e-12 was not reached.*float32 ends at .* float64\."
    with pytest.raises(hm.ToleranceError, match=match) as caught:
        F.solve(b.astype(np.float32), rtol=1e-12)
    assert caught.value.asked == 1e-12
    assert caught.value.reached > 1e-12
    with pytest.raises(ValueError, match="`rtol` must be at least 0"):
        F.solve(b, rtol=-1.0)


def test_right_hand_sides_of_zeros_or_without_columns_are_solved():
    F = hm.factorize(hm.from_dense(np.eye(6), levels=1))
    assert not F.solve(np.zeros(6), rtol=0.0).any()
    assert F.solve(np.zeros((6, 0)), rtol=0.0).shape == (6, 0)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_tolerances_of_solutions_whose_squares_leave_the_range(size, rng):
    H = hm.from_dense(rng.standard_normal((40, 40)), levels=2, rtol=0)
    F, b = hm.factorize(H), np.full(40, size)
    x = F.solve(b, refine=0, rtol=1e-13)
    assert np.linalg.norm(H @ (x / size) - 1) <= 1e-12
    with pytest.raises(hm.ToleranceError):
        F.solve(b, rtol=1e-18)


@pytest.mark.parametrize("method", ["inversion", "cholesky"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float64", 1e30), ("float64", 1e140), ("float64", 1e-140), ("float32", 1e8)],
)
@pytest.mark.parametrize("sizes", [None, [20, 0, 30, 47]])
def test_padding_does_not_mind_the_scale_of_the_matrix(xp, sizes, dtype, scale, method):
    """Blocks of full stored rank: vectors of their rounding errors point to padding."""
    n, rounding = 97, {"float32": 1e-4, "float64": 1e-11}[dtype]
    t = np.linspace(0, 1, n)
    A = (np.exp(-100 * (t[:, None] - t) ** 2) + 0.5 * np.eye(n)).astype(dtype)
    H = hm.from_dense(
        xp.asarray(A * A.dtype.type(scale)), tree=hm.ClusterTree(n, 2, sizes), rtol=0
    )
    F = hm.factorize(H, method=method)
    logdet = np.linalg.slogdet(A)[1] + n * np.log(scale)
    assert F.logdet() == pytest.approx(logdet, rel=rounding)
    x = to_numpy(F.solve(xp.asarray(t.astype(dtype)))).astype(np.float64) * scale
    assert error_ratio(A @ x, t) <= rounding
    X = to_numpy(hm.inverse(F, rtol=1e-3).to_dense()).astype(np.float64) * scale
    assert error_ratio(X, np.linalg.inv(A.astype(np.float64))) <= 1e-3 + rounding


def test_nan_is_told_apart_from_singular_blocks():
    H = hm.from_dense(np.eye(40) + np.ones((40, 40)), levels=2)
    leaves = H.leaves.copy()
    leaves[1, 0, 0] = np.nan
    H = hm.HODLR(H.tree, leaves, H.upper)
    for act in (hm.factorize, hm.inverse):
        with pytest.raises(hm.NonFiniteError, match="NaN or infinite"):
            act(H)
    assert np.isnan(hm.norm(H))
    assert np.isnan(hm.norm(H, 2))


@pytest.mark.parametrize("shift", [np.ones(9), np.ones(1), 1j, np.complex64(1j), [1.0]])
def test_shifts_that_factorize_does_not_take(shift):
    with pytest.raises(hm.DTypeError, match=r"real number, got .* `hmatrix\.shift`"):
        hm.factorize(hm.identity(9, levels=1), shift)
