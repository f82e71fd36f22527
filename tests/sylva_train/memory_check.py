"""What programs of a Triton kernel read and write, checked in the interpreter.

A stand-in for ``compute-sanitizer`` where there is no GPU, and stricter in one respect: a
program may touch the elements of the tensors that it is given, not what lies between them.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


class AccessError(AssertionError):
    """A program read or wrote where it should not."""


def addresses(tensor):
    """Return where each element of a tensor is, in order: int64."""
    places = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(size) * stride).ravel()
    return np.unique(tensor.data_ptr() + places * tensor.itemsize)


class Memory:
    """The elements that kernels may touch, and those that have a value.

    Parameters
    ----------
    known : sequence of torch.Tensor
        Tensors with values. Others come with a launch's arguments, and have to be written
        before they are read.
    """

    def __init__(self, known):
        self.kept = []  # so that no address is given out again
        self.sizes, self.valued = {}, set()
        for tensor in known:
            self.valued.update(self.allow(tensor).tolist())
        self.written = set()
        self.launches = 0

    def allow(self, tensor):
        """Let kernels touch a tensor's elements."""
        self.kept.append(tensor)
        found = addresses(tensor)
        self.sizes.update(dict.fromkeys(found.tolist(), tensor.itemsize))
        return found

    def launch(self, arguments):
        """Begin a launch, of which programs may run in any order."""
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.allow(argument)
        self.valued |= self.written
        self.written = set()
        self.readers, self.writers, self.program = {}, {}, None
        self.launches += 1

    def touched(self, pointers, mask, itemsize, what):
        found = pointers[mask.astype(bool)].astype(np.int64).tolist()
        for address in found:
            if self.sizes.get(address) != itemsize:
                msg = f"program {self.program} {what} {itemsize} bytes outside of all tensors"
                raise AccessError(msg)
        return found

    def load(self, pointers, mask, itemsize):
        for address in self.touched(pointers, mask, itemsize, "reads"):
            self.readers.setdefault(address, set()).add(self.program)
            if self.writers.get(address, self.program) != self.program:
                msg = (
                    f"program {self.program} reads what {self.writers[address]} writes"
                )
                raise AccessError(msg)
            if address not in self.valued and address not in self.written:
                msg = f"program {self.program} reads what nothing has written"
                raise AccessError(msg)

    def store(self, pointers, value, mask):
        found = self.touched(pointers, mask, value.itemsize, "writes")
        if len(set(found)) < len(found):
            msg = f"program {self.program} writes an element twice in one store"
            raise AccessError(msg)
        for address in found:
            others = self.readers.get(address, set()) | {
                self.writers.get(address, self.program)
            }
            if others - {self.program}:
                msg = f"program {self.program} writes what {others} touch"
                raise AccessError(msg)
            self.writers[address] = self.program
        self.written.update(found)

    def has_written(self, tensor):
        """Whether the launches so far have written all of a tensor's elements."""
        return self.written.union(self.valued).issuperset(addresses(tensor).tolist())


class Watched:
    """The interpreter's loads and stores, each told to a `Memory` first."""

    def __init__(self, own, memory):
        self.own, self.memory = own, memory

    def __getattr__(self, name):
        return getattr(self.own, name)

    def load(self, pointers, mask, other, dtype):
        self.memory.load(pointers, mask, np.dtype(dtype).itemsize)
        return self.own.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.memory.store(pointers, value, mask)
        return self.own.store(pointers, value, mask)


@contextlib.contextmanager
def checked(*known):
    """Check all that kernels touch within; see `Memory`."""
    memory = Memory(known)
    builder = interpreter.interpreter_builder
    call, place = interpreter.GridExecutor.__call__, builder.set_grid_idx

    def launch(executor, *arguments, **options):
        memory.launch([*arguments, *options.values()])
        try:
            return call(executor, *arguments, **options)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, AccessError):
                raise error.__cause__ from None
            raise

    def begin(*index):
        memory.program = index
        place(*index)

    with (
        mock.patch.object(
            interpreter, "_interpreter", Watched(interpreter._interpreter, memory)
        ),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(builder, "set_grid_idx", begin),
    ):
        yield memory
