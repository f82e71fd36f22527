"""Serial adapters: a small network behind each sublayer's output projection.

Houlsby et al. 2019. The library `adapters` has them, but 1.3.0 is for transformers 4 and
does not import beside transformers 5; so here they are in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import TargetError
from sylva_train.targets import (
    head_names,
    is_inside,
    is_supported,
    matches,
    weight_view,
)

__all__ = ["SerialAdapter", "add_serial_adapters"]

#: Endings of the projections that attention and feed-forward sublayers end with, in BERT
#: and its kin, LLaMA, GPT-2, T5, BART and OPT, DistilBERT, ALBERT, Phi, GPT-NeoX, BLOOM.
PROJECTIONS = (
    "output.dense", "o_proj", "down_proj", "c_proj", "o", "wo", "out_proj", "fc2",
    "out_lin", "lin2", "attention.dense", "ffn_output", "self_attn.dense",
    "self_attention.dense", "dense_4h_to_h",
)  # fmt: skip


class SerialAdapter(nn.Module):
    """A frozen projection ``y = W x``, then ``y + U gelu(D y)``.

    Parameters
    ----------
    base : torch.nn.Module
        The projection.
    width : int
        Of ``D y``.
    generator : torch.Generator
        Draws ``D`` from a normal distribution of standard deviation 0.01, as Houlsby
        et al. do. ``U`` is zero: the model begins as it was.
    """

    def __init__(self, base: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        weight = weight_view(base)
        size = weight.shape[0]
        self.down = nn.Linear(size, width, device=weight.device)
        self.up = nn.Linear(width, size, device=weight.device)
        with torch.no_grad():
            drawn = torch.randn(width, size, generator=generator)
            self.down.weight.copy_(0.01 * drawn)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of ``x`` (..., in) and what the adapter adds."""
        y: torch.Tensor = self.base(x)
        added: torch.Tensor = self.up(F.gelu(self.down(y.to(self.down.weight.dtype))))
        return y + added.to(y.dtype)


def add_serial_adapters(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Put an adapter behind each sublayer, and freeze everything else, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The pretrained model.
    targets : mapping of str to torch.nn.Module
        The layers whose blocks other methods train.
    density : float
        All adapters together have as many weights as this fraction of the targets', but
        for rounding the width, which is at least 1.
    modules_to_save : list of str, optional
        Modules to train whole.
    seed : int
        Seed of the new weights.

    Returns
    -------
    torch.nn.Module
        ``model``.

    Raises
    ------
    TargetError
        If no module has one of the known names of a sublayer's output projection.
    """
    heads = head_names(model)  # RoBERTa's and BART's have an `out_proj` too
    found = {
        name: module
        for name, module in model.named_modules()
        if matches(name, PROJECTIONS)
        and is_supported(module)
        and name not in heads
        and not is_inside(name, modules_to_save)
    }
    if not found:
        msg = (
            f"no layer of this {type(model).__name__} ends in one of"
            f" {', '.join(PROJECTIONS)}, behind which serial adapters go. Leave the"
            " method out of `methods`."
        )
        raise TargetError(msg)
    budget = density * sum(weight_view(module).numel() for module in targets.values())
    sizes = [weight_view(module).shape[0] for module in found.values()]
    width = (budget - sum(sizes)) / sum(2 * size + 1 for size in sizes)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, module in found.items():
        adapter = SerialAdapter(module, max(1, round(width)), generator)
        model.set_submodule(name, adapter)
    for name, module in model.named_modules():
        if is_inside(name, modules_to_save):
            module.requires_grad_(True)
    return model
