"""Jobs, each in a process of its own: done once, kept, and gone on with after a stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError, check_integer
from sylva_train.workflow import check_folder, differences

from .events import Clock, Event, Watcher
from .process import RUNS, Job, Processes, done, start

__all__ = ["RESULTS", "check_output", "jobs_folder", "run_jobs"]

RESULTS = "results.json"


def check_output(
    output: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> bool:
    """Refuse a folder that is in the way, and tell whether runs in it are to be kept.

    Raises
    ------
    OutputExistsError
        If it has something in it and neither ``resume`` nor ``overwrite`` is set, or has
        something else than runs.
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
def jobs_folder(
    jobs: Iterable[Job],
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Make the folder of some jobs, for good only once a job in it is done.

    What was there before comes back if none is, unless ``resume`` goes on with it.
    ``check``, which may take long, is called before anything is changed, unless all jobs
    are done.

    Raises
    ------
    OutputExistsError
        As `check_output`.
    """
    keep = check_output(output, resume=resume, overwrite=overwrite)
    if not (keep and all(done(job, output) for job in jobs)):
        check()
    aside = output.with_name(f".{output.name}.old")
    if output.exists() and not keep:
        shutil.rmtree(aside, ignore_errors=True)
        output.replace(aside)
    (output / RUNS).mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        rows = (output / RUNS).glob("*.json")
        if all(path.name.endswith(".spec.json") for path in rows):
            shutil.rmtree(output)
            if aside.exists():
                aside.replace(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


def check_same(jobs: Sequence[Job], output: Path) -> None:
    """Raise `ConfigError` if a job that is to be kept has another spec."""
    for job in jobs:
        if not done(job, output):
            continue
        path, spec_path = job.files(output)
        found = read(spec_path)
        if job.spec != found:
            differ = "; ".join(differences(found, job.spec)) or "another first seed"
            msg = (
                f"`{output}` has runs with other options: {differ} ({path.name}). Go on"
                " with the same ones, or choose another folder."
            )
            raise ConfigError(msg)


def read(path: Path) -> dict[str, Any]:
    """Read a file of a job.

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


def run_jobs(
    jobs: Sequence[Job], output: Path, watch: Watcher, *, workers: int = 1
) -> list[dict[str, Any]]:
    """Do the jobs that are not done yet, and return the rows of all, in order.

    Parameters
    ----------
    jobs : sequence of Job
        What to do.
    output : Path
        A folder that `jobs_folder` made.
    watch : callable
        Told each `Event`, one at a time.
    workers : int
        Jobs at a time; several share the CPU's cores evenly.

    Raises
    ------
    ConfigError
        If a job that is to be kept has another spec.
    SylvaError
        If a job fails; those that are under way are stopped, the finished ones kept.
    """
    check_integer("workers", workers, 1)
    check_same(jobs, output)
    queue = Queue(jobs, output, watch, workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(queue.do, number) for number in range(len(jobs))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException as error:  # Ctrl-C above all
            queue.failure = queue.failure or error
            raise
        finally:
            if queue.failure is not None:
                queue.processes.kill()
    if queue.failure is not None:
        raise queue.failure
    return [future.result() for future in futures]


class Queue:
    """Jobs on their way, told of by one thread at a time."""

    def __init__(self, jobs: Sequence[Job], output: Path, watch: Watcher, workers: int):
        self.jobs, self.output, self.watch = jobs, output, watch
        self.processes = Processes(workers)
        self.clock = Clock([job.kind for job in jobs], workers)
        self.lock = threading.RLock()
        self.failure: BaseException | None = None

    def tell(self, event: Event, **changes: Any) -> None:
        """Tell of an event."""
        with self.lock:
            self.watch(dataclasses.replace(event, **changes))

    def do(self, number: int) -> dict[str, Any]:
        """Do a job and return its row, unless another one failed meanwhile."""
        if self.failure is not None:
            raise self.failure
        try:
            return self.row(number)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def row(self, number: int) -> dict[str, Any]:
        """Do a job, unless it is done, and return its row."""
        job = self.jobs[number]
        event = Event(
            kind="begin",
            label=job.label,
            number=number + 1,
            count=len(self.jobs),
            left=self.clock.left(),
        )
        if done(job, self.output):
            row = read(job.files(self.output)[0])
            self.clock.finish(number)
            self.tell(event, kind="kept", row=row)
            return row
        self.tell(event)
        begin = time.perf_counter()

        def report(stage: str, done: int, total: int) -> None:
            left = self.clock.left(number, time.perf_counter() - begin)
            progress = {"stage": stage, "done": done, "total": total}
            self.tell(event, kind="stage", left=left, **progress)

        row = start(job, self.output, report, self.processes)
        self.clock.finish(number, time.perf_counter() - begin)
        self.tell(event, kind="end", row=row, left=self.clock.left())
        return row
