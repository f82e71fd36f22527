"""Products of two matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hmatrix._backend import Array, in_own_precision, one_blas_thread_if_narrow
from hmatrix._checks import check_kind
from hmatrix._operator import operation
from hmatrix.arithmetic.assembly import Terms, assemble, estimate_norm
from hmatrix.arithmetic.error import after, product_error
from hmatrix.arithmetic.linear import check_match
from hmatrix.hodlr import HODLR
from hmatrix.lowrank import LowRank, beside, pair, stack

__all__ = ["matmul"]


@operation
@in_own_precision
def matmul(
    H: HODLR, G: HODLR, *, rtol: float | None = None, max_rank: int | None = None
) -> HODLR:
    """Return the product ``H G``, truncated.

    Parameters
    ----------
    H, G : HODLR
        Two matrices of one tree, library, dtype and device.
    rtol : float, optional
        Promise ``‖result − H G‖_F ≤ rtol · ‖H G‖_F`` (to rounding); default: rounding
        only, with ranks up to the sum of those of ``H`` and ``G`` at all levels above.
    max_rank : int, optional
        Cap on the ranks of the result. It wins over ``rtol``.

    Returns
    -------
    HODLR
        Symmetric for ``H @ H`` of a symmetric ``H`` (one object twice); other products
        of Hermitian matrices are in general not Hermitian. Its ``error`` bounds what the
        truncation and those of ``H`` and ``G`` amount to.

    Raises
    ------
    TypeError, ShapeError, DTypeError, BackendError
        If the two do not match.
    ValueError
        If tensors that want gradients would lose those of what is cut off.

    Notes
    -----
    Cost ``O(n r² K²)`` for ranks r and K levels. A block ``A11 B12 + A12 B22`` is two
    blocks of vectors under the levels below; the products ``A12 B21`` and ``A21 B12`` of
    low rank reach into all levels below. Rounding is relative to ``‖H‖ ‖G‖``, as that of
    a dense product is.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 300)
    >>> A = np.exp(-abs(t[:, None] - t))
    >>> H = hm.from_dense(A, levels=3, rtol=1e-12)
    >>> C = hm.matmul(H, H, rtol=1e-8)
    >>> C.ranks, bool(np.linalg.norm(C.to_dense() - A @ A) <= 1e-8 * np.linalg.norm(A @ A))
    ((2, 2, 2), True)
    """
    check_kind("H", H, HODLR)
    check_match(H, G)
    with one_blas_thread_if_narrow(H.space, *H._widths, *G._widths):
        product = assemble(
            H.tree,
            H.leaves @ G.leaves,
            _terms(H, G),
            size=estimate_norm(lambda x: H._apply(G._apply(x)), H.tree, H.space),
            rtol=rtol,
            max_rank=max_rank,
            symmetric=H is G and H.symmetric,
        )
    return replace(product, error=after(product_error(product, H, G), product.error))


def _terms(A: HODLR, B: HODLR) -> Iterator[Terms]:
    """Off-diagonal and diagonal low-rank terms of ``A B``, level by level."""
    for level in range(A.tree.levels):
        (A12, A21), (B12, B21) = A.blocks(level), B.blocks(level)
        # A11 B12 and A22 B21, then A21 B11 and A12 B22, whose factors are all in halves
        left12, left21 = _apply_below(A, level, B12.U, B21.U)
        if A is B and A.symmetric:
            right21, right12 = left12, left21
        else:
            right21, right12 = _apply_below(B.H, level, A21.V, A12.V)
        first, second = A12 @ B21, A21 @ B12
        yield (
            beside(LowRank(left12, B12.S, B12.V), LowRank(A12.U, A12.S, right12)),
            beside(LowRank(left21, B21.S, B21.V), LowRank(A21.U, A21.S, right21)),
            stack(first, second),
        )


def _apply_below(
    H: HODLR, level: int, first: Array, second: Array
) -> tuple[Array, Array]:
    """Apply the diagonal blocks B11 and B22 of a level's nodes to factors of each."""
    xp = H.space.xp
    x = pair(first, second)
    y = H._apply(xp.reshape(x, (H.tree.padded, x.shape[-1])), level + 1)
    y = xp.reshape(y, x.shape)
    return y[:, 0, :, : first.shape[-1]], y[:, 1, :, : second.shape[-1]]
