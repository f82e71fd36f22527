"""AdamW on the trainable blocks, written through to the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ._checks import ConfigError, check_choice, check_positive
from .kernels import OPTIONS, BlockState, find_kernel
from .layers import SparseEmbeddedLinear, embedded_layers
from .targets import weight_view

__all__ = ["SparseAdamW"]


class Chosen(NamedTuple):
    """A layer that a kernel updates: its adapter, values and parameter group."""

    layer: SparseEmbeddedLinear
    adapter: str
    values: nn.Parameter
    group: int


@dataclass(frozen=True)
class FusedBlocks:
    """Layers of one device that a kernel updates together."""

    layers: list[SparseEmbeddedLinear]
    parameters: list[nn.Parameter]
    tables: Any
    one: torch.Tensor
    zero: torch.Tensor

    def take_gradients(self) -> None:
        """Tell the tables where this step's gradients are, if there are any."""
        for values in self.parameters:
            if values.grad is not None:
                values.grad = values.grad.contiguous()
        self.tables.set_gradients([values.grad for values in self.parameters])


class SparseAdamW(torch.optim.AdamW):
    """AdamW whose state exists for active blocks only.

    The blocks' values are float32 masters: gradients, moments and steps are kept for
    them alone, and every step ends with the values rounded into the dense weights.
    Schedulers, clipping and gradient scalers work as with any optimizer. On a GPU one
    Triton kernel updates the blocks of all layers; elsewhere, and for whatever is no
    block, PyTorch's own AdamW does. Both keep the same state, so that a checkpoint of
    either goes on with the other.

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
    max_grad_norm : float, optional
        Clip the gradient of all parameters together to this norm in each step.
    **kwargs
        Other options of `torch.optim.AdamW`. With ``amsgrad``, ``differentiable``,
        ``foreach=True`` or ``fused=False`` PyTorch's own AdamW takes every step.

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
        max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("decay_towards", decay_towards, ("zero", "base"))
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
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
        self.decay_towards, self.max_grad_norm = decay_towards, max_grad_norm
        self.layers: list[SparseEmbeddedLinear] = list(embedded_layers(model).values())
        self._blocks: list[FusedBlocks] = []
        self._fused: set[int] = set()
        self._key: list[Any] = []
        self._options: dict[torch.device, tuple[list[list[float]], torch.Tensor]] = {}
        named = {"foreach": None, "fused": None, "amsgrad": False} | kwargs
        if may_fuse(named | {"differentiable": kwargs.get("differentiable")}) and any(
            kernel_of(layer) for layer in self.layers
        ):
            # What is no block takes its step without waiting for the device as well.
            kwargs["fused"] = True
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
        self.find_blocks()
        clip = self.clip() if self.max_grad_norm else None
        super().step()
        for blocks in self._blocks:
            self.update(blocks, clip)
        others = [layer for layer in self.layers if not self.is_fused(layer)]
        if self.decay_towards == "base":
            self.decay_to_base(others)
        # By force: a fused step does not count as a change of the values.
        for layer in others:
            layer.sync(force=True)
        return loss

    def is_fused(self, layer: SparseEmbeddedLinear) -> bool:
        """Whether a kernel updates a layer, and writes its weight."""
        name = layer.wanted()
        return name is not None and id(layer.sylva_values[name]) in self._fused

    def find_blocks(self) -> None:
        """Find the layers that a kernel updates; make its tables anew if they changed.

        A layer's weight has to show the values of the adapter that is active before, so
        that it does after the step.
        """
        groups = {
            id(parameter): number
            for number, group in enumerate(self.param_groups)
            if may_fuse(group)
            for parameter in group["params"]
        }
        chosen = []
        for layer in self.layers:
            name = layer.wanted()
            if name is None or kernel_of(layer) is None:
                continue
            values = layer.sylva_values[name]
            if id(values) in groups:
                layer.sync()
                chosen.append(Chosen(layer, name, values, groups[id(values)]))
        if self.key_of(chosen) != self._key:
            devices = dict.fromkeys(c.values.device for c in chosen)
            self._blocks = [
                self.make_blocks([c for c in chosen if c.values.device == device])
                for device in devices
            ]
            self._fused = {id(c.values) for c in chosen}
            # After it, since there is new state.
            self._key = self.key_of(chosen)
        for blocks in self._blocks:
            blocks.take_gradients()

    def key_of(self, chosen: list[Chosen]) -> list[Any]:
        """Return what tells whether the tables are still right."""
        key: list[Any] = []
        for layer, adapter, values, _ in chosen:
            indices = layer.sylva_indices[adapter]
            weight = weight_view(layer.base_layer)
            tensors = [values, weight, indices, *self.state[values].values()]
            if self.decay_towards == "base":
                tensors.append(layer.original())
            places = [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]
            key.append((id(values), weight.dtype, indices._version, *places))
        return key

    def make_blocks(self, chosen: list[Chosen]) -> FusedBlocks:
        """Make the tables of some layers of one device, and their state if there is none.

        Steps are views of one tensor, which the kernel counts up.
        """
        kernel = kernel_of(chosen[0].layer)
        device = chosen[0].values.device
        taken = [self.state[c.values].get("step", 0.0) for c in chosen]
        steps = torch.stack(
            [torch.as_tensor(t, dtype=torch.float32, device=device) for t in taken]
        )
        layers = []
        for step, (layer, adapter, values, group) in zip(steps, chosen, strict=True):
            state = self.state[values]
            state["step"] = step
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(values)
                state[name] = state[name].contiguous()
            layers.append(
                BlockState(
                    values=values.detach(),
                    exp_avg=state["exp_avg"],
                    exp_avg_sq=state["exp_avg_sq"],
                    indices=layer.sylva_indices[adapter].contiguous(),
                    weight=weight_view(layer.base_layer),
                    base=layer.original() if self.decay_towards == "base" else None,
                    group=group,
                )
            )
        return FusedBlocks(
            [c.layer for c in chosen],
            [c.values for c in chosen],
            kernel.Tables(layers, steps),
            torch.ones((), device=device),
            torch.zeros((), device=device),
        )

    def clip(self) -> torch.Tensor | None:
        """Clip what PyTorch updates; return the factor for what the kernel updates."""
        assert self.max_grad_norm is not None
        rest = [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) not in self._fused
        ]
        squares: list[torch.Tensor] = [b.tables.square_norm() for b in self._blocks]
        if rest:
            total = torch.nn.utils.get_total_norm([p.grad for p in rest])
            squares.append(total.square())
        if not squares:
            return None
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            norm = norm / scale.to(device)
        torch.nn.utils.clip_grads_with_norm_(rest, self.max_grad_norm, norm)
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def update(self, blocks: FusedBlocks, clip: torch.Tensor | None) -> None:
        """Let the kernel take a step; nothing here waits for the device."""
        factor, found_inf = blocks.one, getattr(self, "found_inf", None)
        if clip is not None:
            factor = clip.to(factor)
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            factor = factor / scale.to(factor)
        found_inf = blocks.zero if found_inf is None else found_inf.to(blocks.zero)
        blocks.tables.update(self.options_on(factor.device), factor, found_inf)
        for layer, values in zip(blocks.layers, blocks.parameters, strict=True):
            if values.grad is not None:
                layer.note_written()

    def options_on(self, device: torch.device) -> torch.Tensor:
        """Return the groups' options on a device, uploaded if they changed."""
        columns = [
            (
                g["lr"],
                *g["betas"],
                g["eps"],
                g["weight_decay"],
                -1.0 if g["maximize"] else 1.0,
            )
            for g in self.param_groups
        ]
        rows = [
            [0.0 if isinstance(x, torch.Tensor) else float(x) for x in row]
            for row in columns
        ]
        known, table = self._options.get(device, ([], None))
        if table is None:
            table = torch.empty(
                (len(rows), len(OPTIONS)), dtype=torch.float64, device=device
            )
        if rows != known:
            cuda = device.type == "cuda"
            host = torch.tensor(rows, dtype=torch.float64, pin_memory=cuda)
            table.copy_(host, non_blocking=True)
            self._options[device] = rows, table
        # Options that are tensors may change without Python's knowing, in a CUDA graph.
        for i, row in enumerate(columns):
            for j, option in enumerate(row):
                if isinstance(option, torch.Tensor):
                    table[i, j].copy_(option.reshape(()), non_blocking=True)
        return table

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as with any optimizer."""
        super().add_param_group(param_group)
        self._key, self._options = [], {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or `torch.optim.AdamW` saved.

        Who computes stays what it is here: where steps are counted depends on it.
        """
        groups = [
            {**saved, "fused": own["fused"]}
            for saved, own in zip(
                state_dict["param_groups"], self.param_groups, strict=False
            )
        ]
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Leave to PyTorch's AdamW what no kernel updates."""
        rest = [p for p in group["params"] if id(p) not in self._fused]
        group = {**group, "params": rest}
        result: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        return result

    def decay_to_base(self, layers: list[SparseEmbeddedLinear]) -> None:
        """Turn this step's decay to zero into one to the base.

        AdamW did ``v -= lr·wd·v``; ``v += lr·wd·base`` makes it ``v -= lr·wd·(v - base)``.
        """
        rates = {
            id(p): float(group["lr"]) * group["weight_decay"]
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        values, bases = [], []
        for layer in layers:
            name = layer.wanted()
            rate = rates.get(id(layer.sylva_values[name]), 0.0) if name else 0.0
            if name and rate:
                layer.sync()
                base = layer.original().float() * rate
                if found_inf is not None:
                    base = base * (found_inf.to(base.device) == 0)
                values.append(layer.sylva_values[name])
                bases.append(base)
        if values:
            torch._foreach_add_(values, bases)


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether a group asks for nothing that the kernel does not do."""
    others = group["amsgrad"] or group["differentiable"] or group["foreach"]
    return not others and group["fused"] is not False


def kernel_of(layer: SparseEmbeddedLinear) -> Any:
    """Return the module of the kernel that updates a layer, or None."""
    name = layer.wanted()
    values = None if name is None else layer.sylva_values[name]
    if values is None or values.dtype != torch.float32 or not values.is_contiguous():
        return None
    weight = weight_view(layer.base_layer)
    return find_kernel("adamw", weight.device, weight.dtype, values.shape[-1])
