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
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hmatrix\[plot\]'"):
        hm.plot(hm.from_dense(np.eye(3), levels=0))


def test_only_matrices_are_drawn():
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR"):
        hm.plot(np.eye(3))
