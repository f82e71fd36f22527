"""Array libraries: one namespace, and the only door to their differences.

Everything else in the package is written against the array API standard. What the
standard leaves out (seeded normal numbers, conversion to NumPy, whether a failed
Cholesky raises) is settled here.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import array_api_compat
import numpy as np
from threadpoolctl import ThreadpoolController

__all__ = [
    "COMPLEX",
    "FLOATS",
    "HALVES",
    "NUMBERS",
    "Array",
    "Space",
    "adjoint",
    "cholesky",
    "complete_qr",
    "conjugate",
    "contiguous",
    "default_workers",
    "detach",
    "dtype_name",
    "eigh_descending",
    "frobenius",
    "in_threads",
    "inverse",
    "inverse_lower",
    "is_array",
    "known_gradients",
    "library",
    "namespace",
    "nbytes",
    "one_blas_thread",
    "one_thread_if_small",
    "qr",
    "real_part",
    "slogdet",
    "solve",
    "squares",
    "subtract_product",
    "svd",
    "to_numpy",
    "transpose",
    "wants_gradient",
    "without_gradients",
]

Array = Any  # an array of any supported library; the standard has no common type
Namespace = Any
Item = TypeVar("Item")
Result = TypeVar("Result")

FLOATS = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
NUMBERS = (*FLOATS, *COMPLEX)
HALVES = ("float16", "bfloat16")


def is_array(x: object) -> bool:
    """Tell whether ``x`` is an array of a supported library."""
    return bool(array_api_compat.is_array_api_obj(x))


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace of ``x``."""
    return array_api_compat.array_namespace(x)


def library(x: Array) -> str:
    """Return the library of ``x`` by name: ``numpy``, ``torch``, ``cupy``."""
    return Space.of(x).library


def dtype_name(dtype: object) -> str:
    """Return the bare name of a dtype of any library, ``float32`` say.

    Examples
    --------
    >>> import numpy as np
    >>> from hmatrix._backend import dtype_name
    >>> dtype_name(np.dtype("float64")), dtype_name(np.float32), dtype_name("float32")
    ('float64', 'float32', 'float32')
    """
    if isinstance(dtype, type):
        return dtype.__name__
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rsplit(".", 1)[-1]


def nbytes(*arrays: Array) -> int:
    """Return the bytes of the numbers of some arrays."""
    return sum(math.prod(x.shape) * Space.of(x).itemsize for x in arrays)


def frobenius(x: Array) -> Array:
    """Return the Frobenius norm of a whole array, as an array; it may overflow."""
    xp = namespace(x)
    if array_api_compat.is_numpy_array(x):
        # vdot needs no array of squares, and an overflow is the caller's to judge
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.sqrt(np.vdot(x, x).real)
    else:
        norm = xp.linalg.vector_norm(x)
    if math.prod(x.shape) and float(norm) < Space.of(x).smallest_norm:
        # Squares of these underflow; and complex division overflows at subnormal numbers,
        # from which a power of two leads away
        away = 1 / float(xp.finfo(x.dtype).smallest_normal)
        x = x * away
        largest = xp.max(xp.abs(x))
        if float(largest) > 0:
            norm = largest * xp.linalg.vector_norm(x / largest) / away
    return norm


def detach(x: Array) -> Array:
    """Cut a torch tensor off its autograd graph; return other arrays as they are."""
    return x.detach() if array_api_compat.is_torch_array(x) else x


def wants_gradient(x: Array) -> bool:
    """Tell whether an array is a torch tensor whose operations are recorded."""
    if not array_api_compat.is_torch_array(x):
        return False
    return bool(x.requires_grad and namespace(x).is_grad_enabled())


def without_gradients(xp: Namespace) -> AbstractContextManager[Any]:
    """Keep torch from recording operations."""
    if not array_api_compat.is_torch_namespace(xp):
        return nullcontext()
    recording: AbstractContextManager[Any] = xp.no_grad()
    return recording


def known_gradients(
    value: Array,
    gradients: Callable[[Array], Sequence[Array]],
    inputs: Sequence[Array],
) -> Array:
    """Let torch differentiate ``value`` by ``inputs``, once.

    ``gradients`` turns that of the result into those of the inputs.

    Raises
    ------
    RuntimeError
        When the gradient itself is to be differentiable.
    """
    return _known_function().apply(value, gradients, *inputs)


