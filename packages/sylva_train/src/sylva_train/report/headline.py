"""What a comparison found, in plain sentences computed from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .summary import Paired, Results, Row, best, metric_of, percentage, summary_rows

__all__ = ["Headline", "headline"]


@dataclass(frozen=True)
class Headline:
    """The result in one sentence, the sentences that qualify it, and key figures.

    Parameters
    ----------
    title : str
        One sentence.
    sentences : tuple of str
        What a reader should know beside it.
    figures : tuple of (str, str)
        Number and what it counts.
    """

    title: str
    sentences: tuple[str, ...]
    figures: tuple[tuple[str, str], ...]


def headline(results: Results) -> Headline:
    """Say in plain words what a comparison found, and what it did not.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    found = Findings(results)
    winner = found.winner
    if winner is None:
        count = len(found.rows)
        title = f"{count} methods compared; no Sylva rule among them has a score."
        return Headline(title, tuple(found.cautions()), ())
    title = found.gap(winner)
    sentences = [found.levels(winner), *found.versus_random()]
    found.figures.append(
        (percentage(winner.trainable_fraction), "of the weights trained")
    )
    sentences += [*found.costs(winner), *found.cautions()]
    return Headline(title, tuple(sentences), tuple(found.figures))


class Findings:
    """What stands out of a comparison; what says it adds its key figures."""

    def __init__(self, results: Results) -> None:
        self.metric, self.rows = metric_of(results), summary_rows(results)
        self.sign = 1 if self.metric.higher else -1
        self.steps = results.get("setup", {}).get("steps")
        self.figures: list[tuple[str, str]] = []
        self.frozen = self.best(lambda row: row.method == "frozen")
        self.full = self.best(lambda row: row.method == "full")
        self.lora = self.best(lambda row: row.method.split(":")[0] == "lora")
        self.control = self.best(lambda row: row.is_random)
        # The control is Sylva's machinery without its idea: it stands for Sylva only
        # where nothing else can.
        self.winner = self.best(lambda row: row.is_sylva and not row.is_random)
        if self.winner is None:
            self.winner, self.control = self.control, None

    def best(self, among: Callable[[Row], bool]) -> Row | None:
        """Return the row of the best mean score among some that have one."""
        return best(self.rows, self.metric, among)

    def gap(self, winner: Row) -> str:
        """Say how much of the way from frozen to full fine-tuning Sylva goes."""
        if self.frozen is None or self.full is None:
            return self.level(winner)
        gap, gain = self.above(self.frozen, self.full), self.above(self.frozen, winner)
        if gap <= 0:
            return (
                "Full fine-tuning gains nothing over the frozen model here, so there is"
                " no gap for Sylva to close."
            )
        if gain <= 0:
            return "Sylva does not improve on the frozen model here."
        self.figures.append((f"{gain / gap:.0%}", "of the frozen-to-full gap closed"))
        part = f"{gain / gap:.0%} of the gap" if gain < gap else "the whole gap"
        beside = ""
        if self.control is not None:
            share = self.above(self.frozen, self.control) / gap
            beside = f"; random blocks close {max(share, 0.0):.0%}"
            if share >= 1:
                beside = "; random blocks close all of it"
                if gain >= gap:
                    beside = "; so do random blocks"
        return (
            f"Sylva closes {part} between the frozen and the fully fine-tuned model"
            f" while training {percentage(winner.trainable_fraction)} of the"
            f" weights{beside}."
        )

    def level(self, winner: Row) -> str:
        """Say what Sylva reaches, where there is no gap to hold that against."""
        reached, words = self.value(winner), self.metric.words
        beside = ""
        if self.control is not None:
            beside = f"; random blocks reach {self.value(self.control)}"
        self.figures.append((reached, f"{words}, {winner.rule}"))
        return (
            f"Sylva reaches {reached} {words} while training"
            f" {percentage(winner.trainable_fraction)} of the weights{beside}."
        )

    def above(self, low: Row, high: Row) -> float:
        """Return by how much one row's score is better than another's."""
        return self.sign * ((high.mean or 0.0) - (low.mean or 0.0))

    def value(self, row: Row) -> str:
        """Print a row's mean score."""
        return self.metric.value(row.mean or 0.0)

    def levels(self, winner: Row) -> str:
        """Say which scores the title rests on."""
        others = [
            f"{self.value(row)} {words}"
            for row, words in (
                (self.frozen, "frozen"),
                (self.lora, "with LoRA"),
                (self.full, "with full fine-tuning"),
            )
            if row is not None
        ]
        spread = "one seed"
        if winner.std is not None:
            spread = (
                f"± {self.metric.number(winner.std)} over {len(winner.scores)} seeds"
            )
        rank = "" if winner.is_random else ", the best scoring rule here"
        text = (
            f"{self.metric.heading} is {self.value(winner)} with"
            f" {winner.rule}{rank} ({spread})"
        )
        return f"{text}, against {_listed(others)}." if others else f"{text}."

    def versus_random(self) -> list[str]:
        """Say whether choosing blocks by score beat drawing them at random."""
        # By means over the common seeds: a rule is not picked on seeds of its own.
        rules = [
            (self.sign * row.versus_random.mean, row, row.versus_random)
            for row in self.rows
            if row.versus_random is not None
        ]
        if not rules:
            return []
        lead, row, pair = max(rules, key=lambda rule: rule[0])
        unit = "points" if self.metric.percent else self.metric.words
        self.figures.append(
            (
                self.metric.signed(pair.mean) + self.metric.spread(pair.std),
                f"{unit}, {row.rule} against random blocks",
            )
        )
        return [self.verdict(row.rule, lead, pair, len(rules))]

    def verdict(self, rule: str, lead: float, pair: Paired, rules: int) -> str:
        """Say whether the best rule's lead over random blocks is more than chance.

        The rule is the best one on the very scores it is judged by, so the interval is
        widened for the number of rules it was picked from.
        """
        count = len(pair.differences)
        seeds = "one seed" if count == 1 else f"{count} seeds, paired"
        if lead <= 0:
            place = f"is {self.metric.gap(lead)} behind" if lead < 0 else "ties with"
            return (
                "Scoring does not beat random blocks here: the best scored rule,"
                f" {rule}, {place} them ({seeds})."
            )
        ahead = f"{rule} is {self.metric.gap(lead)} ahead of them"
        if count == 1:
            return (
                "Whether scoring beats random blocks cannot be told from one seed:"
                f" {ahead}, but there is no spread to hold that against."
            )
        margin = pair.margin(rules)
        # One digit more than scores have: an end near zero must show its side.
        finer = replace(self.metric, decimals=self.metric.decimals + 1)
        low, high = (finer.signed(pair.mean + end) for end in (-margin, margin))
        widened = f", widened for picking the best of {rules} rules"
        interval = (
            f"95% interval {low} to {high}{widened if rules > 1 else ''}; {seeds}"
        )
        if lead > margin:
            return (
                f"Scoring beats random blocks beyond the spread: {ahead} ({interval})."
            )
        return (
            "Scoring does not beat random blocks beyond the spread over seeds:"
            f" {ahead}, which chance could explain ({interval})."
        )

    def costs(self, winner: Row) -> Iterator[str]:
        """Say what a step, its memory and the scoring cost against other methods."""
        for row, name in ((self.full, "full fine-tuning"), (self.lora, "LoRA")):
            if row is None:
                continue
            step = _ratio(winner.step_seconds, row.step_seconds)
            memory = _ratio(winner.peak_memory, row.peak_memory)
            if row is self.full:
                costs = (
                    (step, f"the step time of {name}"),
                    (memory, f"the peak memory of {name}"),
                )
                self.figures += [cost for cost in costs if cost[0]]
            parts = [f"a step takes {step} the time"] if step else []
            parts += [f"peak memory is {memory}"] if memory else []
            if parts:
                yield f"Against {name}, {_listed(parts)}."
        if winner.score_seconds and winner.step_seconds:
            steps = max(1, round(winner.score_seconds / winner.step_seconds))
            by = f" by {winner.scored:,} examples" if winner.scored else ""
            there = f", of which there are {self.steps:,}" if self.steps else ""
            yield (
                f"Scoring the blocks{by} takes {winner.score_seconds:.3g} s once, the time"
                f" of {steps:,} training steps{there}."
            )
        if self.lora is not None and self.lora.trainable and winner.trainable:
            ratio = self.lora.trainable / winner.trainable
            if not 0.8 < ratio < 1.25:
                yield (
                    f"The budgets differ: LoRA trains {_times(ratio)} the weights that"
                    " Sylva does."
                )

    def cautions(self) -> Iterator[str]:
        """Say what limits the comparison."""
        if max(len(row.scores) for row in self.rows) == 1:
            yield "Every method ran with one seed, so no spread is known."
        for row in self.rows:
            if row.failed:
                yield (
                    f"{row.label}: {row.failed} of {row.failed + len(row.scores)} runs"
                    " gave no finite score; the means leave it out."
                )


def _times(ratio: float) -> str:
    """Print a ratio."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def _ratio(one: float | None, other: float | None) -> str:
    """Print the ratio of two costs, nothing where one was not measured."""
    return _times(one / other) if one and other else ""


def _listed(parts: Sequence[str]) -> str:
    """Join parts as a sentence does."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
