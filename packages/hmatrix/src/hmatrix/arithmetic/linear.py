"""Sums and multiples."""

from __future__ import annotations

from typing import Any, TypeVar

from hmatrix._backend import (
    Array,
    Space,
    detach,
    dtype_name,
    in_own_precision,
    is_array,
    is_real,
    wants_gradient,
)
from hmatrix._checks import (
    DTypeError,
    ShapeError,
    check_array,
    check_finite,
    check_float,
    check_kind,
    check_operand,
    remedy,
)
from hmatrix._operator import operation, pad_rows
from hmatrix.arithmetic.error import with_error_of_sum
from hmatrix.arithmetic.truncation import truncate
from hmatrix.construct import slices
from hmatrix.hodlr import HODLR, from_sides
from hmatrix.lowrank import LowRank, beside
from hmatrix.mlr import MLR

__all__ = ["add", "add_low_rank", "check_match", "scale", "shift", "subtract"]

Matrix = TypeVar("Matrix", HODLR, MLR)


@operation
def scale(H: Matrix, factor: complex | Array) -> Matrix:
    """Return ``factor · H``.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    factor : float or complex
        Any finite number; not negative for an `MLR`, whose terms are squares, and
        complex only for a complex matrix. A torch tensor () that wants a gradient
        gets one, if ``H`` is of torch.

    Returns
    -------
    HODLR or MLR
        Symmetric if ``H`` is and ``factor`` is real.

    Raises
    ------
    DTypeError, NonFiniteError
        If ``factor`` is no such number.
    ValueError
        If it is negative, for an `MLR`.
    """
    check_kind("H", H, HODLR, MLR)
    number: Any = _check_number("factor", factor, H.space)
    real = not isinstance(number, complex)
    if isinstance(H, MLR):
        check_float("factor", number, minimum=0.0)
    tensor: Any = factor
    if wants_gradient(tensor):
        number = _check_own_or_real("factor", tensor, H.space)
        real = not Space.of(number).is_complex
    if isinstance(H, MLR):
        root = number**0.5
        factors = tuple(F * root for F in H.factors)
        return MLR(H.tree, H.leaves * number, factors, H.sign)

    def scaled(block: LowRank) -> LowRank:
        if real:
            return LowRank(block.U, block.S * number, block.V)
        return LowRank(block.U * number, block.S, block.V)  # scales are real

    upper = tuple(map(scaled, H.upper))
    if H.symmetric and real:
        return HODLR(H.tree, H.leaves * number, upper, error=H.error)
    lower = tuple(scaled(H.blocks(k)[1]) for k in range(H.tree.levels))
    return HODLR(H.tree, H.leaves * number, upper, lower, H.error)


@in_own_precision
def shift(H: Matrix, diagonal: complex | Array) -> Matrix:
    """Return ``H`` with a number, or a vector (n,), added to its diagonal.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix.
    diagonal : number or array (n,)
        What to add; an array in the library and device of ``H``, and in its dtype or
        the real one that belongs to it. Imaginary parts, for a complex ``H``, make a
        result that is not symmetric. Tensors that want gradients get them.

    Returns
    -------
    HODLR or MLR
        With the off-diagonal blocks of ``H``, not copied.

    Raises
    ------
    ShapeError, DTypeError, BackendError, NonFiniteError
        If ``diagonal`` does not fit.
    """
    check_kind("H", H, HODLR, MLR)
    space, tree = H.space, H.tree
    xp = space.xp
    vector: Any = diagonal
    if is_array(vector) and (len(vector.shape) or wants_gradient(vector)):
        added = _check_own_or_real("diagonal", vector, space)
        if tuple(added.shape) not in ((), (tree.n,)):
            msg = f"`diagonal` must have shape ({tree.n},), got {tuple(added.shape)}."
            raise ShapeError(msg)
        check_finite("diagonal", added)
        real = is_real(added)
        added = xp.broadcast_to(added, (tree.n,))
    else:
        number = _check_number("diagonal", diagonal, space)
        real = not isinstance(number, complex)
        added = xp.full((tree.n,), number, dtype=space.dtype, device=space.device)
    added = xp.reshape(pad_rows(added, tree), H.leaves.shape[:2])
    leaves = H.leaves + added[:, :, None] * space.eye(tree.leaf_size)
    if isinstance(H, MLR):
        if not real:
            msg = "An MLR matrix is Hermitian: `diagonal` must be real."
            raise DTypeError(msg)
        return MLR(tree, leaves, H.factors, H.sign)
    lower = H.lower
    if H.symmetric and not real:
        lower = tuple(block.H for block in H.upper)
    return with_error_of_sum(HODLR(tree, leaves, H.upper, lower), H)


