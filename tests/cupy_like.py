"""A stand-in for CuPy where there is none, on NumPy and as strict as CuPy is.

It has what CuPy 13 and 14 have of NumPy's functions, refuses to mix with NumPy's arrays, to become
one of them by itself and to give scalars, fails without an exception in ``linalg``, and
counts how often the host waits for a number. ``array_api_compat`` takes it for CuPy.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec

import numpy as np

#: Functions of NumPy 2 that CuPy 13 or 14 lacks.
ABSENT = {
    "acos",
    "acosh",
    "asin",
    "asinh",
    "astype",
    "atan",
    "atan2",
    "atanh",
    "bitwise_count",
    "bitwise_invert",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "block",
    "concat",
    "cumulative_prod",
    "cumulative_sum",
    "errstate",
    "geomspace",
    "insert",
    "isdtype",
    "matrix_transpose",
    "matvec",
    "ndenumerate",
    "nditer",
    "permute_dims",
    "pow",
    "spacing",
    "unique_all",
    "unique_counts",
    "unique_inverse",
    "unique_values",
    "unstack",
    "vecdot",
    "vecmat",
}
#: Matrices up to this size have a batched SVD in cuSOLVER.
BATCHED_SVD = 32
#: How often the host waited, and the largest batched SVD.
seen = {"waits": 0, "svd": 0}


class Device:
    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device)

    __hash__ = None

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def __repr__(self):
        return "<CUDA Device 0>"


def _waits(convert):
    def method(self):
        seen["waits"] += 1
        return convert(self._a)

    return method


class ndarray:  # noqa: N801
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, a):
        self._a = a

    def __array__(self, dtype=None, copy=None):
        msg = "Implicit conversion to a NumPy array is not allowed."
        raise TypeError(msg)

    def __array_function__(self, func, types, args, kwargs):
        msg = f"{func.__name__} of NumPy got an array of CuPy."
        raise TypeError(msg)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return _call(getattr(ufunc, method), *inputs, **kwargs)

    device = Device()
    T = property(lambda self: ndarray(self._a.T))
    real = property(lambda self: ndarray(self._a.real))
    imag = property(lambda self: ndarray(self._a.imag))

    def __getattr__(self, name):
        if name in (
            "shape",
            "ndim",
            "size",
            "dtype",
            "itemsize",
            "nbytes",
            "strides",
            "flags",
        ):
            return getattr(self._a, name)
        raise AttributeError(name)

    def get(self, order="C"):
        seen["waits"] += 1
        # as CuPy: only "A" keeps columns in one piece, of the whole array
        return np.array(self._a, order=order)

    def astype(self, dtype, order="K", copy=True):
        return ndarray(self._a.astype(dtype, order=order, copy=copy))

    def __getitem__(self, key):
        return ndarray(np.asarray(self._a[_unwrap(key)]))

    def __setitem__(self, key, value):
        self._a[_unwrap(key)] = _unwrap(value)

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (ndarray(np.asarray(x)) for x in self._a)

    def __dlpack_device__(self):
        assert self.size, "CuPy asks CUDA what memory at address 0 is"
        return 2, 0

    def __dlpack__(self, **options):
        msg = "the stand-in has no memory on a device"
        raise BufferError(msg)

    __float__, __int__, __bool__ = map(_waits, (float, int, bool))
    __complex__ = _waits(complex)
    item = _waits(np.ndarray.item)

    def __repr__(self):
        return f"cupy_like({self._a!r})"


def _method(name):
    function = getattr(np.ndarray, name)

    def method(self, *args, **kwargs):
        return _call(function, self, *args, **kwargs)

    return method


for _name in [
    "reshape",
    "ravel",
    "transpose",
    "swapaxes",
    "copy",
    "conj",
    "sum",
    "max",
    "min",
    "any",
    "all",
    "view",
    "fill",
]:
    setattr(ndarray, _name, _method(_name))


def _operation(function):
    def method(x, y):
        if not isinstance(y, ndarray) and getattr(y, "__array_ufunc__", 0) is None:
            return NotImplemented
        return _call(function, x, y)

    return method


def _in_place(function):
    def method(x, y):
        x._a = function(x._a, _unwrap(y))
        return x

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "matmul",
):
    _function = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", _operation(_function))
    setattr(ndarray, f"__r{_name}__", _operation(lambda x, y, f=_function: f(y, x)))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operation(getattr(operator, f"__{_name}__")))
for _name in ("neg", "pos", "abs", "invert"):
    _unary = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", lambda x, f=_unary: _call(f, x))


def _unwrap(x):
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, tuple | list):
        return type(x)(map(_unwrap, x))
    if isinstance(x, np.ndarray):
        msg = "Unsupported type <class 'numpy.ndarray'>"
        raise TypeError(msg)
    return x


def _wrap(x):
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    if isinstance(x, tuple | list):
        return tuple(map(_wrap, x))
    return x


def _call(function, *args, **kwargs):
    args, kwargs = _unwrap(args), {k: _unwrap(v) for k, v in kwargs.items()}
    with np.errstate(all="ignore"):  # a GPU has no floating point exceptions
        return _wrap(function(*args, **kwargs))


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return _call(function, *args, **kwargs)

    return wrapper


def array(obj, dtype=None, copy=True, order="K", **options):
    """Copy to the device: of NumPy's arrays rows or columns stay in one piece."""
    if isinstance(obj, ndarray):
        return ndarray(np.array(obj._a, dtype=dtype, copy=copy or None, order=order))
    obj = np.asarray(obj, dtype=dtype)
    fortran = order == "K" and obj.flags.f_contiguous and not obj.flags.c_contiguous
    return ndarray(np.array(obj, order="F" if fortran else "C"))


