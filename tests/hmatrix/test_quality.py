"""How good the approximations are, on the covariances that curvature looks like."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr

import hmatrix as hm
from tests.helpers import dense, error_ratio, to_numpy

pytestmark = [pytest.mark.property, pytest.mark.slow]
N, LEVELS = 512, 4


def covariance_samples(kind, c, rng):
    """Samples of a power-law spectrum in a random basis, or of a local covariance."""
    X = rng.standard_normal((c, N))
    if kind == "local":
        t = np.arange(N)
        return X @ np.linalg.cholesky(np.exp(-abs(t[:, None] - t) / 20)).T
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    return X * np.arange(1, N + 1.0) ** -1 @ basis.T


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("c", [128, 4096])
@pytest.mark.parametrize("kind", ["power", "local"])
def test_damped_inverse_diagonals_are_positive_and_ranked_well(kind, c, rank, rng):
    X = covariance_samples(kind, c, rng)
    A = X.T @ X / c
    damping = 1e-2 * np.trace(A) / N
    stream = hm.StreamingMLR(N, LEVELS, rank)
    for batch in np.array_split(X, 4):
        stream.update(batch)
    H = stream.result()
    diagonal = hm.factorize(H, damping).inverse_diagonal()
    exact = np.diag(np.linalg.inv(A + damping * np.eye(N)))
    assert np.linalg.eigvalsh(dense(H))[0] > -1e-12 * np.linalg.norm(A)
    assert np.all(diagonal > 0)
    assert spearmanr(diagonal, exact).statistic > 0.5


def test_twenty_thousand_updates_keep_bases_orthonormal(dtype, rng):
    stream = hm.StreamingHODLR(64, 1, 10, dtype=dtype)
    for _ in range(20_000):
        stream.update(rng.standard_normal((1, 64)).astype(dtype))
    (block,) = stream.result().upper
    gram = to_numpy(block.U).swapaxes(-1, -2) @ to_numpy(block.U)
    assert abs(gram - np.eye(10)).max() < (1e-13 if dtype == "float64" else 1e-5)


def test_more_rank_is_never_much_worse(rng):
    X = covariance_samples("local", 1000, rng)
    errors = []
    for rank in (2, 4, 8, 16, 32):
        stream = hm.StreamingMLR(N, LEVELS, rank)
        stream.update(X)
        errors.append(error_ratio(stream.result().to_dense(), X.T @ X / len(X)))
    assert all(b < 1.05 * a for a, b in pairwise(errors))
