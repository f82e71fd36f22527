"""The strategies draw what they say: a property of nothing is always true."""

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from tests.helpers import condition, error_ratio
from tests.strategies import hodlr_matrices, invertible_matrices, samples, trees


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


@pytest.mark.parametrize(
    "wanted",
    [
        lambda H: H.symmetric and H.space.is_complex and max(H.ranks, default=0) > 1,
        lambda H: not H.symmetric and H.tree.permutation is not None,
        lambda H: H.tree.sizes is not None and H.tree.sizes.min() == 0,
        lambda H: H.tree.plain and H.tree.levels > 2,
        lambda H: H.tree.levels == 0,
    ],
)
def test_hodlr_matrices_of_every_sort_are_drawn(wanted):
    assert wanted(find(hodlr_matrices(), wanted))


def test_error_ratios_see_what_is_wrong():
    assert error_ratio(np.zeros(3), np.ones(3)) == 1
    assert error_ratio(np.ones(3) + 1e-6, np.ones(3)) > 0.9e-6
    assert error_ratio(np.ones(2), np.zeros(2)) > 1
