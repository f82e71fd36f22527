import sys

import matplotlib as mpl
import numpy as np
import pytest

import hmatrix as hm

mpl.use("agg")


@pytest.fixture
def ax():
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_every_block_is_drawn_with_its_rank(ax, rng):
    A = np.triu(rng.standard_normal((16, 16)))
    H = hm.from_dense(A, levels=2)
    assert hm.plot(H, ax) is ax
    leaves, blocks = ax.collections
    assert len(leaves.get_paths()) == 4
    assert list(blocks.get_array()) == [8, 0, 4, 0, 4, 0]
    assert [text.get_text() for text in ax.texts] == ["8", "0", "4", "0", "4", "0"]
    ax.figure.canvas.draw()


def test_factors_of_an_mlr_add_up(ax, rng):
    stream = hm.StreamingMLR(16, 2, 3)
    stream.update(rng.standard_normal((30, 16)))
    hm.plot(stream.result(), ax)
    assert list(ax.collections[1].get_array()) == [3, 3, 6, 6, 6, 6]


def test_a_single_leaf_has_no_blocks():
    from matplotlib import pyplot as plt

    ax = hm.plot(hm.from_dense(np.eye(3), levels=0))
    assert len(ax.collections[0].get_paths()) == 1
    assert not ax.child_axes  # no ranks, no scale of them
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_blocks_are_drawn_without_padding(ax, rng):
    tree = hm.ClusterTree.from_sizes([10, 60, 30, 5])
    hm.plot(hm.from_dense(rng.standard_normal((105, 105)), tree=tree), ax)
    leaves, blocks = ax.collections
    boxes = [path.get_extents().bounds for path in leaves.get_paths()]
    assert boxes == [
        (0, 0, 10, 10),
        (10, 10, 60, 60),
        (70, 70, 30, 30),
        (100, 100, 5, 5),
    ]
    upper, lower, *_ = (path.get_extents().bounds for path in blocks.get_paths())
    assert upper == (70, 0, 35, 70)
    assert lower == (0, 70, 70, 35)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 105), (105, 0))


def test_small_blocks_are_not_covered_by_lines_or_numbers(ax):
    hm.plot(hm.identity(1024, leaf_size=1), ax)
    assert max(min(patches.get_linewidths()) for patches in ax.collections) < 0.1
    assert len(ax.texts) < 128


def test_the_scale_of_ranks_has_whole_numbers(ax, rng):
    hm.plot(hm.from_low_rank(rng.standard_normal((64, 1)), leaf_size=16), ax)
    ax.figure.canvas.draw()
    (scale,) = ax.child_axes
    assert [text.get_text() for text in scale.get_yticklabels()] == ["0", "1"]


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hmatrix\[plot\]'"):
        hm.plot(hm.from_dense(np.eye(3), levels=0))


def test_only_matrices_are_drawn():
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR"):
        hm.plot(np.eye(3))