def _check_own_or_real(name: str, x: Array, space: Space) -> Array:
    """Return ``x`` if it lives in ``space``, or in the real one that belongs to that."""
    real = dtype_name(x.dtype) == space.real.name
    return check_operand(name, x, space.real if real else space)


def _check_number(name: str, value: Any, space: Space) -> float | complex:
    """Return a finite number as a float, or as a complex one with an imaginary part."""
    try:
        if isinstance(value, str):
            raise TypeError
        number = complex(detach(value) if wants_gradient(value) else value)
    except (TypeError, ValueError):
        hint = (
            "`@` multiplies vectors and matrices"
            if name == "factor"
            else "a vector must be an array"
        )
        msg = f"`{name}` must be a number, got {type(value).__name__}; {hint}."
        raise DTypeError(msg) from None
    real, imaginary = (check_float(name, x) for x in (number.real, number.imag))
    if not imaginary:
        return real
    if not space.is_complex:
        msg = f"`{name}` is complex, the matrix {space.name}; convert it with `to`."
        raise DTypeError(msg)
    return number


@operation
@in_own_precision
def add(
    H: Matrix,
    G: Matrix | LowRank,
    *,
    rtol: float | None = None,
    max_rank: int | None = None,
) -> Matrix:
    """Return ``H + G``, truncated if ``rtol`` or ``max_rank`` is given.

    Parameters
    ----------
    H, G : HODLR or MLR
        Two matrices of one kind, tree, library, dtype and device. To a `HODLR`, ``G``
        may also be one `LowRank` block (n, n), its rows in the order of the matrix; see
        `add_low_rank`.
    rtol, max_rank
        As of `truncate`, relative to the sum. Without them the sum is exact and its
        ranks are the sums of the ranks.

    Returns
    -------
    HODLR or MLR
        Symmetric if both are. The ``error`` of a `HODLR` bounds what those of ``H`` and
        ``G`` amount to; it is None where the sum cancels down to them.

    Raises
    ------
    TypeError, ShapeError, DTypeError, BackendError
        If the two do not match.
    ValueError
        If two `MLR` matrices have different signs, or as `truncate`.
    """
    check_kind("H", H, HODLR, MLR)
    if isinstance(H, HODLR) and isinstance(G, LowRank):
        G = _spread(G, H)
    check_match(H, G)
    if isinstance(H, HODLR) and isinstance(G, HODLR):
        both = H.symmetric and G.symmetric
        sides = (
            [beside(H.blocks(k)[side], G.blocks(k)[side]) for k in range(H.tree.levels)]
            for side in ((0,) if both else (0, 1))
        )
        total = from_sides(H.tree, H.leaves + G.leaves, sides)
        total = with_error_of_sum(total, H, G)
    elif isinstance(H, MLR) and isinstance(G, MLR):
        if H.sign != G.sign:
            msg = f"`G` must have sign {H.sign}, got {G.sign}."
            raise ValueError(msg)
        factors = tuple(
            H.space.xp.concat(pair, axis=-1)
            for pair in zip(H.factors, G.factors, strict=True)
        )
        total = MLR(H.tree, H.leaves + G.leaves, factors, H.sign)
    if rtol is None and max_rank is None:
        return total
    return truncate(total, rtol=rtol, max_rank=max_rank)


