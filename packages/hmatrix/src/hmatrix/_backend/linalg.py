"""Factorizations of batches of matrices."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import array_api_compat
import numpy as np

from .arrays import (
    Array,
    adjoint,
    block_matrix,
    multiply_into,
    namespace,
    positive_or_one,
    transpose,
)
from .batched import householder_qr, in_turn
from .gradients import wants_gradient
from .space import Space, contiguous
from .threads import SINGLE_THREAD_SIZE, one_thread_if_small

__all__ = [
    "cholesky",
    "complete_qr",
    "eigh_descending",
    "inverse",
    "inverse_lower",
    "orthonormal_parts",
    "qr",
    "slogdet",
    "solve",
    "svd",
    "triangle",
    "try_cholesky",
]

#: Matrices of a batch from which on a loop over their rows is faster than one over them.
MANY = 32

#: Rows up to which triangles are inverted without a step of refinement, for speed.
STEADY = 64


def _eigh(a: Array) -> tuple[Array, Array]:
    """Eigenvalues, smallest first, and eigenvectors of Hermitian ``a``."""
    xp = namespace(a)
    if array_api_compat.is_torch_array(a) and a.is_cuda and not wants_gradient(a):
        with suppress(ImportError):
            import cupy

            # torch before 2.12 decomposes matrices of more than 32 rows one by one, and
            # the host waits
            with cupy.cuda.Device(a.device.index):  # which need not be the current one
                found = cupy.linalg.eigh(cupy.from_dlpack(a.detach().resolve_conj()))
                values, vectors = map(xp.from_dlpack, found)
            return values, vectors
    with one_thread_if_small(a):
        values, vectors = xp.linalg.eigh(a)
    return values, vectors


def eigh_descending(a: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and eigenvectors of Hermitian ``a`` (..., m, m).

    The matrices are brought to norm 1 and freed of subnormal numbers first; on a CPU,
    single precision is scaled and decomposed in double: complex division overflows at
    subnormal numbers, and MKL's single-precision solver returns NaN, or does not converge,
    for some matrices of low rank whose rows differ by many orders of magnitude. On a device
    complex64 is: the vectors of a batch may be far from orthonormal, without a word
    (PyTorch 2.12 at least, https://github.com/pytorch/pytorch/issues/192483).
    """
    xp, space = namespace(a), Space.of(a)
    if not a.shape[-1]:
        return space.real.zeros(*a.shape[:-1]), a
    if space.on_host or space.is_complex:
        a = xp.astype(a, space.double.dtype)
    scale = positive_or_one(xp.max(xp.abs(a), axis=(-2, -1), keepdims=True))
    a = a / scale
    tiny = xp.finfo(space.dtype).smallest_normal
    a = xp.where(xp.abs(a) < tiny, 0.0, a)
    values, vectors = _eigh(a)
    values = xp.astype(values * scale[..., 0], space.real.dtype)
    return xp.flip(values, axis=-1), xp.flip(xp.astype(vectors, space.dtype), axis=-1)


