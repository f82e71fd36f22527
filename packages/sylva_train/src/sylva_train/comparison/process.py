"""A run in a process of its own: starting it, listening to it, ending it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sylva_train import _checks
from sylva_train._checks import SylvaError, atomic_write

from .events import decode_event, send
from .single import run

__all__ = ["start", "worker"]

#: What a run's process ends with where its error was told to the parent.
TOLD = 3
CODE = "from sylva_train.comparison import worker; worker()"


def start(
    spec: dict[str, Any], result_path: Path, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run a spec in a process of its own and return its row.

    Parameters
    ----------
    spec : dict
        From `Comparison.spec`.
    result_path : path
        Where the process writes its row.
    report : callable
        Called with (stage, done, total) as the run goes on.

    Raises
    ------
    SylvaError
        Of the class that the run failed with.
    """
    error: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as folder:
        spec_path = Path(folder) / "spec.json"
        spec_path.write_text(json.dumps(spec), encoding="utf-8")
        with child([sys.executable, "-c", CODE, spec_path, result_path]) as process:
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
    name = f"the run of {spec['method']} with seed {spec['training']['seed']}"
    if error is not None:
        kind = getattr(_checks, error["error"], SylvaError)
        msg = f"{name} failed: {error['message']}"
        raise kind(msg)
    if code:
        reason = f"exit code {code}; its message is above"
        if code < 0:
            reason = f"signal {-code}, which may mean that the memory was exhausted"
        msg = f"{name} ended early ({reason}). Finished runs are kept."
        raise SylvaError(msg)
    row: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    return row


@contextlib.contextmanager
def child(command: list[Any]) -> Any:
    """Yield a process that ends when the block does, and when this process does."""
    process = subprocess.Popen(
        command,
        # Nothing is ever written: its end tells the child that the parent is gone.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        # A terminal's Ctrl-C is for the parent, which then ends the child.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with process:
            pass


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
    """Do the run of the spec file that the command line names (a child's entry)."""
    spec_path, result_path = map(Path, sys.argv[1:3])
    end_with_parent()
    warnings.showwarning = tell_warning
    # Bars of saving a model would run into those of the parent.
    logging.disable_progress_bar()
    # What was imported is not garbage: a collection takes a tenth of the time.
    gc.freeze()
    try:
        spec = json.loads(spec_path.read_text(encoding="utf-8"))
        row = run(spec, lambda stage, n, all_: send(stage=stage, done=n, total=all_))
    except SylvaError as error:
        send(error=type(error).__name__, message=str(error))
        raise SystemExit(TOLD) from None
    with atomic_write(result_path) as temporary:
        temporary.write_text(json.dumps(row), encoding="utf-8")
