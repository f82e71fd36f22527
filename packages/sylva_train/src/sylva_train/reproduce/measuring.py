"""Table 2, figure 4 and figure 5: their measurements planned, done and written down."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sylva_train._checks import check_choice
from sylva_train._files import write_text
from sylva_train.comparison import Job, Watcher, jobs_folder, made, run_jobs
from sylva_train.report import svg_file

from .performance import measure_layer, measure_memory, measure_step
from .performance_jobs import fig4_jobs, fig5_jobs, table2_jobs
from .performance_tables import Table, draw_fig4, draw_fig5, fig4, fig5, table2
from .tables import csv_text, markdown, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASUREMENTS", "Measurement", "measure"]

FORMAT, RESULTS = "sylva-measurement/1", "results.json"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A table or figure of the paper that is about time or memory.

    Parameters
    ----------
    name, title : str
        What it is called, and what it shows.
    jobs : callable
        From the scale, ``"small"`` or ``"paper"``, to the specifications.
    function : str
        ``module:function`` that does one, in a process of its own.
    table : callable
        From the rows to header and lines.
    draw : callable, optional
        From the rows to the picture.
    """

    name: str
    title: str
    jobs: Callable[[str], Rows]
    function: str
    table: Callable[[Rows], Table]
    draw: Callable[[Rows], Figure] | None = None


MEASUREMENTS = {
    one.name: one
    for one in (
        Measurement(
            name="table2",
            title="Peak memory of fine-tuning, GB",
            jobs=table2_jobs,
            function=f"{__name__}:run_memory",
            table=table2,
        ),
        Measurement(
            name="fig4",
            title="Time of a training step",
            jobs=fig4_jobs,
            function=f"{__name__}:run_step",
            table=fig4,
            draw=draw_fig4,
        ),
        Measurement(
            name="fig5",
            title="Latency of a layer: forward, backward and optimizer",
            jobs=fig5_jobs,
            function=f"{__name__}:run_layer",
            table=fig5,
            draw=draw_fig5,
        ),
    )
}


def run_memory(spec: dict[str, Any], _: Any) -> dict[str, Any]:
    """Do a job of table 2."""
    return measure_memory(spec["options"])


def run_step(spec: dict[str, Any], _: Any) -> dict[str, Any]:
    """Do a job of figure 4."""
    return measure_step(spec["options"])


def run_layer(spec: dict[str, Any], _: Any) -> dict[str, Any]:
    """Do a job of figure 5."""
    return measure_layer(spec["options"])


def measure(
    name: str,
    output: str | os.PathLike[str],
    *,
    scale: str = "small",
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Make a table or figure of the paper that is about time or memory.

    Parameters
    ----------
    name : str
        One of `MEASUREMENTS`.
    output : path
        Folder for ``results.json``, ``table.md``, ``table.csv``, ``figure.svg`` where
        there is one and, a file a measurement, ``runs/``.
    scale : str
        ``"small"``: what a CPU does in minutes; ``"paper"``: the paper's sizes, on GPUs.
    resume, overwrite : bool
        Keep what was measured before; delete it.
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
        If there is no such table or scale, or ``resume`` meets another one.
    OutputExistsError
        If ``output`` has something in it and neither ``resume`` nor ``overwrite`` is set.
    SylvaError
        If a measurement fails; those that were finished are kept.
    """
    check_choice("name", name, MEASUREMENTS)
    one, output = MEASUREMENTS[name], Path(output)
    jobs = [
        Job(
            name=f"{name}-{number}",
            label=describe(spec),
            kind=f"{spec.get('model')} {spec.get('method')} {spec.get('in_features')}",
            spec={"options": spec},
            function=one.function,
        )
        for number, spec in enumerate(one.jobs(scale))
    ]
    with jobs_folder(jobs, output, resume=resume, overwrite=overwrite):
        # One at a time: they would slow each other down.
        rows = run_jobs(jobs, output, watch or (lambda _: None))
    options = jobs[0].spec["options"]
    about = made(options["device"], rows)
    about["threads"] = options.get("threads") or about["threads"]
    results = {
        "format": FORMAT,
        "name": name,
        "title": one.title,
        "scale": scale,
        "made": about,
        "command": command,
        "runs": rows,
    }
    return write_measurement(results, output)


def describe(spec: dict[str, Any]) -> str:
    """Name a measurement for people."""
    if "model" not in spec:
        return (
            f"{spec['out_features']} × {spec['in_features']}, {spec['sequence']} tokens"
        )
    parts = [spec["model"], spec["method"]]
    if "rank" in spec:
        parts.append(f"rank {spec['rank']} / density {spec['density']:g}")
    if "processes" in spec:
        parts.append(f"processes: {spec['processes']}")
    return ", ".join(parts)


def write_measurement(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write the results as JSON, Markdown, CSV and SVG, and return them."""
    one = MEASUREMENTS[results["name"]]
    header, lines = one.table(results["runs"])
    body = [f"# {one.title}", markdown(header, lines), f"Scale: {results['scale']}."]
    page = "\n\n".join([*body, provenance(results)])
    texts = {
        RESULTS: json.dumps(results),
        "table.md": f"{page}\n",
        "table.csv": csv_text(header, lines),
    }
    if one.draw is not None:
        texts["figure.svg"] = svg_file(functools.partial(one.draw, results["runs"]))
    for name, content in texts.items():
        write_text(output / name, content)
    return results
