"""Leaves of matrices that are factorized: shifted, with identity in padded rows."""

from __future__ import annotations

from hmatrix._backend import Array, Space, add_to_diagonals, cholesky
from hmatrix._operator import places, real_rows
from hmatrix.hodlr import HODLR
from hmatrix.mlr import MLR
from hmatrix.tree import ClusterTree

__all__ = ["leaf_factors", "shifted_leaves", "without_padding"]


def shifted_leaves(
    tree: ClusterTree, leaves: Array, shift: float, which: slice = slice(None)
) -> Array:
    """Add ``shift`` to the diagonal, and ones to the padded part of it.

    With the identity in padded rows, they neither mix with others nor change the
    determinant. Where there is nothing to add, a view of ``leaves`` is returned.
    """
    if not shift and tree.padded == tree.n:
        return leaves[which, ...]
    space, m = Space.of(leaves), tree.leaf_size
    xp, rows = space.xp, space.xp.reshape(places("rows", tree, space), (-1, m))
    real = rows[which, :] < tree.n
    # so that the log-determinant has no gradient to padded rows
    leaves = xp.where(real[:, :, None], leaves[which, ...], 0.0)
    added = xp.full(real.shape, shift, dtype=space.dtype, device=space.device)
    added = xp.where(real, added, 1.0)
    return add_to_diagonals(leaves, added)


def without_padding(tree: ClusterTree, leaves: Array) -> Array:
    """Return the inverses of shifted leaves with zeros in the padded rows again."""
    space = Space.of(leaves)
    real = space.xp.astype(real_rows(tree, space), space.dtype)
    return leaves * space.xp.reshape(real, (*leaves.shape[:2], 1))


def leaf_factors(H: HODLR | MLR, shift: float) -> Array:
    """Return the Cholesky factors of shifted leaves.

    They are known to exist, so that the host does not wait for a device.

    Raises
    ------
    OverwrittenError
        If the matrix was overwritten in the meantime.
    """
    return cholesky(shifted_leaves(H.tree, H.leaves, shift), sure=True)
