"""Making a table: its runs planned, done in processes of their own, and written down."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_train._checks import NonFiniteError, check_choice
from sylva_train._files import write_text
from sylva_train.comparison import Comparison, Watcher, jobs_folder, made, run_jobs
from sylva_train.report import svg_file
from sylva_train.workflow import evaluated_on, located

from .pictures import draw
from .quality import TABLES, Cell, Plan, Table
from .tables import as_csv, as_markdown

__all__ = ["reproduce"]

FORMAT, RESULTS = "sylva-table/1", "results.json"
#: A cell of the table, and the row that a run of it returned.
Result = tuple[Cell, Mapping[str, Any]]
#: Parts of a run's row that tables do not need.
LEFT_OUT = {"history", "total", "examples", "labels", "step_seconds_iqr"}


def reproduce(
    table: str | Table,
    settings: Mapping[str, Comparison],
    output: str | os.PathLike[str],
    *,
    tune: Sequence[float] = (),
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Make a table of the paper, in form, on the models that are at hand.

    Parameters
    ----------
    table : str or Table
        What to vary: one of `TABLES`, by name, or a table of your own.
    settings : mapping of str to Comparison
        By name, the models and tasks, their options, seeds and learning rates. Methods
        are the table's.
    output : path
        Folder for ``results.json``, ``table.md``, ``table.csv``, ``table.svg`` and, a
        file a run, ``runs/``.
    tune : sequence of float
        Multiples of each method's learning rate to choose the best of before, on a tenth
        of the training data and with a seed that is not reported.
    workers : int
        Runs at a time.
    resume : bool
        Keep the runs that were finished before; seeds and settings may be added.
    overwrite : bool
        Whether to delete a table that is there.
    watch : callable, optional
        Told each `Event`.
    command : str, optional
        How to do this again.

    Returns
    -------
    dict
        The results, as ``results.json`` holds them.

    Raises
    ------
    ConfigError
        If there is no such table, a value does not fit, or ``resume`` meets runs of other
        options.
    OutputExistsError
        If ``output`` has something in it and neither ``resume`` nor ``overwrite`` is set.
    NonFiniteError
        If every run of a setting diverged; the table tells of single ones.
    SylvaError
        If a run fails; those that were finished are kept.
    """
    if isinstance(table, str):
        check_choice("table", table, TABLES)
        table = TABLES[table]
    output, tell = Path(output), watch or (lambda _: None)
    found = {
        name: dataclasses.replace(one, task=located(one.task))
        for name, one in settings.items()
    }
    plan = Plan(table, found, tune)
    tuning = plan.tuning()
    untuned = [job for _, job in plan.runs({})]
    with jobs_folder(
        untuned, output, resume=resume, overwrite=overwrite, check=plan.check
    ):
        tuned = run_jobs(list(tuning.values()), output, tell, workers=workers)
        runs = plan.runs(plan.rates(dict(zip(tuning, tuned, strict=True))))
        rows = run_jobs([job for _, job in runs], output, tell, workers=workers)
    tried = zip((cell for cell, _ in tuning), tuned, strict=True)
    reported = zip((cell for cell, _ in runs), rows, strict=True)
    results = gather(plan, list(tried), list(reported)) | {"command": command}
    for name, one in settings.items():  # as it was given, not where it was found
        results["settings"][name] |= {
            "task": dataclasses.asdict(one.task),
            "data": f"{one.task.data} ({evaluated_on(one.task)})",
        }
    return write_table(results, output)


def gather(
    plan: Plan, tried: Sequence[Result], reported: Sequence[Result]
) -> dict[str, Any]:
    """Put the results together: of the runs that chose rates, and of those reported."""
    settings = {}
    for name, one in plan.settings.items():
        rows = [row for cell, row in reported if cell.setting == name]
        scored = [row for row in rows if row["score"] is not None]
        if not scored:
            msg = (
                f"every run of {name} diverged ({rows[0]['diverged']}). Give smaller"
                " learning rates, or `tune`, in another folder."
            )
            raise NonFiniteError(msg)
        settings[name] = {
            "sylva": one.spec(one.methods[0], 0)["sylva"],
            "training": dataclasses.asdict(one.training),
            "metric": one.metric,
            "train_examples": scored[0]["examples"][0],
            "eval_examples": scored[0]["examples"][1],
            "total_weights": scored[0]["total"],
            "steps": max(len(row["history"]) for row in scored),
        }

    def entry(cell: Cell, row: Mapping[str, Any]) -> dict[str, Any]:
        about = {"setting": cell.setting, "method": cell.method, "value": cell.value}
        return about | {k: v for k, v in row.items() if k not in LEFT_OUT | {"method"}}

    return {
        "format": FORMAT,
        "name": plan.table.name,
        "title": plan.table.title,
        "option": plan.table.option,
        "tune": list(plan.multiples),
        "made": made(
            next(iter(plan.settings.values())).training.device,
            [row for _, row in [*tried, *reported]],
        ),
        "settings": settings,
        "tuning": [entry(*result) for result in tried],
        "runs": [entry(*result) for result in reported],
    }


def write_table(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write the results as JSON, Markdown, CSV and SVG, and return them."""
    texts = {
        RESULTS: json.dumps(results),
        "table.md": as_markdown(results),
        "table.csv": as_csv(results),
        "table.svg": svg_file(lambda: draw(results)),
    }
    for name, text in texts.items():
        write_text(output / name, text)
    return results
