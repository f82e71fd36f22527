"""A job in a process of its own: starting it, listening to it, ending it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sylva_train import _checks
from sylva_train._checks import SylvaError
from sylva_train._files import write_text

from .events import decode_event, send
from .provenance import stamp

__all__ = ["RUNS", "Job", "Processes", "Tell", "done", "start", "worker"]

#: Folder of the jobs' files, in that of what they belong to.
RUNS = "runs"

#: Told (stage, done, total).
Tell = Callable[[str, int, int], None]

#: What a run's process ends with where its error was told to the parent.
TOLD = 3
CODE = "from sylva_train.comparison import worker; worker()"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do in a process of its own.

    Parameters
    ----------
    name : str
        Of its files.
    label : str
        For people.
    kind : str
        Jobs of one kind take about as long as each other.
    spec : dict
        What is to be done, as JSON: the function's argument.
    function : str
        ``module:function`` of (spec, tell), which returns the job's row as JSON.
    """

    name: str
    label: str
    kind: str
    spec: dict[str, Any]
    function: str = "sylva_train.comparison.single:run"

    def files(self, output: Path) -> tuple[Path, Path]:
        """Return the paths of the row and of the spec."""
        runs = output / RUNS
        return runs / f"{self.name}.json", runs / f"{self.name}.spec.json"


def done(job: Job, output: Path) -> bool:
    """Whether a job is finished."""
    return all(path.exists() for path in job.files(output))


class Processes:
    """The processes of jobs, which share the CPU and can all be ended at once.

    Parameters
    ----------
    workers : int
        How many there are at a time.
    """

    def __init__(self, workers: int = 1):
        self.environment = dict(os.environ)
        if workers > 1:
            threads = max(1, (os.cpu_count() or 1) // workers)
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.alive: set[subprocess.Popen[str]] = set()
        self.ended = False

    @contextlib.contextmanager
    def child(self, command: list[Any]) -> Iterator[subprocess.Popen[str]]:
        """Yield a process that ends when the block does, and when this process does."""
        process = subprocess.Popen(
            command,
            # Nothing is ever written: its end tells the child that the parent is gone.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=self.environment,
            # A terminal's Ctrl-C is for the parent, which then ends the child.
            start_new_session=True,
        )
        self.alive.add(process)
        if self.ended:  # while another thread was about to start this one
            process.kill()
        try:
            yield process
        finally:
            self.alive.discard(process)
            if process.poll() is None:
                process.kill()
            with process:
                pass

    def kill(self) -> None:
        """End all of them, and those that are yet to start."""
        self.ended = True
        for process in list(self.alive):
            process.kill()


def start(job: Job, output: Path, report: Tell, processes: Processes) -> dict[str, Any]:
    """Do a job in a process of its own and return its row; its files keep both.

    Parameters
    ----------
    job : Job
        What to do.
    output : Path
        The folder that its files are in.
    report : callable
        Called with (stage, done, total) as the run goes on.
    processes : Processes
        Those that it becomes one of.

    Raises
    ------
    SylvaError
        Of the class that the run failed with.
    """
    error: dict[str, Any] | None = None
    result_path, spec_path = job.files(output)
    write_text(spec_path, json.dumps(job.spec))
    command = [sys.executable, "-c", CODE, job.function, spec_path, result_path]
    with processes.child(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            body = decode_event(line)
            if body is None:
                sys.stderr.write(line)
            elif "error" in body:
                error = body
            elif "warning" in body:
                warnings.warn(body["warning"], stacklevel=2)
            else:
                report(body["stage"], body["done"], body["total"])
        code = process.wait()
    if error is not None:
        kind = getattr(_checks, error["error"], SylvaError)
        msg = f"{job.label}: {error['message']}"
        raise kind(msg)
    if code:
        reason = f"exit code {code}; its message is above"
        if code < 0:
            reason = f"signal {-code}, which may mean that the memory was exhausted"
        msg = f"{job.label}: it ended early ({reason}). Finished runs are kept."
        raise SylvaError(msg)
    row: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    return row


def end_with_parent() -> None:
    """End this process when its parent has ended, however that came about."""

    def wait() -> None:
        # Not sys.stdin: its lock would be held when the interpreter shuts down.
        while os.read(0, 1):
            pass
        os._exit(TOLD)

    threading.Thread(target=wait, daemon=True).start()


def tell_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    """Tell the parent of a warning to users; libraries' for developers are not."""
    if issubclass(category, UserWarning):
        send(warning=str(message))


def worker() -> None:
    """Call the function that the command line names with its spec (a child's entry)."""
    module, _, name = sys.argv[1].partition(":")
    spec_path, result_path = map(Path, sys.argv[2:4])
    end_with_parent()
    warnings.showwarning = tell_warning
    # Bars of saving a model would run into those of the parent.
    logging.disable_progress_bar()
    function = getattr(importlib.import_module(module), name)
    try:
        spec = json.loads(spec_path.read_text(encoding="utf-8"))
        row = function(
            spec, lambda stage, n, all_: send(stage=stage, done=n, total=all_)
        )
    except SylvaError as error:
        send(error=type(error).__name__, message=str(error))
        raise SystemExit(TOLD) from None
    write_text(result_path, json.dumps(row | {"made": stamp()}))
