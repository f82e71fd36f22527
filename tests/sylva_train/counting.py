"""Counts of what PyTorch is asked for, in place of times and of a machine's memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes shapes and types of tensors that operations make in memory of their own."""

    def __init__(self):
        super().__init__()
        self.made = []

    @property
    def shapes(self):
        return [shape for shape, _ in self.made]

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given, found = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in ((args, kwargs), made)
        )
        there = {x.untyped_storage().data_ptr() for x in given}
        self.made += [
            (tuple(x.shape), x.dtype)
            for x in found
            if x.untyped_storage().data_ptr() not in there
        ]
        return made
