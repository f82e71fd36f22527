"""Time and memory of training steps: of one layer, and of a whole model.

All functions take and return what JSON can hold. A run in a process of its own has its
own peak of memory; whoever calls `measure_step` and `measure_memory` starts one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sylva_train._checks import SylvaError
from sylva_train.comparison import PeakMemory
from sylva_train.options import memory_bytes

from .specs import LayerSpec, StepSpec
from .subjects import LABELS, adapt_model, build_model
from .timing import Phases, summarize, take_turns

__all__ = ["measure_layer", "measure_memory", "measure_step"]

#: What is None where memory did not suffice.
MEASURED = (
    "weights", "trainable", "seconds", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
#: File that a process of a group leaves when it runs out of memory.
OUT_OF_MEMORY = "out-of-memory"


def trained(model: nn.Module) -> int:
    """Return the number of trained weights."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stepping(optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    """Return the last phase of a step, which is none without an optimizer."""

    def step() -> None:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or ``"cpu"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure_layer(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time forward, backward and optimizer step of a linear layer by several methods.

    The input requires a gradient, as that of a layer within a model does. Methods take
    turns. LoRA has rank ``density · in · out / (in + out)``, rounded: as many trainable
    weights as the blocks.

    Parameters
    ----------
    spec : mapping
        Options of `LayerSpec`: ``in_features`` and ``out_features`` at least.

    Returns
    -------
    dict
        ``spec`` with all its options, ``device`` by name, and ``rows``, one a method:
        ``method``, ``trainable``, and ``seconds``: median, min, q1 and q3 of each of
        forward, backward, optimizer and total.

    Raises
    ------
    ConfigError
        If an option cannot be used.
    """
    chosen = LayerSpec.read(spec)
    device, dtype = chosen.prepare(), getattr(torch, chosen.dtype)
    tokens = chosen.batch * chosen.sequence
    x = torch.randn(tokens, chosen.in_features, device=device).to(dtype)
    dy = torch.randn(tokens, chosen.out_features, device=device).to(dtype)
    x.requires_grad_()

    def make(method: str) -> tuple[int, Phases]:
        layer = nn.Linear(chosen.in_features, chosen.out_features, bias=False)
        model, optimizer = adapt_model(
            nn.Sequential(layer).to(device, dtype),
            method,
            density=chosen.density,
            block_size=chosen.block_size,
            mask=chosen.mask,
            seed=chosen.seed,
        )
        kept: list[torch.Tensor] = []

        def backward() -> None:
            kept.pop().backward(dy)
            x.grad = None

        phases = (lambda: kept.append(model(x)), backward, stepping(optimizer))
        return trained(model), phases

    made = {method: make(method) for method in chosen.methods}
    turns = take_turns(
        device,
        {method: phases for method, (_, phases) in made.items()},
        chosen.repeats,
        in_a_row=chosen.in_a_row,
        warmup=2,
    )
    return {
        "spec": dataclasses.asdict(chosen),
        "device": device_name(device),
        "rows": [
            {
                "method": method,
                "label": LABELS[method],
                "trainable": count,
                "seconds": summarize(turns[method]),
            }
            for method, (count, _) in made.items()
        ],
    }