def add_low_rank(
    H: HODLR,
    U: Array,
    V: Array | None = None,
    S: Array | None = None,
    *,
    rtol: float | None = None,
    max_rank: int | None = None,
) -> HODLR:
    """Return ``H + U diag(S) Vᴴ``, a low-rank update.

    Parameters
    ----------
    H : HODLR
        The matrix.
    U, V : array (n, r)
        Factors, their rows in the order of the matrix, in the library, dtype and device
        of ``H``. Without ``V`` it is ``U``, and a symmetric ``H`` stays so.
    S : array (r,), optional
        Real scales of any sign; default: ones.
    rtol, max_rank
        As of `truncate`, relative to the sum. Without them the sum is exact and all
        ranks grow by r.

    Returns
    -------
    HODLR
        Symmetric if ``H`` is and ``V`` is left out.

    Raises
    ------
    ShapeError, DTypeError, BackendError
        If the factors do not fit.
    ValueError
        As `truncate`, if ``rtol`` or ``max_rank`` is given.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 100)
    >>> H = hm.from_dense(np.exp(-abs(t[:, None] - t)), levels=3, rtol=1e-12)
    >>> G = hm.add_low_rank(H, np.stack([t, t * t], axis=1), rtol=1e-12)
    >>> G.symmetric, G.ranks
    (True, (3, 3, 3))
    >>> bool(np.allclose((G - H) @ t, t * (t @ t) + t**2 * (t**2 @ t)))
    True
    """
    check_kind("H", H, HODLR)
    U = check_array("U", check_operand("U", U, H.space), ndim=2)
    if S is None:
        S = H.space.real.ones(int(U.shape[-1]))
    return add(H, LowRank(U, S, U if V is None else V), rtol=rtol, max_rank=max_rank)


def check_match(H: Matrix, G: object) -> None:
    """Raise unless two matrices are of one kind, tree, library, dtype and device."""
    if type(H) is not type(G):
        kind, got = type(H).__name__, type(G).__name__
        msg = f"`G` must be a {kind}, got {got}{remedy(G)}."
        if isinstance(G, int | float | complex):
            msg = f"{msg[:-1]}; `shift` adds a number to the diagonal."
        raise TypeError(msg)
    if H.tree != G.tree:
        msg = f"`G` must have {H.tree}, got {G.tree}."
        raise ShapeError(msg)
    check_operand("G", G.leaves, H.space)


@operation
def subtract(
    H: HODLR,
    G: HODLR | LowRank,
    *,
    rtol: float | None = None,
    max_rank: int | None = None,
) -> HODLR:
    """Return ``H − G``, truncated if ``rtol`` or ``max_rank`` is given.

    Parameters
    ----------
    H, G : HODLR
        As of `add`; ``G`` may be one `LowRank` block here too. No `MLR` is a difference.
    rtol, max_rank
        As of `add`.

    Returns
    -------
    HODLR
        Symmetric if both are.

    Raises
    ------
    TypeError, ShapeError, DTypeError, BackendError
        If the two do not match.
    """
    check_kind("H", H, HODLR)
    if not isinstance(G, LowRank):
        check_match(H, G)
    negative = LowRank(G.U, -G.S, G.V) if isinstance(G, LowRank) else scale(G, -1.0)
    return add(H, negative, rtol=rtol, max_rank=max_rank)


def _spread(block: LowRank, H: HODLR) -> HODLR:
    """Return a block (n, n) as a matrix like ``H``: slices of its factors, not copied."""
    if block.shape != H.shape:
        msg = f"`G` must have shape {H.shape}, got {block.shape}."
        raise ShapeError(msg)
    check_operand("G", block.U, H.space)
    upper, lower, leaves = slices(block, H.tree)
    below = None if block.U is block.V else lower
    return HODLR(H.tree, leaves.to_dense(), upper, below, error=0.0)
