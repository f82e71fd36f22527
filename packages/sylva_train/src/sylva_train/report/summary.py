"""What a comparison found, method by method, and how its numbers are printed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sylva_train._checks import DataError
from sylva_train.comparison import FORMAT
from sylva_train.metrics import FRACTIONS, key_of
from sylva_train.options import METHODS

__all__ = [
    "BYTES",
    "COUNTS",
    "SECONDS",
    "Metric",
    "Paired",
    "Results",
    "Row",
    "best",
    "deviation",
    "digits",
    "finite",
    "metric_of",
    "percentage",
    "quantity",
    "summary_rows",
]

#: The results dictionary of `sylva compare`, as read from its JSON file.
Results = Mapping[str, Any]

#: The control: blocks drawn at random.
RANDOM = "sylva:random"

#: Rows of the table come in this order, variants of a method behind it. The empty names
#: stand for methods that `METHODS` does not have.
ORDER = (
    *(name for name in METHODS if not name.startswith("sylva:")),
    "",
    "sylva:kfac",
    *(name for name in METHODS if name.startswith("sylva:") and name != RANDOM),
    "sylva:",
    RANDOM,
)

SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))

CONFIDENCE = 0.95

#: How parts of metrics' names are spelled that are no words.
SPELLED = {
    "bleu": "BLEU", "cider": "CIDEr", "coco": "COCO", "f1": "F1", "l": "L", "mcc": "MCC",
    "meteor": "METEOR", "mse": "MSE", "nist": "NIST", "pearson": "Pearson correlation",
    "rouge": "ROUGE", "spearman": "Spearman correlation",
}  # fmt: skip


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Metric:
    """How a score is named and printed.

    Parameters
    ----------
    name : str
        The metric, ``"accuracy"`` say.
    percent : bool
        Whether scores are fractions to print in percent, differences in points.
    decimals : int
        Digits after the point.
    higher : bool
        Whether a higher score is better.
    """

    name: str
    percent: bool
    decimals: int
    higher: bool

    @classmethod
    def of(cls, name: str, *, higher: bool, examples: int) -> Self:
        """Return how a metric is printed that was taken over some examples."""
        percent = key_of(name) in FRACTIONS
        # One example of a small evaluation set is worth more than 0.02 points.
        decimals = (1 if percent else 3) + (examples >= 5000)
        return cls(name, percent, decimals, higher)

    @property
    def factor(self) -> float:
        """What a raw score is multiplied by for print."""
        return 100.0 if self.percent else 1.0

    @property
    def words(self) -> str:
        """Name as words."""
        name = self.name.replace("_", " ")
        return re.sub(r"\w+", lambda part: SPELLED.get(part[0], part[0]), name)

    @property
    def heading(self) -> str:
        """Name as words at the beginning of a sentence."""
        return self.words[:1].upper() + self.words[1:]

    @property
    def title(self) -> str:
        """Name with its unit, for an axis."""
        return f"{self.words}, %" if self.percent else self.words

    def number(self, score: float) -> str:
        """Print a score without its unit."""
        return f"{score * self.factor:.{self.decimals}f}"

    def value(self, score: float) -> str:
        """Print a score with its unit."""
        return self.number(score) + ("%" if self.percent else "")

    def spread(self, std: float | None) -> str:
        """Print a deviation as what follows a mean; nothing where there is none."""
        return "" if std is None else f" ± {self.number(std)}"

    def signed(self, difference: float) -> str:
        """Print a difference with its sign, a true minus rather than a hyphen."""
        size = self.number(abs(difference))
        if not float(size):
            return size
        return ("+" if difference > 0 else "−") + size

    def gap(self, difference: float) -> str:
        """Print a difference's size in words."""
        return self.number(abs(difference)) + (" points" if self.percent else "")


@dataclass(frozen=True)
class Paired:
    """Differences to another method over the seeds that both ran with.

    Parameters
    ----------
    differences : tuple of float
        Score minus the other method's score, one entry a common seed.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.fmean(self.differences)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the differences; None for one seed."""
        return deviation(self.differences)

    def margin(self, comparisons: int = 1) -> float:
        """Half the width of Student's 95% interval of the mean difference.

        Parameters
        ----------
        comparisons : int
            How many methods the reported one was picked from: the interval is widened
            so that all of theirs hold together (Bonferroni).

        Returns
        -------
        float
            Infinite for one seed, which says nothing of the spread.
        """
        from scipy.stats import t

        if self.std is None:
            return math.inf
        count = len(self.differences)
        tail = (1 - CONFIDENCE) / (2 * comparisons)
        return float(t.ppf(1 - tail, count - 1)) * self.std / math.sqrt(count)


@dataclass(frozen=True)
class Row:
    """One method of a comparison, over all of its seeds.

    Times are medians over the seeds, memory and adapter size the largest; None stands
    for what was not measured. `mean` and `std` (sample standard deviation; None for one
    seed) are of the finite scores; `failed` counts the others.
    `trainable` does not count the task's head; `peak_memory` is that of training,
    `score_memory` that of scoring, `scored` the examples that it took.
    """

    method: str
    label: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    failed: int
    trainable: int
    trainable_fraction: float
    step_seconds: float | None
    step_iqr: tuple[float, float] | None
    score_seconds: float | None
    score_memory: int | None
    scored: int | None
    peak_memory: int | None
    adapter_bytes: int | None
    versus_random: Paired | None = None
    best: bool = False

    @property
    def is_sylva(self) -> bool:
        """Whether the method trains Sylva's blocks, random ones included."""
        return self.method.split(":")[0] == "sylva"

    @property
    def is_random(self) -> bool:
        """Whether the method is the control."""
        return self.method == RANDOM or self.method.startswith(f"{RANDOM}:")

    @property
    def rule(self) -> str:
        """The label without the word Sylva, for sentences that have it already."""
        return self.label.removeprefix("Sylva, ")

    @property
    def mean(self) -> float | None:
        """Mean score."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the score."""
        return deviation(self.scores)


