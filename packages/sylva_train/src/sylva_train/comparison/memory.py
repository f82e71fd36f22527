"""Peak memory of a stretch of a run."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Highest memory in use between `reset` and `bytes`.

    On a GPU the allocator's peak; else the process's peak resident set, which Linux can
    reset. Elsewhere it is the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.status = Path("/proc/self/status")

    def reset(self) -> None:
        """Forget the peak so far, and give freed memory back first."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.init()  # or there is nothing to reset before the first tensor
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.status.exists():
            try:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
            except (AttributeError, OSError):
                pass  # not glibc, or not allowed: the peak includes what came before

    def bytes(self) -> int:
        """Return the peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.status.exists():
            for line in self.status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource  # there is none on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