@cache
def _known_function() -> Any:
    import torch

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Array, gradients: Any, *inputs: Array) -> Array:  # noqa: ARG004
            ctx.gradients = gradients
            return value.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Array) -> tuple[Array | None, ...]:
            # recorded only for second derivatives, which would lack a part
            if torch.is_grad_enabled():
                msg = (
                    'Factorizations by "cholesky" are differentiated once; use '
                    'factorize(H, method="inversion") with create_graph=True.'
                )
                raise RuntimeError(msg)
            return (None, None, *ctx.gradients(upstream))

    return Known


def to_numpy(x: Array) -> np.ndarray:
    """Copy an array of any library and device into host memory."""
    if array_api_compat.is_torch_array(x):
        return np.asarray(x.detach().cpu().resolve_conj())
    if array_api_compat.is_cupy_array(x):
        return np.asarray(x.get())
    if array_api_compat.is_numpy_array(x):
        return np.asarray(x)
    return np.from_dlpack(x)


def contiguous(x: Array) -> Array:
    """Return ``x`` in row-major memory of its own size.

    torch multiplies strided views an order of magnitude slower, and a slice that is
    kept would keep all of what it was cut from.
    """
    if array_api_compat.is_torch_array(x):
        x = x.contiguous()
        return x.clone() if x.untyped_storage().nbytes() > nbytes(x) else x
    xp = namespace(x)
    if array_api_compat.is_numpy_array(x) or array_api_compat.is_cupy_array(x):
        return xp.array(x, order="C")
    return xp.asarray(x, copy=True)


def subtract_product(x: Array, a: Array, b: Array) -> Array:
    """Return ``x - a @ b`` (batches of matrices), computed in the memory of ``x``."""
    if array_api_compat.is_torch_array(x):
        return x.baddbmm_(a, b, alpha=-1)
    x -= a @ b
    return x


def transpose(x: Array) -> Array:
    """Swap the last two axes."""
    return namespace(x).matrix_transpose(x)


def conjugate(x: Array) -> Array:
    """Return the complex conjugate; a real array is returned as it is."""
    return namespace(x).conj(x) if dtype_name(x.dtype) in COMPLEX else x


def squares(x: Array) -> Array:
    """Squares of absolute values, real."""
    if dtype_name(x.dtype) not in COMPLEX:
        return x * x
    xp = namespace(x)
    return xp.real(x) ** 2 + xp.imag(x) ** 2


def real_part(x: Array) -> Array:
    """Real part; a real array is returned as it is."""
    return namespace(x).real(x) if dtype_name(x.dtype) in COMPLEX else x


def adjoint(x: Array) -> Array:
    """Swap the last two axes and conjugate."""
    return conjugate(transpose(x))


