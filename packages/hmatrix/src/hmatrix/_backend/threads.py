"""Threads of ours, and those of BLAS and LAPACK."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

import array_api_compat
from threadpoolctl import ThreadpoolController

from .arrays import Array, namespace
from .space import Space

__all__ = [
    "default_workers",
    "in_threads",
    "one_blas_thread",
    "one_blas_thread_if_narrow",
    "one_thread_if_small",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Matrices up to this size are factorized by one thread.
SINGLE_THREAD_SIZE = 192
_thread_count_lock = threading.RLock()


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


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS and LAPACK of NumPy to one thread.

    For batches of small or narrow matrices, and where threads of ours are at work.
    OpenBLAS's meet at a barrier in every product, and wait for it spinning: on two
    processors that have other work too, H @ B of 20 columns at n = 65536 takes 6 s, by one
    thread 0.06 s.
    """
    # the count is global, and the last to leave gives it back
    with _held.lock:
        if not _held.times:
            _held.limiter = _blas().limit(limits=1)
        _held.times += 1
    try:
        yield
    finally:
        with _held.lock:
            _held.times -= 1
            if not _held.times:
                _held.limiter.restore_original_limits()


class _Held:
    """How many hold BLAS to one thread at this time."""

    def __init__(self) -> None:
        self.lock, self.times, self.limiter = threading.Lock(), 0, None


_held: Any = _Held()


def one_blas_thread_if_narrow(
    space: Space, *widths: int
) -> AbstractContextManager[None]:
    """Hold BLAS to one thread if NumPy multiplies matrices no wider than these."""
    small = max(widths, default=0) <= SINGLE_THREAD_SIZE
    if small and not _held.times and array_api_compat.is_numpy_namespace(space.xp):
        return one_blas_thread()
    return nullcontext()


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


def one_thread_if_small(x: Array) -> AbstractContextManager[None]:
    """Decompose batches of small or narrow matrices on one thread.

    LAPACK meets a barrier at every few columns. On a machine with other work each can
    cost a time slice: 36 ms for the eigenvalues of one 40×40 matrix on two threads of
    torch with MKL, 0.1 ms on one.
    """
    if not array_api_compat.is_torch_array(x):
        return one_blas_thread_if_narrow(Space.of(x), min(x.shape[-2:]))
    small = x.device.type == "cpu" and min(x.shape[-2:]) <= SINGLE_THREAD_SIZE
    return _one_torch_thread(namespace(x)) if small else nullcontext()


@contextmanager
def _one_torch_thread(torch: Any) -> Iterator[None]:
    with _thread_count_lock:  # the count is global
        threads = torch.get_num_threads()
        if threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
