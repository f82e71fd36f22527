"""What a comparison found, in plain sentences computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .summary import Metric, Results, Row, best, metric_of, percentage, summary_rows

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


def times(ratio: float) -> str:
    """Print a ratio."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def headline(results: Results) -> Headline:
    """Say in plain words what a comparison found, and what it did not.

    Parameters
    ----------
    results : dict
        Results of `sylva compare`.

    Returns
    -------
    Headline
        Title, sentences and key figures, computed from the numbers alone.

    Raises
    ------
    DataError
        If ``results`` has another format or no runs.
    """
    metric = metric_of(results)
    rows = summary_rows(results)
    named = {row.method: row for row in rows if row.mean is not None}
    frozen, full = named.get("frozen"), named.get("full")
    lora = best(rows, metric, lambda row: row.method.split(":")[0] == "lora")
    control = best(rows, metric, lambda row: row.is_random)
    # The control is Sylva's machinery without its idea: it may not stand for Sylva.
    winner = best(rows, metric, lambda row: row.is_sylva and not row.is_random)
    winner = winner or control
    sentences: list[str] = []
    figures: list[tuple[str, str]] = []
    if winner is None:
        title = f"{len(rows)} methods compared; no Sylva rule among them has a score."
    else:
        other = control if control is not winner else None
        title = _gap(winner, other, frozen, full, metric, figures)
        sentences.append(_levels(winner, frozen, full, lora, metric))
        verdict = _versus_random(rows, metric, figures)
        if verdict:
            sentences.append(verdict)
        figures.append(
            (percentage(winner.trainable_fraction), "of the weights trained")
        )
        sentences += _costs(winner, full, lora, figures)
        if lora is not None and lora.trainable and winner.trainable:
            ratio = lora.trainable / winner.trainable
            if not 0.8 < ratio < 1.25:
                sentences.append(
                    f"The budgets differ: LoRA trains {times(ratio)} the weights that"
                    " Sylva does."
                )
    sentences += _cautions(rows)
    return Headline(title, tuple(sentences), tuple(figures))


def _gap(
    winner: Row,
    control: Row | None,
    frozen: Row | None,
    full: Row | None,
    metric: Metric,
    figures: list[tuple[str, str]],
) -> str:
    """Say how much of the way from frozen to full fine-tuning Sylva goes."""
    reached = winner.mean or 0.0
    weights = percentage(winner.trainable_fraction)
    if frozen is None or full is None:
        level = f"{metric.value(reached)} {metric.words}"
        beside = ""
        if control is not None:
            beside = f"; random blocks reach {metric.value(control.mean or 0.0)}"
        figures.append((metric.value(reached), f"{metric.words}, {winner.rule}"))
        return f"Sylva reaches {level} while training {weights} of the weights{beside}."
    sign = 1 if metric.higher else -1
    base = frozen.mean or 0.0
    gap, gain = sign * ((full.mean or 0.0) - base), sign * (reached - base)
    if gap <= 0:
        return (
            "Full fine-tuning gains nothing over the frozen model here, so there is no "
            "gap for Sylva to close."
        )
    if gain <= 0:
        return "Sylva does not improve on the frozen model here."
    figures.append((f"{gain / gap:.0%}", "of the frozen-to-full gap closed"))
    part = f"{gain / gap:.0%} of the gap" if gain < gap else "the whole gap"
    beside = ""
    if control is not None:
        share = sign * ((control.mean or 0.0) - base) / gap
        beside = f"; random blocks close {max(share, 0.0):.0%}"
        if share >= 1:
            both = gain >= gap
            beside = (
                "; so do random blocks" if both else "; random blocks close all of it"
            )
    return (
        f"Sylva closes {part} between the frozen and the fully fine-tuned model while "
        f"training {weights} of the weights{beside}."
    )


def _levels(
    winner: Row, frozen: Row | None, full: Row | None, lora: Row | None, metric: Metric
) -> str:
    """Say which scores the title rests on."""
    others = [
        f"{metric.value(row.mean)} {words}"
        for row, words in (
            (frozen, "frozen"),
            (lora, "with LoRA"),
            (full, "with full fine-tuning"),
        )
        if row is not None and row.mean is not None
    ]
    seeds = len(winner.scores)
    spread = (
        "one seed"
        if winner.std is None
        else f"± {metric.number(winner.std)} over {seeds} seeds"
    )
    rank = "" if winner.is_random else ", the best scoring rule here"
    text = (
        f"{metric.words.capitalize()} is {metric.value(winner.mean or 0.0)} with "
        f"{winner.rule}{rank} ({spread})"
    )
    return f"{text}, against {_listed(others)}." if others else f"{text}."