@dataclass(frozen=True)
class Space:
    """Where arrays live: library, dtype and device.

    Parameters
    ----------
    xp
        Array-API namespace.
    dtype
        A dtype object of that namespace.
    device
        A device object of that library.
    """

    xp: Namespace
    dtype: Any
    device: Any

    @classmethod
    def of(cls, x: Array) -> Space:
        """Return the space of an array."""
        return cls(namespace(x), x.dtype, array_api_compat.device(x))

    @classmethod
    def like(cls, like: Array | None, dtype: object = None) -> Space:
        """Return the space of ``like`` (default NumPy), in ``dtype`` if given.

        A half-precision ``like`` gives float32: sums of squares are never
        accumulated in fewer bits.
        """
        x = np.empty(0) if like is None else like
        xp = namespace(x)
        name = dtype_name(x.dtype if dtype is None else dtype)
        if dtype is None and name in HALVES:
            name = "float32"
        return cls(xp, getattr(xp, name, None), array_api_compat.device(x))

    @property
    def name(self) -> str:
        """Bare name of the dtype."""
        return dtype_name(self.dtype)

    @property
    def library(self) -> str:
        """Name of the library."""
        return str(self.xp.__name__).removeprefix("array_api_compat.").split(".")[0]

    @property
    def place(self) -> str:
        """Library and, unless it is the host, device, for messages."""
        device = str(self.device)
        return self.library + (f" on {device}" if "cpu" not in device.lower() else "")

    @property
    def on_host(self) -> bool:
        """Whether the numbers are in the memory of the CPU."""
        return "cpu" in str(self.device).lower()

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number of the dtype."""
        return float(self.xp.finfo(self.dtype).eps)

    @property
    def smallest_norm(self) -> float:
        """Norm whose part of epsilon has a square that does not underflow."""
        return math.sqrt(float(self.xp.finfo(self.dtype).smallest_normal)) / self.eps

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        parts = 2 if self.is_complex else 1
        return int(self.xp.finfo(self.dtype).bits) // 8 * parts

    @property
    def is_complex(self) -> bool:
        """Whether the numbers are complex."""
        return self.name in COMPLEX

    @property
    def real(self) -> Space:
        """The space of absolute values."""
        if not self.is_complex:
            return self
        name = FLOATS[COMPLEX.index(self.name)]
        return Space(self.xp, getattr(self.xp, name), self.device)

    def zeros(self, *shape: int) -> Array:
        """Return an array of zeros."""
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Array:
        """Return an array of ones."""
        return self.xp.ones(shape, dtype=self.dtype, device=self.device)

    def eye(self, n: int) -> Array:
        """Return the identity matrix."""
        return self.xp.eye(n, dtype=self.dtype, device=self.device)

    def integers(self, x: np.ndarray) -> Array:
        """Bring integers of NumPy here, to be indices."""
        return self.xp.asarray(x, device=self.device)

    def asarray(self, x: Array, *, copy: bool = False) -> Array:
        """Bring an array of any library into this space.

        Memory is shared where library, dtype and device allow it, unless ``copy``.
        """
        if namespace(x) is not self.xp:
            x = self._handed_over(x)
        x = self.xp.astype(x, self.dtype, copy=copy)
        return array_api_compat.to_device(x, self.device)

    def _handed_over(self, x: Array) -> Array:
        """Give this library an array of another one."""
        device = x.__dlpack_device__()
        # only devices of their own need DLPack: host memory is shared through NumPy
        if device[0] != 1 and device == self.zeros(0).__dlpack_device__():
            return self.xp.from_dlpack(detach(x))
        host = to_numpy(x)
        if not host.flags.writeable or min(host.strides, default=0) < 0:
            host = host.copy()  # torch has neither read-only nor reversed arrays
        return self.xp.asarray(host, device=self.device)

    def normal(self, shape: tuple[int, ...], *key: int) -> Array:
        """Return standard normal numbers that ``key`` alone determines.

        Drawn on the device where the library can: the same key gives the same
        numbers on the same library and kind of device, not across them.
        """
        if self.is_complex:
            parts = self.real.normal((2, *shape), *key)
            whole = self.xp.astype(parts[0, ...], self.dtype) + 1j * parts[1, ...]
            return whole / math.sqrt(2)
        seed = np.random.SeedSequence(key)
        if array_api_compat.is_torch_namespace(self.xp):
            generator = self.xp.Generator(device=self.device)
            generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            return self.xp.randn(
                shape, generator=generator, dtype=self.dtype, device=self.device
            )
        if array_api_compat.is_cupy_namespace(self.xp):
            with self.device:
                generator = self.xp.random.default_rng(int(seed.generate_state(1)[0]))
                return generator.standard_normal(shape, dtype=self.dtype)
        drawn = np.random.default_rng(seed).standard_normal(
            shape, dtype=np.float32 if self.name == "float32" else np.float64
        )
        return self.xp.asarray(drawn, device=self.device)


def default_workers(space: Space) -> int:
    """Return how many threads of ours are of use: as many as BLAS takes, with NumPy.

    ``OMP_NUM_THREADS``, or the processors. NumPy's loops over batches take one thread
    each, and let others run; other libraries have threads, or a device, of their own.
    """
    if not array_api_compat.is_numpy_namespace(space.xp):
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold BLAS to one thread, where threads are at work already.

    OpenBLAS's own would be too many, and spin on the processors that others need.
    """
    limited: AbstractContextManager[Any] = _blas().limit(limits=1)
    return limited


