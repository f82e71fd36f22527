"""What a layer's dense weight shows at the moment: the base values or an adapter's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from sylva_train._torch import set_version
from sylva_train.kernels import gather_blocks, is_capturing, scatter_blocks_
from sylva_train.targets import as_matrix

__all__ = ["Shown"]


def holds_blocks(
    matrix: torch.Tensor, indices: torch.Tensor, blocks: torch.Tensor
) -> bool:
    """Whether a weight (out, in) is known to have blocks (k, b, b), rounded, bit for bit.

    To know it the host waits for the device, which no graph under capture lets it.
    """
    if is_capturing(matrix.device):
        return False
    shown = gather_blocks(matrix, indices, blocks.shape[-1])
    bits = [t.to(matrix.dtype).contiguous().view(torch.uint8) for t in (shown, blocks)]
    return torch.equal(*bits)


class Written(NamedTuple):
    """What values and weight were when the ones were written into the other."""

    values: torch.Tensor  # not its id, which a new tensor may come to have
    version: int
    weight_version: int
    is_trained: bool
    address: int
    weight_address: int


class Left(NamedTuple):
    """What a weight had in an adapter's blocks, and its version, when they were left."""

    indices: torch.Tensor
    blocks: torch.Tensor
    version: int


class Shown:
    """What a dense weight shows, what lies under it, and the versions that go with it.

    Autograd goes by a weight's version. When the weight shows again what it did, bit for
    bit, it gets the version that it had: a backward pass may follow although an adapter
    was disabled in between, as for the reference of preference optimization.

    Attributes
    ----------
    adapter : str or None
        Name of the adapter whose blocks are in the weight, None for the base.
    indices : torch.Tensor or None
        Where they are: block rows and block columns, (k, 2), int64.
    is_due : bool
        Whether the weight is to be looked at even if no change is seen.
    steps : int
        Of all optimizers together. Values in a part of a larger memory (DeepSpeed ZeRO)
        change with it, without a trace, at some time after each of these.
    """

    steps = 0

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.indices: torch.Tensor | None = None
        self.is_due = False
        # Rarely needed: in the host's memory, and no buffer, which DDP would broadcast.
        self._original: torch.Tensor | None = None
        self._written: Written | None = None
        # How many steps there had been, if the values are a part of a larger memory.
        self._after: int | None = None
        # Versions of the weight: what it had as the base and as adapters that are not in
        # it, the highest of all, and its memory and version after the last write.
        self._base: int | None = None
        self._left: dict[str, Left] = {}
        self._highest = 0
        self._last: tuple[int, int] | None = None

    def is_current(self, values: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the adapter's values and the weight are as after the last write."""
        last = self._written
        if last is None or self.is_due or self.is_behind():
            return False
        # One by one, cheapest first: every layer asks in every forward pass.
        return (
            last.values is values
            and last.version == values._version
            and last.weight_version == weight._version
            and last.is_trained == values.requires_grad
            and last.address == values.data_ptr()
            and last.weight_address == weight.data_ptr()
        )

    def is_behind(self) -> bool:
        """Whether values may have changed without a trace since they were looked at."""
        return self._after is not None and self._after != Shown.steps

    def is_stale(self, values: torch.Tensor) -> bool:
        """Whether the values that were written last were changed since."""
        last = self._written
        if last is None or last.values is not values:
            return False
        return last.version != values._version

    def holds(self, base: nn.Module, values: torch.Tensor) -> bool:
        """Whether the base's weight is known to have these values, bit for bit."""
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        matrix, blocks = as_matrix(base, weight.detach()), values.detach()
        return holds_blocks(matrix, self.indices.to(weight.device), blocks)  # type: ignore[union-attr]

    def is_in(self, weight: torch.Tensor) -> bool:
        """Whether a weight has the memory that was written into last."""
        return self._written.weight_address == weight.data_ptr()  # type: ignore[union-attr]

    def original(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the base weight's blocks under the adapter, on the weight's device."""
        if self._original is None:
            msg = "no adapter is written into this layer's weight: call `sync` first"
            raise RuntimeError(msg)
        self._original = self._original.to(weight)
        return self._original

    def write(
        self,
        base: nn.Module,
        weight: torch.Tensor,
        name: str,
        indices: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write an adapter's values into the base's weight, which shows it or none."""
        matrix, blocks = as_matrix(base, weight.detach()), values.detach()
        self._begin(weight)
        version = None
        if self.adapter is None:
            self._original = gather_blocks(matrix, indices, blocks.shape[-1]).cpu()
            scatter_blocks_(matrix, indices, blocks)
            left = self._left.pop(name, None)
            # Values changed through ``.data`` are seen by their bits alone.
            if (
                left is not None
                and left.indices is indices
                and holds_blocks(matrix, indices, left.blocks)
            ):
                version = left.version
        elif (
            self._written.values is values  # type: ignore[union-attr]
            and not self.is_stale(values)
            and holds_blocks(matrix, indices, blocks)
        ):
            # The same bits again would make backward passes under way fail.
            version = weight._version
        else:
            scatter_blocks_(matrix, indices, blocks)
        self.adapter, self.indices = name, indices
        self.note_written(values, weight, version)

    def note_written(
        self, values: torch.Tensor, weight: torch.Tensor, version: int | None = None
    ) -> None:
        """Take note that the weight shows the values as they are now.

        Its version is to be a new one, or one that it had.
        """
        self._end(weight, version)
        self._written = Written(
            values,
            values._version,
            weight._version,
            values.requires_grad,
            values.data_ptr(),
            weight.data_ptr(),
        )
        self.is_due = False
        is_part = values.untyped_storage().nbytes() > values.nbytes
        self._after = Shown.steps if is_part else None

    @torch.no_grad()
    def restore_(self, base: nn.Module) -> None:
        """Put the base weight back, bit for bit."""
        if self.adapter is None:
            return
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        matrix, original = as_matrix(base, weight.detach()), self.original(weight)
        # As they were when they were written, wherever the weight is by now.
        indices = self.indices.to(weight.device)  # type: ignore[union-attr]
        self._begin(weight)
        blocks = gather_blocks(matrix, indices, original.shape[-1])
        self._left[self.adapter] = Left(indices, blocks, weight._version)
        scatter_blocks_(matrix, indices, original)
        self._end(weight, self._base)
        self.adapter, self.indices, self._original = None, None, None

    def forget(self, name: str) -> None:
        """Forget what the weight showed of an adapter that is deleted."""
        self._left.pop(name, None)

    def _begin(self, weight: torch.Tensor) -> None:
        """Forget, before a write, the versions of a weight that others changed."""
        if self._last != (weight.data_ptr(), weight._version):
            self._base, self._left = None, {}
        if self.adapter is None:
            self._base = weight._version
        self._highest = max(self._highest, weight._version)

    def _end(self, weight: torch.Tensor, version: int | None) -> None:
        """Give a weight that was written a version, by default one it never had."""
        if version is None:
            version = max(weight._version, self._highest + 1)
        if version != weight._version:
            set_version(weight, version)
        self._highest = max(self._highest, version)
        self._last = (weight.data_ptr(), version)
