"""Experts of a mixture, taken apart into linear layers and put together again.

`transformers` stores the experts of a layer as stacks of matrices, three-dimensional
parameters, in classes that say how: ``is_transposed``, ``has_bias``, ``has_gate``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import TargetError

__all__ = ["SplitExperts", "join_experts", "split_experts", "stacked_experts"]


def stacks(experts: nn.Module) -> tuple[str, str]:
    """Names of the parameters of the first and the second matrix of each expert."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is of one of the classes that `transformers` marks as experts."""
    marks = ("is_transposed", "has_bias", "has_gate", "_apply_gate")
    if not all(hasattr(module, mark) for mark in marks):
        return False
    weights = [module._parameters.get(name) for name in stacks(module)]
    # Of 8 bits they have scales beside them.
    return all(
        w is not None
        and w.dim() == 3
        and w.is_floating_point()
        and w.element_size() > 1
        for w in weights
    )


def stacked_experts(model: nn.Module) -> list[str]:
    """Names of the modules that `split_experts` takes apart."""
    return [name for name, module in model.named_modules() if is_stacked(module)]


def layer_of(
    weight: torch.Tensor, bias: torch.Tensor | None, turned: bool, trained: bool
) -> nn.Module:
    """Make a linear layer of one expert's matrix, which shares its memory."""
    rows, columns = weight.shape
    layer: nn.Module
    if turned:
        layer = Conv1D(1, 1)  # of any shape
        layer.nf, layer.nx = columns, rows
        bias = weight.new_zeros(columns) if bias is None else bias
    else:
        layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)
    return layer


class SplitExperts(nn.Module):
    """The experts of a layer, each with linear layers of its own.

    Parameters
    ----------
    experts : torch.nn.Module
        Of a class that `transformers` marks as experts; its stacks of matrices are taken
        out of it.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts: int = experts._parameters["down_proj"].shape[0]  # type: ignore[union-attr]
        self.names = stacks(experts)
        for name in self.names:
            weights = experts._parameters.pop(name)
            biases = experts._parameters.pop(f"{name}_bias", None)
            assert weights is not None
            for i, weight in enumerate(weights.detach()):
                if str(i) not in self._modules:
                    self.add_module(str(i), nn.Module())
                # Without the version that views share: a write into one expert would count
                # as one into all.
                bias = None if biases is None else biases.detach()[i].data
                layer = layer_of(
                    weight.data,
                    bias,
                    bool(experts.is_transposed),
                    weights.requires_grad,
                )
                self._modules[str(i)].add_module(name, layer)  # type: ignore[union-attr]
        # What else it has: its activation, its gate, its norm.
        self.rest = experts
        self.train(experts.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Map tokens (t, n) to the weighted sum of what their experts make of them.

        Parameters
        ----------
        hidden_states : torch.Tensor, shape (t, n)
            The tokens.
        top_k_index, top_k_weights : torch.Tensor, shape (t, k)
            The experts of each token, and how much they count.

        Notes
        -----
        Experts without a token run all the same, on none: every layer has a gradient in
        every step, as data parallelism needs.
        """
        rest: Any = self.rest
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        tokens = order // top_k_index.shape[-1]
        parts = hidden_states[tokens].split(counts)
        made = []
        for i, part in enumerate(parts):
            expert = self._modules[str(i)]
            first, second = (expert._modules[name] for name in self.names)  # type: ignore[union-attr]
            inner = first(part)  # type: ignore[misc]
            made.append(
                second(rest._apply_gate(inner) if rest.has_gate else rest.act_fn(inner))  # type: ignore[misc]
            )
        out = torch.cat(made)
        if getattr(rest, "has_post_expert_norm", False):
            out = rest.post_expert_norm(out)
        out = out * top_k_weights.flatten()[order, None]
        # In one order, whatever the hardware: adding up by index has none.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        total: torch.Tensor = out[back].unflatten(0, top_k_index.shape).sum(1)
        return total.to(hidden_states.dtype)

    def joined(self) -> nn.Module:
        """Return the experts that this was made of, with the matrices as they are now."""
        layers = [self._modules[str(i)] for i in range(self.num_experts)]
        for name in self.names:
            own: list[Any] = [layer._modules[name] for layer in layers]  # type: ignore[union-attr]
            trained = own[0].weight.requires_grad
            weights = {name: "weight"}
            if self.rest.has_bias:
                weights[f"{name}_bias"] = "bias"
            for stack, part in weights.items():
                tensors = [getattr(layer, part).detach() for layer in own]
                stacked = nn.Parameter(torch.stack(tensors), requires_grad=trained)
                self.rest.register_parameter(stack, stacked)
        return self.rest


def split_experts(model: nn.Module) -> nn.Module:
    """Take the experts of a mixture apart into linear layers, in place.

    Each expert of ``…mlp.experts`` then has layers like ``…mlp.experts.3.gate_up_proj``,
    which can be scored and hold blocks. They share the memory of the stacks.

    Parameters
    ----------
    model : torch.nn.Module
        A mixture from `transformers`, without adapters.

    Returns
    -------
    torch.nn.Module
        The same model. It computes the same to rounding, one expert after the other.

    Raises
    ------
    TargetError
        If the model has no experts of a kind that can be taken apart, or they are spread
        over devices.

    See Also
    --------
    join_experts : The way back, before the model is saved.
    """
    names = stacked_experts(model)
    if not names:
        msg = (
            f"this {type(model).__name__} has no experts stored as stacks of matrices in a"
            " class that `transformers` marks as experts: there is nothing to split."
        )
        raise TargetError(msg)
    for name in names:
        experts = model.get_submodule(name)
        if getattr(experts, "_is_expert_parallel", False):
            msg = f"the experts of `{name}` are spread over devices: load them on one."
            raise TargetError(msg)
    for name in names:
        model.set_submodule(name, SplitExperts(model.get_submodule(name)))
    return model


def join_experts(model: nn.Module) -> nn.Module:
    """Put experts together again that `split_experts` took apart, in place.

    Parameters
    ----------
    model : torch.nn.Module
        After `merge` or `unload`: without adapters.

    Returns
    -------
    torch.nn.Module
        The same model, of the classes that `transformers` saves and loads.

    Raises
    ------
    TargetError
        If no experts are split, or they have embedded blocks or another adapter.
    """
    split = {n: m for n, m in model.named_modules() if isinstance(m, SplitExperts)}
    if not split:
        msg = f"this {type(model).__name__} has no split experts: there is nothing to join."
        raise TargetError(msg)
    for name, experts in split.items():
        odd = next(
            (n for n, _ in experts.named_modules() if n.endswith("base_layer")), None
        )
        if odd is not None:
            msg = (
                f"`{name}.{odd}` is inside an adapter's layer: `merge` or `unload` the"
                " adapter before the experts are joined."
            )
            raise TargetError(msg)
    for name, experts in split.items():
        model.set_submodule(name, experts.joined())
    return model
