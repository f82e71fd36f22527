"""Hierarchical matrices from products with vectors: randomized peeling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hmatrix._backend import (
    FLOATS,
    NUMBERS,
    Array,
    Space,
    adjoint,
    detach,
    dtype_name,
    in_own_precision,
    safe_norms,
)
from hmatrix._checks import (
    DTypeError,
    ShapeError,
    check_finite,
    check_int,
    check_norm,
    check_operand,
    remedy,
    space_like,
)
from hmatrix._operator import Operator, pad_rows, real_rows, unpad_rows
from hmatrix.construct.budget import (
    block_tolerance,
    check_tolerances,
    cut_blocks,
    make_tree,
)
from hmatrix.construct.probes import ROUNDING, Probes, Product, find_range
from hmatrix.hodlr import HODLR, apply_blocks, clear_padding
from hmatrix.lowrank import LowRank, recompress
from hmatrix.tree import ClusterTree

__all__ = ["from_matvec"]

#: Part of the tolerance to which the levels are found, so that the final cut has something
#: left to lose. In a deep tree it is smaller: each level adds up to half of the squared
#: errors of those above to its own.
PEELING_SHARE = 0.5
LEVEL_GROWTH = 1.2
#: Part of the tolerance that levels and cut together may use, so that an estimate that is a
#: little high does not fail a matrix that keeps the promise.
CUT_SHARE = 0.7
NO_ADJOINT = "`rmatvec`, products of the adjoint, is needed, or else `symmetric=True`."
# First words of the keys of random numbers.
_SKETCH, _SIGN = 2, 3


@in_own_precision
def from_matvec(
    matvec: Any,
    rmatvec: Product | None = None,
    *,
    n: int | None = None,
    like: Array | None = None,
    dtype: object = None,
    levels: int | None = None,
    leaf_size: int | None = None,
    tree: ClusterTree | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_rank: int | None = None,
    symmetric: bool = False,
    oversampling: int = 8,
    seed: int = 0,
) -> HODLR:
    """Compress a matrix that is known by its products with blocks of vectors alone.

    Parameters
    ----------
    matvec : callable or operator
        Takes a block (n, q), any q, and returns the product ``A @ x`` (n, q), rows in
        the matrix's own order, in the library, dtype and device of ``like``. Or an
        operator, with ``shape``, ``matmat`` and ``rmatmat``: a
        ``scipy.sparse.linalg.LinearOperator``, whose products are copied from and to
        the host, a matrix or inverse of this package, or with ``like`` one of another
        library, ``cupyx.scipy.sparse.linalg`` say.
    rmatvec : callable, optional
        The products of the adjoint alike. Default: those of an operator. Not needed
        with ``symmetric=True``.
    n : int, optional
        Rows of the matrix; an operator knows it.
    like, dtype
        Library and device, and dtype, of the vectors and of the result. Default: those
        of an operator, else NumPy in float64.
    levels, leaf_size, tree
        The halving, as of `from_dense`.
    rtol : float, optional
        Promise ``‖A − H‖_F ≤ rtol · ‖A‖_F``, which random vectors that the
        compression did not see check at the end. Default: square root of the dtype's
        epsilon; less than 100 epsilon counts as 100 epsilon. Where products are less
        exact than this, sketches grow to full size for nothing: cap them by
        ``max_rank``.
    atol : float
        Promise ``‖A − H‖_F ≤ atol`` instead, where that allows more.
    max_rank : int, optional
        Cap on the rank of every block, and on the products spent on it. It wins over
        ``rtol``; ``H.error`` tells the relative Frobenius error reached.
    symmetric : bool
        The matrix equals its adjoint (transpose, if real): half the products, and none
        of the adjoint.
    oversampling : int
        Columns of a sketch beyond the rank, and by how many it grows.
    seed : int
        Of the random numbers: the same seed gives the same matrix.

    Returns
    -------
    HODLR
        Its ``error`` is the estimate from 16 random vectors, whose standard deviation
        is 18% of it at most.

    Raises
    ------
    ToleranceError
        If the promise is not kept, and no ``max_rank`` explains it.
    ShapeError, DTypeError, BackendError, NonFiniteError
        If a product has the wrong shape, dtype, library or device, or NaN; if ``n`` is
        missing; if squares of the norm overflow or underflow.
    TypeError, ValueError
        If ``matvec`` is neither a function nor an operator; if products of the adjoint
        are missing and ``symmetric`` is false.

    Notes
    -----
    From the root down, each level's off-diagonal blocks are sketched by Gaussian
    vectors that live on one half of every node, less what the levels above contribute;
    a QR gives bases ``Q``, the adjoint's products the other factors ``Bᴴ Q``; leaves
    come from stacked identities (Lin, Lu & Ying, "Fast construction of hierarchical
    matrix representation from matrix-vector multiplication", 2011; Martinsson,
    "Compressing rank-structured matrices via randomized sampling", 2016). A sketch
    grows until its newest columns lie in the span of those before them to the level's
    share of the tolerance (Halko, Martinsson & Tropp, "Finding structure with
    randomness", 2011, section 4.4). Bases and identities carry random signs, so that
    errors of the levels above add in squares.

    With ``q_k`` the columns of level k, the rank that its blocks need plus 8 to 16 with
    the default oversampling, this takes ``16 + Σ 2 q_k + tree.leaf_size`` products of
    the matrix and ``Σ 2 q_k`` of the adjoint. For a symmetric matrix it is
    ``16 + Σ 2 q_k + tree.leaf_size`` and none.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 500)
    >>> A = np.exp(-abs(t[:, None] - t))
    >>> H = hm.from_matvec(lambda x: A @ x, n=500, symmetric=True, rtol=1e-8)
    >>> bool(np.allclose(H.to_dense(), A, atol=1e-7)), H.error <= 1e-8, H.ranks
    (True, True, (1, 1, 1))
    """
    forward, backward, n, space = _products(matvec, rmatvec, n, like, dtype, symmetric)
    tree = make_tree(n, levels, leaf_size, tree)
    rtol, atol, max_rank = check_tolerances(space, rtol, atol, max_rank)
    step = check_int("oversampling", oversampling, 1)
    seed = check_int("seed", seed, 0)
    peeling = _Peeling(tree, space, forward, backward, symmetric, seed)
    return _peeled(peeling, rtol, atol, max_rank, step)


def _peeled(
    peeling: _Peeling, rtol: float, atol: float, max_rank: int | None, step: int
) -> HODLR:
    """Find all levels and the leaves, cut them, and see whether the promise is kept."""
    tree, space = peeling.tree, peeling.space
    probes = Probes.of(peeling.forward, tree, space, peeling.seed)
    check_norm(probes.norm, space)
    asked = max(rtol, ROUNDING * space.eps)
    share = PEELING_SHARE / LEVEL_GROWTH**tree.levels * max(asked * probes.norm, atol)
    share = max(share, ROUNDING / 4 * space.eps * probes.norm)
    for level in range(tree.levels):
        peeling.peel(level, share, step, max_rank)
    leaves = peeling.leaves()
    upper, lower = (tuple(pair[side] for pair in peeling.found) for side in (0, 1))
    below = None if peeling.symmetric else lower
    whole = clear_padding(HODLR(tree, leaves, upper, below))
    norm = math.hypot(*safe_norms([leaves, *(b.S for b in (*upper, *lower))]))
    allowed = max(asked * norm, atol)
    spent = 2 * probes.error(whole)  # twice: the estimate may be low
    H = cut_blocks(
        tree,
        whole.leaves,
        ((partial(recompress, b) for b in side) for side in whole._sides.values()),
        norm=norm,
        total=math.sqrt(max((CUT_SHARE * allowed) ** 2 - spent**2, 0.0)),
        max_rank=max_rank,
    )
    advice = (
        "Check that `rmatvec` is the adjoint (that the matrix is symmetric, if you said "
        "so) and that products are that exact; then raise `rtol` or `oversampling`"
    )
    return probes.judge(H, norm, math.inf if max_rank is not None else allowed, advice)


@dataclass
class _Peeling:
    """A matrix known by products, and the levels of it that are found."""

    tree: ClusterTree
    space: Space
    matvec: Product
    rmatvec: Product
    symmetric: bool
    seed: int
    found: list[tuple[LowRank, LowRank]] = field(default_factory=list)

    def forward(self, x: Array) -> Array:
        """Product of the matrix, less the levels found, with ``x`` (padded, q)."""
        y = pad_rows(self.matvec(unpad_rows(x, self.tree)), self.tree)
        return y - apply_blocks(self.found, x, 0 * x)

    def backward(self, x: Array) -> Array:
        """Product of the adjoint alike."""
        y = pad_rows(self.rmatvec(unpad_rows(x, self.tree)), self.tree)
        found = ((B21.H, B12.H) for B12, B21 in self.found)
        return y - apply_blocks(found, x, 0 * x)

    def peel(self, level: int, total: float, step: int, max_rank: int | None) -> None:
        """Find the off-diagonal blocks of a level."""
        xp, tree = self.space.xp, self.tree
        half, sides = tree.size(level + 1), 1 if self.symmetric else 2
        shape = (tree.nodes(level), 2, half)

        def sample(q: int, count: int) -> Array:
            drawn = self.space.normal((tree.n, count), _SKETCH, level, q, self.seed)
            halves = xp.reshape(pad_rows(drawn, tree), (*shape, count))
            return self._across(
                self.forward, xp.flip(halves, axis=1)[:, :sides, ...], 1
            )

        width = half if max_rank is None else min(half, max_rank + step)
        # the blocks of one side stand for both in a symmetric matrix
        tolerance = total / math.sqrt(tree.levels * 2 / sides)
        Q = find_range(sample, width, step, tolerance)
        real = xp.reshape(real_rows(tree, self.space), (*shape, 1))[:, :sides, ...]
        Q = xp.where(real, Q, 0.0) * self._signs(level, shape[0], sides, 1, Q.shape[-1])
        W = self._across(self.backward, Q, 0)
        S = self.space.real.ones(shape[0], sides, Q.shape[-1])
        blocks, *_ = recompress(LowRank(Q, S, W), block_tolerance(tree, level, total))
        B12, *rest = (
            LowRank(blocks.U[:, i, ...], blocks.S[:, i, :], blocks.V[:, i, ...])
            for i in range(sides)
        )
        self.found.append((B12, rest[0] if rest else B12.H))

    def leaves(self) -> Array:
        """Find the diagonal blocks below all levels."""
        xp, tree = self.space.xp, self.tree
        nodes, m = tree.nodes(tree.levels), tree.leaf_size
        signs = self._signs(tree.levels, nodes, 1, m)
        eyes = self.space.eye(m) * signs
        Y = self.forward(xp.reshape(eyes, (tree.padded, m)))
        leaves = xp.reshape(Y, (nodes, m, m)) * signs
        return (leaves + adjoint(leaves)) / 2 if self.symmetric else leaves

    def _across(self, product: Product, X: Array, source: int) -> Array:
        """Multiply from one half of every node of a level to the other.

        ``X`` (nodes, sides, half, q): those of side 0 lie in half ``source``, those of
        side 1 in the other, and so the products the other way round.
        """
        xp = self.space.xp
        nodes, sides, half, q = X.shape
        columns = []
        for side in range(sides):
            parts = [xp.zeros_like(X[:, side, ...])] * 2
            parts[(source + side) % 2] = X[:, side, ...]
            columns.append(xp.reshape(xp.stack(parts, axis=1), (-1, q)))
        Y = xp.reshape(product(xp.concat(columns, axis=1)), (nodes, 2, half, sides, q))
        return xp.stack(
            [Y[:, (source + side + 1) % 2, :, side, :] for side in range(sides)], axis=1
        )

    def _signs(self, level: int, *shape: int) -> Array:
        """Random signs, so that errors of the levels found add in squares."""
        drawn = self.space.real.normal(shape, _SIGN, level, self.seed)
        return 2 * self.space.xp.astype(drawn > 0, self.space.dtype) - 1


def _products(
    matvec: Any,
    rmatvec: Product | None,
    n: int | None,
    like: Array | None,
    dtype: object,
    symmetric: bool,
) -> tuple[Product, Product, int, Space]:
    """Return checked products of both sides, the rows and the space of the result."""
    if hasattr(matvec, "matmat") and hasattr(matvec, "shape"):
        matvec, rmatvec, n, space = _of_operator(matvec, rmatvec, like, dtype, n)
    elif not callable(matvec):
        got = type(matvec).__name__
        msg = f"`matvec` must be a function or operator, got {got}{remedy(matvec)}."
        raise TypeError(msg)
    else:
        space = space_like(like, dtype)
    if n is None:
        msg = "`n`, the number of rows, is needed with a function as `matvec`."
        raise ShapeError(msg)
    if symmetric:
        rmatvec = matvec
    elif rmatvec is None:
        raise ValueError(NO_ADJOINT)
    both = _checked("matvec", matvec, space), _checked("rmatvec", rmatvec, space)
    return *both, n, space


def _of_operator(
    A: Any, rmatvec: Product | None, like: Array | None, dtype: object, n: int | None
) -> tuple[Product, Product, int, Space]:
    """Return products of both sides, the rows and the space of the result."""
    from scipy.sparse.linalg import LinearOperator

    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or n not in {None, shape[0]}:
        given = "" if n is None else f" with n = {n}"
        msg = f"The operator must have shape (n, n){given}, got {shape}."
        raise ShapeError(msg)
    if isinstance(A, Operator):
        own = A.space
    else:
        named = dtype_name(A.dtype) if getattr(A, "dtype", None) is not None else ""
        own = Space.like(None, named if named in NUMBERS else FLOATS[-1])
    space = own
    if like is not None or dtype is not None:
        space = space_like(own.zeros(0) if like is None else like, dtype)
    if not isinstance(A, Operator | LinearOperator):
        own = space

    def moved(product: Product) -> Product:
        def apply(x: Array) -> Array:
            if Space.of(x).is_complex and not own.is_complex:
                return apply(space.xp.real(x)) + 1j * apply(space.xp.imag(x))
            y = product(own.asarray(x))
            if Space.of(y).is_complex and not space.is_complex:
                msg = (
                    f"The operator gave {dtype_name(y.dtype)} products for a matrix of "
                    f"{space.name}; give a complex `dtype`."
                )
                raise DTypeError(msg)
            return space.asarray(y)

        return apply

    def rmatmat(x: Array) -> Array:
        try:
            return A.rmatmat(x)
        except (TypeError, NotImplementedError) as error:  # SciPy's, without `rmatvec`
            raise ValueError(NO_ADJOINT) from error

    return moved(A.matmat), moved(rmatvec or rmatmat), shape[0], space


def _checked(name: str, product: Product, space: Space) -> Product:
    """Return a product that refuses what is not a finite block like its argument."""

    def apply(x: Array) -> Array:
        result = f"{name}(x)"
        y = detach(check_operand(result, product(x), space))
        if tuple(y.shape) != tuple(x.shape):
            msg = (
                f"`{result}` must have the shape {tuple(x.shape)} of `x`, got "
                f"{tuple(y.shape)}; `{name}` takes blocks of columns."
            )
            raise ShapeError(msg)
        check_finite(result, y)
        return y

    return apply
