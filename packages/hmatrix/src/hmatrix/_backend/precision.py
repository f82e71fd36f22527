"""Products in the dtype of what is multiplied."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["in_own_precision"]

P = ParamSpec("P")
Result = TypeVar("Result")


def in_own_precision(function: Callable[P, Result]) -> Callable[P, Result]:
    """Keep ``torch.autocast`` out of a function.

    Around a model's forward it would make half-precision products of float32 tensors here
    too: neither sums of squares nor factorizations survive that.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        torch = sys.modules.get("torch")
        # not there, or still being imported by another thread
        lowers = getattr(torch, "is_autocast_enabled", None)
        if torch is None or lowers is None:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in filter(lowers, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run
