"""What is kept of a layer's input for the backward pass: the columns that blocks use.

Layers that read one tensor (query, key and value; gate and up) keep one copy between
them, of the columns that any of them uses: three copies of a third each would be the
whole input again. Who reads what is seen in the first forward passes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from sylva_train._identity import ByIdentity

__all__ = ["Reader"]

# A copy of more of the input than this saves too little to be worth a pass over it.
LARGEST_SHARE = 0.75


class Group:
    """Layers that read the same tensors: the block columns that they use between them."""

    def __init__(self, used: frozenset[int], block_size: int, inputs: int) -> None:
        self.used, self.block_size, self.inputs = used, block_size, inputs
        self.columns: torch.Tensor | None = None

    def add(self, used: frozenset[int]) -> None:
        """Take another layer's block columns in."""
        if not used <= self.used:
            self.used, self.columns = self.used | used, None

    def elements(self, device: torch.device) -> torch.Tensor:
        """Return the columns (c,), int64, in one tensor for all of the group's layers."""
        if self.columns is None or self.columns.device != device:
            first = torch.tensor(sorted(self.used))[:, None] * self.block_size
            columns = (first + torch.arange(self.block_size)).flatten()
            self.columns = columns[columns < self.inputs].to(device)
        return self.columns


@dataclass
class Seen:
    """An input in use: who reads it, and the copies of its columns that are alive."""

    version: int
    group: Group
    copies: dict[Any, TensorWeakRef] = field(default_factory=dict)


# Inputs by identity. Neither they nor their copies are kept alive here.
_inputs: ByIdentity[Seen] = ByIdentity()


def is_held(x: torch.Tensor) -> bool:
    """Whether the operation that made a tensor keeps it for its own backward pass.

    Attention, tanh and softmax do; norms, products and GELU do not. A copy of some
    columns would then be memory on top of the whole.
    """
    base = x._base
    return keeps_output(type((x if base is None else base).grad_fn))  # type: ignore[arg-type]


@functools.cache
def keeps_output(node: type) -> bool:
    """Whether nodes of a kind in autograd's graph keep what their operation gave."""
    return hasattr(node, "_saved_output") or hasattr(node, "_saved_result")


class Reader:
    """One layer's part in what is kept of its input.

    What is kept changes only when the values do, never between a forward pass and the
    recomputation of it that gradient checkpointing does.

    Parameters
    ----------
    table : torch.Tensor, shape (k, 2)
        The block rows and block columns, on the layer's device.
    block_size, inputs : int
        Side of a block, and number of columns of the weight.
    """

    def __init__(self, table: torch.Tensor, block_size: int, inputs: int) -> None:
        self.table = table.long()
        self.block_size, self.inputs = block_size, inputs
        self.used = frozenset(table[:, 1].tolist())
        self.group: Group | None = None
        self.version: int | None = None
        self.kept: frozenset[int] | None = None
        self.columns: torch.Tensor | None = None
        self.indices = self.table

    def update_columns(self, version: int) -> None:
        """Go over to what the group uses by now; the values are of this version."""
        self.version = version
        group = self.group
        if group is None or group.used == self.kept:
            return
        self.kept, self.columns, self.indices = group.used, None, self.table
        columns = group.elements(self.table.device)
        if len(columns) <= LARGEST_SHARE * self.inputs:
            blocks = columns[:: self.block_size] // self.block_size
            place = torch.searchsorted(blocks, self.table[:, 1].contiguous())
            self.columns = columns
            self.indices = torch.stack([self.table[:, 0], place], 1)

    def meet(self, x: torch.Tensor) -> Seen:
        """Join the layers that read this tensor."""
        seen, version = _inputs.get(x), x._version
        if seen is None or seen.version != version:
            group = self.group or Group(self.used, self.block_size, self.inputs)
            seen = _inputs[x] = Seen(version, group)
        if self.group is not seen.group and seen.group.block_size == self.block_size:
            self.group, old = seen.group, self.group
            self.group.add(self.used if old is None else old.used)
        elif self.group is None:
            self.group = Group(self.used, self.block_size, self.inputs)
        return seen

    def narrow(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the columns of an input that are kept, in a dtype."""
        x = x.detach()
        kept = x if self.columns is None else x.index_select(-1, self.columns)
        return kept.to(dtype)

    def keep(
        self, x: torch.Tensor, dtype: torch.dtype, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the backward pass needs of an input.

        Parameters
        ----------
        x : torch.Tensor, shape (..., in)
            The input.
        dtype : torch.dtype
            That of the output, hence of its gradient.
        values : torch.Tensor
            The layer's; their version tells one optimizer step from the next.

        Returns
        -------
        kept : torch.Tensor, shape (..., c)
            Some or all of the columns, not differentiable.
        indices : torch.Tensor, shape (k, 2), int64
            The blocks' places among those columns.
        """
        if torch.compiler.is_compiling():
            # The compiler shares equal copies, and may compute them again instead.
            return self.narrow(x, dtype), self.indices
        if self.table.device != x.device:  # a replica on another device
            return x.detach(), self.table.to(x.device)
        if self.version != values._version:
            self.update_columns(values._version)
        seen = self.meet(x)
        if is_held(x):
            return x.detach(), self.table
        if self.columns is None and x.dtype == dtype:
            return x.detach(), self.indices
        which = None if self.columns is None else (self.kept, self.block_size)
        key = which, dtype
        copy = seen.copies.get(key, lambda: None)()
        if copy is None:
            copy = self.narrow(x, dtype)
            seen.copies[key] = TensorWeakRef(copy)
        return copy, self.indices
