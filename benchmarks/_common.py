"""What every benchmark records beside its figures, and how it measures."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def setting(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine, versions, commit and date of a run."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"python": platform.python_version()}
    versions |= {
        p: importlib.metadata.version(p) for p in ("numpy", "torch", *packages)
    }
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": _commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def interleave(
    repeats: int,
    *tasks: Callable[[], Any],
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Time tasks in turn, so that a busy spell of the machine hits them all alike.

    Returns for each the median, the least and the quartiles, in seconds.
    """
    for _ in range(warmup):
        for task in tasks:
            task()
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, taken in zip(tasks, times, strict=True):
            start = clock()
            task()
            taken.append(clock() - start)
    return [summary(taken) for taken in times]


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    found = {"median": middle, "min": min(values), "q1": low, "q3": high}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def write(name: str, results: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` in one step."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return options


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
