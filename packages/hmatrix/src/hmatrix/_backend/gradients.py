"""What torch records, and gradients that are known better than by recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import array_api_compat

from .arrays import Array, Namespace, namespace

__all__ = ["known_gradients", "wants_gradient", "without_gradients"]


def wants_gradient(x: Array) -> bool:
    """Tell whether an array is a torch tensor whose operations are recorded."""
    if not array_api_compat.is_torch_array(x):
        return False
    return bool(x.requires_grad and namespace(x).is_grad_enabled())


def without_gradients(xp: Namespace) -> AbstractContextManager[Any]:
    """Keep torch from recording operations."""
    if not array_api_compat.is_torch_namespace(xp):
        return nullcontext()
    recording: AbstractContextManager[Any] = xp.no_grad()
    return recording


def known_gradients(
    value: Array, gradients: Callable[[Array], Sequence[Array]], inputs: Sequence[Array]
) -> Array:
    """Return ``value`` as a function of ``inputs`` that torch can differentiate once.

    ``gradients`` computes the gradients to the inputs from the one to the result.

    Raises
    ------
    RuntimeError
        When the gradient itself is to be differentiable.
    """
    return _known_function().apply(value, gradients, *inputs)


@cache
def _known_function() -> Any:
    import torch

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Array, gradients: Any, *inputs: Array) -> Array:  # noqa: ARG004
            ctx.gradients = gradients
            return value.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Array) -> tuple[Array | None, ...]:
            # on in a backward pass for second derivatives alone, which would be incomplete
            if torch.is_grad_enabled():
                msg = (
                    'Factorizations by "cholesky" and "orthogonal", and what is truncated, '
                    "are differentiated once; with create_graph=True, use "
                    'factorize(H, method="inversion").'
                )
                raise RuntimeError(msg)
            return (None, None, *ctx.gradients(upstream))

    return Known
