"""A stand-in for CUDA where there is none: tensors on ``cuda`` whose memory is the host's.

They are plain tensors of a CPU build, with streams of autograd, views and versions of
their own. What a GPU would compute is computed by PyTorch's kernels for a CPU. As with
CUDA, operands of several devices are refused, and where the host would wait is counted.
Graphs are recorded, and done again with the numbers of the host as they were.

It rests on what PyTorch keeps to itself, hence on versions that it was tried with.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import array_api_compat.torch
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

#: Whether this PyTorch can be given the stand-in, and needs it.
usable = (
    sys.platform == "linux"
    and torch.__version__.startswith("2.13.")
    and not torch.cuda.is_available()
)

aten = torch.ops.aten
#: Where the host waited: (operation, file:line of the package's innermost frame).
waits: Counter = Counter()
DEVICES = 2

# --- Memory: DLPack takes an address and a device, and asks no driver. ---------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_alive: dict[int, Any] = {}
#: The host's storage of each of the device's, by its address.
_owners: dict[int, torch.UntypedStorage] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _free(address):
    *_kept, owner = _alive.pop(address)
    _owners.pop(owner.data_ptr(), None)


def _bytes(owner: torch.UntypedStorage, index: int) -> torch.Tensor:
    """Return a storage of the host as bytes of a device."""
    size = (ctypes.c_int64 * 1)(owner.nbytes())
    made = _DLTensor(owner.data_ptr(), (2, index), 1, (1, 8, 1, 0), size, None, 0)
    made.deleter = _free
    _alive[ctypes.addressof(made)] = made, size, owner
    if owner.nbytes():
        assert owner.data_ptr() not in _owners
        _owners[owner.data_ptr()] = owner
    return torch._C._from_dlpack(_capsule(ctypes.addressof(made), b"dltensor", None))


def _shaped(like: torch.Tensor, owner: torch.UntypedStorage, index: int):
    """Return the tensor of a device that a host's tensor is the memory of."""
    base = _bytes(owner, index).view(like.dtype)
    return _strided(base, like)


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _strided(base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    args = (list(like.shape), list(like.stride()), like.storage_offset())
    return aten.as_strided.default.redispatch(_CPU, base, *args)


def twin(x: torch.Tensor) -> torch.Tensor:
    """Return the host's view of a device's tensor."""
    pointer = x.untyped_storage().data_ptr()
    empty = torch.empty(0, dtype=x.dtype)
    if not x.untyped_storage().nbytes():
        return empty.as_strided(x.shape, x.stride()) if x.numel() == 0 else empty
    return empty.set_(_owners[pointer], x.storage_offset(), x.shape, x.stride())


# --- Operations ----------------------------------------------------------------------

#: Operations for which the host waits, since it looks at numbers.
WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "linalg_eigh",
    "_linalg_eigh",
    "_linalg_svd",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
#: Operations that bring operands together by themselves.
MIXING = {
    "copy_",
    "fill_",
    "_to_copy",
    "set_",
    "index",
    "index_put_",
    "_index_put_impl_",
}


def _wait(what: str) -> None:
    frames = [
        f"{frame.filename.rsplit('/src/', 1)[1]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack()
        if "/src/sylva_train/" in frame.filename or "/src/hmatrix/" in frame.filename
    ]
    waits[what, frames[-1] if frames else ""] += 1


def _check_devices(op: Any, tensors: list[torch.Tensor]) -> None:
    devices = {t.device for t in tensors if t.dim() or t.is_cuda}
    small = {t.device for t in tensors} - devices
    pointwise = torch.Tag.pointwise in op.tags
    if len(devices) > 1 or (small and not pointwise):
        found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
        msg = f"Expected all tensors to be on the same device, but {op} got {found}"
        raise RuntimeError(msg)


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute anything on the host."""
    with torch._C._AutoDispatchBelowAutograd(), _own_random_numbers(op, kwargs):
        return _compute(op, args, kwargs)


def _compute(op: Any, args: Any, kwargs: Any) -> Any:
    name = op._schema.name.removeprefix("aten::")
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    on_device = [t for t in tensors if t.is_cuda]
    if name in ("set_", "as_strided", "as_strided_") and on_device:
        return op.redispatch(_CPU, *args, **kwargs)
    if name not in MIXING:
        _check_devices(op, tensors)
    if name in WAITING or (
        name in MIXING
        and any(t.dtype == torch.bool for t in tensors[1:])
        and name.startswith(("index", "_index"))
    ):
        _wait(name)
    device = kwargs.get("device")
    index = on_device[0].device.index if on_device else None
    if device is not None:
        index = current[0] if device.index is None else device.index
    elif index is None:
        index = current[0]
    twins = {id(t): twin(t) for t in on_device}
    sizes = {i: (t.shape, t.stride(), t.data_ptr()) for i, t in twins.items()}

    def lower(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return twins.get(id(x), x) if isinstance(x, torch.Tensor) else x

    wide = any(t.dtype in (torch.float64, torch.complex128) for t in on_device)
    args = tuple(
        _as_tensor(x, argument, wide)
        for x, argument in zip(args, op._schema.arguments, strict=False)
    )
    low_args, low_kwargs = pytree.tree_map(lower, (args, kwargs))
    if "pin_memory" in low_kwargs:
        low_kwargs["pin_memory"] = False
    run = functools.partial(SPECIAL[name], op) if name in SPECIAL else op
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # outputs that are resized
        result = run(*low_args, **low_kwargs)
    for t in on_device:
        low = twins[id(t)]
        if sizes[id(t)] != (low.shape, low.stride(), low.data_ptr()):
            _move(t, low)
    own = {id(low): t for t in on_device for low in [twins[id(t)]]}
    places = {
        twins[id(t)].untyped_storage()._cdata: t
        for t in on_device
        if t.untyped_storage().nbytes()
    }

    def raised(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in own:
            return own[id(x)]
        base = places.get(x.untyped_storage()._cdata)
        if base is None:
            made = _shaped(x, x.untyped_storage(), index)
            places[x.untyped_storage()._cdata] = made
            return made
        if base.dtype != x.dtype:
            base = aten.view.dtype(base.as_strided((0,), (1,)), x.dtype)
        return _strided(base, x)

    made = pytree.tree_map(raised, result)
    if tape is not None and not name.startswith("empty"):
        tape.append(functools.partial(_again, run, low_args, low_kwargs, made))
    return made


#: What a graph under capture has to do again.
tape: list[Any] | None = None


def _again(run: Any, args: Any, kwargs: Any, made: Any) -> None:
    for old, new in zip(
        *map(pytree.tree_leaves, (made, run(*args, **kwargs))), strict=True
    ):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            twin(old).copy_(new)


def _as_tensor(x: Any, argument: Any, wide: bool) -> Any:
    """Undo that a number which PyTorch wrapped comes as a number again."""
    if not isinstance(x, int | float | complex) or str(argument.type) != "Tensor":
        return x
    dtypes = {float: torch.float64, complex: torch.complex128}
    # in double precision beside tensors of it, and else such as promotes none of them
    return torch.tensor(x, dtype=dtypes.get(type(x)) if wide else None)


def _move(t: torch.Tensor, low: torch.Tensor) -> None:
    """Give a device's tensor the memory and shape that an operation gave its twin."""
    storage, owner = t.untyped_storage(), low.untyped_storage()
    if owner.data_ptr() != storage.data_ptr():
        storage = _bytes(_copy_of(owner), t.device.index).untyped_storage()
    aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, t, storage, low.storage_offset(), low.shape, low.stride()
    )