def check_results(results: Results) -> None:
    """Raise `DataError` unless ``results`` is a comparison that can be read."""
    found = results.get("format")
    if found != FORMAT:
        msg = (
            f"`results` must have format {FORMAT!r}; got {found!r}. Pass the results of "
            "`sylva compare`, made with this version."
        )
        raise DataError(msg)
    if not results.get("runs"):
        msg = "`results` must have at least one entry in `runs`; got none."
        raise DataError(msg)


def metric_of(results: Results) -> Metric:
    """Return how the scores of a comparison are named and printed."""
    setup = results.get("setup", {})
    return Metric.of(
        str(setup.get("metric") or "score"),
        higher=bool(setup.get("higher_is_better", True)),
        examples=setup.get("eval_examples") or 0,
    )


def finite(value: object) -> bool:
    """Return whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def rank(method: str) -> tuple[int, int]:
    """Return a method's place in the table (its family's, the more exact first)."""
    sylva = method.startswith("sylva")
    fits = [
        (len(name), place)
        for place, name in enumerate(ORDER)
        if method == name or (name and method.startswith(f"{name.rstrip(':')}:"))
    ]
    length, place = max(fits, default=(0, ORDER.index("sylva:" if sylva else "")))
    return place, len(method) - length


def middle(values: Iterable[float | None]) -> float | None:
    """Median of the values that are there."""
    there = [value for value in values if value is not None and finite(value)]
    return statistics.median(there) if there else None


def largest(values: Iterable[float | None]) -> int | None:
    """Largest of the values that are there."""
    there = [int(value) for value in values if value is not None and finite(value)]
    return max(there, default=None)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """Return the differences over common seeds; None if there is no common seed."""
    seeds = sorted(one.keys() & other.keys())
    return Paired(tuple(one[seed] - other[seed] for seed in seeds)) if seeds else None


def scores_by_seed(runs: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Return the finite scores of one method's runs."""
    return {
        int(run["seed"]): float(run["score"])
        for run in runs
        if finite(run.get("score"))
    }


def summarise(method: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """Return the row of one method but for its relations to others."""
    scores = scores_by_seed(runs)
    ranges = [run["step_seconds_iqr"] for run in runs if run.get("step_seconds_iqr")]
    low, high = (middle(float(pair[end]) for pair in ranges) for end in (0, 1))
    label = " ".join(str(runs[0].get("label") or method).split())
    return Row(
        method=method,
        label=label,
        seeds=tuple(scores),
        scores=tuple(scores.values()),
        failed=len(runs) - len(scores),
        trainable=int(runs[0].get("trainable") or 0),
        trainable_fraction=float(runs[0].get("trainable_fraction") or 0.0),
        step_seconds=middle(run.get("seconds_per_step") for run in runs),
        step_iqr=None if low is None or high is None else (low, high),
        score_seconds=middle(run.get("score_seconds") for run in runs),
        score_memory=largest(run.get("score_memory_bytes") for run in runs),
        scored=largest(run.get("scored") for run in runs),
        peak_memory=largest(run.get("peak_memory_bytes") for run in runs),
        adapter_bytes=largest(run.get("adapter_bytes") for run in runs),
    )


def summary_rows(results: Results) -> list[Row]:
    """Summarise each method of a comparison over its seeds, in the order of `ORDER`.

    The scoring rule of the best mean score is marked; random blocks, the control, never
    are.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    check_results(results)
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault(str(run["method"]), []).append(run)
    methods = sorted(runs, key=rank)
    rows = [summarise(method, runs[method]) for method in methods]
    control = next((row for row in rows if row.is_random), None)
    reference = scores_by_seed(runs[control.method]) if control else {}
    winner = best(
        rows, metric_of(results), lambda row: row.is_sylva and not row.is_random
    )
    return [
        replace(
            row,
            best=row is winner,
            versus_random=paired(scores_by_seed(runs[row.method]), reference)
            if row.is_sylva and row is not control
            else None,
        )
        for row in rows
    ]


def best(
    rows: Iterable[Row], metric: Metric, among: Callable[[Row], bool]
) -> Row | None:
    """Return the row of the best mean score; the earlier one on a tie."""
    sign = 1 if metric.higher else -1
    scored = [row for row in rows if among(row) and row.mean is not None]
    return max(scored, key=lambda row: sign * (row.mean or 0.0), default=None)


def digits(value: float) -> str:
    """Print about three significant digits, without an exponent."""
    size = abs(value)
    if 0 < size < 0.095:
        return f"{value:.{1 - math.floor(math.log10(size))}f}"
    return f"{value:.{0 if size >= 100 or not value else 1 if size >= 10 else 2}f}"


def quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Print three digits of a value in the largest unit that it reaches."""
    size, unit = next((u for u in units if abs(value) >= u[0]), units[-1])
    return f"{digits(value / size)} {unit}".rstrip()


def percentage(fraction: float) -> str:
    """Print a fraction in percent with two significant digits."""
    percent = 100 * fraction
    if percent >= 99.95 or not percent:
        return f"{percent:.0f}%"
    decimals = 1 if percent >= 1 else min(4, 1 - math.floor(math.log10(percent)))
    return f"{percent:.{decimals}f}%"
