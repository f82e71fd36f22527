"""Pairs of close points in different clusters: where kernels peak in a block."""

from __future__ import annotations

import numpy as np

from hmatrix._backend import Array, Space
from hmatrix.tree import ClusterTree

__all__ = ["Near", "near_pairs"]

#: Rows and columns (b, q) of pairs in blocks, the closest first; and 1, or 0 where a block
#: has fewer.
Near = tuple[Array, Array, Array]

#: Neighbours of each point, and pairs of each block at most.
NEIGHBOURS, PAIRS = 8, 512


def near_pairs(
    points: np.ndarray, tree: ClusterTree, space: Space
) -> list[Near] | None:
    """Return the near pairs of all levels' off-diagonal blocks.

    None for numbers that the tree sorts: theirs are in the corners.

    Parameters
    ----------
    points : array (n, d)
        The points, in the order of the matrix.
    tree : ClusterTree
        The halving.
    space : Space
        Of the entries; of its library and device are the results.
    """
    from scipy.spatial import KDTree

    placed = points[slice(None) if tree.permutation is None else tree.permutation]
    if points.shape[1] == 1 and np.all(placed[1:] >= placed[:-1]):
        return None
    count = min(NEIGHBOURS + 1, tree.n)
    distances, other = KDTree(points).query(points, k=count)
    own = np.repeat(np.arange(tree.n), count)
    pairs = tree.slots[np.stack([own, np.reshape(other, -1)])]
    pairs.sort(axis=0)
    key, first = np.unique(pairs[0] * tree.padded + pairs[1], return_index=True)
    key = key[np.argsort(np.reshape(distances, -1)[first], kind="stable")]
    i, j = np.divmod(key, tree.padded)
    # the level of the node in whose halves the two are
    apart = np.frexp(i // tree.leaf_size ^ j // tree.leaf_size)[1]
    return [
        _of_level(i[some], j[some], tree, level, space)
        for level in range(tree.levels)
        for some in [apart == tree.levels - level]
    ]


def _of_level(
    i: np.ndarray, j: np.ndarray, tree: ClusterTree, level: int, space: Space
) -> Near:
    half, nodes = tree.size(level + 1), tree.nodes(level)
    node = i // (2 * half)
    counts = np.bincount(node, minlength=nodes)
    order = np.argsort(node, kind="stable")
    node = node[order]
    rank = np.arange(len(node)) - (np.cumsum(counts) - counts)[node]
    keep = rank < PAIRS
    order, node, rank = order[keep], node[keep], rank[keep]
    places = np.zeros(
        (3, nodes, min(int(counts.max(initial=0)), PAIRS)), dtype=np.int64
    )
    places[:, node, rank] = np.stack([i[order] % half, j[order] % half, 0 * order + 1])
    rows, columns, used = map(space.integers, places)
    return rows, columns, space.xp.astype(used, space.real.dtype)
