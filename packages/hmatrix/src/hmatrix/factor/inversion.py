"""Inverses as hierarchical matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from hmatrix._backend import (
    in_own_precision,
    one_blas_thread_if_narrow,
    safe_norm,
    without_gradients,
)
from hmatrix._checks import (
    NonFiniteError,
    NotPositiveDefiniteError,
    PrecisionError,
    SingularBlockError,
    check_kind,
)
from hmatrix._operator import cleared, pad_rows, unpad_rows
from hmatrix.arithmetic import (
    after,
    assemble,
    estimate_norm,
    inverse_error,
    norm,
    truncate,
)
from hmatrix.factor._base import PROBES, Factorization, has_gradients
from hmatrix.factor.cholesky import HODLRCholesky
from hmatrix.factor.equilibration import (
    General,
    HODLREquilibrated,
    equilibrated_if_lossy,
)
from hmatrix.factor.hodlr import HODLRFactorization
from hmatrix.factor.mlr import MLRFactorization
from hmatrix.factor.operator import stored_inverse
from hmatrix.factor.orthogonal import HOPELESS, HODLROrthogonal
from hmatrix.hodlr import HODLR
from hmatrix.mlr import MLR

__all__ = ["automatic", "inverse", "telling_nan"]


@in_own_precision
def inverse(
    H: HODLR | MLR | Factorization,
    *,
    shift: float = 0.0,
    rtol: float | None = None,
    max_rank: int | None = None,
) -> HODLR | MLR:
    """Return the inverse of ``H + shift·I`` as a matrix of the kind of ``H``.

    `Factorization.inverse` of a `HODLR` is an operator that is applied from the factors;
    this one is stored: it has blocks and ranks, can be added, multiplied and saved.

    Parameters
    ----------
    H : HODLR, MLR, or their factorization
        The matrix. A factorization has its own ``shift``.
    shift : float
        Added to the diagonal.
    rtol : float, optional
        Of a `HODLR`: promise ``‖result − X‖_F ≤ rtol · ‖X‖_F`` of what the
        factorization gives for the inverse ``X``, whose own error grows with the
        condition number. Default: rounding only, or the square root of epsilon where
        that takes products, as far as solutions have that many digits.
    max_rank : int, optional
        Cap on the ranks. It wins over ``rtol``.

    Returns
    -------
    HODLR or MLR
        The inverse, symmetric if ``H`` is. Its ``error`` is a bound that grows with the
        condition number, and leaves rounding aside; digits that terms lost when they
        cancelled are in it by an estimate, as is what was cut off where the inverse is
        found from solutions (see Notes). That of an `MLR` is exact, with the same ranks,
        unless ``max_rank`` cuts it.

    Raises
    ------
    SingularLeafError, SingularBlockError, NotPositiveDefiniteError
        As `factorize`.
    NonFiniteError
        If the matrix holds NaN or infinite values.
    PrecisionError
        If a `HODLR` is singular to working precision.
    ToleranceError
        If ``rtol`` is not kept, because solutions have no more digits than that.
    ValueError
        If a factorization comes with a ``shift``; or if an inverse found from solutions,
        or one that is cut to smaller ranks, should have gradients.

    Notes
    -----
    Each level of the recursive block inversion subtracts ``D P E Qᴴ D`` (see
    `factorize`), and each of a definite matrix's ``W`` adds ``Z M Zᴴ``, which keeps more
    digits: off-diagonal parts are blocks of low rank, diagonal parts reach into all levels
    below. Cost ``O(n r² K²)``. Where that fails or loses digits (see
    `factorize`), or the result differs from solutions with random vectors, or ``H`` is a
    factorization by "orthogonal", it is found from solutions, as `from_matvec` does.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 200)
    >>> A = np.exp(-abs(t[:, None] - t)) + 0.1 * np.eye(200)
    >>> H = hm.from_dense(A, levels=3, rtol=1e-12)
    >>> X = hm.inverse(H, rtol=1e-9)
    >>> X.ranks, bool(np.allclose(X.to_dense() @ A, np.eye(200)))
    ((1, 1, 1), True)
    """
    check_kind("H", H, HODLR, MLR, Factorization)
    if isinstance(H, Factorization) and shift:
        msg = (
            f"`shift` = {shift} comes too late for a factorization; factorize with it."
        )
        raise ValueError(msg)
    F = H
    if isinstance(H, HODLRCholesky) and H._has_gradients():
        # W has none to the matrix; the steps of inversion have
        F = inversion_or_orthogonal(H.matrix, H.shift, strict=False)
    elif isinstance(H, HODLR):
        with telling_nan(H):
            F = automatic(H, shift, for_terms=True)
    elif isinstance(H, MLR):
        F = MLRFactorization(H, shift)
    if isinstance(F, MLRFactorization):
        X = F.inverse()
        if rtol is None and max_rank is None:
            return X
        return truncate(X, rtol=rtol, max_rank=max_rank)
    if isinstance(F, (HODLREquilibrated, HODLROrthogonal)):
        return _from_solutions(F, rtol, max_rank)
    assert isinstance(F, (HODLRCholesky, HODLRFactorization))
    with one_blas_thread_if_narrow(F.space, *F.matrix._widths):
        leaves, terms = F._terms()
        stored = assemble(
            F.tree,
            leaves,
            terms,
            size=estimate_norm(F._apply, F.tree, F.space),
            rtol=rtol,
            max_rank=max_rank,
            symmetric=F.matrix.symmetric,
        )
    with without_gradients(F.space.xp):
        off, rounding = _off(stored, F)
    # of random vectors, whose part of what was cut off may be twice the mean
    known = 2 * (stored.error or 0.0)
    asked = math.sqrt(F.space.eps) if rtol is None else rtol
    if not off <= known + max(asked / 2, rounding):
        return _from_solutions(HODLROrthogonal(F.matrix, F.shift), rtol, max_rank)
    error = after(inverse_error(stored, F.matrix), stored.error)
    if off > known + rounding:  # digits that terms have lost
        error = after(error, off)
    return replace(stored, error=error)


@contextmanager
def telling_nan(H: HODLR) -> Iterator[None]:
    """Raise `NonFiniteError` where a factorization fails because the matrix has NaN."""
    try:
        # what NumPy would warn of, overflow of inverses say, ends in an exception
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except NotPositiveDefiniteError:
        raise  # Cholesky looks for NaN itself
    except (SingularBlockError, PrecisionError):
        if math.isfinite(norm(H)):
            raise
        msg = "The matrix holds NaN or infinite values."
        raise NonFiniteError(msg) from None


def automatic(
    H: HODLR, shift: float, *, overwrite: bool = False, for_terms: bool = False
) -> Factorization:
    """Factorize by "auto" of `factorize`, or ``for_terms`` of the inverse.

    Terms of W Wᴴ keep the most digits, but have no gradients to the matrix.
    """
    if H.symmetric and not (for_terms and has_gradients(H)):
        try:
            return cholesky_or_orthogonal(H, shift, overwrite=overwrite)
        except NotPositiveDefiniteError:
            if overwrite:
                raise
    make = partial(inversion_or_orthogonal, strict=not for_terms)
    return equilibrated_if_lossy(make, H, shift)


def cholesky_or_orthogonal(H: HODLR, shift: float, *, overwrite: bool) -> Factorization:
    """Factorize a definite matrix as W Wᴴ, or orthogonally where that keeps more digits.

    Lost digits are measured where a pivot is small, which costs little beside W; where both
    lose all, the matrix is singular to working precision. Tensors that want gradients keep
    W, whose log-determinant has more accurate ones.
    """
    first = HODLRCholesky(H, shift, overwrite=overwrite)
    if not first._refinements or has_gradients(H):
        return first
    lost = first._check_precision(math.inf, "", stable=True)
    if lost <= HOPELESS:
        return first
    try:
        second = equilibrated_if_lossy(HODLROrthogonal, H, shift)
    except (PrecisionError, SingularBlockError) as error:
        msg = f'{error} For `sample` and `whiten` alone, use method="cholesky".'
        raise PrecisionError(msg, lost) from None
    return second if second._lost < lost else first


def inversion_or_orthogonal(H: HODLR, shift: float, *, strict: bool) -> General:
    """Factorize by inversion, or orthogonally where that fails or loses digits.

    If ``strict``, more digits are asked for than `HODLRFactorization` asks for by itself,
    whose solutions are refined: the log-determinant is not.
    """
    try:
        first = HODLRFactorization(H, shift)
    except (PrecisionError, SingularBlockError) as error:
        try:
            return HODLROrthogonal(H, shift)
        except (PrecisionError, SingularBlockError) as hopeless:
            # that of a block says more, if there is one
            cause = error if isinstance(error, SingularBlockError) else hopeless
            raise cause from None
    if not strict or first._lost <= math.sqrt(H.space.eps):
        return first
    try:
        second = HODLROrthogonal(H, shift)
    except (PrecisionError, SingularBlockError):
        return first
    return second if second._lost < first._lost else first


def _from_solutions(
    F: Factorization, rtol: float | None, max_rank: int | None
) -> HODLR:
    assert isinstance(F.matrix, HODLR)
    if has_gradients(F.matrix):
        msg = (
            "The stored inverse of an ill-conditioned matrix has no gradients; pass "
            "detached tensors."
        )
        raise ValueError(msg)
    if rtol is None and max_rank is None:
        # no cap: take what can be had, and say in `error` what that is
        max_rank = F.tree.n
    stored = stored_inverse(F, rtol, max_rank)
    error = after(inverse_error(stored, F.matrix), stored.error)
    return replace(stored, error=error)


def _off(X: HODLR, F: HODLRCholesky | HODLRFactorization) -> tuple[float, float]:
    """Return how far the stored inverse is from solutions, and how far rounding may be.

    Both are relative. Solutions are refined and terms of the inverse are not: where inverses
    of halves are large beside that of the whole, terms cancel and lose digits.
    """
    space = F.space
    z = pad_rows(space.normal((F.tree.n, PROBES), F.tree.n, PROBES), F.tree)
    y = F._multiply(z)
    x = pad_rows(F.solve(unpad_rows(z, F.tree)), F.tree)
    off = safe_norm(cleared(X._apply(z) - x, F.tree))
    # the 2-norms of matrix and inverse by a step of power iteration: the product of their
    # Frobenius norms is many times larger, and would let lost digits pass
    sizes = safe_norm(x), safe_norm(y)
    two = F._apply_adjoint(x), F._multiply_adjoint(y)
    condition = math.prod(
        safe_norm(cleared(v, F.tree)) / size for v, size in zip(two, sizes, strict=True)
    )
    return off / sizes[0], 10 * space.eps * condition
