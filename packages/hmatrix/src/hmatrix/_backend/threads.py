"""Threads of ours, and those of BLAS and LAPACK."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
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
