"""AdamW on the trainable blocks, written through to the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ._checks import ConfigError, check_choice
from .layers import SparseEmbeddedLinear, embedded_layers

__all__ = ["SparseAdamW"]


class SparseAdamW(torch.optim.AdamW):
    """AdamW whose state exists for active blocks only.

    The blocks' values are float32 masters: gradients, moments and steps are kept for
    them alone, by PyTorch's own AdamW, and every step ends with the values rounded into
    the dense weights. Schedulers, clipping and gradient scalers work as with any
    optimizer.

    Parameters
    ----------
    model : torch.nn.Module
        A model with embedded layers (`sylva_train.embed`, or PEFT). Every parameter that
        requires a gradient is optimized.
    params : iterable of parameters or of groups, optional
        What to optimize instead of all of them.
    lr, betas, eps, weight_decay
        As in `torch.optim.AdamW`. Vectors (biases, norms) are not decayed when ``params``
        is left out.
    decay_towards : str
        ``"zero"``: decoupled weight decay of the values, as full fine-tuning with AdamW
        would do to these weights; ``"base"``: values decay towards the pretrained
        weights instead.
    **kwargs
        Other options of `torch.optim.AdamW`.

    Raises
    ------
    ConfigError
        If nothing in the model requires a gradient, or an option cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay_towards: str = "zero",
        **kwargs: Any,
    ) -> None:
        check_choice("decay_towards", decay_towards, ("zero", "base"))
        if params is None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            matrices = [p for p in trainable if p.dim() > 1]
            vectors = [p for p in trainable if p.dim() <= 1]
            params = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            params = [group for group in params if group["params"]]
        params = list(params)
        if not params:
            msg = (
                "`model` has no parameter that requires a gradient; embed trainable"
                " blocks first (`sylva_train.embed` or `peft.get_peft_model`)."
            )
            raise ConfigError(msg)
        # Set before AdamW's own constructor, which adds the groups.
        self.decay_towards = decay_towards
        self.layers: list[SparseEmbeddedLinear] = list(embedded_layers(model).values())
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs
        )

    #: Its own steps end in the dense weights; nothing is left to write before a forward.
    writes_through = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and write the new values into the dense weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        if self.decay_towards == "base":
            self.decay_to_base()
        # By force: a fused step does not count as a change of the values.
        for layer in self.layers:
            layer.sync(force=True)
        return loss

    def decay_to_base(self) -> None:
        """Turn this step's decay to zero into one to the base.

        AdamW did ``v -= lr·wd·v``; ``v += lr·wd·base`` makes it ``v -= lr·wd·(v - base)``.
        """
        rates = {
            id(p): float(group["lr"]) * group["weight_decay"]
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        values, bases = [], []
        for layer in self.layers:
            name = layer.wanted()
            rate = rates.get(id(layer.sylva_values[name]), 0.0) if name else 0.0
            if name and rate:
                layer.sync()
                values.append(layer.sylva_values[name])
                bases.append(layer.original().float() * rate)
        if values:
            torch._foreach_add_(values, bases)
