"""Factor once, apply many: solve, inverse, its diagonal, log-determinant.

All factorizations go from the leaves to the root, one batched call a level, and take
the columns of all levels above along, so that each level is a few matrix products and
one small factorization.
"""

from __future__ import annotations

from hmatrix._backend import in_own_precision, one_blas_thread_if_narrow
from hmatrix._checks import check_choice, check_kind
from hmatrix.factor._base import Factorization
from hmatrix.factor.cholesky import HODLRCholesky
from hmatrix.factor.equilibration import HODLREquilibrated, equilibrated_if_lossy
from hmatrix.factor.hodlr import HODLRFactorization
from hmatrix.factor.inversion import automatic, inverse, telling_nan
from hmatrix.factor.mlr import MLRFactorization
from hmatrix.factor.orthogonal import HODLROrthogonal
from hmatrix.hodlr import HODLR
from hmatrix.mlr import MLR

__all__ = [
    "Factorization",
    "HODLRCholesky",
    "HODLREquilibrated",
    "HODLRFactorization",
    "HODLROrthogonal",
    "MLRFactorization",
    "factorize",
    "inverse",
]


@in_own_precision
def factorize(
    H: HODLR | MLR, shift: float = 0.0, *, method: str = "auto", overwrite: bool = False
) -> Factorization:
    """Factorize ``H + shift·I``.

    Parameters
    ----------
    H : HODLR or MLR
        The matrix. An `MLR` must be positive definite once shifted.
    shift : float
        Added to the diagonal (damping, nugget).
    method : {"auto", "cholesky", "inversion", "orthogonal"}
        Of a `HODLR`:

        * "cholesky" is the symmetric factorization ``W Wᴴ`` of a Hermitian positive
          definite matrix, which also gives ``sample`` and ``whiten``. ``W Wᴴ`` is the
          matrix to epsilon times the root of its condition number: samples are right
          however large that is, and nothing is a `PrecisionError`. But the
          log-determinant and the inverse may have lost their digits where epsilon times
          its power 3/2 is no longer small.
        * "inversion" is recursive block inversion, of any matrix none of whose diagonal
          blocks is close to singular.
        * "orthogonal" is elimination by unitary transformations, of any matrix: as
          accurate as dense LU with pivots, at a small multiple of the cost.

        Where the last two lose digits and rows or columns differ much in size, they are
        divided by powers of two first that bring them to about one size. (A
        constructor whose ``rtol`` is relative to the whole matrix leaves few digits of rows
        far smaller than others; given factors and diagonals keep theirs.)

        "auto" takes the first of these that applies and keeps the digits: "cholesky" if no
        pivot is below ``sqrt(eps)``, or the Frobenius norm of its ``E`` (see
        `PrecisionError` below) is at most 0.1 or less than that of "orthogonal", or
        tensors want gradients (where both have lost their digits, that is a
        `PrecisionError`); "inversion" if that norm is at most ``sqrt(eps)``. One step
        of refinement mends solutions above that, and products of the operator that
        ``inverse`` gives. ``inverse_diagonal`` is compared with solutions, and found by
        "orthogonal" where it differs. Ask for "cholesky" where you need ``sample`` or
        ``whiten`` of a nearly singular matrix. An `MLR` has one method.
    overwrite : bool
        Let "cholesky" write the factor over the arrays of ``H``, as SciPy's
        ``overwrite_a``: matrix and factor are never in memory both. ``H`` raises
        `OverwrittenError` afterwards, even if the factorization fails; so do
        refinement, which needs it, and `save`. What shares memory with its leaves (what
        ``H`` was made of, or what `truncate` or ``to`` made of it, if there is nothing to
        convert) is overwritten too, without a sign. ``sample`` then loses digits of an
        ill-conditioned matrix: it inverts the leaves' inverse factors. "auto" does not go
        on to another method then, and other methods leave ``H`` as it is.

    Returns
    -------
    Factorization
        With ``solve``, ``inverse``, ``inverse_diagonal``, ``logdet``, ``slogdet``.
        Cost ``O(n r² K²)`` and memory ``O(n r K)`` beside the leaves; no n×n array is
        formed.

    Raises
    ------
    NonFiniteError
        If the matrix holds NaN or infinite values.
    NotPositiveDefiniteError
        If a shifted `MLR`, or a `HODLR` for "cholesky", is not positive definite. Of a
        node's core it names the eigenvalue relative to the node's halves.
    SingularLeafError, SingularBlockError
        If a block that a `HODLR` must invert is singular to working precision.
    PrecisionError
        If a factorization of a `HODLR` has lost its digits: ``E = (H + shift·I) F⁻¹ −
        I`` is tried on random vectors, and both its Frobenius norm and the root of that of
        ``E²``, which a step of refinement leaves, are above ``eps**(1/4)`` for
        "inversion" (1e-4, and 2e-2 in single precision); or the norm and the spectral
        radius are above 0.1, or norm and root above 1, for "orthogonal", whose ``E`` is no
        more than rounding times the condition number. The norm is about the error of the
        log-determinant, and a radius below 1, which no root exceeds, makes its sign right.
    ValueError
        If ``method`` is not one of these, or is "cholesky" for a matrix that is not
        stored as Hermitian; or if tensors that want gradients are to be overwritten.

    Notes
    -----
    For `HODLR` a node's inverse is ``D − D P (I + C Qᵀ D P)⁻¹ C Qᵀ D`` with ``D`` its
    children's inverses and ``P C Qᵀ`` its off-diagonal part, which never divides by small
    singular values (Chen & Martinsson, "Solving linear systems on a GPU with
    hierarchically off-diagonal low-rank approximations", 2022). For `MLR` it is
    ``X − W Wᵀ`` with ``W = X F R⁻ᵀ``, ``R Rᵀ = I + Fᵀ X F``. With "orthogonal" each node
    eliminates what does not concern the others, level by level (after Chandrasekaran, Gu &
    Pals, "A fast ULV decomposition solver for hierarchically semiseparable
    representations", 2006). With "cholesky" a node is
    ``W_c (I + Q X Qᴴ)(I + Q X Qᴴ)ᴴ W_cᴴ``, ``W_c`` its halves' factors and ``Q``
    orthonormal (Ambikasaran, O'Neil & Singh, "Fast symmetric factorization of
    hierarchical matrices with applications", 2014).

    torch carries gradients through solutions, the inverse, its diagonal and the
    log-determinant to leaves, factors and right-hand sides; a shift that wants a gradient
    is refused here and added by `hmatrix.shift`.

    * Those of "inversion" are of its steps and can be differentiated again.
    * Those of "cholesky" are of the matrix, ``dx = A⁻¹ (db − dA x)`` and
      ``d log det A = tr(A⁻¹ dA)``, at the cost of a refinement step and of a selected
      inverse, and raise if differentiated again; its diagonal of the inverse is taken
      from "inversion" for them, or "orthogonal" where that fails.
    * Those of "orthogonal" are alike; of the log-determinant and of the diagonal of the
      inverse they are from the stored inverse (see `inverse`), to the square root of
      epsilon.

    ``sample`` and ``whiten`` have gradients to vectors, and to an `MLR`.

    Examples
    --------
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> t = np.linspace(0, 1, 200)
    >>> A = np.exp(-abs(t[:, None] - t))
    >>> F = hm.factorize(hm.from_dense(A, levels=3, rtol=1e-12), shift=0.1)
    >>> shifted = A + 0.1 * np.eye(200)
    >>> bool(np.allclose(shifted @ F.solve(t), t))
    True
    >>> bool(np.isclose(F.logdet(), np.linalg.slogdet(shifted)[1]))
    True
    """
    check_kind("H", H, HODLR, MLR)
    methods = ("auto", "cholesky", "inversion", "orthogonal")
    check_choice("method", method, methods if isinstance(H, HODLR) else ("auto",))
    with one_blas_thread_if_narrow(H.space, *H._widths):
        if isinstance(H, MLR):
            return MLRFactorization(H, shift)
        with telling_nan(H):
            return _factorize(H, shift, method, overwrite)


def _factorize(H: HODLR, shift: float, method: str, overwrite: bool) -> Factorization:
    if method == "auto":
        return automatic(H, shift, overwrite=overwrite)
    if method == "cholesky":
        return HODLRCholesky(H, shift, overwrite=overwrite)
    make = HODLRFactorization if method == "inversion" else HODLROrthogonal
    return equilibrated_if_lossy(make, H, shift)