def svd(a: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition ``a = U diag(S) Vᴴ``: U, S and V.

    Single precision of torch is decomposed in double on a CPU, as NumPy does: LAPACK's
    divide and conquer in single is off by many epsilon where singular values vanish.
    """
    xp, space = namespace(a), Space.of(a)
    if array_api_compat.is_torch_array(a) and space.on_host and space.wider:
        U, S, V = svd(xp.astype(a, space.double.dtype))
        S = xp.astype(S, space.real.dtype)
        return xp.astype(U, a.dtype), S, xp.astype(V, a.dtype)
    if not in_turn(a, free=32):
        failed = getattr(xp.linalg, "LinAlgError", np.linalg.LinAlgError)
        # LAPACK's divide and conquer does not converge for some matrices of clustered
        # singular values, finite and harmless to other methods
        with suppress(failed), one_thread_if_small(a):
            U, S, Vh = xp.linalg.svd(a, full_matrices=False)
            if not (_spoilt(U) or _spoilt(Vh)):
                return U, S, adjoint(Vh)
    return svd_by_eigh(a)


def svd_by_eigh(a: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition ``a = U diag(S) Vᴴ``: U, S and V.

    Eigenvectors of ``[[0, A], [Aᴴ, 0]]`` are pairs of singular vectors, backward stable,
    but orthogonal only in pairs where singular values vanish beside the largest. QR
    decompositions make them so: that of ``A V`` is diagonal to rounding.
    """
    xp, (m, n) = namespace(a), a.shape[-2:]
    if m < n:
        V, S, U = svd_by_eigh(adjoint(a))
        return U, S, V
    Q, R = householder_qr(a)
    zero = xp.zeros_like(R)
    _, vectors = eigh_descending(block_matrix(zero, R, adjoint(R), zero))
    V, _ = householder_qr(vectors[..., n:, :n])
    U, R = householder_qr(R @ V)
    diagonal = xp.linalg.diagonal(R)
    S = xp.abs(diagonal)
    large = float(xp.finfo(a.dtype).smallest_normal) <= S  # for complex division
    sizes = xp.where(large, S, 1.0)
    signs = xp.where(large, diagonal / sizes, 1.0)
    # in order, which rounding may have changed among the smallest
    order = xp.flip(xp.argsort(S, axis=-1), axis=-1)
    columns = xp.broadcast_to(order[..., None, :], V.shape)
    U, V = (
        xp.take_along_axis(x, columns, axis=-1) for x in (U * signs[..., None, :], V)
    )
    return Q @ U, xp.take_along_axis(S, order, axis=-1), V


def qr(a: Array) -> tuple[Array, Array]:
    """Thin QR decomposition of ``a`` (..., m, n)."""
    if in_turn(a):
        return householder_qr(a)
    with one_thread_if_small(a):
        Q, R = namespace(a).linalg.qr(a)
    return householder_qr(a) if _spoilt(Q) else (Q, R)


def triangle(a: Array) -> Array:
    """Return R of the QR decomposition of ``a`` (..., m, n), in half the time."""
    if in_turn(a) or not (type(a) is np.ndarray or array_api_compat.is_torch_array(a)):
        return qr(a)[1]
    with one_thread_if_small(a):
        R = namespace(a).linalg.qr(a, mode="r")
    R = R if type(a) is np.ndarray else R[1]
    return householder_qr(a)[1] if _spoilt(R) else R


def complete_qr(a: Array) -> tuple[Array, Array]:
    """QR decomposition of ``a`` (..., m, n) with square Q."""
    if in_turn(a):
        return householder_qr(a, complete=True)
    with one_thread_if_small(a):
        Q, R = namespace(a).linalg.qr(a, mode="complete")
    return householder_qr(a, complete=True) if _spoilt(Q) else (Q, R)


def _spoilt(x: Array) -> bool:
    """Tell whether a decomposition has NaN, as MKL's complex ones may.

    They divide by subnormal numbers, which rounding leaves in the last columns of a matrix
    of low rank. Tensors that want gradients are not looked at: they have no other method.
    """
    if not array_api_compat.is_torch_array(x) or wants_gradient(x):
        return False
    if not (x.is_complex() and x.device.type == "cpu"):
        return False
    return not bool(namespace(x).all(namespace(x).isfinite(x)))


def solve(a: Array, b: Array) -> Array:
    """Solve ``a x = b`` for regular ``a`` (..., m, m), ``b`` (..., m, q)."""
    xp = namespace(a)
    if _one_by_one(a):
        return xp.stack([solve(x, y) for x, y in zip(a, b, strict=True)])
    with one_thread_if_small(a):
        if array_api_compat.is_torch_array(a):
            return xp.linalg.solve_ex(a, b)[0]  # the host does not wait
        return xp.linalg.solve(a, b)


def _one_by_one(a: Array) -> bool:
    """Tell whether PyTorch's LU decompositions of a whole batch may be wrong.

    They are on a CPU, with MKL, after a call of `torch.set_num_threads`
    (https://github.com/pytorch/pytorch/issues/142815). One by one they are as fast: each
    matrix of these sizes takes all threads.
    """
    if not array_api_compat.is_torch_array(a) or a.device.type != "cpu":
        return False
    return a.ndim > 2 and len(a) > 1 and a.shape[-1] > SINGLE_THREAD_SIZE


def inverse(a: Array) -> Array:
    """Inverse of ``a`` (..., m, m); NaN or infinite where it is singular on a device."""
    xp = namespace(a)
    if _one_by_one(a):
        return xp.stack([inverse(x) for x in a])
    with one_thread_if_small(a):
        if array_api_compat.is_torch_array(a):
            # no exception of torch's own, for which the host would wait
            found, info = xp.linalg.inv_ex(a)
            return xp.where((info == 0)[..., None, None], found, math.nan)
        return xp.linalg.inv(a)


def slogdet(a: Array) -> tuple[Array, Array]:
    """Signs and logs of absolute values of the determinants of ``a`` (..., m, m).

    Where one is zero the log is infinite; callers say so, and NumPy need not warn.
    """
    if _one_by_one(a):
        parts = zip(*(slogdet(x) for x in a), strict=True)
        signs, logs = map(namespace(a).stack, parts)
        return signs, logs
    with one_thread_if_small(a), np.errstate(divide="ignore"):
        signs, logs = namespace(a).linalg.slogdet(a)
    return signs, logs


def cholesky(a: Array, *, sure: bool = False) -> Array | None:
    """Lower Cholesky factors of ``a`` (..., m, m); None if one does not exist.

    If it is ``sure`` to exist, a device is not asked, and the host does not wait.
    """
    xp = namespace(a)
    if array_api_compat.is_torch_array(a):
        with one_thread_if_small(a):
            factor, info = xp.linalg.cholesky_ex(a)
        return None if not sure and bool(xp.any(info != 0)) else factor
    try:
        with one_thread_if_small(a), nullcontext() if sure else _raising(a):
            return xp.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        return None


def try_cholesky(a: Array) -> tuple[Array, Array]:
    """Return Cholesky factors of ``a`` (..., m, m) on a device, and whether all exist.

    The latter is an array (), for which the host does not wait.
    """
    xp = namespace(a)
    if array_api_compat.is_torch_array(a):
        factor, info = xp.linalg.cholesky_ex(a)
        return factor, xp.all(info == 0)
    if not a.shape[-1]:
        return a, xp.asarray(True, device=Space.of(a).device)
    factor = xp.linalg.cholesky(a)  # CuPy's is wrong or NaN if none exists
    largest = [xp.max(xp.abs(x)) for x in (factor @ adjoint(factor) - a, a)]
    return factor, largest[0] <= math.sqrt(Space.of(a).eps) * largest[1]


def _raising(a: Array) -> AbstractContextManager[Any]:
    """Make CuPy raise on failure as NumPy does; by default it returns garbage."""
    if not array_api_compat.is_cupy_array(a):
        return nullcontext()
    from cupyx import errstate

    raising: AbstractContextManager[Any] = errstate(linalg="raise")
    return raising


def inverse_lower(a: Array, out: Array | None = None) -> Array:
    """Inverse of lower triangular ``a`` (..., m, m), in the memory of ``out`` if given."""
    xp, space = namespace(a), Space.of(a)
    if array_api_compat.is_torch_array(a):
        eye = xp.broadcast_to(space.eye(a.shape[-1]), a.shape)
        with one_thread_if_small(a):
            found = xp.linalg.solve_triangular(a, eye, upper=False)
        if out is not None:
            out[...] = found
        return found
    if out is None:
        out = space.empty(*a.shape)
    with one_thread_if_small(a):
        _invert_lower(a, out, many=math.prod(a.shape[:-2]) >= MANY)
    return out


def _invert_lower(a: Array, out: Array, many: bool) -> None:
    """Write the inverse of ``a`` into ``out``."""
    xp, m = namespace(a), int(a.shape[-1])
    if m > (8 if many else 32):
        # [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]]: products in place of an LU
        # decomposition that does not know of the zeros
        h = m // 2
        top, low = out[..., :h, :h], out[..., h:, h:]
        _invert_lower(a[..., :h, :h], top, many)
        _invert_lower(a[..., h:, h:], low, many)
        out[..., :h, h:] = 0
        product = a[..., h:, :h] @ top
        multiply_into(out[..., h:, :h], low, -product)
        if m > STEADY:
            # a step of refinement: the residual BA⁻¹ + C(−C⁻¹BA⁻¹) would otherwise grow with
            # the square of the condition number
            rest = product + a[..., h:, h:] @ out[..., h:, :h]
            out[..., h:, :h] -= low @ rest
    elif not many:
        # LU decomposition of an upper triangular matrix has no need of pivots, which would
        # cost digits; CuPy hands cuBLAS the transpose of what it is given
        if array_api_compat.is_cupy_array(a):
            out[...] = xp.linalg.inv(a)
        else:
            out[...] = transpose(xp.linalg.inv(transpose(a)))
    else:
        # row by row for all matrices at once, the batch being the last axis: a call of
        # LAPACK for each takes four times as long
        rows = contiguous(xp.moveaxis(a, (-2, -1), (0, 1)))
        found = xp.moveaxis(out, (-2, -1), (0, 1))
        x = xp.zeros_like(rows)
        for i in range(m):
            x[i, i, ...] = 1 / rows[i, i, ...]
            if i:
                known = xp.sum(rows[i, :i, None, ...] * x[:i, :i, ...], axis=0)
                x[i, :i, ...] = -x[i, i, ...] * known
        found[...] = x


def orthonormal_parts(
    X: Array, late: list[Array] | None = None
) -> tuple[Array, Array, Array]:
    """Return Q, T and R of tall X (b, m, r): ``Q T`` orthonormal, ``Q T R = X``.

    T (b, r, r) is returned by itself for the caller to multiply with other small matrices,
    since Q is as large as X. This is Cholesky QR of the columns scaled to norm 1: products
    and small factorizations, many times faster than Householder QR. What it leaves of
    ``QᴴQ − I`` is removed by T, which is ``(QᴴQ)^(−1/2)`` by its power series, or else
    comes from a second Cholesky QR. A column of zeros in X is one in Q and in R.

    If Cholesky QR fails, Householder QR is used, for which the host waits for a device.
    With ``late`` it does not: whether it succeeded, an array (), is appended there.
    """
    space, r = Space.of(X), int(X.shape[-1])
    xp, eye = space.xp, space.eye(r)
    if X.shape[-2] < r:
        return _householder(X)
    gram = adjoint(X) @ X
    norms, null = xp.sqrt(xp.linalg.diagonal(gram)[:, None, :]), 0 * eye
    zero = norms == 0
    if not space.on_host or bool(xp.any(zero)):
        norms = xp.where(zero, 1.0, norms)
        null = xp.astype(zero, X.dtype) * eye
    # divided by one norm at a time: the product of two may be subnormal, by which complex
    # division fails. A factor that does not exist has NaN on a device, or Q is far from
    # orthonormal
    first = cholesky(gram / norms / transpose(norms) + null, sure=True)
    if first is None:
        return _householder(X)
    Q = X @ (adjoint(inverse_lower(first)) / transpose(norms))
    rest = adjoint(Q) @ Q + (null - eye)
    lost = xp.max(xp.abs(rest))  # of orthogonality
    if late is not None:
        late.append(lost < 0.5)
        second = cholesky(rest + eye, sure=True)
    elif r * float(lost) < space.eps ** (1 / 3) / 2:
        square = rest @ rest
        T = eye - rest / 2 + square * (3 / 8)  # (QᴴQ)^(−1/2), and its inverse
        root = eye + rest / 2 - square / 8
        return Q, T, (root @ adjoint(first) - null) * norms
    else:
        second = cholesky(rest + eye) if float(lost) < 0.5 else None
    if second is None:
        return _householder(X)
    R = (adjoint(second) @ adjoint(first) - null) * norms
    return Q, adjoint(inverse_lower(second)), R


def _householder(X: Array) -> tuple[Array, Array, Array]:
    space = Space.of(X)
    Q, R = qr(X)
    width = int(Q.shape[-1])
    return Q, space.xp.broadcast_to(space.eye(width), (*Q.shape[:-2], width, width)), R
