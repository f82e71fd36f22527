"""Laws of sums, products, inverses and low-rank updates of HODLR matrices.

Against their own dense form: what compression loses is the subject of other tests.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_in, condition, dense, to_numpy
from tests.strategies import (
    SEEDS,
    cluster_trees,
    hodlr_matrices,
    invertible_matrices,
    trees,
)

TOLERANCES = st.sampled_from([1e-12, 1e-8, 1e-3, 0.3])


def distance(H, expected):
    return np.linalg.norm((H if isinstance(H, np.ndarray) else dense(H)) - expected)


@st.composite
def pairs(draw):
    """Draw two matrices of one tree and dtype."""
    tree = draw(cluster_trees())
    pair = [draw(hodlr_matrices(tree)) for _ in range(2)]
    if any(H.space.is_complex for H in pair):
        pair = [H.to(dtype="complex128") for H in pair]
    return pair


@st.composite
def invertible(draw):
    """Draw a matrix with a bounded condition number, real or complex."""
    tree = draw(cluster_trees())
    A = draw(invertible_matrices(tree.n))
    if draw(st.booleans()):
        # a unitary similarity leaves both condition and Hermitian matrices as they are
        angles = np.random.default_rng(draw(SEEDS)).random(tree.n)
        z = np.exp(2j * np.pi * angles)
        A = A * z[:, None] * z.conj()
    return hm.from_dense(A, tree=tree, rtol=1e-3)


def vector(H, seed):
    x = np.random.default_rng(seed).standard_normal(H.tree.n)
    return x.astype(H.dtype)


@given(pairs(), SEEDS)
def test_sums_act_as_the_sum_of_the_products(pair, seed):
    H, G = pair
    x = vector(H, seed)
    scale = (hm.norm(H) + hm.norm(G)) * np.linalg.norm(x)
    assert distance((H + G) @ x, H @ x + G @ x) <= 1e-14 * scale
    assert distance((H - G) @ x, H @ x - G @ x) <= 1e-14 * scale
    assert (H + G).symmetric == (H.symmetric and G.symmetric)


@given(pairs(), SEEDS)
def test_products_act_one_after_the_other(pair, seed):
    H, G = pair
    x = vector(H, seed)
    scale = hm.norm(H) * hm.norm(G) * np.linalg.norm(x)
    assert distance((H @ G) @ x, H @ (G @ x)) <= 1e-13 * scale


@given(pairs())
def test_products_against_dense_ones(pair):
    H, G = pair
    assert distance(H @ G, dense(H) @ dense(G)) <= 1e-14 * hm.norm(H) * hm.norm(G)


@given(pairs(), TOLERANCES)
def test_products_keep_the_tolerance_relative_to_the_product(pair, rtol):
    H, G = pair
    exact = dense(H) @ dense(G)
    rounding = 1e-14 * hm.norm(H) * hm.norm(G)
    C = hm.matmul(H, G, rtol=rtol)
    assert distance(C, exact) <= rtol * np.linalg.norm(exact) + rounding


@given(pairs())
def test_the_adjoint_of_a_product_is_the_product_of_the_adjoints(pair):
    H, G = pair
    scale = hm.norm(H) * hm.norm(G)
    assert distance((H @ G).H, dense(G.H @ H.H)) <= 1e-13 * scale


@given(hodlr_matrices())
def test_squares_of_symmetric_matrices_are_symmetric(H):
    square = H @ H
    assert square.symmetric == H.symmetric
    assert distance(square, dense(H) @ dense(H)) <= 1e-14 * hm.norm(H) ** 2
    if H.symmetric:
        D = dense(square)
        assert np.array_equal(D, D.conj().T) or distance(D, D.conj().T) <= 1e-15 * (
            hm.norm(square)
        )


@given(pairs(), st.integers(0, 3))
def test_a_cap_on_the_ranks_of_a_product_leaves_the_leaves_alone(pair, rank):
    H, G = pair
    C = hm.matmul(H, G, max_rank=rank)
    assert all(r <= rank for r in C.ranks)
    best = hm.from_dense(dense(H) @ dense(G), tree=H.tree, max_rank=rank)
    scale = hm.norm(H) * hm.norm(G)
    assert distance(C.diagonal(), best.diagonal()) <= 1e-13 * scale
    error, least = (distance(X, dense(H) @ dense(G)) for X in (C, best))
    assert error <= least + 1e-12 * scale


@given(pairs())
def test_a_matrix_less_itself_is_nothing(pair):
    H, _ = pair
    assert distance(H + (-H), np.zeros(H.shape)) <= 1e-15 * hm.norm(H)
    assert hm.norm(hm.truncate(H - H, max_rank=2)) <= 1e-13 * hm.norm(H)


@given(hodlr_matrices(max_rank=None), TOLERANCES)
def test_truncation_is_idempotent_and_raises_no_rank(H, rtol):
    once = hm.truncate(H, rtol=rtol)
    assert distance(once, dense(H)) <= (rtol + 1e-13) * hm.norm(H)
    again = hm.truncate(once, rtol=1e-13)
    assert distance(again, dense(once)) <= 1e-12 * hm.norm(H)
    for before, after in ((H, once), (once, again)):
        for k in range(H.tree.levels):
            for old, new in zip(before.blocks(k), after.blocks(k), strict=True):
                assert np.all(new.ranks <= old.ranks)


@given(invertible(), SEEDS)
def test_the_inverse_undoes_the_matrix(H, seed):
    x, c = vector(H, seed), condition(dense(H))
    X = hm.inverse(H)
    assert distance(X @ (H @ x), x) <= 1e-13 * c * np.linalg.norm(x)
    assert X.symmetric == H.symmetric
    assert distance(X, np.linalg.inv(dense(H))) <= 1e-13 * c * hm.norm(X)


@given(invertible(), TOLERANCES)
def test_inverses_keep_the_tolerance_relative_to_the_inverse(H, rtol):
    exact = np.linalg.inv(dense(H))
    rounding = 1e-13 * condition(dense(H)) * np.linalg.norm(exact)
    X = hm.inverse(hm.factorize(H), rtol=rtol)
    assert distance(X, exact) <= rtol * np.linalg.norm(exact) + rounding


@given(invertible(), st.sampled_from([0.0, 0.5]))
def test_the_determinant_of_the_inverse_is_the_inverse_determinant(H, shift):
    X = hm.inverse(H, shift=shift)
    sign, value = hm.factorize(X).slogdet()
    expected_sign, expected = hm.factorize(H, shift).slogdet()
    c, n = condition(dense(H)), H.tree.n
    assert abs(sign - np.conj(expected_sign)) <= 1e-12 * n * c
    assert abs(value + expected) <= 1e-12 * n * c


@given(invertible())
def test_a_matrix_times_its_inverse_has_no_ranks(H):
    c = condition(dense(H))
    assume(c < 1e5)
    unit = hm.matmul(H, hm.inverse(H), rtol=1e-8)
    assert unit.ranks == (0,) * H.tree.levels
    assert distance(unit, np.eye(H.tree.n)) <= 2e-8 * math.sqrt(H.tree.n)


@given(hodlr_matrices(), st.integers(0, 4), SEEDS)
def test_low_rank_updates(H, rank, seed):
    rng = np.random.default_rng(seed)
    U, V = (rng.standard_normal((H.tree.n, rank)).astype(H.dtype) for _ in range(2))
    S = rng.standard_normal(rank)
    if H.space.is_complex:
        U = U * (1 + 2j)
    scale = hm.norm(H) + np.linalg.norm(U) * (np.linalg.norm(V) + np.linalg.norm(U)) * 3
    general = hm.add_low_rank(H, U, V, S)
    assert distance(general, dense(H) + U * S @ V.conj().T) <= 1e-14 * scale
    assert all(b <= a + rank for a, b in zip(H.ranks, general.ranks, strict=True))
    same = hm.add_low_rank(H, U, rtol=1e-3)
    exact = dense(H) + U @ U.conj().T
    assert distance(same, exact) <= 1e-3 * np.linalg.norm(exact) + 1e-14 * scale
    assert same.symmetric == H.symmetric
    assert distance(H + hm.LowRank(U, S, V), dense(general)) == 0
    back = general - hm.LowRank(U, S, V)
    assert distance(back, dense(H)) <= 1e-13 * scale


@given(hodlr_matrices())
def test_the_two_norm_is_the_largest_singular_value(H):
    exact = np.linalg.norm(dense(H), 2)
    assert abs(hm.norm(H, 2) - exact) <= 1e-6 * exact
    assert abs(hm.norm(H, "fro") - np.linalg.norm(dense(H))) <= 1e-12 * hm.norm(H)


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        (np.linspace(0.9999, 1, 300), 1e-6),  # close together
        (np.r_[np.full(299, 1.0), 1.001], 1e-6),  # one just above many
        (np.r_[np.full(299, 1e-200), 1e-199], 1e-6),  # squares that underflow
        (4 * np.sin(np.arange(1, 301) * np.pi / 602) ** 2, 1e-5),  # a Laplacian's
    ],
)
def test_two_norms_of_hard_spectra(values, bound, rng):
    H = hm.from_dense(np.diag(rng.permutation(values)), levels=3)
    exact = values.max()
    assert 0 <= 1 - hm.norm(H, 2) / exact + 1e-14 <= bound


def test_the_two_norm_of_an_inverse_gives_the_condition_number(rng):
    A = rng.standard_normal((40, 40)) + 15 * np.eye(40)
    H = hm.from_dense(A, levels=2, rtol=1e-14)
    found = hm.norm(H, 2) * hm.norm(hm.factorize(H).inverse(), 2)
    assert found == pytest.approx(np.linalg.cond(A), rel=1e-5)


@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_library_and_dtype(xp, name, symmetric, rng):
    n = 45
    tree = hm.ClusterTree.from_sizes([9, 14, 10, 12], rng.permutation(n))
    A = rng.standard_normal((n, n)) + 3j * rng.standard_normal((n, n))
    A = A if "complex" in name else A.real
    A = 10 * np.eye(n) + (A + A.conj().T if symmetric else A) / 10
    H = hm.from_dense(xp.asarray(A, name), tree=tree, max_rank=3)
    assert H.symmetric == symmetric
    D = dense(H).astype("complex128")
    eps = np.finfo(name).eps
    tolerance = 50 * eps * hm.norm(H) ** 2
    assert_in((H @ H).leaves, H.leaves)
    assert distance(H @ H, D @ D) <= tolerance
    assert distance(H @ H.H, D @ D.conj().T) <= tolerance
    inverse = np.linalg.inv(D)
    assert distance(hm.inverse(H), inverse) <= 50 * eps * np.linalg.norm(inverse)
    U = rng.standard_normal((n, 2))
    updated = hm.add_low_rank(H, xp.asarray(U, name), rtol=100 * eps)
    assert updated.symmetric == symmetric
    assert distance(updated, D + U @ U.T) <= 200 * eps * np.linalg.norm(D + U @ U.T)
    assert hm.norm(H, 2) == pytest.approx(np.linalg.norm(D, 2), rel=1e-5)


def test_rounding_does_not_keep_ranks_of_noise():
    """Products of matrices of rank 1 have rank 2, as handed down as they may be."""
    t = np.linspace(0, 1, 500)
    H = hm.from_dense(np.exp(-abs(t[:, None] - t)), levels=5, rtol=1e-12)
    assert H.ranks == (1,) * 5
    assert (H @ H).ranks == (2,) * 5
    assert hm.inverse(hm.shift(H, 1.0), rtol=1e-12).ranks == (1,) * 5
    assert hm.truncate(H + H).ranks == (1,) * 5


def test_products_that_cancel_keep_their_tolerance(rng):
    """‖HG‖ ≪ ‖H‖ ‖G‖: a tolerance relative to the factors would lose the product."""
    n = 64
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    A = Q * np.r_[np.ones(n // 2), np.full(n // 2, 1e-5)] @ Q.T
    B = Q * np.r_[np.full(n // 2, 1e-5), np.ones(n // 2)] @ Q.T
    H, G = (hm.from_dense(X, levels=3, rtol=1e-15) for X in (A, B))
    exact = A @ B
    assert np.linalg.norm(exact) < 2e-5 * np.linalg.norm(A) * np.linalg.norm(B) * n
    error = distance(hm.matmul(H, G, rtol=1e-3), exact)
    assert error <= 1.001e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_squares_out_of_range_do_no_harm_in_float32(size, rng):
    A = rng.standard_normal((40, 40))
    H = hm.from_dense(A.astype("float32"), levels=2, rtol=1e-6)
    small = hm.scale(H, size)
    assert hm.norm(small) == pytest.approx(size * np.linalg.norm(A), rel=1e-5)
    assert hm.norm(small, 2) == pytest.approx(size * np.linalg.norm(A, 2), rel=1e-5)
    product = hm.matmul(small, H, rtol=1e-5)
    assert distance(product, size * A @ A) <= 2e-5 * size * np.linalg.norm(A @ A)


def test_products_that_overflow_are_refused():
    H = hm.scale(hm.from_dense(np.ones((8, 8), np.float32), levels=1), 1e30)
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(hm.NonFiniteError, match="overflows float32"),
    ):
        H @ H


def test_an_error_is_never_understated(rng):
    t = np.sort(rng.random(200))
    A = 1 / (0.05 + abs(t[:, None] - t)) + t
    H = hm.from_dense(A, levels=3, rtol=1e-2)
    for X, B in [
        (H, A),
        (hm.truncate(H, rtol=0.1), A),
        (hm.truncate(hm.truncate(H, rtol=0.1), max_rank=0), A),
        (hm.scale(H, -3.0), -3 * A),
        (H.H, A.T),
    ]:
        assert distance(X, B) <= X.error * np.linalg.norm(B) * (1 + 1e-9)
    # nothing is left of the sum but errors; and nothing is known of the matrix
    assert (H - H).error is None
    unknown = hm.HODLR(H.tree, H.leaves, H.upper, H.lower)
    for X in (H + unknown, unknown @ H, hm.shift(unknown, 1.0), hm.inverse(unknown)):
        assert X.error is None
    # a compression that came out longer than the matrix
    longer = hm.HODLR(H.tree, 2 * H.leaves, H.upper, H.lower, error=1.0)
    cut = hm.truncate(longer, rtol=0.5)
    lost = distance(cut, dense(longer)) / hm.norm(longer)
    assert cut.error >= 1 + 2 * lost - 1e-12


def test_what_does_not_fit_is_refused(rng):
    import torch

    H = hm.from_dense(np.eye(8), levels=1)
    with pytest.raises(hm.ShapeError, match="`G` must have ClusterTree"):
        H @ hm.from_dense(np.eye(8), levels=2)
    with pytest.raises(hm.DTypeError, match="`G` has dtype float32"):
        hm.matmul(H, H.to(dtype="float32"))
    with pytest.raises(hm.BackendError, match="`G` is a torch array"):
        hm.matmul(H, H.to(like=torch.empty(0)))
    with pytest.raises(TypeError, match="`H` must be a HODLR, got MLR"):
        hm.matmul(hm.MLR(H.tree, H.leaves, (np.zeros((1, 8, 0)),)), H)
    with pytest.raises(TypeError, match="`G` must be a HODLR, got float"):
        hm.matmul(H, 2.0)
    with pytest.raises(hm.ShapeError, match=r"`G` must have shape \(8, 8\), got \(7"):
        hm.add_low_rank(H, np.ones((7, 1)), np.ones((8, 1)))
    with pytest.raises(hm.DTypeError, match="`U` has dtype float32"):
        hm.add_low_rank(H, np.ones((8, 1), np.float32))
    with pytest.raises(ValueError, match="`kind` must be 'fro' or 2, got 1"):
        hm.norm(H, 1)
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR, got HODLRInverse"):
        hm.norm(hm.factorize(H).inverse())
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR or"):
        hm.inverse(np.eye(8))
    with pytest.raises(ValueError, match="comes too late for a factorization"):
        hm.inverse(hm.factorize(H), shift=1.0)
    with pytest.raises(hm.SingularLeafError):
        hm.inverse(H, shift=-1.0)
    with pytest.raises(ValueError, match="`rtol` must be at least 0"):
        hm.matmul(H, H, rtol=-1)
    with pytest.raises(hm.ShapeError, match="`max_rank` must be at least 0"):
        hm.inverse(H, max_rank=-1)


def test_inverses_of_mlr_matrices_are_mlr(rng):
    stream = hm.StreamingMLR(30, 2, rank=4)
    stream.update(rng.standard_normal((20, 30)))
    H = stream.result()
    X = hm.inverse(H, shift=0.5)
    assert distance(X, np.linalg.inv(dense(H) + 0.5 * np.eye(30))) <= 1e-12
    assert hm.inverse(hm.factorize(H, 0.5), max_rank=2).ranks <= (2, 2)
    with pytest.raises(ValueError, match="truncated by `max_rank`"):
        hm.inverse(H, rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@given(
    trees(), SEEDS, st.sampled_from([1e-1, 1e-3, 1e-6]), st.sampled_from([None, 1e-2])
)
def test_errors_after_arithmetic_are_upper_bounds(symmetric, size, seed, loose, rtol):
    n, levels = size
    rng = np.random.default_rng(seed)
    t = np.sort(rng.random(n))
    A = np.exp(-3 * abs(t[:, None] - t)) + 0.5 * np.eye(n)
    B = np.cos(np.outer(t, 9 * t)) + np.diag(3 + t)
    if not symmetric:
        A, B = A * (1 + t), B + np.tril(np.ones((n, n)))
    H = hm.from_dense(A, levels=levels, rtol=loose)
    G = hm.from_dense(B, levels=levels, rtol=1e-2 * loose)
    U = rng.standard_normal((n, 2))
    cases = [
        (hm.add(H, G, rtol=rtol), A + B),
        (hm.subtract(H, G, rtol=rtol), A - B),
        (hm.add_low_rank(H, U, rtol=rtol), A + U @ U.T),
        (hm.shift(H, 2.0), A + 2 * np.eye(n)),
        (hm.shift(H - 2 * G, t), A - 2 * B + np.diag(t)),
        (hm.matmul(H, G, rtol=rtol), A @ B),
        (hm.matmul(H, H, rtol=rtol), A @ A),
        (hm.inverse(H, shift=1.0, rtol=rtol), np.linalg.inv(A + np.eye(n))),
    ]
    for X, exact in cases:
        if X.error is not None:
            error = distance(X, exact) / np.linalg.norm(exact)
            assert error <= X.error * (1 + 1e-9) + 1e-12
    # small errors have bounds, and those are no more than a condition number too large
    if loose < 1e-2 and rtol is None:
        sizes = [np.linalg.norm(C) for C in (A, B)]
        bound = 2 * loose * sum(sizes)
        assert cases[0][0].error <= bound / np.linalg.norm(A + B) + 1e-12
        bound = 3 * loose * sizes[0] * sizes[1]
        assert cases[5][0].error <= bound / np.linalg.norm(A @ B) + 1e-12
        assert cases[7][0].error <= 10 * loose * sizes[0] * np.sqrt(n)


@pytest.mark.parametrize("symmetric", [False, True])
def test_bounds_of_products_and_inverses_are_close_where_norms_are_small(symmetric):
    """In the 2-norm: the Frobenius norm of the identity is √n."""
    t = np.linspace(0, 1, 1024)
    A = np.eye(1024) + 0.01 / (1 + 1e4 * (t[:, None] - t) ** 2)
    A = A if symmetric else A * (1 + t)
    H = hm.from_dense(A, rtol=1e-6)
    for X, exact in ((hm.matmul(H, H), A @ A), (hm.inverse(H), np.linalg.inv(A))):
        error = distance(X, exact) / np.linalg.norm(exact)
        assert error <= X.error <= 10 * error


def test_bounds_count_what_is_of_second_order():
    A, H = np.eye(400), hm.identity(400, levels=1)
    A[0, 0] = 3.0  # taken for 1
    H = hm.HODLR(H.tree, H.leaves, H.upper, error=2 / np.linalg.norm(A))
    assert distance(H @ H, A @ A) <= (H @ H).error * np.linalg.norm(A @ A)
    short = hm.HODLR(hm.ClusterTree(1, 0), np.full((1, 1, 1), 0.9), (), error=0.1)
    assert hm.shift(short, 1.5).error >= 0.1 / 2.5  # of 1, taken for 0.9


def test_matrices_without_errors_stay_so():
    H = hm.identity(20, levels=2)
    for X in (H + H, hm.shift(H, 1.0), H @ H, hm.inverse(H)):
        assert X.error <= 1e-14


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ranks", [(0, 2), (2, 0), (0, 0)])
def test_levels_without_rank_are_inverted(xp, ranks, symmetric, rng):
    tree = hm.ClusterTree(8, 2)

    def blocks():
        for level, r in enumerate(ranks):
            b, m = tree.nodes(level), tree.size(level + 1)
            U, V = (xp.asarray(rng.standard_normal((b, m, r))) for _ in range(2))
            yield hm.LowRank(U, xp.asarray(rng.random((b, r))), V)

    leaves = rng.random((4, 2, 2)) + 9 * np.eye(2)
    leaves = xp.asarray(leaves + leaves.mT)
    upper, lower = tuple(blocks()), tuple(blocks())
    H = hm.HODLR(tree, leaves, upper, None if symmetric else lower, error=0.01)
    exact = np.linalg.inv(dense(H))
    for method in ("auto", "inversion", "orthogonal"):
        F = hm.factorize(H, method=method)
        assert distance(F.inverse().H, exact.T) < 1e-13
        assert np.allclose(to_numpy(F.inverse_diagonal()), np.diag(exact))
    X = hm.inverse(H)
    assert distance(X, exact) < 1e-13
    assert X.error < 1