def _mm(op: Any, a: torch.Tensor, b: torch.Tensor, *rest: Any, **kwargs: Any):
    if "dtype" not in op._overloadname:
        return op(a, b, *rest, **kwargs)
    dtype = rest[0] if rest else kwargs["out_dtype"]
    assert a.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(a.to(dtype), b.to(dtype))


def _mse_loss(_, x, y, reduction=1, *, out):
    """Not by way of an output that is resized twice."""
    square = (x - y).square()
    return out.copy_((square.clone, square.mean, square.sum)[reduction]())


SPECIAL = {"mm": _mm, "mse_loss": _mse_loss}


def _copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False):
    """Copy between devices: the host waits unless its memory is pinned."""
    low = [twin(t) if t.is_cuda else t for t in (self, src)]
    if self.is_cuda != src.is_cuda:
        host = src if self.is_cuda else self
        if not (non_blocking and (self.is_cuda or is_pinned(host))):
            _wait("upload" if self.is_cuda else "download")
        assert tape is None or is_pinned(host), "cannot copy during capture"
    if tape is not None:
        tape.append(functools.partial(low[0].copy_, low[1]))
    with torch._C._AutoDispatchBelowAutograd():
        low[0].copy_(low[1])
    return self


def _to_copy(
    self,
    *,
    dtype=None,
    layout=None,
    device=None,
    pin_memory=None,
    non_blocking=False,
    memory_format=None,
):
    device = self.device if device is None else device
    kept = memory_format or torch.preserve_format
    out = torch.empty_like(
        self, dtype=dtype or self.dtype, device=device, memory_format=kept
    )
    if non_blocking and device.type == "cpu":
        _pinned.add(out.data_ptr())
    return out.copy_(self, non_blocking)


def _copy_of(owner):
    return torch.UntypedStorage(owner.nbytes()).copy_(owner)


