"""Learning rates, chosen before what is compared runs: on data and a seed of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sylva_train._checks import ConfigError, NonFiniteError, check_positive
from sylva_train.baselines import parse_method
from sylva_train.metrics import METRICS, known_metrics
from sylva_train.options import LABELLED
from sylva_train.workflow import HELD_OUT

from .plan import Comparison
from .process import Job

__all__ = [
    "TUNING_SEED",
    "at_best_rates",
    "attempt",
    "best_rates",
    "check_multiples",
    "rate_jobs",
    "trials",
    "tuning_metric",
]

#: Seed to choose learning rates with, which no reported run should have.
TUNING_SEED = 100
#: What does a run: one that diverges is no reason to lose the others.
TRY_RATE = "sylva_train.comparison.single:try_rate"
#: What has a learning rate: a method, or a cell of a table.
Key = TypeVar("Key")


def check_multiples(
    multiples: Sequence[float], seeds: Iterable[int]
) -> tuple[float, ...]:
    """Return multiples of learning rates to try before runs with these seeds.

    Raises
    ------
    ConfigError
        If one is none, or a seed is that of the trials.
    """
    for multiple in multiples:
        check_positive("tune", multiple)
    if multiples and TUNING_SEED in seeds:
        msg = (
            f"`seeds` must not have {TUNING_SEED} beside `tune`: rates are chosen with it,"
            " and would be reported on what they were chosen by."
        )
        raise ConfigError(msg)
    return tuple(dict.fromkeys(multiples))


def tuning_metric(comparison: Comparison) -> str:
    """Return what learning rates are chosen by.

    A language model's is its perplexity: what it is evaluated by may be of other data,
    and takes long.
    """
    task = comparison.task.task
    return comparison.metric if task in LABELLED else known_metrics(task)[0]


def attempt(one: Comparison, seed: int, **about: str) -> Job:
    """Return the run of a comparison of one method as a job that may diverge.

    ``about`` are the job's ``name``, ``label`` and ``kind``.
    """
    (method,) = one.methods
    spec = one.spec(method, seed) | {"describe": False}
    return Job(**about, spec=spec, function=TRY_RATE)


def rate_jobs(
    one: Comparison, multiples: Sequence[float], *, name: str, label: str, kind: str
) -> dict[float, Job]:
    """Return the runs that choose a rate of a comparison of one method, by rate.

    They are on a tenth of the training data that is held out, at multiples of the
    method's own rate. Their names and labels begin with those given.
    """
    (method,) = one.methods
    task = dataclasses.replace(
        one.task, eval_data=None, eval_split=HELD_OUT, metric=tuning_metric(one)
    )
    found = {}
    for multiple in multiples:
        rate = float(f"{multiple * one.rate(method):.3g}")
        found[rate] = attempt(
            dataclasses.replace(one, task=task, learning_rates={method: rate}),
            TUNING_SEED,
            name=f"tune-{name}-{rate:g}",
            label=f"{label}, rate {rate:g}",
            kind=kind,
        )
    return found


def trials(
    comparison: Comparison, multiples: Sequence[float]
) -> dict[tuple[str, float], Job]:
    """Return the runs that choose a comparison's rates, by method and rate."""
    found: dict[tuple[str, float], Job] = {}
    multiples = check_multiples(multiples, comparison.seeds)
    for method in comparison.methods:
        if method == "frozen":  # nothing is trained
            continue
        jobs = rate_jobs(
            dataclasses.replace(comparison, methods=(method,)),
            multiples,
            name=method.replace(":", "-"),
            label=parse_method(method).label,
            kind=f"tune {method}",
        )
        found |= {(method, rate): job for rate, job in jobs.items()}
    return found


def at_best_rates(
    comparison: Comparison, rows: Mapping[tuple[str, float], Mapping[str, Any]]
) -> Comparison:
    """Return a comparison with the rates that did best in its trials, if there were any.

    Raises
    ------
    NonFiniteError
        If a method diverged at every rate.
    """
    best = best_rates(
        rows,
        metric=lambda _: tuning_metric(comparison),
        label=lambda method: parse_method(method).label,
    )
    rates = comparison.learning_rates | best
    return dataclasses.replace(comparison, learning_rates=rates)


def best_rates(
    rows: Mapping[tuple[Key, float], Mapping[str, Any]],
    metric: Callable[[Key], str],
    label: Callable[[Key], str],
) -> dict[Key, float]:
    """Return the rate at which each key scored best; of equal ones the first.

    Raises
    ------
    NonFiniteError
        If one diverged at every rate.
    """
    best: dict[Key, tuple[float, float]] = {}
    for (key, rate), row in rows.items():
        if row["score"] is None or not math.isfinite(row["score"]):
            continue
        score = row["score"] if METRICS[metric(key)] else -row["score"]
        if key not in best or score > best[key][0]:
            best[key] = score, rate
    for (key, rate), row in rows.items():
        if key not in best:
            msg = (
                f"{label(key)} diverged at every rate that was tried, {rate:g} among"
                f" them ({row.get('diverged', 'its score is not finite')}). Give"
                " smaller multiples to `tune`, in another folder."
            )
            raise NonFiniteError(msg)
    return {key: rate for key, (_, rate) in best.items()}
