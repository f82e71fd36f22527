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

#: Backends of torch whose float32 products may be set to a lower precision.
BACKENDS = ("cuda", "mkldnn")


def in_own_precision(function: Callable[P, Result]) -> Callable[P, Result]:
    """Keep ``torch.autocast`` and TF32 out of a function.

    Set around a model's forward pass, they would lower the precision of float32 products
    here too, which neither sums of squares nor factorizations survive.
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
            if _full_precision.times or _is_lowered(torch):
                stack.enter_context(_full_precision.held())
            return function(*args, **kwargs)

    return run


def _settings(torch: Any) -> list[Any]:
    """Return the objects whose ``fp32_precision`` is that of a backend's products."""
    backends = getattr(torch, "backends", None)
    found: list[Any] = [getattr(backends, name, None) for name in BACKENDS]
    return [x.matmul for x in found if hasattr(x, "matmul")]


def _is_lowered(torch: Any) -> bool:
    return any(x.fp32_precision in ("tf32", "bf16") for x in _settings(torch))


def _set_full() -> Callable[[], None]:
    """Set float32 products to full precision; return a function that undoes that."""
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


_full_precision = Shared(_set_full)
