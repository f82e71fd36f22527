"""Kernels and entries as functions of two lists, and predictions with them."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import hmatrix as hm
from tests.helpers import dense, relative, to_numpy


def gaussian(x, y):
    """Kernel of points that broadcast."""
    return np.exp(-((x - y) ** 2).sum(axis=-1))


def of_lists(X, Y):
    """The same kernel of two lists of points."""
    assert X.ndim == Y.ndim == 2
    return gaussian(X[:, None, :], Y[None, :, :])


@pytest.mark.parametrize(
    ("n", "leaf_size"), [(1, 50), (2, 1), (3, 1), (80, 1), (150, 50), (700, 90)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_lists_give_what_broadcasting_gives(n, leaf_size, symmetric, rng):
    x = rng.random((n, 2))
    tilt = lambda x, y: 1 + x[..., 0] * y[..., 0 if symmetric else 1]
    expected = hm.from_kernel(
        lambda x, y: gaussian(x, y) * tilt(x, y), x, leaf_size=leaf_size
    )
    H = hm.from_kernel(
        lambda X, Y: of_lists(X, Y) * tilt(X[:, None, :], Y[None, :, :]),
        x,
        leaf_size=leaf_size,
    )
    assert H.symmetric == symmetric or n == 1
    assert H.ranks == expected.ranks
    assert relative(H, dense(expected)) <= 1e-15


@pytest.mark.parametrize("kernel", [gaussian, of_lists])
def test_entries_stay_where_the_points_are(kernel, rng):
    """A matrix on the host of points that are not would come as a surprise."""
    x = torch.asarray(rng.random((40, 2)))
    on_host = lambda x, y: kernel(x.numpy(), y.numpy())
    with pytest.raises(hm.BackendError, match="must give a torch array, got numpy;"):
        hm.from_kernel(on_host, x)


def test_lists_in_every_library(xp, rng):
    x = rng.random((400, 1))

    def kernel(X, Y):
        return 1 / (1 + abs(X[:, 0][:, None] - Y[:, 0][None, :]))

    H = hm.from_kernel(kernel, xp.asarray(x), nugget=0.5, rtol=1e-6)
    assert relative(H, kernel(x, x) + 0.5 * np.eye(400)) <= 1e-6


def test_lists_of_numbers_of_rows(rng):
    A = np.sort(rng.random(600))
    A = A[:, None] ** 2 + A
    H = hm.from_entries(lambda i, j: A[np.ix_(i, j)], 600, rtol=1e-10)
    assert not H.symmetric
    assert relative(H, A) <= 1e-10


def test_lists_whose_matrices_are_symmetric_to_rounding(rng):
    x = torch.asarray(rng.random((500, 3)))

    def kernel(X, Y):  # by products, whose rounding depends on the order
        return torch.exp(-torch.cdist(X, Y, compute_mode="use_mm_for_euclid_dist"))

    H = hm.from_kernel(kernel, x, rtol=1e-4, symmetric=True)
    assert relative(H, to_numpy(torch.exp(-torch.cdist(x, x)))) <= 1e-4
    assert bool((H.leaves == H.leaves.mT).all())


def test_lists_of_the_wrong_shape_are_told(rng):
    def kernel(X, Y):
        return cdist(X[:2], Y)

    with pytest.raises(hm.ShapeError, match=r"two lists .* \(64, 64\), got \(2, 64\)"):
        hm.from_kernel(kernel, rng.random((128, 2)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_predictions_at_new_points_are_those_of_dense_algebra(dims, rng):
    """Gaussian process regression; points and new points in no order."""
    n, noise = 500, 0.1
    x, new = rng.random((n, dims)), rng.random((300, dims))
    y = np.sin(3 * x.sum(axis=1)) + noise * rng.standard_normal(n)

    def kernel(X, Y):
        return np.exp(-cdist(X, Y, "sqeuclidean") / 2)

    C = kernel(x, x) + noise**2 * np.eye(n)
    F = hm.factorize(hm.from_kernel(kernel, x, rtol=1e-10), shift=noise**2)
    weights, cross = F.solve(y), kernel(new, x)
    joint = hm.from_kernel(kernel, np.concatenate([x, new]), rtol=1e-10)
    means = (joint @ np.concatenate([weights, np.zeros(300)]))[n:]
    np.testing.assert_allclose(means, cross @ np.linalg.solve(C, y), atol=1e-6)
    variances = 1 - np.sum(cross * F.solve(cross.T).T, axis=1)
    exact = 1 - np.sum(cross * np.linalg.solve(C, cross.T).T, axis=1)
    np.testing.assert_allclose(variances, exact, atol=1e-6)
    assert F.logdet() == pytest.approx(np.linalg.slogdet(C)[1], rel=1e-7)
