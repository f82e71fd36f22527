"""Seconds of one training step on a CPU: Sylva beside LoRA, full fine-tuning and none.

A step is forward, backward, clipping and optimizer on the same batch of MiniLM's
encoder; the methods take turns, step by step, so that a busy machine slows them all.
LoRA has as many trainable weights as Sylva; random blocks, since which ones they are
changes the cost little, and a staircase mask as scores give it beside them.

The optimizer's part is measured alone as well: SparseAdamW, which writes the values into
the dense weights, beside PyTorch's AdamW, fused and not, on copies of the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _common import interleave, parser, setting, write

from sylva_train import Loader, SparseAdamW, SylvaConfig, load_data, load_model
from sylva_train.baselines import adapt, parse_method
from sylva_train.reproduce import staircase
from sylva_train.targets import find_targets, weight_view


def stepper(
    name: str, batch: dict[str, Any], options: Any
) -> tuple[Callable[[], None], int, SparseAdamW]:
    """Return what takes one step, the number of trained weights and the optimizer."""
    model, _ = load_model("minilm", labels=["a", "b", "c", "d"], seed=0)
    config = SylvaConfig(
        density=options.density,
        block_size=options.block,
        modules_to_save=["classifier"],
    )
    if name == "frozen backbone":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        # As deep as an adapter's backward pass: down to the embeddings.
        model.enable_input_require_grads()
        trained = 0
    else:
        scores = None
        if name == "sylva, staircase":
            targets = find_targets(model)
            shapes = {n: tuple(weight_view(m).shape) for n, m in targets.items()}
            scores = staircase(shapes)
        method = parse_method("sylva:random" if "sylva" in name else name)
        adapted = adapt(method, model, config, scores=scores)
        model, trained = adapted.model, adapted.trainable
    optimizer = SparseAdamW(model, lr=1e-4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, trained, optimizer


def optimizer_steps(optimizer: SparseAdamW) -> dict[str, Callable[[], Any]]:
    """Return the step of an optimizer, and of PyTorch's AdamW on copies of its values."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps: dict[str, Callable[[], Any]] = {"SparseAdamW": optimizer.step}
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    for name, fused in (("AdamW, fused", True), ("AdamW", False)):
        copies = [p.detach().clone().requires_grad_() for p in parameters]
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = parameter.grad
        steps[name] = torch.optim.AdamW(copies, lr=1e-4, fused=fused).step
    return steps


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--density", type=float, default=0.05)
    options.add_argument("--block", type=int, default=32)
    options.add_argument("--batch", type=int, default=32)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data("e2e-rating", limit=options.batch)
    _, tokenizer = load_model("minilm", labels=["a", "b", "c", "d"])
    batch = next(iter(Loader(data, tokenizer, options.batch, max_length=64)))
    names = ["frozen backbone", "full", "lora", "sylva, random", "sylva, staircase"]
    steps, counts, optimizers = zip(
        *(stepper(n, batch, options) for n in names), strict=True
    )
    times = interleave(options.repeats, *steps, warmup=2)
    alone = optimizer_steps(optimizers[names.index("sylva, random")])
    alone_times = interleave(20 * options.repeats, *alone.values(), warmup=5)
    results = {
        "setting": setting(packages=("transformers", "peft")),
        "batch": list(batch["input_ids"].shape),
        "density": options.density,
        "block_size": options.block,
        "methods": {
            name: {"trainable": count, "seconds": time}
            for name, count, time in zip(names, counts, times, strict=True)
        },
        "optimizers": {
            name: {
                "seconds": time,
                "over_fused": round(time["median"] / alone_times[1]["median"], 3),
            }
            for name, time in zip(alone, alone_times, strict=True)
        },
    }
    lora, full = times[2]["median"], times[1]["median"]
    for name, time in zip(names, times, strict=True):
        ratios = time["median"] / lora, time["median"] / full
        results["methods"][name]["over_lora"] = round(ratios[0], 3)
        results["methods"][name]["over_full"] = round(ratios[1], 3)
        print(
            f"{name:18} {time['median']:.3f} s  {ratios[0]:.2f} × LoRA  {ratios[1]:.2f} × full"
        )
    for name, found in results["optimizers"].items():
        milliseconds = 1000 * found["seconds"]["median"]
        print(f"{name:18} {milliseconds:.2f} ms  {found['over_fused']:.2f} × fused")
    print(write("step", results))


if __name__ == "__main__":
    main()
