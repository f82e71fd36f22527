"""Threads of this package, and those of BLAS and LAPACK."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import array_api_compat
from threadpoolctl import ThreadpoolController

from .arrays import Array, namespace
from .space import Space

__all__ = [
    "Shared",
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


def default_workers(space: Space) -> int:
    """Return how many Python threads to use: as many as BLAS has with NumPy, else 1.

    That is ``OMP_NUM_THREADS``, or the number of processors. NumPy's loop over a batch runs
    on one thread and lets others run; other libraries have their own threads, or a device.
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


class Shared:
    """A setting of the whole process that several threads may hold at a time.

    The first to enter calls ``begin``, which makes the setting and returns a function that
    undoes it; the last to leave calls that function.
    """

    def __init__(self, begin: Callable[[], Callable[[], object]]) -> None:
        self._begin, self._lock, self.times = begin, threading.Lock(), 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the setting."""
        with self._lock:
            if not self.times:
                self._give_back = self._begin()
            self.times += 1
        try:
            yield
        finally:
            with self._lock:
                self.times -= 1
                if not self.times:
                    self._give_back()


_one_thread = Shared(lambda: _blas().limit(limits=1).restore_original_limits)


def one_blas_thread() -> AbstractContextManager[None]:
    """Hold NumPy's BLAS and LAPACK to one thread.

    For batches of small or narrow matrices, and while threads of this package run.
    OpenBLAS's threads spin at a barrier in every product: on two processors that have other
    work too, H @ B of 20 columns at n = 65536 takes 6 s, by one thread 0.06 s.
    """
    return _one_thread.held()


def one_blas_thread_if_narrow(
    space: Space, *widths: int
) -> AbstractContextManager[None]:
    """Hold BLAS to one thread if NumPy multiplies matrices no wider than these."""
    small = max(widths, default=0) <= SINGLE_THREAD_SIZE
    if (
        small
        and not _one_thread.times
        and array_api_compat.is_numpy_namespace(space.xp)
    ):
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

    LAPACK's threads meet at a barrier every few columns. On a machine with other work each
    can cost a time slice: 36 ms for the eigenvalues of one 40×40 matrix on two threads of
    torch with MKL, 0.1 ms on one.
    """
    if not array_api_compat.is_torch_array(x):
        return one_blas_thread_if_narrow(Space.of(x), min(x.shape[-2:]))
    small = x.device.type == "cpu" and min(x.shape[-2:]) <= SINGLE_THREAD_SIZE
    return _one_torch_thread(namespace(x)) if small else nullcontext()


@cache
def _openmp() -> list[Any]:
    return list(ThreadpoolController().select(user_api="openmp").lib_controllers)


@cache
def _mkl() -> Callable[[int], int]:
    """Return ``MKL_Set_Num_Threads_Local`` of PyTorch, a dummy if it is built without MKL.

    It sets the number of MKL's threads for the calling thread and returns the one before, 0
    if that was left to OpenMP.
    """
    folder = Path(sys.modules["torch"].__file__ or "").parent / "lib"
    for name in ("libtorch_cpu.so", "torch_cpu.dll"):
        with suppress(OSError, AttributeError):
            found: Callable[[int], int]
            found = ctypes.CDLL(str(folder / name)).MKL_Set_Num_Threads_Local
            return found
    return lambda _: 0


@contextmanager
def _one_torch_thread(torch: Any) -> Iterator[None]:
    """Hold OpenMP and MKL to one thread where they are called from this one.

    Not by `torch.set_num_threads`: it allows MKL threads of its own inside of PyTorch's, and
    from then on LU decompositions of several matrices at once are wrong (PyTorch 2.5 to
    2.13 at least, https://github.com/pytorch/pytorch/issues/142815).
    """
    if torch.get_num_threads() == 1:
        yield
        return
    before, threads = [(x, x.get_num_threads()) for x in _openmp()], _mkl()(1)
    try:
        for library, _ in before:
            library.set_num_threads(1)
        yield
    finally:
        _mkl()(threads)
        for library, count in before:
            library.set_num_threads(count)
