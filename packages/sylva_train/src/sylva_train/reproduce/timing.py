"""Seconds of the parts of a step, for candidates that take turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["PHASES", "Phases", "mark", "summarize", "take_turns"]

#: What a step consists of.
PHASES = ("forward", "backward", "optimizer")
#: A candidate's functions of these, called in their order.
Phases = Sequence[Callable[[], Any]]


def mark(device: torch.device) -> Any:
    """Return a moment: of the device's own time line on a GPU, else of the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))  # not of another, current device
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one moment to another; on a GPU both must have passed."""
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000


def take_turns(
    device: torch.device,
    candidates: Mapping[str, Phases],
    repeats: int,
    *,
    in_a_row: int = 1,
    warmup: int = 1,
) -> dict[str, list[list[float]]]:
    """Time the phases of candidates, one after the other in each repetition.

    A busy spell of the machine so hits all of them alike.

    Parameters
    ----------
    device : torch.device
        Where they compute.
    candidates : mapping of str to sequence of callables
        The phases of one step of each.
    repeats : int
        Timings of each candidate.
    in_a_row : int
        Steps of one timing, which is their mean: on a GPU the host so runs ahead, as it
        does in training.
    warmup : int
        Untimed rounds before.

    Returns
    -------
    dict of str to list of list of float
        Of each candidate and repetition, the seconds of its phases.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, phases in candidates.items():
            marks = [mark(device)]
            for _ in range(in_a_row):
                for phase in phases:
                    phase()
                    marks.append(mark(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmup:
                pairs = itertools.pairwise(marks)
                seconds = [between(start, end) for start, end in pairs]
                steps = np.reshape(seconds, (in_a_row, len(phases)))
                taken[name].append(steps.mean(0).tolist())
    return taken


def summarize(turns: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return median, minimum and quartiles of the phases and of their total."""
    times = np.asarray(turns)
    parts = dict(zip(PHASES, times.T, strict=True)) | {"total": times.sum(1)}
    found = {}
    for phase, values in parts.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        numbers = {"median": middle, "min": values.min(), "q1": low, "q3": high}
        found[phase] = {name: float(f"{n:.4g}") for name, n in numbers.items()}
    return found