def _storage_to(self, *, device, non_blocking=False):
    device = torch.device(device)
    empty = torch.UntypedStorage(0)
    owner = _owners.get(self.data_ptr(), empty) if self.device.type == "cuda" else self
    if device.type == "cpu":
        return _copy_of(owner)
    return _bytes(_copy_of(owner), _indexed(device).index).untyped_storage()


# --- Pinned memory and random numbers --------------------------------------------------

_pinned: set[int] = set()


def is_pinned(t: torch.Tensor) -> bool:
    return not t.is_cuda and t.untyped_storage().data_ptr() in _pinned


def _pinning(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        t = make(*args, **kwargs)
        if pin_memory:
            _pinned.add(t.untyped_storage().data_ptr())
        return t

    return made


def _pin(t: torch.Tensor, *_: Any) -> torch.Tensor:
    assert not t.is_cuda, "cannot pin 'torch.cuda.FloatTensor'"
    if is_pinned(t):
        return t
    t = t.clone()
    _pinned.add(t.untyped_storage().data_ptr())
    return t


_states: dict[int, torch.Tensor] = {}
_generators: dict[int, torch.device] = {}


class Generator(torch.Generator):
    """Random numbers of a device; no other tensors may be filled with them."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        device = torch.device(device)
        made.place = device if device.type == "cpu" else _indexed(device)
        _generators[made._cdata] = made.place
        return made

    device = property(lambda self: self.place)


@contextlib.contextmanager
def _own_random_numbers(op: Any, kwargs: dict[str, Any]):
    given = kwargs.get("generator")
    if given is not None:
        place = _generators.get(given._cdata, torch.device("cpu"))
        if place.type != "cuda":
            msg = "Expected a 'cuda' device type for generator but found 'cpu'"
            raise RuntimeError(msg)
    if given is not None or torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    index = current[0]
    before = torch.random.default_generator.get_state()
    torch.random.default_generator.set_state(_states[index])
    yield
    _states[index] = torch.random.default_generator.get_state()
    torch.random.default_generator.set_state(before)


# --- torch.cuda ------------------------------------------------------------------------

current = [0]


def _indexed(device: Any = None) -> torch.device:
    if isinstance(device, int):
        device = torch.device("cuda", device)
    device = torch.device("cuda" if device is None else device)
    assert device.type == "cuda", f"Expected a cuda device, but got: {device}"
    index = current[0] if device.index is None else device.index
    assert 0 <= index < DEVICES, "invalid device ordinal"
    return torch.device("cuda", index)


def _exchange(index: int) -> int:
    before = current[0]
    if index >= 0:
        current[0] = index
    return before


class _Stream:
    def __init__(self, device=None, **_: Any):
        self.device = _indexed(device)

    def wait_stream(self, _): ...

    def synchronize(self):
        _wait("synchronize")

    def __enter__(self): ...

    def __exit__(self, *_): ...


class _Graph:
    """Does again what was done on the device, with the numbers of the host as they were."""

    @contextlib.contextmanager
    def captured(self):
        global tape
        before, tape = waits.total(), []
        kept = [(owner, _copy_of(owner)) for owner in _owners.values()]
        try:
            yield
        finally:
            self.tape, tape = tape, None
        for owner, old in kept:  # nothing has been computed yet
            owner.copy_(old)
        assert waits.total() == before, f"not permitted during capture: {waits}"

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            for step in self.tape:
                step()


class _Event:
    def __init__(self, enable_timing=False, **_): ...

    def record(self, stream=None):
        self.device = (stream or _Stream()).device
        self.time = time.perf_counter()

    def synchronize(self):
        _wait("synchronize")

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


def _properties(device=None):
    _indexed(device)
    return SimpleNamespace(
        name="stand-in",
        total_memory=80 << 30,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
        major=9,
        minor=0,
    )


def _memory(device=None):
    index = _indexed(device).index
    return sum(
        owner.nbytes() for made, _, owner in _alive.values() if made.device[1] == index
    )


def _get_state(device="cuda"):
    return _states[_indexed(device).index].clone()


def _set_state(state, device="cuda"):
    assert not state.is_cuda
    _states[_indexed(device).index] = state.clone()


def _seed(seed, index=None):
    _states[current[0] if index is None else index] = (
        torch.Generator("cpu").manual_seed(seed).get_state()
    )


def _seed_all(seed):
    for index in range(DEVICES):
        _seed(seed, index)


_no = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
_yes = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
_methods = (ctypes.c_void_p * 64)(*[ctypes.cast(_no, ctypes.c_void_p).value] * 64)
_nothing = ctypes.c_void_p(ctypes.addressof(_methods))


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


@contextlib.contextmanager
def _guarded():
    """Have PyTorch use its own fake of CUDA's devices and streams.

    It takes that where CUDA says that it has 0 devices, but a CPU build has nobody to ask:
    an object all of whose methods return 0 stands there for the moment.
    """
    # Autograd counts devices once, and would start a thread for each.
    torch.ones((), requires_grad=True).backward()
    guards = (ctypes.c_void_p * 2).in_dll(
        _library("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = guards[1]
    guards[1] = ctypes.addressof(_nothing)
    torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[1] = before


@contextlib.contextmanager
def _has_cuda():
    """Have autograd's engine count CUDA among the accelerators.

    The table of virtual methods begins with two destructors, and what CUDA has and is.
    """
    find = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    find.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(find())
    before, word = table.value, ctypes.sizeof(ctypes.c_void_p)
    methods = (ctypes.c_void_p * 64).from_buffer_copy(
        ctypes.string_at(before - 2 * word, 64 * word)
    )
    methods[4] = methods[5] = methods[6] = ctypes.cast(_yes, ctypes.c_void_p).value
    table.value = ctypes.addressof(methods) + 2 * word
    try:
        yield
    finally:
        table.value = before


def _interpreter() -> Any:
    """Return what runs interpreted kernels of Triton, if there is one."""
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import GridExecutor

        return GridExecutor
    return None


def _launch(launch: Any) -> Any:
    """Run interpreted kernels in place, which addresses in tables need."""

    def launched(self, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        devices = {t.device for t in tensors}
        assert len(devices) == 1, f"Pointer argument cannot be accessed: {devices}"
        assert devices.pop().index in (None, current[0]), "another device is current"
        args = tuple(
            twin(x) if isinstance(x, torch.Tensor) and x.is_cuda else x for x in args
        )
        if tape is not None:
            tape.append(functools.partial(launch, self, *args, **kwargs))
        launch(self, *args, **kwargs)

    return launched


@contextlib.contextmanager
def installed():
    """Let this process have CUDA devices."""
    _device_constructors()  # remembers which functions there are
    waits.clear()
    current[0] = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
        _guarded(),
        _has_cuda(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        patch.delitem(sys.modules, "cupy", raising=False)
        cuda = {
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: DEVICES,
            "current_device": lambda: current[0],
            "set_device": lambda d: _exchange(_indexed(d).index),
            "_exchange_device": _exchange,
            "_maybe_exchange_device": _exchange,
            "synchronize": lambda d=None: (_indexed(d), _wait("synchronize")),
            "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: tape is not None,
            "get_device_properties": _properties,
            "get_device_name": lambda d=None: _properties(d).name,
            "get_device_capability": lambda *_: (9, 0),
            "memory_allocated": _memory,
            "max_memory_allocated": _memory,
            "memory_reserved": _memory,
            "reset_peak_memory_stats": lambda d=None: _indexed(d) and None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda d=None: (_indexed(d) and 70 << 30, 80 << 30),
            "set_per_process_memory_fraction": lambda _, d=None: _indexed(d) and None,
            "get_rng_state": _get_state,
            "set_rng_state": _set_state,
            "manual_seed": _seed,
            "manual_seed_all": _seed_all,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": lambda s: s,
            "Event": _Event,
            "CUDAGraph": _Graph,
            "graph": lambda graph: graph.captured(),
        }
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        for name in ("tensor", "empty"):
            patch.setattr(torch, name, _pinning(getattr(torch, name)))
        patch.setattr(torch.Tensor, "pin_memory", _pin)
        patch.setattr(torch.Tensor, "is_pinned", lambda t, *_: is_pinned(t))
        patch.setattr(
            torch.Tensor,
            "cuda",
            lambda t, device=None, non_blocking=False, **_: t.to(
                _indexed(device), non_blocking=non_blocking
            ),
        )
        for module in (torch, array_api_compat.torch):  # which has its own names of all
            patch.setattr(module, "Generator", Generator)
        storage = torch.storage._StorageBase
        patch.setattr(storage, "to", _storage_to)
        patch.setattr(storage, "clone", lambda s: _storage_to(s, device=s.device))
        patch.setattr(
            storage,
            "cuda",
            lambda s, device=None, **_: _storage_to(s, device=_indexed(device)),
        )
        if (executor := _interpreter()) is not None:
            patch.setattr(executor, "__call__", _launch(executor.__call__))
        _seed_all(0)
        for space in ("_", "aten"):
            library = torch.library.Library(space, "IMPL")
            stack.callback(library._destroy)
            if space == "_":
                library.fallback(_kernel, "CUDA")
            else:
                library.impl("copy_", _copy_, "CUDA")
                library.impl("_to_copy", _to_copy, "CUDA")
        yield waits