def asarray(a, dtype=None, order=None, **options):
    if isinstance(a, ndarray) and dtype in (None, a.dtype):
        return a
    return array(a, dtype, order=order or "K")


_raising = [False]


@contextmanager
def errstate(*, linalg=None):
    before, _raising[0] = _raising[0], linalg == "raise"
    try:
        yield
    finally:
        _raising[0] = before


def _one_by_one(function, a, *others):
    """Apply to each matrix: where NumPy raises, NaN unless CuPy is to raise."""
    batch = a.shape[:-2]
    flat = [x.reshape(math.prod(batch), *x.shape[-2:]) for x in (a, *others)]
    found = np.swapaxes(np.empty_like(np.swapaxes(flat[-1], 1, 2), order="C"), 1, 2)
    for k in range(len(found)):
        try:
            found[k] = function(*(x[k] for x in flat))
        except np.linalg.LinAlgError:
            found[k] = np.nan
            if _raising[0]:
                raise
    return found.reshape(*batch, *found.shape[1:])


def cholesky(a):
    seen["waits"] += _raising[0]
    return _call(functools.partial(_one_by_one, np.linalg.cholesky), a)


def inv(a):
    """Invert as cuBLAS does, for which rows are columns: the transpose has the pivots."""
    turned = _call(functools.partial(_one_by_one, np.linalg.inv), a.swapaxes(-2, -1))
    return turned.swapaxes(-2, -1)


def solve(a, b):
    if b.ndim > 1 and a.shape[:-1] != b.shape[:-1]:
        msg = "a must have (..., M, M) shape and b must have (..., M, K)"
        raise ValueError(msg)
    if a.ndim > 2 and a.size and not b.size:
        msg = "CuPy counts addresses that are 0 apart."
        raise ZeroDivisionError(msg)
    return _call(functools.partial(_one_by_one, np.linalg.solve), a, b)


def svd(a, full_matrices=True, compute_uv=True):
    if a.ndim > 2 and np.prod(a.shape[:-2]) > 1:
        seen["svd"] = max(seen["svd"], *a.shape[-2:])
    return _call(np.linalg.svd, a, full_matrices, compute_uv)


def take_along_axis(a, indices, axis):
    return _call(np.take_along_axis, a, indices, axis)


class Philox4x3210:
    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)


class Generator:
    def __init__(self, bit_generator):
        self._generator = bit_generator.generator

    def standard_normal(self, size, dtype):
        return ndarray(np.asarray(self._generator.standard_normal(size, dtype)))


def _module(name, source, own):
    module = types.ModuleType(name)
    for key in dir(source):
        value = getattr(source, key)
        if key.startswith("_") or key in ABSENT:
            continue
        if isinstance(value, type) or not callable(value):
            if not isinstance(value, types.ModuleType):
                setattr(module, key, value)
        else:
            setattr(module, key, _wrapped(value))
    for key, value in own.items():
        setattr(module, key, value)
    return module


def install():
    """Become the module ``cupy`` of this process."""
    linalg = _module(
        "cupy.linalg",
        types.SimpleNamespace(
            **{
                k: getattr(np.linalg, k)
                for k in ("eigh", "eigvalsh", "norm", "qr", "slogdet")
            }
        ),
        {"cholesky": cholesky, "inv": inv, "solve": solve, "svd": svd, "lstsq": None},
    )
    linalg.pinv = linalg.matrix_power = None
    fft = _module("cupy.fft", np.fft, {})
    random = types.ModuleType("cupy.random")
    random.Generator, random.Philox4x3210 = Generator, Philox4x3210
    cuda = types.ModuleType("cupy.cuda")
    cuda.device = types.ModuleType("cupy.cuda.device")
    cuda.Device = cuda.device.Device = Device
    own = {
        "array": array,
        "asarray": asarray,
        "cuda": cuda,
        "fft": fft,
        "finfo": np.finfo,
        "iinfo": np.iinfo,
        "linalg": linalg,
        "ndarray": ndarray,
        "random": random,
        "stand_in": True,
        "result_type": np.result_type,
        "take_along_axis": take_along_axis,
    }
    cupy = _module("cupy", np, own)
    cupyx = types.ModuleType("cupyx")
    cupyx.errstate = errstate
    for module in (cupy, linalg, fft, random, cuda, cuda.device, cupyx):
        module.__path__ = []
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
