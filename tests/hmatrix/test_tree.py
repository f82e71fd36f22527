import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hmatrix as hm
from tests.strategies import trees


@given(trees())
def test_padding_is_the_least_that_makes_equal_leaves(size):
    tree = hm.ClusterTree(*size)
    assert tree.padded == tree.leaf_size * tree.nodes(tree.levels)
    assert tree.n <= tree.padded < tree.n + tree.nodes(tree.levels)


@given(trees())
def test_nodes_of_every_level_cover_the_padded_range(size):
    tree = hm.ClusterTree(*size)
    assert all(
        tree.nodes(k) * tree.size(k) == tree.padded for k in range(tree.levels + 1)
    )


@given(st.integers(1, 3000), st.integers(2, 300))
def test_leaf_size_is_kept_with_the_fewest_levels(n, leaf_size):
    tree = hm.ClusterTree.from_leaf_size(n, leaf_size)
    assert tree.leaf_size <= leaf_size
    if tree.levels:
        assert hm.ClusterTree(n, tree.levels - 1).leaf_size > leaf_size


def test_too_many_levels_name_the_most_there_can_be():
    with pytest.raises(hm.ShapeError, match=r"`levels` = 4 .* n = 15 .* at most 3"):
        hm.ClusterTree(15, 4)


@pytest.mark.parametrize(
    ("n", "levels"), [(0, 0), (-3, 0), (4, -1), (4.0, 1), (4, True), ("4", 1)]
)
def test_bad_sizes_are_refused(n, levels):
    with pytest.raises(hm.ShapeError, match=r"`(n|levels)` must be"):
        hm.ClusterTree(n, levels)


@given(st.lists(st.integers(0, 300), min_size=8, max_size=8), st.integers(1, 400))
def test_given_leaves_are_halved_until_they_are_small(sizes, leaf_size):
    assume(sum(sizes) >= 8)
    plain = hm.ClusterTree.from_sizes(sizes)
    tree = hm.ClusterTree.from_sizes(sizes, leaf_size=leaf_size)
    # parts that stay together are those that were given
    parts = np.diff(np.searchsorted(tree.slots, np.arange(9) * tree.padded // 8))
    assert list(parts) == sizes
    assert tree.leaf_size <= leaf_size or 2 << tree.levels > tree.n
    assert tree.leaf_size == plain.leaf_size or tree.leaf_size <= -(
        -plain.leaf_size // 2
    )


@pytest.mark.parametrize("dtype", ["int8", "float16", "int64"])
def test_boxes_of_narrow_numbers_have_their_sides(dtype):
    """That from −120 to 120 is 240 long, not the −16 of int8."""
    x = np.stack([np.linspace(-120, 120, 64), np.arange(64) % 16], axis=1).astype(dtype)
    if dtype == "float16":
        x[:, 0] *= 500
    tree = hm.ClusterTree.from_points(x, leaf_size=32)
    wide = hm.ClusterTree.from_points(x.astype(float), leaf_size=32)
    np.testing.assert_array_equal(tree.permutation, wide.permutation)


@pytest.mark.parametrize("dtype", ["bool", "complex128", "object", "S3"])
def test_points_are_real_numbers(dtype):
    with pytest.raises(hm.DTypeError, match="integers or floats"):
        hm.ClusterTree.from_points(np.ones((5, 2)).astype(dtype))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: hm.ClusterTree(8, 1, permutation=[0, 1, 2, 3, 4, 5, 6, 6]),
            "each of 0 … 7 once",
        ),
        (
            lambda: hm.ClusterTree(8, 1, permutation=np.arange(8.0)),
            "must be 8 integers, got float64",
        ),
        (
            lambda: hm.ClusterTree(8, 1, sizes=[3, 4]),
            "sum to n = 8, got 3 at least and 7",
        ),
        (lambda: hm.ClusterTree(8, 1, sizes=[-1, 9]), "got -1 at least and 8"),
        (lambda: hm.ClusterTree.from_sizes([3, 4, 5]), "a power of two of them, got 3"),
        (lambda: hm.ClusterTree.from_sizes([]), "a power of two of them, got 0"),
        (
            lambda: hm.ClusterTree.from_points(np.ones((2, 3, 4))),
            r"\(n, d\) or \(n,\), got \(2, 3, 4\)",
        ),
        (lambda: hm.ClusterTree.from_points(np.ones((0, 2))), r"got \(0, 2\)"),
    ],
)
def test_rows_that_are_no_rows_of_the_matrix_are_refused(make, expected):
    with pytest.raises(hm.ShapeError, match=expected):
        make()


def test_points_that_are_nowhere_are_refused():
    with pytest.raises(hm.NonFiniteError, match="drop these rows"):
        hm.ClusterTree.from_points(np.array([0.0, np.nan, 1.0]))


def test_trees_are_equal_to_trees_alone():
    tree = hm.ClusterTree(8, 1)
    assert tree == hm.ClusterTree(8, 1, permutation=np.arange(8))
    assert hash(tree) == hash(hm.ClusterTree(8, 1))
    assert tree != hm.ClusterTree(8, 2)
    assert tree != (8, 1)
