"""Tokenised examples, kept in a few flat arrays."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

__all__ = ["Example", "Examples"]

Example = dict[str, Any]


class Column(NamedTuple):
    """One entry of many examples: numbers, or rows of token ids one after the other.

    Attributes
    ----------
    values : numpy.ndarray
        Numbers, one an example; or token ids (int32).
    starts : numpy.ndarray, shape (examples + 1,), int64, or None
        Where each example's ids begin, and where the last end.
    """

    values: np.ndarray
    starts: np.ndarray | None

    def at(self, place: int) -> Any:
        """Return an example's number, or its ids as a list."""
        if self.starts is None:
            return self.values[place].item()
        return self.values[self.starts[place] : self.starts[place + 1]].tolist()


def column(rows: Sequence[Any]) -> Column:
    """Return the column of numbers or of lists of token ids."""
    if not isinstance(rows[0], Sequence):
        return Column(np.asarray(rows), None)
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    ids = (i for row in rows for i in row)
    return Column(np.fromiter(ids, dtype=np.int32, count=int(starts[-1])), starts)


class Examples(Sequence[Example]):
    """Examples as dicts of token ids and labels, in 4 bytes an id.

    In lists an id takes 8 bytes, and its number up to 28 more. An example is made when it
    is asked for.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Column]] = []
        self._ends: list[int] = []

    def add(self, examples: Sequence[Example]) -> None:
        """Take more examples in, at least one, all with the same entries."""
        part: dict[str, Column] = {}
        for name in examples[0]:
            # A language model's labels are often its ids, the very same lists.
            if name == "labels" and all(e[name] is e["input_ids"] for e in examples):
                part[name] = part["input_ids"]
            else:
                part[name] = column([example[name] for example in examples])
        self._append(part, len(examples))

    def _append(self, part: dict[str, Column], count: int) -> None:
        self._parts.append(part)
        self._ends.append(len(self) + count)

    def packed(self, length: int) -> Examples:
        """Join the ``input_ids`` of all and cut them; the last may be shorter."""
        ids = np.concatenate([part["input_ids"].values for part in self._parts])
        # A single token predicts nothing.
        if len(ids) > length and len(ids) % length == 1:
            ids = ids[:-1]
        starts = np.append(np.arange(0, len(ids), length), len(ids))
        cuts, result = Column(ids, starts), Examples()
        result._append({"input_ids": cuts, "labels": cuts}, len(starts) - 1)
        return result

    def lengths(self, name: str = "input_ids") -> np.ndarray:
        """Return how many ids each example has: int64 (examples,)."""
        starts = [part[name].starts for part in self._parts]
        return np.concatenate([np.diff(s) for s in starts if s is not None])

    def largest(self, name: str = "input_ids") -> int:
        """Return the largest id of all examples, −1 where there is none."""
        return max(int(p[name].values.max(initial=-1)) for p in self._parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # counts from the end, or raises IndexError
        number = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        return {name: column.at(place) for name, column in self._parts[number].items()}