def in_threads(
    workers: int, run: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result]:
    """Return ``[run(item) for item in items]``, several at a time."""
    workers = min(workers, len(items))
    if workers <= 1:
        return [run(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        # in the caller's context, which holds numpy.errstate
        runs = [pool.submit(copy_context().run, run, item) for item in items]
        return [finished.result() for finished in runs]


#: Matrices up to this size are factorized by one thread.
SINGLE_THREAD_SIZE = 192
_thread_count_lock = threading.RLock()


@contextmanager
def one_thread_if_small(x: Array) -> Iterator[None]:
    """Work on batches of small or narrow matrices on one thread.

    LAPACK meets a barrier at every few columns. On a machine with other work each can
    cost a time slice: 36 ms for the eigenvalues of one 40×40 matrix on two threads of
    torch with MKL, 0.1 ms on one.
    """
    if not array_api_compat.is_torch_array(x) or x.device.type != "cpu":
        yield
        return
    torch = namespace(x)
    with _thread_count_lock:  # the count is global
        threads = torch.get_num_threads()
        if threads == 1 or min(x.shape[-2:]) > SINGLE_THREAD_SIZE:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def eigh_descending(a: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and eigenvectors of Hermitian ``a`` (..., m, m).

    The matrices are brought to norm 1 and freed of subnormal numbers first: MKL's
    float32 solver gives NaN for some matrices that have them.
    """
    xp = namespace(a)
    if not a.shape[-1]:
        return Space.of(a).real.zeros(*a.shape[:-1]), a
    scale = xp.max(xp.abs(a), axis=(-2, -1), keepdims=True)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    a = a / scale
    a = xp.where(xp.abs(a) < xp.finfo(a.dtype).smallest_normal, xp.zeros_like(a), a)
    with one_thread_if_small(a):
        values, vectors = xp.linalg.eigh(a)
    return xp.flip(values * scale[..., 0], axis=-1), xp.flip(vectors, axis=-1)


def svd(a: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition ``a = U diag(S) Vᴴ``: U, S and V."""
    with one_thread_if_small(a):
        U, S, Vh = namespace(a).linalg.svd(a, full_matrices=False)
    return U, S, adjoint(Vh)


def qr(a: Array) -> tuple[Array, Array]:
    """Thin QR decomposition of ``a`` (..., m, n)."""
    with one_thread_if_small(a):
        Q, R = namespace(a).linalg.qr(a)
    return Q, R


def complete_qr(a: Array) -> tuple[Array, Array]:
    """QR decomposition of ``a`` (..., m, n) with square Q."""
    with one_thread_if_small(a):
        Q, R = namespace(a).linalg.qr(a, mode="complete")
    return Q, R


def solve(a: Array, b: Array) -> Array:
    """Solve ``a x = b`` for matrices ``a`` (..., m, m), ``b`` (..., m, q)."""
    with one_thread_if_small(a):
        return namespace(a).linalg.solve(a, b)


def inverse(a: Array) -> Array:
    """Inverse of ``a`` (..., m, m), none of them singular."""
    with one_thread_if_small(a):
        return namespace(a).linalg.inv(a)


def slogdet(a: Array) -> tuple[Array, Array]:
    """Signs and logs of absolute values of the determinants of ``a`` (..., m, m)."""
    with one_thread_if_small(a):
        signs, logs = namespace(a).linalg.slogdet(a)
    return signs, logs


def cholesky(a: Array) -> Array | None:
    """Lower Cholesky factors of ``a`` (..., m, m); None if one does not exist."""
    xp = namespace(a)
    if array_api_compat.is_torch_array(a):
        with one_thread_if_small(a):
            factor, info = xp.linalg.cholesky_ex(a)
        return None if bool(xp.any(info != 0)) else factor
    try:
        with _raising(a):
            return xp.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        return None


def _raising(a: Array) -> AbstractContextManager[Any]:
    """Make CuPy raise on failure as NumPy does; by default it returns garbage."""
    if not array_api_compat.is_cupy_array(a):
        return nullcontext()
    from cupyx import errstate

    raising: AbstractContextManager[Any] = errstate(linalg="raise")
    return raising


def inverse_lower(a: Array) -> Array:
    """Inverse of lower triangular ``a`` (..., m, m)."""
    xp, space = namespace(a), Space.of(a)
    eye = xp.broadcast_to(space.eye(a.shape[-1]), a.shape)
    if array_api_compat.is_torch_array(a):
        with one_thread_if_small(a):
            return xp.linalg.solve_triangular(a, eye, upper=False)
    m = int(a.shape[-1])
    if m <= 8 or m % 2:
        return xp.linalg.solve(a, eye)
    # [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]]: products in place of an LU
    # decomposition that does not know of the zeros
    h = m // 2
    halves = inverse_lower(xp.stack([a[..., :h, :h], a[..., h:, h:]], axis=0))
    A, C = halves[0, ...], halves[1, ...]
    low = -(C @ (a[..., h:, :h] @ A))
    top = xp.concat([A, xp.zeros_like(A)], axis=-1)
    return xp.concat([top, xp.concat([low, C], axis=-1)], axis=-2)
