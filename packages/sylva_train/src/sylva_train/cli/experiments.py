"""The commands that run many trainings: comparisons, the demo, the paper's tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sylva_train._checks import check_choice
from sylva_train.options import (
    DEMO,
    DEMO_STEPS,
    DEMO_TASK,
    SylvaOptions,
    TaskConfig,
    TrainingConfig,
)

from .frame import command, typed
from .options import numbers, rates, words


@command(
    omit={
        "importance", "curvature", "seed", "lr", "save_every", "modules_to_save",
        "memory_budget", "host_budget",
    },
    output="Folder for results.json, report.html, table.md.",
)  # fmt: skip
def compare(
    output: Path,
    task: TaskConfig,
    sylva: SylvaOptions,
    training: TrainingConfig,
    methods: str | None = None,
    seeds: str = "0,1,2",
    learning_rates: str | None = None,
    tune: str | None = None,
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    report_only: bool = False,
    quiet: bool = False,
) -> None:
    """Compare Sylva's rules with each other, LoRA, full fine-tuning and pruning.

    Every method trains on the same data, seeds and steps, in a process of its own; LoRA
    has as many trainable weights as Sylva has. Finished runs are kept: --resume goes on
    after them, and may add methods and seeds. --tune chooses each method's learning rate
    first: those that it has by default were chosen for MiniLM.

    Examples
    --------
      sylva compare runs/compared --max-length 64 --steps 150
      sylva compare runs/two --methods full,sylva:kfac --seeds 0,1 --data train.csv
      sylva compare runs/tuned --model my-model --data train.csv --tune 0.1,0.3,1,3
    """
    from sylva_train.comparison import Comparison, load_results, suited
    from sylva_train.config import SylvaConfig

    from . import show
    from .comparing import publish, run_comparison

    if report_only:
        show.comparison(publish(load_results(output / "results.json"), output), output)
        return
    comparison = Comparison(
        task=task,
        sylva=SylvaConfig(**vars(sylva)),
        training=training,
        methods=suited(task.task) if methods is None else tuple(words(methods) or ()),
        seeds=numbers("seeds", seeds),
        learning_rates=rates("learning_rates", learning_rates),
    )
    results = run_comparison(
        comparison,
        output,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        workers=workers,
        tune=numbers("tune", tune, float),
        command=typed(),
    )
    show.comparison(results, output)


@command(output="Folder for results and adapter.")
def demo(
    output: Path = Path("runs/demo"),
    model: str = DEMO_TASK.model,
    limit: int | None = DEMO_TASK.limit,
    eval_limit: int | None = DEMO_TASK.eval_limit,
    steps: int = DEMO_STEPS,
    methods: str = ",".join(DEMO),
    seeds: str = "0,1,2",
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """See the whole of it in ten minutes on two CPU cores, without a network.

    Fine-tunes MiniLM to tell which customer rating a sentence about a restaurant states:
    5% of the weights of its linear layers, chosen by Sylva, beside LoRA, full
    fine-tuning, random blocks and frozen features, with three seeds each. Then saves the
    adapter, loads it again and asks it.

    Examples
    --------
      sylva demo
      sylva demo runs/second --seeds 0
    """
    from sylva_train.comparison import demonstration

    from .demo import run_demo

    task = dataclasses.replace(
        DEMO_TASK, model=model, limit=limit, eval_limit=eval_limit
    )
    run_demo(
        demonstration(
            task=task,
            steps=steps,
            methods=tuple(words(methods) or ()),
            seeds=numbers("seeds", seeds),
        ),
        output,
        resume=resume,
        overwrite=overwrite,
        command=typed(),
    )


@command(
    experiment="table2 to table7, fig4, fig5, rules, damping, rank, allocation or tokens.",
    output="Folder for results.json, table.md, table.csv, a picture.",
)
def reproduce_command(
    experiment: str,
    output: Path,
    configs: str = "minilm-e2e-rating",
    seeds: str = "0,1,2",
    values: str | None = None,
    methods: str | None = None,
    model: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    eval_limit: int | None = None,
    steps: int | None = None,
    tune: str | None = None,
    scale: str = "small",
    workers: int = 1,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Make a table or figure of the paper, in form, on the models that are at hand.

    Tables 3 to 7 are about quality, and take configurations; rules, damping, rank,
    allocation and tokens are of their kind. Table 2 and figures 4 and 5 are about memory
    and time, and take a scale. Finished runs are kept: --resume goes on after them.

    Examples
    --------
      sylva reproduce table5 runs/table5 --values 16,32,64
      sylva reproduce table3 runs/table3 --configs roberta-large-mrpc --data glue/MRPC
      sylva reproduce fig5 runs/fig5
    """
    from sylva_train.reproduce import MEASUREMENTS

    from .reproducing import EXPERIMENTS, check_unused, make_measurement, make_table

    check_choice("experiment", experiment, EXPERIMENTS)
    common: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "quiet": quiet,
        "command": typed(),
    }
    changes: dict[str, Any] = {
        "seeds": seeds, "model": model, "data": data, "limit": limit,
        "eval_limit": eval_limit, "steps": steps, "device": device,
    }  # fmt: skip
    if experiment in MEASUREMENTS:
        of_tables = changes | {
            "configs": configs, "values": values, "methods": methods, "tune": tune,
            "workers": workers,
        }  # fmt: skip
        check_unused(experiment, of_tables, reproduce_command)
        make_measurement(experiment, output, scale=scale, **common)
        return
    check_unused(experiment, {"scale": scale}, reproduce_command)
    make_table(
        experiment,
        output,
        configs=words(configs) or (),
        values=words(values),
        methods=words(methods),
        changes=changes | {"seeds": numbers("seeds", seeds)},
        tune=numbers("tune", tune, float),
        workers=workers,
        **common,
    )
