"""The part of a step that a kernel takes: all layers' blocks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sylva_train.kernels import (
    GROUP,
    OPTIONS,
    BlockState,
    Mirror,
    adamw,
    find_kernel,
    find_mode,
    is_demanded,
)
from sylva_train.layers import SparseEmbeddedLinear
from sylva_train.targets import weight_view

if TYPE_CHECKING:
    from .sparse import SparseAdamW

__all__ = ["KernelStep", "kernel_of", "laid_out_as", "may_fuse", "may_fuse_on_cpu"]

#: Values of a layer that the kernel counts in 32 bits, a piece at a time.
MOST_VALUES = 2**31 - 1024


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether a group asks for nothing that the kernel does not do."""
    others = group["amsgrad"] or group["differentiable"] or group["foreach"]
    return not others and group["fused"] is not False


def may_fuse_on_cpu(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch's fused AdamW can be trusted with parameters, all on a CPU.

    It takes memory as it lies, so that none may have gaps (`laid_out_as`).
    """
    return all(
        p.device.type == "cpu"
        and p.is_floating_point()
        and p.stride() == torch.empty_like(p).stride()
        for p in parameters
    )


def laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with a parameter's strides, copied if it has others.

    PyTorch's fused AdamW does not look at strides on a CPU: elements of one place in
    memory, not of one index, would be put together.
    """
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def kernel_of(layer: SparseEmbeddedLinear, eight_bit: bool = False) -> Any:
    """Return the module of the kernel that updates a layer, or None for PyTorch's AdamW.

    That has no moments in 8 bits, so the kernel's reference takes its place for them.
    """
    name = layer.wanted()
    values = None if name is None else layer.sylva_values[name]
    # Of its own kind, since a sharded tensor's memory holds a part of the values.
    if type(values) is not nn.Parameter or values.dtype != torch.float32:
        return None
    if not values.is_contiguous() or values.numel() > MOST_VALUES:
        return None
    weight = weight_view(layer.base_layer)
    found = find_kernel("adamw", weight.device, weight.dtype, values.shape[-1])
    return adamw if found is None and eight_bit else found


def make_moments(values: torch.Tensor, eight_bit: bool) -> dict[str, torch.Tensor]:
    """Return moments of zero, in float32 or in 8 bits with their scales."""
    if not eight_bit:
        return {name: torch.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")}
    scales = values.new_zeros(-(-values.numel() // GROUP))
    return {
        "exp_avg": torch.zeros_like(values, dtype=torch.int8),
        "exp_avg_sq": torch.zeros_like(values, dtype=torch.uint8),
        "exp_avg_scale": scales,
        "exp_avg_sq_scale": scales.clone(),
    }


class Chosen(NamedTuple):
    """A layer that the kernel updates: its adapter, values and parameter group."""

    layer: SparseEmbeddedLinear
    adapter: str
    values: nn.Parameter
    group: int


@dataclass(frozen=True)
class DeviceBlocks:
    """The layers of one device, and the tables that the kernel reads about them."""

    chosen: list[Chosen]
    tables: Any
    one: torch.Tensor
    zero: torch.Tensor


class KernelStep:
    """Updates the blocks of those layers for which there is a kernel.

    Parameters
    ----------
    optimizer : SparseAdamW
        Whose layers, options, groups and state are used; the state is
        `torch.optim.AdamW`'s, and the scales of moments in 8 bits.
    """

    def __init__(self, optimizer: SparseAdamW) -> None:
        self.optimizer, self.layers = optimizer, optimizer.layers
        self.to_base = optimizer.decay_towards == "base"
        self.eight_bit = optimizer.moments == "8bit"
        self.blocks: list[DeviceBlocks] = []
        self.taken: set[int] = set()
        #: Layers that are left to PyTorch.
        self.rest: list[SparseEmbeddedLinear] = []
        self.forget()

    def forget(self) -> None:
        """Make tables anew in the next step: the groups changed."""
        self.key: list[Any] | None = None
        self.options: dict[torch.device, Mirror] = {}

    def takes(self, values: torch.Tensor | None) -> bool:
        """Whether the kernel updates a parameter in this step."""
        return id(values) in self.taken

    def prepare(self) -> None:
        """Find the layers to update and their gradients; tables only if they changed.

        A layer's weight has to show the values of the adapter that is active before, so
        that it does after the step.
        """
        # On a CPU it is not worth looking, unless kernels are demanded there.
        possible = (
            self.eight_bit
            or is_demanded()
            or any(p.is_cuda for g in self.optimizer.param_groups for p in g["params"])
        )
        if not possible and not self.taken:
            self.key, self.blocks, self.rest = None, [], list(self.layers)
            return
        if self.key is None or self.key_of() != self.key:
            chosen = self.choose() if possible else []
            devices = dict.fromkeys(c.values.device for c in chosen)
            self.blocks = [
                self.make([c for c in chosen if c.values.device == device])
                for device in devices
            ]
            self.taken = {id(c.values) for c in chosen}
            mine = {id(c.layer) for c in chosen}
            self.rest = [layer for layer in self.layers if id(layer) not in mine]
            # After it, since there is new state.
            self.key = self.key_of()
        for blocks in self.blocks:
            gradients = []
            for c in blocks.chosen:
                c.layer.sync()
                if c.values.grad is not None:
                    c.values.grad = c.values.grad.contiguous()
                gradients.append(c.values.grad)
            blocks.tables.set_gradients(gradients)

    def choose(self) -> list[Chosen]:
        """Return the layers that the kernel can update."""
        groups = {
            id(parameter): number
            for number, group in enumerate(self.optimizer.param_groups)
            if may_fuse(group)
            for parameter in group["params"]
        }
        chosen = []
        for layer in self.layers:
            name = layer.wanted()
            if name is None or kernel_of(layer, self.eight_bit) is None:
                continue
            values = layer.sylva_values[name]
            if id(values) in groups:
                chosen.append(Chosen(layer, name, values, groups[id(values)]))
        return chosen

    def key_of(self) -> list[Any]:
        """Return what tells whether choice and tables are still right.

        For every layer in every step, hence by its cheapest signs alone.
        """
        groups = self.optimizer.param_groups
        key: list[Any] = [
            find_mode(),
            *((may_fuse(g), len(g["params"])) for g in groups),
        ]
        for layer in self.layers:
            adapter = layer.wanted()
            key.append(adapter)
            if adapter is None:
                continue
            values, weight, indices = layer.parts(adapter)
            key += (
                id(values),
                values.data_ptr(),
                weight.data_ptr(),
                indices.data_ptr(),
                indices._version,
            )
            state = self.optimizer.state.get(values)
            if state and id(values) in self.taken:
                key += (t.data_ptr() for t in state.values())
        return key

    def make(self, chosen: list[Chosen]) -> DeviceBlocks:
        """Make the tables of some layers of one device, and their state if there is none.

        Steps are views of one tensor, which the kernel counts up.
        """
        kernel = kernel_of(chosen[0].layer, self.eight_bit)
        device = chosen[0].values.device
        states = [self.optimizer.state[c.values] for c in chosen]
        taken = [
            torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=device)
            for state in states
        ]
        steps = torch.stack(taken)
        layers = []
        for step, state, c in zip(steps, states, chosen, strict=True):
            state["step"] = step
            if "exp_avg" not in state:
                state.update(make_moments(c.values, self.eight_bit))
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].contiguous()
            layers.append(
                BlockState(
                    values=c.values.detach(),
                    exp_avg=state["exp_avg"],
                    exp_avg_sq=state["exp_avg_sq"],
                    indices=c.layer.sylva_indices[c.adapter].contiguous(),
                    weight=weight_view(c.layer.base_layer),
                    base=c.layer.original() if self.to_base else None,
                    group=c.group,
                    exp_avg_scale=state.get("exp_avg_scale"),
                    exp_avg_sq_scale=state.get("exp_avg_sq_scale"),
                )
            )
        one = torch.ones((), device=device)
        return DeviceBlocks(chosen, kernel.Tables(layers, steps), one, 0 * one)

    def square_norms(self) -> list[torch.Tensor]:
        """Return the sum of the squares of all gradients, for each device."""
        return [blocks.tables.square_norm() for blocks in self.blocks]

    def update(
        self,
        clip: torch.Tensor | None,
        scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Take the step; nothing here waits for the device.

        Parameters
        ----------
        clip : torch.Tensor, shape (), optional
            What clipping multiplies the gradient by.
        scale : torch.Tensor, shape (), optional
            What a gradient scaler multiplied the loss by.
        found_inf : torch.Tensor, shape (), optional
            Unless zero, nothing is changed.
        """
        for blocks in self.blocks:
            factor = blocks.one if clip is None else clip.to(blocks.one)
            if scale is not None:
                factor = factor / scale.to(factor)
            skip = blocks.zero if found_inf is None else found_inf.to(blocks.zero)
            blocks.tables.update(self.options_on(factor.device), factor, skip)
            for c in blocks.chosen:
                if c.values.grad is not None:
                    c.layer.note_written()

    def options_on(self, device: torch.device) -> torch.Tensor:
        """Return the groups' options on a device, uploaded if they changed."""
        columns = [
            (
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                -1.0 if group["maximize"] else 1.0,
            )
            for group in self.optimizer.param_groups
        ]
        rows = [
            [0.0 if isinstance(x, torch.Tensor) else float(x) for x in row]
            for row in columns
        ]
        if device not in self.options:
            size = len(rows), len(OPTIONS)
            self.options[device] = Mirror(size, torch.float64, device)
        self.options[device].update([number for row in rows for number in row])
        table = self.options[device].tensor
        # Options that are tensors may change without Python's knowing, in a CUDA graph.
        for i, row in enumerate(columns):
            for j, option in enumerate(row):
                if isinstance(option, torch.Tensor):
                    table[i, j].copy_(option.reshape(()), non_blocking=True)
        return table
