"""All runs of a comparison, each in its own process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, atomic_write
from sylva_train.baselines import parse_method
from sylva_train.importance import score
from sylva_train.masks import select
from sylva_train.training import pick_device
from sylva_train.workflow import check_folder, load_task, located

from .events import Clock, Event, Watcher
from .plan import Comparison
from .process import start
from .results import gather

__all__ = ["check_output", "compare"]

RUNS, RESULTS = "runs", "results.json"


def compare(
    comparison: Comparison,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
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
    SylvaError
        If a run fails; runs that were finished are kept.
    """
    output = Path(output)
    comparison = dataclasses.replace(comparison, task=located(comparison.task))
    keep = check_output(output, resume=resume, overwrite=overwrite)
    if keep:
        check_same(comparison, output)
    if any(not done(output, *key) for key in keys(comparison)):
        check_plan(comparison)
    with fresh(output, keep=keep):
        rows = run_all(comparison, output, watch or (lambda _: None))
    results = gather(comparison, rows, command)
    with atomic_write(output / RESULTS) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")
    return results


def check_output(
    output: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> bool:
    """Refuse a folder that is in the way, and tell whether runs in it are to be kept.

    Raises
    ------
    OutputExistsError
        As `compare`.
    """
    begun = (Path(output) / RUNS).is_dir()
    if resume and begun:
        return True
    check_folder(
        output,
        marks=[RUNS, RESULTS],
        overwrite=overwrite,
        advice="go on with it (`resume=True`, `--resume`), " if begun else "",
    )
    return False


@contextlib.contextmanager
def fresh(output: Path, *, keep: bool) -> Iterator[None]:
    """Make a comparison's folder, for good only once a run in it is done.

    What was there before comes back if none is, unless ``keep`` goes on with it.
    """
    aside = output.with_name(f".{output.name}.old")
    if output.exists() and not keep:
        shutil.rmtree(aside, ignore_errors=True)
        output.replace(aside)
    (output / RUNS).mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        # A row's name ends in its seed, a spec's in "spec".
        if not list((output / RUNS).glob("*[0-9].json")):
            shutil.rmtree(output)
            if aside.exists():
                aside.replace(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


def files(output: Path, method: str, seed: int) -> tuple[Path, Path]:
    """Return the paths of a run's row and of its spec."""
    name = f"{method.replace(':', '-')}-{seed}"
    return output / RUNS / f"{name}.json", output / RUNS / f"{name}.spec.json"


def keys(comparison: Comparison) -> list[tuple[str, int]]:
    """Return method and seed of each run, in order."""
    return [(m, seed) for seed in comparison.seeds for m in comparison.methods]


def done(output: Path, method: str, seed: int) -> bool:
    """Whether a run is finished."""
    return all(path.exists() for path in files(output, method, seed))


def check_plan(comparison: Comparison) -> None:
    """Find what is wrong with model, data and options before the first run does.

    Raises
    ------
    SylvaError
        As a run would.
    """
    config = comparison.sylva
    task = load_task(comparison.task, seed=comparison.seeds[0])
    pick_device(comparison.training.device)
    drawn = score(task.model, config=dataclasses.replace(config, importance="random"))
    select(drawn, config.density, config.block_size, config.scope, config.spread)


def check_same(comparison: Comparison, output: Path) -> None:
    """Raise `ConfigError` if a run that is to be kept has other options."""
    for method, seed in keys(comparison):
        if not done(output, method, seed):
            continue
        path, spec_path = files(output, method, seed)
        spec, found = comparison.spec(method, seed), read(spec_path)
        differ = [
            f"`{name}` is {found[part].get(name)!r} there and {value!r} here"
            for part in ("task", "sylva", "training")
            for name, value in spec[part].items()
            if found[part].get(name) != value
        ]
        if spec != found:
            msg = (
                f"`{output}` is a comparison with other options:"
                f" {'; '.join(differ) or 'another first seed'} ({path.name}). Go on with"
                " the same ones, or choose another folder."
            )
            raise ConfigError(msg)


def read(path: Path) -> dict[str, Any]:
    """Read a file of a run.

    Raises
    ------
    ConfigError
        If it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"`{path}` is damaged ({error}); delete it, and the run is done again."
        raise ConfigError(msg) from error
    return content


def run_all(
    comparison: Comparison, output: Path, watch: Watcher
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet, and return the rows of all."""
    plan = keys(comparison)
    clock = Clock([method for method, _ in plan])
    rows = []
    for number, (method, seed) in enumerate(plan):
        event = Event(
            kind="begin",
            method=method,
            label=parse_method(method).label,
            seed=seed,
            number=number + 1,
            count=len(plan),
            left=clock.left(number),
        )
        path, spec_path = files(output, method, seed)
        if done(output, method, seed):
            row = read(path)
            rows.append(row)
            watch(dataclasses.replace(event, kind="kept", row=row))
            continue
        watch(event)
        spec = comparison.spec(method, seed)
        with atomic_write(spec_path) as temporary:
            temporary.write_text(json.dumps(spec), encoding="utf-8")
        begin = time.perf_counter()
        report = stages(event, clock, watch, begin)
        row = start(spec, path, report)
        clock.finish(method, time.perf_counter() - begin)
        left = clock.left(number + 1)
        watch(dataclasses.replace(event, kind="end", row=row, left=left))
        rows.append(row)
    return rows


def stages(
    event: Event, clock: Clock, watch: Watcher, begin: float
) -> Callable[[str, int, int], None]:
    """Return the function of (stage, done, total) that tells a run's progress on."""

    def report(stage: str, done: int, total: int) -> None:
        left = clock.left(event.number - 1, time.perf_counter() - begin)
        progress: dict[str, Any] = {"stage": stage, "done": done, "total": total}
        watch(dataclasses.replace(event, kind="stage", left=left, **progress))

    return report
