"""The strategies draw what they say: a property of nothing is always true."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import condition, error_ratio
from tests.strategies import invertible_matrices, samples, trees


@given(st.integers(1, 40).flatmap(invertible_matrices))
def test_diagonal_blocks_of_invertible_matrices_are_well_conditioned(A):
    half = max(1, len(A) // 2)
    assert max(map(condition, (A, A[:half, :half], A[half - 1 :, half - 1 :]))) < 1e3


@given(samples(7))
def test_samples_are_finite_rows(Z):
    assert Z.ndim == 2
    assert Z.shape[1] == 7
    assert np.isfinite(Z).all()


@given(trees())
def test_trees_have_a_row_for_every_leaf(size):
    n, levels = size
    assert 1 <= 2**levels <= n


def test_error_ratios_see_what_is_wrong():
    assert error_ratio(np.zeros(3), np.ones(3)) == 1
    assert error_ratio(np.ones(3) + 1e-6, np.ones(3)) > 0.9e-6
    assert error_ratio(np.ones(2), np.zeros(2)) > 1