def _listed(parts: Sequence[str]) -> str:
    """Join parts as a sentence does."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _versus_random(
    rows: Sequence[Row], metric: Metric, figures: list[tuple[str, str]]
) -> str | None:
    """Say whether choosing blocks by score beat drawing them at random.

    The rule is the best one on the very scores it is judged by, so the interval is
    widened for the number of rules it was picked from.
    """
    rules = [row for row in rows if row.versus_random is not None]
    sign = 1 if metric.higher else -1
    # Means over the common seeds, so that a rule is not picked on seeds of its own.
    rule = max(
        rules,
        key=lambda row: sign * row.versus_random.mean if row.versus_random else 0.0,
        default=None,
    )
    if rule is None or rule.versus_random is None:
        return None
    pair = rule.versus_random
    lead, count = sign * pair.mean, len(pair.differences)
    unit = "points" if metric.percent else metric.words
    figures.append(
        (
            metric.signed(pair.mean) + metric.spread(pair.std),
            f"{unit}, {rule.rule} against random blocks",
        )
    )
    if lead <= 0:
        place = f"is {metric.gap(lead)} behind" if lead < 0 else "ties with"
        return (
            "Scoring does not beat random blocks here: the best scored rule, "
            f"{rule.rule}, {place} them ({_seeds(count)})."
        )
    ahead = f"{rule.rule} is {metric.gap(lead)} ahead of them"
    if count == 1:
        return (
            "Whether scoring beats random blocks cannot be told from one seed: "
            f"{ahead}, but there is no spread to hold that against."
        )
    margin = pair.margin(len(rules))
    low, high = pair.mean - margin, pair.mean + margin
    widened = f", widened for picking the best of {len(rules)} rules"
    # One digit more than scores have: an end near zero must show its side.
    finer = replace(metric, decimals=metric.decimals + 1)
    interval = (
        f"95% interval {finer.signed(low)} to {finer.signed(high)}"
        f"{widened if len(rules) > 1 else ''}; {_seeds(count)}"
    )
    if lead > margin:
        return f"Scoring beats random blocks beyond the spread: {ahead} ({interval})."
    return (
        "Scoring does not beat random blocks beyond the spread over seeds: "
        f"{ahead}, which chance could explain ({interval})."
    )


def _seeds(count: int) -> str:
    """Print how many pairs of runs there are."""
    return "one seed" if count == 1 else f"{count} seeds, paired"


def _costs(
    winner: Row,
    full: Row | None,
    lora: Row | None,
    figures: list[tuple[str, str]],
) -> list[str]:
    """Say what a step, its memory and the scoring cost against other methods."""
    sentences = []
    for row, name in ((full, "full fine-tuning"), (lora, "LoRA")):
        if row is None:
            continue
        parts = []
        if winner.step_seconds and row.step_seconds:
            ratio = winner.step_seconds / row.step_seconds
            parts.append(f"a step takes {times(ratio)} the time")
            if row is full:
                figures.append((times(ratio), "the step time of full fine-tuning"))
        if winner.peak_memory and row.peak_memory:
            ratio = winner.peak_memory / row.peak_memory
            parts.append(f"peak memory is {times(ratio)}")
            if row is full:
                figures.append((times(ratio), "the peak memory of full fine-tuning"))
        if parts:
            sentences.append(f"Against {name}, {_listed(parts)}.")
    if winner.score_seconds and winner.step_seconds:
        steps = winner.score_seconds / winner.step_seconds
        sentences.append(
            f"Scoring the blocks takes {winner.score_seconds:.3g} s once, the time of "
            f"{max(1, round(steps))} training steps."
        )
    return sentences


def _cautions(rows: Sequence[Row]) -> list[str]:
    """Say what limits the comparison."""
    cautions = []
    if max(len(row.scores) for row in rows) == 1:
        cautions.append("Every method ran with one seed, so no spread is known.")
    for row in rows:
        if row.failed:
            total = row.failed + len(row.scores)
            cautions.append(
                f"{row.label}: {row.failed} of {total} runs gave no finite score; the "
                "means leave it out."
            )
    return cautions
