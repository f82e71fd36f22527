"""Tokenised examples, kept in arrays."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

__all__ = ["Example", "Examples"]

Example = dict[str, Any]


class Examples(Sequence[Example]):
    """Examples as dicts of token ids and labels, in 4 bytes an id.

    In lists an id takes 8 bytes, and its number up to 28 more.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = defaultdict(list)

    def add(self, examples: Sequence[Example]) -> None:
        """Take more examples in, all with the same entries."""
        for example in examples:
            ids = example["input_ids"]
            kept = array("i", ids)
            for name, value in example.items():
                # A language model's labels are often its ids, the very same list.
                if value is ids:
                    value = kept  # noqa: PLW2901
                elif isinstance(value, list):
                    value = array("i", value)  # noqa: PLW2901
                self._columns[name].append(value)

    def packed(self, length: int) -> Examples:
        """Join the ``input_ids`` of all and cut them; the last may be shorter."""
        ids = np.concatenate(self._columns["input_ids"])
        # A single token predicts nothing.
        if len(ids) > length and len(ids) % length == 1:
            ids = ids[:-1]
        result = Examples()
        for start in range(0, len(ids), length):
            cut = ids[start : start + length].tolist()
            result.add([{"input_ids": cut, "labels": cut}])
        return result

    def lengths(self) -> np.ndarray:
        """Return how many ids each example has: int64 (examples,)."""
        return np.array([len(ids) for ids in self._columns["input_ids"]])

    def largest(self, name: str) -> int:
        """Return the largest id of all examples, −1 where there is none."""
        return max(max(ids, default=-1) for ids in self._columns[name])

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = {name: values[index] for name, values in self._columns.items()}
        return {n: v.tolist() if isinstance(v, array) else v for n, v in found.items()}