def measure_step(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time training steps of a causal language model by one method, on random tokens.

    Parameters
    ----------
    spec : mapping
        Options of `StepSpec`: ``model`` and ``method`` at least.

    Returns
    -------
    dict
        ``spec`` with all its options; ``device`` by name; ``label`` of the method;
        ``weights`` and ``trainable`` in number; ``seconds``: median, min, q1 and q3 of
        each of forward, backward, optimizer and total, of the first process;
        ``tokens_per_second`` of all; ``peak_memory_bytes``, the most of any process: the
        allocator's on a GPU, on a CPU what the process takes beyond what it took before
        the model was built. ``out_of_memory`` is True, and what was not measured None,
        where memory did not suffice.

    Raises
    ------
    ConfigError, ModelError
        If an option cannot be used, or a model not be loaded.
    SylvaError
        If a process of several ended otherwise.
    """
    chosen = StepSpec.read(spec)
    device = chosen.prepare()
    several = chosen.processes > 1 or chosen.method == "zero"
    found = run_group(chosen) if several else run(chosen, device)
    limit = memory_bytes(chosen.memory_limit) or math.inf
    return {
        "spec": dataclasses.asdict(chosen),
        "device": device_name(device),
        "label": LABELS[chosen.method],
        **(found or dict.fromkeys(MEASURED)),
        "out_of_memory": found is None or found["peak_memory_bytes"] > limit,
    }


def measure_memory(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the peak memory of training steps; `measure_step`, once.

    Parameters, results and errors are those of `measure_step`.
    """
    return measure_step({"repeats": 1, **spec})


def run(spec: StepSpec, device: torch.device) -> dict[str, Any] | None:
    """Measure in this process, one of a group or alone; None if memory is exhausted."""
    try:
        return measure(spec, device)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "not enough memory" not in str(error):
            raise
        return None
    finally:
        if spec.memory_limit is not None and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def measure(spec: StepSpec, device: torch.device) -> dict[str, Any]:
    """Build, adapt, train and measure."""
    memory = PeakMemory(device)
    limit = memory_bytes(spec.memory_limit)
    if limit is not None and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        # By its index: PyTorch takes no device without one.
        fraction = min(1.0, limit / whole)
        torch.cuda.set_per_process_memory_fraction(fraction, device.index)
    memory.reset()
    before = 0 if device.type == "cuda" else memory.bytes()
    model = build_model(spec.model, device, spec.dtype, spec.sequence, spec.seed)
    weights = sum(p.numel() for p in model.parameters())
    adapted, optimizer = make_trainable(model, spec, device)
    shape = (spec.batch, spec.sequence)
    ids = torch.randint(model.config.vocab_size, shape, device=device)
    kept: list[torch.Tensor] = []

    def forward() -> None:
        kept.append(adapted(input_ids=ids, labels=ids, use_cache=False).loss)

    phases = (forward, lambda: kept.pop().backward(), stepping(optimizer))
    take_turns(device, {"": phases}, 0, warmup=2)
    memory.reset()
    turns = take_turns(
        device, {"": phases}, spec.repeats, in_a_row=spec.in_a_row, warmup=0
    )
    seconds = summarize(turns[""])
    tokens = spec.processes * spec.batch * spec.sequence
    return {
        "weights": weights,
        "trainable": trained(adapted),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds["total"]["median"],
        "peak_memory_bytes": max(0, memory.bytes() - before),
    }


def make_trainable(
    model: Any, spec: StepSpec, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Make a model trainable as a step says, spread over processes if it has several."""
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.method == "frozen":
        # As deep as an adapter's backward pass: down to the embedding.
        model.enable_input_require_grads()
    adapted, optimizer = adapt_model(
        model,
        spec.method,
        density=spec.density,
        block_size=spec.block_size,
        mask=spec.mask,
        rank=spec.rank,
        max_columns=spec.max_columns,
        seed=spec.seed,
    )
    if spec.method == "zero":
        return shard(adapted, device)
    if spec.processes > 1 and optimizer is not None:
        adapted = replicate(adapted, device)
    return adapted, optimizer


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients over the processes; buffers are equal in all of them."""
    with warnings.catch_warnings():
        # What is to replace this option is not in every version yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
        )


def shard(
    model: nn.Module, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Split gradients and optimizer state over the processes: the second stage of ZeRO."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: Any = {"mesh": mesh, "reshard_after_forward": False}
    for block in model.modules():
        if isinstance(block, nn.ModuleList):
            for layer in block:
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def run_group(spec: StepSpec) -> dict[str, Any] | None:
    """Measure in several processes; None if one's memory is exhausted."""
    from torch.multiprocessing.spawn import (
        ProcessExitedException,
        ProcessRaisedException,
        spawn,
    )

    with tempfile.TemporaryDirectory() as folder:
        job = (dataclasses.asdict(spec), folder)
        try:
            spawn(work, job, nprocs=spec.processes)
        except (ProcessExitedException, ProcessRaisedException) as error:
            # Others may notice the end of one that is out of memory before we do.
            if Path(folder, OUT_OF_MEMORY).exists():
                return None
            last = str(error).strip().splitlines()[-1]
            msg = f"process {error.error_index} of {spec.processes} failed: {last}"
            raise SylvaError(msg) from error
        found: dict[str, Any] = json.loads(Path(folder, "found").read_text())
        return found


def work(rank: int, options: dict[str, Any], folder: str) -> None:
    """Measure in one process of a group, and leave what the first one found."""
    spec = StepSpec(**options)
    device = spec.prepare()
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // spec.processes))
    torch.manual_seed(spec.seed)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=spec.processes,
    )
    found = run(spec, device)
    if found is None:
        # The others wait for it in vain, and are ended with it.
        Path(folder, OUT_OF_MEMORY).touch()
        raise SystemExit(1)
    peak = torch.tensor(found["peak_memory_bytes"], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        found["peak_memory_bytes"] = int(peak)
        Path(folder, "found").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
