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
    an `MLR` the sum of the ranks of the factors that reach it. Rows are in the order of
    the tree, without padding.

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
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        msg = "plot() needs matplotlib: pip install 'hmatrix[plot]'."
        raise ImportError(msg) from error

    if ax is None:
        _, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    tree = H.tree
    scale = 72 / ax.figure.dpi * min(ax.bbox.width, ax.bbox.height) / tree.n  # points
    counts = tree.counts(tree.levels)
    begins = np.cumsum(counts) - counts
    boxes, ranks = _blocks(H)

    def patches(boxes: Any, **look: Any) -> Any:
        return PatchCollection(
            [Rectangle((x, y), width, height) for x, y, width, height in boxes],
            edgecolor="white",
            # Lines would hide blocks that are no larger.
            linewidth=np.minimum(1, 0.15 * scale * boxes[:, 2:].min(axis=1)),
            **look,
        )

    leaves = np.stack([begins, begins, counts, counts], axis=1)
    ax.add_collection(patches(leaves, facecolor="0.55"))
    blocks = patches(boxes, cmap="viridis")
    blocks.set_array(ranks.astype(float))
    most = int(ranks.max(initial=0)) or 1
    blocks.set_clim(0, most)
    ax.add_collection(blocks)
    for (x, y, width, height), rank in zip(boxes, ranks.tolist(), strict=True):
        room = min(0.6 * height, 1.2 * width / len(str(rank)))
        if room * scale >= 5:  # smaller numbers could not be read
            color = "black" if rank > 0.6 * most else "white"  # on yellow, on blue
            ax.annotate(
                str(rank), (x + width / 2, y + height / 2), ha="center",
                va="center_baseline", color=color, fontsize=min(10, room * scale),
            )  # fmt: skip
    ax.set(xlim=(0, tree.n), ylim=(tree.n, 0), aspect="equal", title=repr(H))
    ax.locator_params(nbins=5, integer=True)
    ax.title.set_fontsize("small")
    ax.title.set_wrap(True)
    if ranks.size:
        place = ax.inset_axes((1.04, 0, 0.04, 1))
        integers = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True)
        ax.figure.colorbar(blocks, place, label="rank", ticks=integers)
    return ax


def _blocks(H: HODLR | MLR) -> tuple[np.ndarray, np.ndarray]:
    """Left, top, width and height of the off-diagonal blocks, and their ranks."""
    boxes, ranks = [np.zeros((0, 4))], [np.zeros(0, dtype=np.int64)]
    for level in range(H.tree.levels):
        counts = H.tree.counts(level + 1)
        begins = np.cumsum(counts) - counts
        sides = np.stack([begins, counts]).reshape(2, -1, 2)
        # The upper block has the second child's columns and the first one's rows.
        both = np.stack([sides[:, :, ::-1], sides], axis=1)
        boxes.append(both.transpose(2, 3, 0, 1).reshape(-1, 4))
        ranks.append(np.stack(_block_ranks(H, level), axis=1).ravel())
    every, found = np.concatenate(boxes), np.concatenate(ranks)
    there = every[:, 2:].min(axis=1) > 0  # where leaves are empty, so are blocks
    return every[there], found[there]


def _block_ranks(H: HODLR | MLR, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the two off-diagonal blocks of each node of a level."""
    if isinstance(H, HODLR):
        upper, lower = H.blocks(level)
        return upper.ranks, lower.ranks
    total = np.zeros(H.tree.nodes(level), dtype=np.int64)
    for k in range(level + 1):
        total += np.repeat(H.block_ranks(k), 2 ** (level - k))
    return total, total
