"""HODLR and MLR matrices against their own dense form: arithmetic bugs only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmatrix as hm
from tests.helpers import assert_close, assert_in, dense, to_numpy
from tests.strategies import SEEDS, mlr_matrix, square_matrices, trees


def general(n, levels, rng):
    return hm.from_dense(rng.standard_normal((n, n)), levels=levels, max_rank=3)


def symmetric(n, levels, rng):
    A = rng.standard_normal((n, n))
    return hm.from_dense(A + A.T, levels=levels, max_rank=3)


def uneven(n, levels, rng):
    """Upper blocks of another rank than the lower ones."""
    A = np.triu(rng.standard_normal((n, n))) + 0.1 * np.tril(np.ones((n, n)))
    return hm.from_dense(A, levels=levels)


MAKERS = [general, symmetric, uneven, mlr_matrix]
makers = st.sampled_from(MAKERS)


@st.composite
def matrices(draw):
    n, levels = draw(trees())
    return draw(makers)(n, levels, np.random.default_rng(draw(SEEDS)))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("n", "levels"), [(1, 0), (7, 2), (32, 3), (45, 4)])
def test_both_sides_vector_and_block(xp, dtype, make, n, levels, rng):
    H = make(n, levels, rng).to(like=xp.asarray(np.empty(0)), dtype=dtype)
    x, X = (xp.asarray(rng.standard_normal(s), dtype) for s in ((n,), (n, 3)))
    D, y, Y = dense(H), to_numpy(x).astype(float), to_numpy(X).astype(float)
    assert_in(H @ x, x)
    assert_close(H @ x, D @ y, (dtype, "exact"))
    assert_close(H @ X, D @ Y, (dtype, "exact"))
    if xp.name != "array_api_strict":  # whose arrays refuse what they do not know
        assert_close(x @ H, y @ D, (dtype, "exact"))
        assert_close(X.T @ H, Y.T @ D, (dtype, "exact"))
    assert_close(H.matvec(x), D @ y, (dtype, "exact"))
    assert_close(H.matmat(X), D @ Y, (dtype, "exact"))
    assert_close(H.rmatvec(x), D.T @ y, (dtype, "exact"))
    assert_close(H.rmatmat(X), D.T @ Y, (dtype, "exact"))


@given(matrices(), SEEDS)
def test_the_transpose_is_the_adjoint(H, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, H.shape[0]))
    scale = np.linalg.norm(dense(H)) * np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(y @ (H @ x) - x @ (H.T @ y)) <= 1e-13 * scale
    assert_close(H.T.to_dense(), dense(H).T, ("float64", "exact"))


@given(matrices())
def test_diagonal_trace_and_norm(H):
    D = dense(H)
    assert_close(H.diagonal(), np.diag(D), ("float64", "exact"))
    assert abs(H.trace() - np.trace(D)) <= 1e-13 * np.linalg.norm(D) * len(D)
    assert abs(hm.norm(H) - np.linalg.norm(D)) <= 1e-12 * np.linalg.norm(D)


@given(matrices())
def test_padded_rows_stay_zero(H):
    padding = H.tree.padded - H.tree.n
    tree = hm.ClusterTree(H.tree.padded, H.tree.levels)
    if isinstance(H, hm.MLR):
        whole = hm.MLR(tree, H.leaves, H.factors)
    else:
        whole = hm.HODLR(tree, H.leaves, H.upper, H.lower)
    expected = np.pad(dense(H), (0, padding))
    assert_close(whole.to_dense(), expected, ("float64", "exact"))


@given(matrices())
def test_nbytes_counts_every_stored_number(H):
    sizes = []
    H.map(lambda x: sizes.append(x.nbytes) or x)
    assert H.nbytes == sum(sizes)


@given(st.data())
def test_ranks_are_those_of_the_blocks(data):
    n, levels = data.draw(trees(max_levels=3))
    A = data.draw(square_matrices(n))
    H = hm.from_dense(A, levels=levels, rtol=1e-9)
    padded = H.tree.padded
    D = np.pad(dense(H), (0, padded - n))
    for k, rank in enumerate(H.ranks):
        half = H.tree.size(k + 1)
        nodes = (
            (slice(i, i + half), slice(i + half, i + 2 * half))
            for i in range(0, padded, 2 * half)
        )
        blocks = [B for top, low in nodes for B in (D[top, low], D[low, top])]
        # what is cut off is a thousand times as large
        assert rank == max(np.linalg.matrix_rank(blocks, tol=1e-12 * np.linalg.norm(A)))


@pytest.mark.parametrize("make", MAKERS)
def test_conversion_keeps_the_numbers(xp, make, rng):
    H = make(13, 2, rng)
    there = H.to(like=xp.asarray(np.empty(0), "float64"))
    assert_in(there.leaves, xp.asarray(H.leaves))
    assert np.array_equal(dense(there.to(like=np.empty(0))), dense(H))
    single = there.to(dtype="float32")
    assert_close(single.to_dense(), dense(H), ("float32", "exact"))


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_reach_the_vector(make, rng):
    import torch

    H = make(13, 2, rng).to(like=torch.empty(0, dtype=torch.float64))
    x = torch.ones(13, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(13.0, dtype=torch.float64)
    (weights @ (H @ x)).backward()
    assert_close(x.grad, dense(H).T @ weights.numpy(), ("float64", "exact"))


def test_repr_says_what_it_is(rng):
    assert repr(symmetric(40, 2, rng)) == (
        "HODLR(n=40, levels=2, ranks=(3, 3), symmetric, float64, numpy, 5.19 kB, 0.41 of dense)"
    )
    assert repr(mlr_matrix(40, 2, rng)) == (
        "MLR(n=40, levels=2, ranks=(3, 3), float64, numpy, 5.12 kB, 0.4 of dense)"
    )


@pytest.mark.parametrize("make", [general, mlr_matrix])
def test_operands_that_do_not_fit_are_refused(make, rng):
    import torch

    H = make(10, 1, rng)
    with pytest.raises(
        hm.ShapeError, match=r"`x` must have shape \(10,\) or \(10, q\)"
    ):
        H @ np.ones(11)
    with pytest.raises(hm.ShapeError, match=r"\(10,\), got \(10, 2\)"):
        H.matvec(np.ones((10, 2)))
    with pytest.raises(hm.DTypeError, match="dtype float32, expected float64"):
        H @ np.ones(10, dtype=np.float32)
    with pytest.raises(hm.BackendError, match="is a torch array, expected numpy"):
        H @ torch.ones(10, dtype=torch.float64)
    with pytest.raises(hm.BackendError, match="got list"):
        H @ [1.0] * 10


def test_parts_must_fit_the_tree():
    tree = hm.ClusterTree(8, 1)
    with pytest.raises(hm.ShapeError, match="`leaves` must have shape"):
        hm.MLR(tree, np.ones((2, 3, 3)), ())
    with pytest.raises(hm.ShapeError, match="`factors` must have shapes"):
        hm.MLR(tree, np.ones((2, 4, 4)), ())
    with pytest.raises(hm.ShapeError, match="`upper` must hold blocks"):
        hm.HODLR(tree, np.ones((2, 4, 4)), ())
    with pytest.raises(ValueError, match="`sign` must be 1 or -1"):
        hm.MLR(hm.ClusterTree(4, 0), np.ones((1, 4, 4)), (), sign=2)
