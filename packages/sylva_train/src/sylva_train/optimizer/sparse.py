"""AdamW on the trainable blocks, written through to the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from sylva_train._checks import ConfigError, check_choice, check_positive
from sylva_train._torch import total_norm
from sylva_train.layers import (
    SparseEmbeddedLinear,
    embedded_layers,
    layer_showing,
    values_dtype,
)

from .fused import KernelStep, kernel_of, laid_out_as, may_fuse, may_fuse_on_cpu
from .masters import HALVES, MOMENTS, follow_masters, keep_master

__all__ = ["SparseAdamW"]


def adamw_step(optimizer: torch.optim.Optimizer) -> None:
    """Take `torch.optim.AdamW`'s step without the hooks, which the caller's step runs.

    PyTorch wraps the ``step`` of each optimizer class once there is an instance of it.
    """
    step = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)  # type: ignore[arg-type]


class SparseAdamW(torch.optim.AdamW):
    """AdamW whose state exists for active blocks only.

    The blocks' values are float32 masters: gradients, moments and steps are kept for
    them alone, and every step ends with the values rounded into the dense weights.
    Other parameters in bfloat16 or float16, such as those of a head, have their master
    and moments in the state, in float32 too.
    Schedulers, clipping and gradient scalers work as with any optimizer. On a GPU one
    Triton kernel updates the blocks of all layers; elsewhere, and for whatever is no
    block, PyTorch's own AdamW does, fused where it can be. All keep the same state, so
    that a checkpoint of one goes on with another.

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
    moments : str
        ``"32bit"``, or ``"8bit"``: the blocks' two moments take 2 bytes of each value
        instead of 8, with levels a few percent apart (`kernels.quantize`). Blocks of
        float64 weights, and what is no block, keep theirs as they are.
    **kwargs
        Other options of `torch.optim.AdamW`. With ``amsgrad``, ``differentiable``,
        ``foreach=True`` or ``fused=False`` PyTorch's own AdamW takes every step.

    Raises
    ------
    ConfigError
        If nothing in the model requires a gradient, or an option cannot be used.
    TypeError
        If ``model`` is no model.
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
        moments: str = "32bit",
        **kwargs: Any,
    ) -> None:
        if not isinstance(cast("object", model), nn.Module):
            msg = (
                "`model` must be the torch.nn.Module with embedded blocks, whose dense"
                f" weights each step writes; got a {type(model).__name__}. Parameters or"
                " groups of them go into `params`: `SparseAdamW(model, params)`."
            )
            raise TypeError(msg)
        check_choice("decay_towards", decay_towards, ("zero", "base"))
        check_choice("moments", moments, ("32bit", "8bit"))
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if params is None:
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
        self.moments = moments
        self._kernel = KernelStep(self)
        defaults = {"amsgrad": False, "differentiable": False}
        plain = may_fuse({"foreach": None, "fused": None} | defaults | kwargs)
        if moments == "8bit" and not plain:
            msg = (
                "`moments='8bit'` cannot be combined with `amsgrad`, `differentiable`,"
                " `foreach=True` or `fused=False`; leave one of them out."
            )
            raise ConfigError(msg)
        # On a GPU what is no block takes its step without waiting for the device as well.
        if plain and (any(map(kernel_of, self.layers)) or may_fuse_on_cpu(trainable)):
            kwargs["fused"] = True
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; its layers are copies of these, as parameters are."""
        names = ("decay_towards", "max_grad_norm", "moments", "layers")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what another left, or only the state of the parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "layers" in state:
            self._kernel = KernelStep(self)

    #: Its own steps end in the dense weights; nothing is left to write before a forward.
    writes_through = True

    # Compiled, a layer would not look whether its values changed.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and write the new values into the dense weights.

        Raises
        ------
        ConfigError
            If all blocks were merged or unloaded, or moments in 8 bits are in use of blocks
            that are not shown.
        """
        if self.layers and all(layer.is_out for layer in self.layers):
            msg = (
                "the blocks that this optimizer trains were merged or unloaded; make a"
                " new optimizer for the model as it is."
            )
            raise ConfigError(msg)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = (getattr(self, n, None) for n in ("grad_scale", "found_inf"))
        self._kernel.prepare()
        self.check_moments()
        clip = self.clip(scale) if self.max_grad_norm else None
        adamw_step(self)
        follow_masters(self)
        self._kernel.update(clip, scale, found_inf)
        if self.decay_towards == "base":
            self.decay_to_base(self._kernel.rest)
        rest = [
            (layer, layer.values_of(name))
            for layer in self._kernel.rest
            if (name := layer.wanted()) is not None
        ]
        # A fused step does not count as a change of the values.
        torch.autograd.graph.increment_version([values for _, values in rest])
        for layer, _ in rest:
            layer.sync()
        return loss

    def check_moments(self) -> None:
        """Raise `ConfigError` where PyTorch's AdamW would meet moments in 8 bits."""
        if self.moments == "8bit" and any(
            parameter.grad is not None
            and "exp_avg_scale" in state
            and not self._kernel.takes(parameter)
            for parameter, state in self.state.items()
        ):
            msg = (
                "blocks of an adapter that is not active have a gradient, but with"
                " `moments='8bit'` steps are taken of active ones alone; nothing was"
                " changed. Call `set_adapter` after the step, and `zero_grad` with"
                " `set_to_none=True`."
            )
            raise ConfigError(msg)

    def clip(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        """Clip what PyTorch updates; return the factor for what the kernel updates."""
        assert self.max_grad_norm is not None
        rest = [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and not self._kernel.takes(p)
        ]
        squares = self._kernel.square_norms()
        if rest:
            squares.append(total_norm(p.grad for p in rest).square())
        if not squares:
            return None
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()
        if scale is not None:
            norm = norm / scale.to(device)
        torch.nn.utils.clip_grads_with_norm_(rest, self.max_grad_norm, norm)
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as with any optimizer, also of another model."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            layer = layer_showing(parameter)
            if layer is not None and layer not in self.layers:
                self.layers.append(layer)
        self._kernel.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this optimizer or `torch.optim.AdamW` saved.

        Who computes stays what it is here: where steps are counted depends on it.

        Raises
        ------
        ConfigError
            If moments were saved in another number of bits, or are of other blocks.
        """
        groups = [
            {**saved, "fused": own["fused"]}
            for saved, own in zip(
                state_dict["param_groups"], self.param_groups, strict=False
            )
        ]
        eight_bit = self.moments == "8bit"
        # What no kernel updates, a new head for one, has no moments in 8 bits.
        coded = {id(c.values) for c in self._kernel.choose()} if eight_bit else set()
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved_states = [state_dict["state"].get(i, {}) for i in numbers]
        for p, saved in zip(parameters, saved_states, strict=False):
            if "exp_avg" not in saved:
                continue
            if not eight_bit if "exp_avg_scale" in saved else id(p) in coded:
                msg = (
                    "`state_dict` has moments in another number of bits than this"
                    f" optimizer, which was made with `moments={self.moments!r}`."
                )
                raise ConfigError(msg)
            # Fused steps go through memory by the parameter's size, and beyond.
            if saved["exp_avg"].shape != p.shape:
                msg = (
                    "`state_dict` has moments of shape"
                    f" {tuple(saved['exp_avg'].shape)} for values of shape"
                    f" {tuple(p.shape)}: it was saved with other blocks or in another"
                    " order. Begin with a new optimizer where the masks changed."
                )
                raise ConfigError(msg)
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        for p, saved in zip(parameters, saved_states, strict=True):
            for name in {"master", *MOMENTS} & saved.keys():
                # PyTorch cast it to the parameter's dtype: codes, and what is float32
                # for a half float.
                is_coded = "exp_avg_scale" in saved
                dtype = saved[name].dtype if is_coded else values_dtype(p)
                self.state[p][name] = laid_out_as(p, saved[name].to(p.device, dtype))

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Leave to PyTorch's AdamW what no kernel updates, and masters for half floats."""
        rest = [p for p in group["params"] if not self._kernel.takes(p)]
        group = {**group, "params": rest}
        result: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        parameters, gradients, *moments = lists
        for i, parameter in enumerate(parameters):
            if parameter.dtype in HALVES:
                state = self.state[parameter]
                parameters[i] = keep_master(parameter, state)
                gradients[i] = gradients[i].float()
                for name, found in zip(MOMENTS, moments, strict=False):
                    if found:  # the last is only filled for `amsgrad`
                        found[i] = state[name]
        if group["fused"]:
            gradients[:] = map(laid_out_as, parameters, gradients)
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
                base = layer.original().to(layer.sylva_values[name].dtype) * rate
                if found_inf is not None:
                    base = base * (found_inf.to(base.device) == 0)
                values.append(layer.sylva_values[name])
                bases.append(base)
        if values:
            torch._foreach_add_(values, bases)
