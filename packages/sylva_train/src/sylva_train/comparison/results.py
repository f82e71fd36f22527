"""The results of a comparison: put together from its runs, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_train._checks import ConfigError
from sylva_train.metrics import METRICS
from sylva_train.workflow import evaluated_on

from .plan import Comparison
from .provenance import made

__all__ = ["FORMAT", "gather", "load_results"]

#: The layout of the results that reports are made of.
FORMAT = "sylva-comparison/1"


def gather(
    comparison: Comparison,
    rows: list[dict[str, Any]],
    command: str | None,
    tried: Sequence[Mapping[str, Any]] = (),
    tune: Sequence[float] = (),
) -> dict[str, Any]:
    """Turn rows of runs, and of those that chose rates, into what reports are made of."""
    results: dict[str, Any] = {
        "format": FORMAT,
        "setup": setup(comparison, rows) | {"command": command},
        "tune": list(tune),
        "tuning": [
            {name: row[name] for name in ("method", "lr", "score")} for row in tried
        ],
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
    metric = comparison.metric
    steps = max((len(row["history"]) for row in rows), default=0)
    return {
        "model": task.model,
        "data": f"{task.data} ({evaluated_on(task)})",
        "task": task.task,
        "labels": rows[0]["labels"],
        "metric": metric,
        "higher_is_better": METRICS[metric],
        "train_examples": rows[0]["examples"][0],
        "eval_examples": rows[0]["examples"][1],
        "steps": training.steps or steps,
        "batch_size": training.batch_size,
        "density": comparison.sylva.density,
        "block_size": comparison.sylva.block_size,
        "seeds": list(comparison.seeds),
        "total_weights": rows[0]["total"],
        **made(training.device, rows),
    }


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``results.json`` of a comparison.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    dict
        As `compare` returns it.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is of another format.
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
