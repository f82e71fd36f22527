"""All runs of a comparison, each in its own process, and their results."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sylva_train._checks import (
    ConfigError,
    OutputExistsError,
    SylvaError,
    atomic_write,
)
from sylva_train.training import pick_device

from .plan import Comparison

__all__ = ["compare", "load_results"]

FORMAT = "sylva-comparison/1"


def start(spec: dict[str, Any], result_path: Path) -> dict[str, Any]:
    """Run a spec in a process of its own and return its row.

    Raises
    ------
    SylvaError
        If the process fails; its own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec_path = Path(folder) / "spec.json"
        spec_path.write_text(json.dumps(spec), encoding="utf-8")
        code = "from sylva_train.comparison import worker; worker()"
        done = subprocess.run(
            [sys.executable, "-c", code, spec_path, result_path], check=False
        )
    if done.returncode:
        msg = (
            f"the run of {spec['method']} with seed {spec['training']['seed']} failed"
            f" (exit code {done.returncode}); see its message above. Finished runs are"
            " kept: the same command goes on after them."
        )
        raise SylvaError(msg)
    row: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    return row


def compare(
    comparison: Comparison,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    notify: Callable[[str, dict[str, Any] | None], None] | None = None,
) -> dict[str, Any]:
    """Run every method with every seed and gather the results.

    Parameters
    ----------
    comparison : Comparison
        What to compare.
    output : path
        Folder for ``results.json`` and, a file a run, ``runs/``.
    resume : bool
        Keep the runs that a killed comparison of the same options finished.
    notify : callable, optional
        Called with a run's name, and None at its beginning or its row at its end.

    Returns
    -------
    dict
        The results, as ``results.json`` holds them.

    Raises
    ------
    OutputExistsError
        If ``output`` has results and ``resume`` is not set.
    ConfigError
        If ``resume`` meets runs of other options.
    SylvaError
        If a run fails.
    """
    output = Path(output)
    runs = output / "runs"
    if output.exists() and any(output.iterdir()) and not resume:
        msg = (
            f"the output `{output}` exists; nothing was changed. Choose another folder,"
            " or go on with it (`resume=True`, `--resume`)."
        )
        raise OutputExistsError(msg)
    runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in comparison.seeds:
        for method in comparison.methods:
            spec = comparison.spec(method, seed)
            name = f"{method.replace(':', '-')}-{seed}"
            path, spec_path = runs / f"{name}.json", runs / f"{name}.spec.json"
            if path.exists() and spec_path.exists():
                if json.loads(spec_path.read_text(encoding="utf-8")) != spec:
                    msg = (
                        f"`{path}` is of a comparison with other options; choose another"
                        " output folder."
                    )
                    raise ConfigError(msg)
                row = json.loads(path.read_text(encoding="utf-8"))
            else:
                if notify is not None:
                    notify(name, None)
                with atomic_write(spec_path) as temporary:
                    temporary.write_text(json.dumps(spec), encoding="utf-8")
                row = start(spec, path)
            if notify is not None:
                notify(name, row)
            rows.append(row)
    results = gather(comparison, rows)
    with atomic_write(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")
    return results


def gather(comparison: Comparison, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Turn the runs' rows into the results that reports are made of."""
    results: dict[str, Any] = {
        "format": FORMAT,
        "setup": setup(comparison, rows),
        "masks": {},
        "scores": {},
        "factor": None,
        "runs": [],
    }
    for row in rows:
        for part in ("masks", "scores"):
            if part in row:
                results[part][row["method"]] = row[part]
        results["factor"] = results["factor"] or row.get("factor")
        extra = ("masks", "scores", "factor", "total", "examples", "labels")
        results["runs"].append({k: v for k, v in row.items() if k not in extra})
    return results


def setup(comparison: Comparison, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return on what, with what and when a comparison was run."""
    task, training = comparison.task, comparison.training
    device = pick_device(training.device)
    packages = ("sylva-train", "hmatrix", "torch", "transformers", "peft", "numpy")
    steps = max((len(row["history"]) for row in rows), default=0)
    return {
        "model": task.model,
        "data": f"{task.data} ({task.eval_data or task.eval_split})",
        "task": task.task,
        "labels": rows[0]["labels"],
        "metric": task.metric or "accuracy",
        "train_examples": rows[0]["examples"][0],
        "eval_examples": rows[0]["examples"][1],
        "steps": training.steps or steps,
        "batch_size": training.batch_size,
        "density": comparison.sylva.density,
        "block_size": comparison.sylva.block_size,
        "seeds": list(comparison.seeds),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": sys.version.split()[0]},
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "total_weights": rows[0]["total"],
        "command": " ".join(["sylva", *sys.argv[1:]]),
    }


def processor() -> str:
    """Return the CPU's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the checkout that the package runs from, if any."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``results.json`` of a comparison.

    Raises
    ------
    ConfigError
        If it is not one.
    """
    try:
        results: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"`{path}` cannot be read as the results of a comparison ({error})."
        raise ConfigError(msg) from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        msg = f"`{path}` does not hold results of the format {FORMAT}."
        raise ConfigError(msg)
    return results
