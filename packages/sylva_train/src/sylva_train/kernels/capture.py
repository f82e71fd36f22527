"""What CUDA graphs ask of the host: no waiting, and no memory that a replay would read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sylva_train._checks import ConfigError

__all__ = ["Mirror", "check_not_capturing", "is_capturing", "never_ran"]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device's current stream."""
    # A build without CUDA has no such question to ask.
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device, what: str) -> None:
    """Raise `ConfigError` where ``what`` would wait for a device that is captured.

    Something has to be worked out once, at its first use, which no graph can record.
    """
    if is_capturing(device):
        msg = (
            f"a CUDA graph is being captured, but {what} only at its first use, which"
            " waits for the device. Take three whole training steps on a side stream"
            " before the capture, with inputs of the same shapes."
        )
        raise ConfigError(msg)


def never_ran(failure: Exception, device: torch.device) -> bool:
    """Whether a kernel's call failed before anything ran, so that another may stand in.

    Compilers raise errors of many classes, among them the RuntimeError of CUDA's own. But
    a fault while a kernel runs, this one or one before it, stays with the device, and
    whatever waits for the device raises it: so does this. No memory is no fault of a kernel.
    """
    if isinstance(failure, torch.OutOfMemoryError) or is_capturing(device):
        return False
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return True


class Mirror:
    """Numbers of the host on a device, uploaded without a wait when they changed.

    A CUDA graph keeps the numbers that it was captured with, and writes them again at
    each replay.

    Parameters
    ----------
    shape : tuple of int
        Of the table.
    dtype : torch.dtype
        Of the table.
    device : torch.device
        Where it is.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.known: list[float] | None = None
        self.recorded = False

    def update(self, numbers: Sequence[float]) -> None:
        """Make the table hold these numbers, row by row."""
        numbers, device = list(numbers), self.tensor.device
        if is_capturing(device):
            # Arguments of kernels, since PyTorch before 2.10 cannot pin memory now, and
            # a copy would read it anew at each replay.
            cells = list(self.tensor.view(-1).unbind())
            torch._foreach_zero_(cells)
            torch._foreach_add_(cells, numbers)
            self.recorded = True
        elif self.recorded or numbers != self.known:
            # What a replay left in the table is not known here.
            host = torch.tensor(
                numbers, dtype=self.tensor.dtype, pin_memory=device.type == "cuda"
            )
            self.tensor.view(-1).copy_(host, non_blocking=True)
        self.known = numbers
