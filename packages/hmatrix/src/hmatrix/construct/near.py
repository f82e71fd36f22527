"""Close pairs of points in different clusters, where kernels peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hmatrix._backend import Array, Space
from hmatrix.tree import ClusterTree

__all__ = ["Near", "near_parts"]

#: Neighbours of each point.
NEIGHBOURS = 8
#: A block keeps PAIRS close pairs at most, or SHARE for each of its rows if that is more.
PAIRS, SHARE = 512, 1 / 4


@dataclass(frozen=True)
class Near:
    """Close points in blocks of two clusters each.

    Parameters
    ----------
    rows, columns : array (b, q)
        Pairs of them, the closest first.
    used : array (b, q)
        1, or 0 where a block has fewer pairs.
    row_order, column_order : array (b, m)
        All rows and all columns, those first that are close to the other cluster's box.
    """

    rows: Array
    columns: Array
    used: Array
    row_order: Array
    column_order: Array

    @property
    def count(self) -> int:
        """Pairs of each block."""
        return int(self.rows.shape[1])

    @property
    def lower(self) -> Near:
        """That of the blocks on the other side of the diagonal."""
        return Near(
            self.columns, self.rows, self.used, self.column_order, self.row_order
        )

    def each(self, take: Callable[[Array], Array]) -> Near:
        """Apply ``take`` to all arrays."""
        return Near(*map(take, vars(self).values()))


def near_parts(
    points: np.ndarray, tree: ClusterTree, space: Space
) -> list[Near] | None:
    """Return the close pairs of points in the off-diagonal blocks of each level.

    None for numbers that the tree has in ascending order: they are close in the corners.

    Parameters
    ----------
    points : array (n, d)
        The points, in the order of the matrix.
    tree : ClusterTree
        The halving.
    space : Space
        Space of the entries, whose library and device the results have.
    """
    placed = points[slice(None) if tree.permutation is None else tree.permutation]
    if points.shape[1] == 1 and np.all(placed[1:] >= placed[:-1]):
        return None
    from scipy.spatial import KDTree

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
    padded = np.full((tree.padded, points.shape[1]), np.nan)
    padded[tree.slots] = points
    near = []
    for level in range(tree.levels):
        some = apart == tree.levels - level
        pairs = _pairs(i[some], j[some], tree, level)
        rows, columns, used = map(space.integers, pairs)
        orders = map(space.integers, _orders(padded, tree, level))
        near.append(
            Near(rows, columns, space.xp.astype(used, space.real.dtype), *orders)
        )
    return near


def _pairs(i: np.ndarray, j: np.ndarray, tree: ClusterTree, level: int) -> np.ndarray:
    """Return rows, columns and ``used`` of a level's blocks, as of `Near`: (3, b, q)."""
    half, nodes = tree.size(level + 1), tree.nodes(level)
    node = i // (2 * half)
    counts = np.bincount(node, minlength=nodes)
    order = np.argsort(node, kind="stable")
    node = node[order]
    rank = np.arange(len(node)) - (np.cumsum(counts) - counts)[node]
    most = min(int(counts.max(initial=0)), max(PAIRS, int(half * SHARE)))
    keep = rank < most
    order, node, rank = order[keep], node[keep], rank[keep]
    places = np.zeros((3, nodes, most), dtype=np.int64)
    places[:, node, rank] = np.stack([i[order] % half, j[order] % half, 0 * order + 1])
    return places


def _orders(points: np.ndarray, tree: ClusterTree, level: int) -> np.ndarray:
    """Return rows and columns by their distances to the others' box: (2, b, m)."""
    halves = np.reshape(points, (tree.nodes(level), 2, tree.size(level + 1), -1))
    # padding is NaN here: it is in no box and comes last
    low, high = (
        np.flip(f(halves, axis=2, keepdims=True), axis=1)
        for f in (np.fmin.reduce, np.fmax.reduce)
    )
    outside = np.maximum(np.maximum(low - halves, halves - high), 0.0)
    return np.moveaxis(np.argsort((outside**2).sum(axis=-1), axis=-1), 1, 0)
