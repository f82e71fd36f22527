"""A job in a process of its own: starting it, listening to it, ending it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sylva_train import _checks
from sylva_train._checks import SylvaError, write_text

from .events import decode_event, send
from .job import Job

__all__ = ["Processes", "start", "worker"]

#: What a run's process ends with where its error was told to the parent.
TOLD = 3
CODE = "from sylva_train.comparison import worker; worker()"


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


def start(
    job: Job,
    result_path: Path,
    report: Callable[[str, int, int], None],
    processes: Processes,
) -> dict[str, Any]:
    """Do a job in a process of its own and return its row.

    Parameters
    ----------
    job : Job
        What to do.
    result_path : path
        Where the process writes its row.
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
    with tempfile.TemporaryDirectory() as folder:
        spec_path = Path(folder) / "spec.json"
        spec_path.write_text(json.dumps(job.spec), encoding="utf-8")
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
    # What was imported is not garbage: a collection takes a tenth of the time.
    gc.freeze()
    try:
        spec = json.loads(spec_path.read_text(encoding="utf-8"))
        row = function(
            spec, lambda stage, n, all_: send(stage=stage, done=n, total=all_)
        )
    except SylvaError as error:
        send(error=type(error).__name__, message=str(error))
        raise SystemExit(TOLD) from None
    finally:
        # nanobind, where Triton is there, takes what stays frozen for leaked.
        gc.unfreeze()
    write_text(result_path, json.dumps(row))
