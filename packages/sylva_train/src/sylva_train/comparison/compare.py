"""All runs of a comparison, each in its own process."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sylva_train._files import write_text
from sylva_train.baselines import parse_method
from sylva_train.selection import check_selection
from sylva_train.training import pick_device
from sylva_train.workflow import load_task, located, words_of_cuts

from .events import Watcher
from .jobs import RESULTS, jobs_folder, run_jobs
from .plan import Comparison
from .results import gather
from .tuning import at_best_rates, trials

__all__ = ["check_plan", "compare"]


def compare(
    comparison: Comparison,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
    tune: Sequence[float] = (),
    workers: int = 1,
    command: str | None = None,
) -> dict[str, Any]:
    """Run every method with every seed and gather the results.

    Parameters
    ----------
    comparison : Comparison
        What to compare.
    output : path
        Folder for ``results.json`` and, a file a run, ``runs/``.
    resume : bool
        Keep the runs that a killed comparison of the same options finished; more
        methods and seeds may be added.
    overwrite : bool
        Whether to delete a comparison that is there.
    watch : callable, optional
        Told each `Event`.
    tune : sequence of float
        Multiples of each method's learning rate to choose the best of before, on a tenth
        of the training data that is held out and with a seed of their own; a language
        model's by its perplexity. Empty: the rates are as they are.
    workers : int
        Runs at a time, which share the cores of the CPU: sooner done in all, but the
        times that are measured say little.
    command : str, optional
        How to do this again, for the report.

    Returns
    -------
    dict
        The results, as ``results.json`` holds them.

    Raises
    ------
    OutputExistsError
        If ``output`` has something in it and neither ``resume`` nor ``overwrite`` is
        set, or has something else than a comparison.
    ConfigError
        If ``resume`` meets runs of other options.
    NonFiniteError
        If a method diverges at every rate that ``tune`` tries.
    SylvaError
        If a run fails; runs that were finished are kept.
    """
    output = Path(output)
    comparison = dataclasses.replace(comparison, task=located(comparison.task))
    tuning, tell = trials(comparison, tune), watch or (lambda _: None)
    jobs, check = comparison.jobs(), partial(check_plan, comparison)
    with jobs_folder(jobs, output, resume=resume, overwrite=overwrite, check=check):
        tried = run_jobs(list(tuning.values()), output, tell, workers=workers)
        comparison = at_best_rates(comparison, dict(zip(tuning, tried, strict=True)))
        rows = run_jobs(comparison.jobs(), output, tell, workers=workers)
    results = gather(comparison, rows, command, tried, tune)
    write_text(output / RESULTS, json.dumps(results))
    return results


def check_plan(comparison: Comparison) -> None:
    """Find what is wrong with model, data and options before the first run does.

    Raises
    ------
    SylvaError
        As a run would.

    Warns
    -----
    UserWarning
        If texts are longer than ``max_length``.
    """
    config, training = comparison.sylva, comparison.training
    task = load_task(comparison.task, seed=comparison.seeds[0])
    pick_device(training.device)
    for loader in (task.loader(training), task.eval_loader(training)):
        if words := words_of_cuts(loader):
            warnings.warn(words, stacklevel=2)
    for rule in filter(None, {parse_method(n).rule for n in comparison.methods}):
        check_selection(dataclasses.replace(config, importance=rule), task.model)
