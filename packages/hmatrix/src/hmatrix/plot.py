"""Pictures of hierarchical matrices; matplotlib is imported only here."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmatrix._checks import check_kind
from hmatrix.hodlr import HODLR
from hmatrix.mlr import MLR

__all__ = ["plot"]


def plot(H: HODLR | MLR, ax: Any = None) -> Any:
    """Draw the rank of every block.

    Dense leaves are grey. An off-diagonal block of a `HODLR` shows its own rank, one of
    an `MLR` the sum of the ranks of the factors that reach it.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    ax : matplotlib Axes, optional
        Where to draw; default: a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    check_kind("H", H, HODLR, MLR)
    try:
        from matplotlib import pyplot as plt
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle
    except ImportError as error:
        msg = "plot() needs matplotlib: pip install 'hmatrix[plot]'."
        raise ImportError(msg) from error

    tree = H.tree
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    corners, ranks = [], []
    for level in range(tree.levels):
        half = tree.size(level + 1)
        upper, lower = _block_ranks(H, level)
        # one rectangle for each of at most some hundred blocks
        for node, pair in enumerate(zip(upper, lower, strict=True)):
            start = 2 * half * node
            for (x, y), rank in zip(((half, 0), (0, half)), pair, strict=True):
                corners.append((start + x, start + y, half))
                ranks.append(int(rank))
    m = tree.leaf_size
    leaves = [Rectangle((m * j, m * j), m, m) for j in range(tree.nodes(tree.levels))]
    ax.add_collection(PatchCollection(leaves, facecolor="0.55", edgecolor="white"))
    blocks = PatchCollection(
        [Rectangle((x, y), size, size) for x, y, size in corners],
        edgecolor="white",
        cmap="viridis",
    )
    blocks.set_array(np.asarray(ranks, dtype=float))
    most = max(ranks, default=1) or 1
    blocks.set_clim(0, most)
    ax.add_collection(blocks)
    for (x, y, size), rank in zip(corners, ranks, strict=True):
        if size * 40 >= tree.padded:  # smaller ones have no room for a number
            centre = (x + size / 2, y + size / 2)
            color = "black" if rank > 0.6 * most else "white"  # on yellow, on blue
            ax.annotate(str(rank), centre, ha="center", va="center", color=color)
    end = tree.n if tree.plain else tree.padded
    ax.set(xlim=(0, end), ylim=(end, 0), aspect="equal", title=repr(H))
    ax.title.set_fontsize("small")
    ax.title.set_wrap(True)
    ax.figure.colorbar(blocks, ax=ax, label="rank", shrink=0.8)
    return ax


def _block_ranks(H: HODLR | MLR, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the two off-diagonal blocks of each node of a level."""
    if isinstance(H, HODLR):
        upper, lower = H.blocks(level)
        return upper.ranks, lower.ranks
    total = np.zeros(H.tree.nodes(level), dtype=np.int64)
    for k in range(level + 1):
        total += np.repeat(H.block_ranks(k), 2 ** (level - k))
    return total, total
