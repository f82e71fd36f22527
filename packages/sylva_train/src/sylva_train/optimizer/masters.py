"""Float32 masters of bfloat16 and float16 parameters that are no blocks, like a head's.

A master and its moments are a part of the optimizer's state. The parameter stays what it
is for everybody else, and is what is saved, merged and averaged.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["HALVES", "MOMENTS", "follow_masters", "keep_master"]

HALVES = (torch.bfloat16, torch.float16)
#: As `torch.optim.AdamW` orders and names them.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def keep_master(parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Return a parameter's master for a step, and see that its moments are float32."""
    master: torch.Tensor | None = state.get("master")
    if master is None:
        master = state["master"] = parameter.detach().float()
    else:
        # Elements that somebody else wrote since the last step, a loaded model for one.
        is_shown = master.to(parameter.dtype) == parameter
        master.copy_(torch.where(is_shown, master, parameter))
    for name in MOMENTS:
        if name in state:
            state[name] = state[name].float()
    return master


def follow_masters(optimizer: torch.optim.Optimizer) -> None:
    """Round the masters of parameters that a step was taken for into these."""
    pairs = [
        (parameter, state["master"])
        for parameter, state in optimizer.state.items()
        if parameter.dtype in HALVES
        and parameter.grad is not None
        and "master" in state
    ]
    if pairs:
        torch._foreach_copy_([p for p, _ in pairs], [master for _, master in pairs])
