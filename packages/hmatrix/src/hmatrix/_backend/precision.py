"""Products in the dtype of what is multiplied."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .threads import Shared

__all__ = ["in_own_precision"]

P = ParamSpec("P")
Result = TypeVar("Result")

#: What of torch multiplies float32 in fewer bits where it was told that it may.
BACKENDS = ("cuda", "mkldnn")


def in_own_precision(function: Callable[P, Result]) -> Callable[P, Result]:
    """Keep ``torch.autocast`` and TF32 out of a function.

    Around a model's forward they would make products of fewer bits of float32 tensors here
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
            if _whole.times or _are_rounded(torch):
                stack.enter_context(_whole.held())
            return function(*args, **kwargs)

    return run


def _settings(torch: Any) -> list[Any]:
    """Return what holds ``fp32_precision`` of each backend's products."""
    backends = getattr(torch, "backends", None)
    found: list[Any] = [getattr(backends, name, None) for name in BACKENDS]
    return [x.matmul for x in found if hasattr(x, "matmul")]


def _are_rounded(torch: Any) -> bool:
    return any(x.fp32_precision in ("tf32", "bf16") for x in _settings(torch))


def _set_to_whole() -> Callable[[], None]:
    """Have all factors multiplied as they are; return what undoes that."""
    torch = sys.modules["torch"]
    settings, general = _settings(torch), None
    before = [x.fp32_precision for x in settings]
    try:
        general = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # set for backends, after which torch refuses the general one
        for x in settings:
            x.fp32_precision = "ieee"

    def give_back() -> None:
        if general is not None:
            torch.set_float32_matmul_precision(general)
        for x, value in zip(settings, before, strict=True):
            if x.fp32_precision != value:
                x.fp32_precision = value

    return give_back


_whole = Shared(_set_to_whole)
