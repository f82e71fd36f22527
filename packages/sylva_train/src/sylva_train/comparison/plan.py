"""What a comparison runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sylva_train._artifacts import as_read
from sylva_train._checks import ConfigError, check_integer, check_positive
from sylva_train.baselines import parse_method
from sylva_train.config import SylvaConfig
from sylva_train.metrics import REGRESSION, known_metrics
from sylva_train.options import (
    DEMO,
    DEMO_STEPS,
    DEMO_TASK,
    LABELLED,
    METHODS,
    SylvaOptions,
    TaskConfig,
    TrainingConfig,
)

from .process import Job

__all__ = ["LEARNING_RATES", "Comparison", "demonstration", "suited"]

#: Peak learning rates, chosen on the validation split (benchmarks/bench_rates.py). The
#: serial adapter takes LoRA's; the pruner, SHiRA and Super-Tuning train the same kind of
#: weights as Sylva, and take its rate.
LEARNING_RATES = {
    "full": 4e-4,
    "lora": 4e-3,
    "adapter": 4e-3,
    "shira": 4e-3,
    "supertuning": 4e-3,
    "kfac-pruner": 4e-3,
    "sylva": 4e-3,
}

#: Metrics of predictions alone, without logits: those of a head on frozen features.
OF_PREDICTIONS = ("accuracy", "f1", "f1-binary", "mcc", *REGRESSION)

#: Options of `SylvaConfig` that a comparison passes on: all but the methods', the task's,
#: the runs' and the machine's.
OPTIONS = tuple(
    option.name
    for option in dataclasses.fields(SylvaOptions)
    if option.name
    not in {
        "importance", "curvature", "modules_to_save", "seed", "memory_budget",
        "host_budget",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare.

    Parameters
    ----------
    task : TaskConfig
        Model and data; ``eval_split`` is what the scores are of.
    sylva : SylvaConfig
        Targets, and options of scoring and choosing blocks; rule and curvature are the
        methods'. LoRA gets as many trainable weights.
    training : TrainingConfig
        The loop; the learning rate is the method's.
    methods : tuple of str
        Names that `parse_method` knows.
    seeds : tuple of int
        Of a new head, the data order, dropout and random blocks.
    learning_rates : dict
        Instead of `LEARNING_RATES`; a method's own name goes before ``"sylva"``.

    Raises
    ------
    ConfigError
        If a method or the method of a rate is unknown, or there is no seed, or
        ``"frozen"`` is among the methods of a task without labels, or of one whose
        metric it is not scored by.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    sylva: SylvaConfig = field(default_factory=SylvaConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    methods: tuple[str, ...] = DEMO
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = tuple(dict.fromkeys(parse_method(name).name for name in self.methods))
        object.__setattr__(self, "methods", names)
        # A run that counted twice would make the deviation wrong.
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))
        if not names or not self.seeds:
            msg = "`methods` and `seeds` must each have at least one entry."
            raise ConfigError(msg)
        for seed in self.seeds:
            check_integer("seeds", seed, 0)
        rates = {}
        for name, rate in self.learning_rates.items():
            check_positive("learning_rates", rate)
            rates[name if name in LEARNING_RATES else parse_method(name).name] = rate
        object.__setattr__(self, "learning_rates", rates)
        if "frozen" not in names:
            return
        if self.task.task not in LABELLED:
            msg = (
                f"`methods`: 'frozen' is for `task` {' or '.join(LABELLED)}; leave it out"
                f" for {self.task.task!r}."
            )
            raise ConfigError(msg)
        if self.task.metric not in {None, *OF_PREDICTIONS}:
            msg = (
                f"`metric` {self.task.metric!r} is not one that frozen features are"
                f" scored by; take one of {', '.join(OF_PREDICTIONS)}, or leave the method"
                " out of `methods`."
            )
            raise ConfigError(msg)

    @property
    def metric(self) -> str:
        """The score that is reported."""
        return self.task.metric or known_metrics(self.task.task)[0]

    def rate(self, method: str) -> float:
        """Return a method's peak learning rate."""
        rates = LEARNING_RATES | self.learning_rates
        return rates.get(method, rates.get(method.partition(":")[0], self.training.lr))

    def spec(self, method: str, seed: int) -> dict[str, Any]:
        """Return what a run's process needs to know, as JSON."""
        rate = self.training.lr if method == "frozen" else self.rate(method)
        training = dataclasses.replace(self.training, seed=seed, lr=rate)
        spec = {
            "method": method,
            "task": dataclasses.asdict(self.task),
            "sylva": {name: getattr(self.sylva, name) for name in OPTIONS},
            "training": dataclasses.asdict(training),
            "describe": method.startswith("sylva") and seed == self.seeds[0],
        }
        return as_read(spec)

    def jobs(self) -> list[Job]:
        """Return the runs: every method with every seed, seed by seed."""
        return [
            Job(
                name=f"{method.replace(':', '-')}-{seed}",
                label=f"{parse_method(method).label}, seed {seed}",
                kind=method,
                spec=self.spec(method, seed),
            )
            for seed in self.seeds
            for method in self.methods
        ]


def suited(task: str) -> tuple[str, ...]:
    """Return the methods that a kind of task can be compared by."""
    frozen = task in LABELLED
    return tuple(name for name in METHODS if frozen or name != "frozen")


def demonstration(
    *,
    task: TaskConfig | None = None,
    steps: int = DEMO_STEPS,
    methods: tuple[str, ...] = DEMO,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> Comparison:
    """Return the short comparison: 5% of MiniLM on the built-in task.

    Parameters
    ----------
    task : TaskConfig, optional
        Instead of `DEMO_TASK`: MiniLM on ``"e2e-rating"``.
    steps : int
        Optimizer steps of each run.
    methods, seeds : tuple
        What to run, and how often.
    """
    return Comparison(
        task=task or DEMO_TASK,
        # As accurate there as by 128, at a third of the cost (benchmarks/bench_samples.py).
        sylva=SylvaConfig(density=0.05, block_size=32, samples=32),
        training=TrainingConfig(steps=steps),
        methods=methods,
        seeds=seeds,
    )
