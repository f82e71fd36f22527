"""What is known of objects, by their identity, for as long as they live."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

__all__ = ["ByIdentity"]

Value = TypeVar("Value")


class Entry(weakref.ref):  # type: ignore[type-arg]
    """A value beside a weak reference to what it belongs to."""

    __slots__ = ("number", "value")
    number: int
    value: Any


class ByIdentity(Generic[Value]):
    """Values of objects that may have no hash, held weakly and found by identity.

    `torch.utils.weak.WeakIdKeyDictionary` does the same, and takes several times as long:
    it makes a weak reference to look one up. Every layer looks several up in every step.
    A value must not refer to its object, which would then live for ever.
    """

    def __init__(self) -> None:
        # An object's number is its own until it is gone, and its entry goes with it.
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: object) -> Value | None:
        """Return the value of an object, or None if it has none."""
        entry = self._entries.get(id(key))
        return None if entry is None else entry.value

    def __setitem__(self, key: object, value: Value) -> None:
        entry = Entry(key, self._remove)
        entry.number, entry.value = id(key), value
        self._entries[entry.number] = entry

    def _remove(self, entry: Entry) -> None:
        if self._entries.get(entry.number) is entry:
            del self._entries[entry.number]
