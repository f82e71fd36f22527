"""Where arrays live: library, dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import array_api_compat
import numpy as np

from .arrays import (
    COMPLEX,
    FLOATS,
    HALVES,
    Array,
    Namespace,
    detach,
    dtype_name,
    materialized,
    namespace,
    to_numpy,
)

__all__ = ["Space", "contiguous", "nbytes"]


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
        if type(x) is np.ndarray:  # called thousands of times for one matrix
            return _of_numpy(x.dtype)
        return cls(namespace(x), x.dtype, x.device)

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
        # an unknown name stays a name, for messages
        return cls(xp, getattr(xp, name, name), x.device)

    def __reduce__(self) -> tuple[Any, ...]:
        # a module cannot be pickled, but its name can
        return _named, (self.xp.__name__, self.name, self.device)

    @property
    def name(self) -> str:
        """Bare name of the dtype."""
        return dtype_name(self.dtype)

    @property
    def library(self) -> str:
        """Name of the library: ``numpy``, ``torch``, ``cupy``."""
        return str(self.xp.__name__).removeprefix("array_api_compat.").split(".")[0]

    @property
    def place(self) -> str:
        """Library and, unless it is the host, device, for messages."""
        return self.library if self.on_host else f"{self.library} on {self.device}"

    @property
    def on_host(self) -> bool:
        """Whether the numbers are in the memory of the CPU."""
        return "cpu" in str(self.device).lower()

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number of the dtype."""
        return float(self.xp.finfo(self.dtype).eps)

    @property
    def wider(self) -> str:
        """Name of the dtype with twice the digits, empty if there is none."""
        name = self.double.name
        return name if name != self.name else ""

    def or_wider(self, words: str) -> str:
        """Advise, in these ``words``, the wider dtype; nothing if there is none."""
        return f"{words} {self.wider}" if self.wider else ""

    @property
    def smallest_norm(self) -> float:
        """Smallest norm of which epsilon times it has a square that does not underflow."""
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
        return self._in(FLOATS[COMPLEX.index(self.name)])

    @property
    def double(self) -> Space:
        """The same library and device in double precision."""
        return self._in("complex128" if self.is_complex else "float64")

    def _in(self, dtype: str) -> Space:
        return Space(self.xp, getattr(self.xp, dtype), self.device)

    def zeros(self, *shape: int) -> Array:
        """Return an array of zeros."""
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def empty(self, *shape: int) -> Array:
        """Return an array that is not initialized."""
        return self.xp.empty(shape, dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Array:
        """Return an array of ones."""
        return self.xp.ones(shape, dtype=self.dtype, device=self.device)

    def eye(self, n: int) -> Array:
        """Return the identity matrix."""
        return self.xp.eye(n, dtype=self.dtype, device=self.device)

    def integers(self, x: np.ndarray) -> Array:
        """Return integers of NumPy as indices of this library and device."""
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
        """Convert an array of another library, or of another namespace of this one."""
        if not math.prod(x.shape):
            # DLPack needs memory, and an empty array has none
            return self.zeros(*x.shape)
        device = x.__dlpack_device__()
        # host memory (device 1) is shared through NumPy, other devices by DLPack
        if device[0] != 1 and device == self.zeros(1).__dlpack_device__():
            x = materialized(detach(x))
            if array_api_compat.is_cupy_array(x) and min(x.strides, default=0) < 0:
                x = contiguous(x)  # reversed, which ends the process of torch
            return self.xp.from_dlpack(x)
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
            return (parts[0, ...] + 1j * parts[1, ...]) / math.sqrt(2)
        seed = np.random.SeedSequence(key)
        if array_api_compat.is_torch_namespace(self.xp):
            generator = self.xp.Generator(device=self.device)
            generator.manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
            return self.xp.randn(
                shape, generator=generator, dtype=self.dtype, device=self.device
            )
        if array_api_compat.is_cupy_namespace(self.xp):
            random = self.xp.random
            with self.device:
                # other generators take longer to set up than to draw from
                generator = random.Generator(random.Philox4x3210(seed))
                return generator.standard_normal(shape, dtype=self.dtype)
        drawn = np.random.default_rng(seed).standard_normal(
            shape, dtype=np.float32 if self.name == "float32" else np.float64
        )
        return self.xp.asarray(drawn, device=self.device)


def _named(xp: str, dtype: str, device: Any) -> Space:
    module = import_module(xp)
    return Space(module, getattr(module, dtype), device)


@cache
def _of_numpy(dtype: Any) -> Space:
    x = np.empty(0, dtype)
    return Space(namespace(x), dtype, x.device)


def nbytes(*arrays: Array) -> int:
    """Return the bytes of the numbers of some arrays."""
    return sum(math.prod(x.shape) * Space.of(x).itemsize for x in arrays)


def contiguous(x: Array) -> Array:
    """Return ``x`` in row-major memory of its own size, itself if it is.

    torch multiplies strided views an order of magnitude slower, and a slice that is
    kept would keep all of what it was cut from.
    """
    if array_api_compat.is_torch_array(x):
        x = x.contiguous()
        return x.clone() if x.untyped_storage().nbytes() > nbytes(x) else x
    xp = namespace(x)
    if array_api_compat.is_numpy_array(x) or array_api_compat.is_cupy_array(x):
        own = x.flags.c_contiguous and x.flags.owndata
        return x if own else xp.array(x, order="C")
    return xp.asarray(x, copy=True)
