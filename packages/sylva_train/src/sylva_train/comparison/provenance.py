"""With what and when results were made: versions, commit, machine and date."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sylva_train.training import pick_device

__all__ = ["made", "stamp"]


def stamp() -> dict[str, Any]:
    """Return with what, but for the machine, and when something is made, as JSON."""
    packages = ("sylva-train", "hmatrix", "torch", "transformers", "peft", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": sys.version.split()[0]},
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def made(
    device: str = "auto", rows: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return with what and when something was measured, as JSON.

    Parameters
    ----------
    device : str
        As `pick_device` takes it.
    rows : iterable of mappings
        Those of the runs, which may be older, with `stamp` under ``"made"``. The last
        one's counts; where others differ in more than the date, ``"earlier"`` says by what.
    """
    picked = pick_device(device)
    stamps = [row["made"] for row in rows if "made" in row] or [stamp()]
    last = max(stamps, key=lambda made: str(made["date"]))
    about = {
        "device": torch.cuda.get_device_name(picked)
        if picked.type == "cuda"
        else processor(),
        "threads": torch.get_num_threads(),
        **last,
    }
    earlier = sorted({unlike(made, last) for made in stamps} - {""})
    return about | ({"earlier": earlier} if earlier else {})


def unlike(made: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what one stamp has that another one has not, in words."""
    versions = made["versions"].items()
    words = [f"{n} {v}" for n, v in versions if other["versions"].get(n) != v]
    if made["commit"] != other["commit"]:
        words.append(f"commit {made['commit'] or 'unknown'}")
    return ", ".join(words)


def processor() -> str:
    """Return the CPU's name."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the checkout that the package runs from, if any.

    Followed by ``-dirty`` where the package is not as it was committed.
    """
    file = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words],
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    try:
        # An environment may be installed inside of another project's checkout.
        found = git("ls-files", file.name) and git("rev-parse", "--short", "HEAD")
        changed = found and git("diff", "--name-only", "HEAD", "--", "..")
        return f"{found}-dirty" if changed else found or None
    except FileNotFoundError:
        return None
