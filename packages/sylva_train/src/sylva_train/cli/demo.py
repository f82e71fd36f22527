"""The demo: a short comparison, then one adapter made, kept, loaded again and asked."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from sylva_train._files import folder_size
from sylva_train.baselines import parse_method
from sylva_train.comparison import Comparison, check_output
from sylva_train.progress import size_words
from sylva_train.workflow import finetune, predict

from . import show
from .comparing import run_comparison
from .printing import out, prose, say, table, written

__all__ = ["SENTENCES", "run_demo"]

#: What the methods are for, to people who see them for the first time.
REASONS = {
    "frozen": "nothing of the model is trained: the floor",
    "full": "every weight is trained: what is usual, and costs most",
    "lora": "low-rank additions, as many weights as Sylva trains",
    "sylva:kfac": "the blocks that matter most by second-order information",
    "sylva:random": "blocks drawn by lot: is it worth choosing them?",
}
METHOD = "sylva:kfac"
#: Sentences of nobody's data set, and what a reader would answer.
SENTENCES = (
    (
        "The Golden Palace is a cheap coffee shop that its customers rate 5 out of 5.",
        "high",
    ),
    ("Prices are high at The Mill, yet customers give it a single star.", "low"),
    (
        "The Wrestlers is a family friendly pub by the river with Italian food.",
        "not stated",
    ),
    ("Nobody has a good word to say about the food at The Cricketers.", "low"),
    (
        "Diners find Zizzi neither good nor bad; three stars of five seem fair.",
        "average",
    ),
)


def introduce(comparison: Comparison) -> None:
    """Say what will be done, and why."""
    task, training = comparison.task, comparison.training
    ways, seeds = len(comparison.methods), len(comparison.seeds)
    say("1. Compare", "bold")
    prose(
        "The task: which customer rating does a sentence about a restaurant state: high,"
        " average, low or none? One has to read it, since 'high' may be the price and a"
        " rating may be told in stars, marks or words. Accuracy is that on sentences held"
        f" out. The model, {task.model}, learns from {training.steps} batches of"
        f" {training.batch_size} sentences, in each of these ways:\n"
    )
    for name in comparison.methods:
        label = parse_method(name).label
        say(f"   {label:<24} {REASONS.get(name, '')}".rstrip())
    again = f", each way with {seeds} seeds, since one run may be lucky"
    prose(
        f"\nThat makes {ways * seeds} runs{again if seeds > 1 else ''}. Each is a process"
        " of its own, so that its memory can be measured.\n"
    )


def run_demo(
    comparison: Comparison, output: Path, *, resume: bool, overwrite: bool, command: str
) -> None:
    """Compare, fine-tune once, save, load and predict."""
    check_output(output, resume=resume, overwrite=overwrite)
    introduce(comparison)
    results = run_comparison(
        comparison,
        output,
        resume=resume,
        overwrite=overwrite,
        quiet=False,
        command=command,
    )
    show.comparison(results)
    keep(comparison, output / "finetuned")
    use(output / "finetuned")
    adapter = output / "finetuned" / "adapter"
    again = f"sylva finetune runs/mine --model {shlex.quote(comparison.task.model)}"
    written(
        {"report": output / "report.html", "adapter": adapter, "everything": output},
        f"{again} --data YOUR.csv",
    )


def keep(comparison: Comparison, folder: Path) -> None:
    """Fine-tune once more, into a folder."""
    say("\n2. Keep", "bold")
    prose("Sylva once more with seed 0, this time to save what it learns.")
    rate = comparison.rate(METHOD)
    training = dataclasses.replace(comparison.training, lr=rate)
    run = finetune(comparison.task, comparison.sylva, training, folder, resume=True)
    found = run["metrics"]
    prose(
        f"It scores {show.score_text(found['metric'], found['score'])}. The adapter takes"
        f" {size_words(folder_size(folder / 'adapter'))} on disk; the whole model would take"
        f" {size_words(4 * run['total'])}."
    )


def use(folder: Path) -> None:
    """Ask a fine-tuned model what it makes of some sentences."""
    say("\n3. Use", "bold")
    prose(
        "The adapter is loaded into a fresh copy of the model, which reads sentences that"
        " are in no data set:"
    )
    answers = predict(folder, [text for text, _ in SENTENCES])
    rows = [
        (text, truth, answer, f"{probability:.0%}")
        for (text, truth), (answer, probability) in zip(SENTENCES, answers, strict=True)
    ]
    columns = ("sentence", "a reader says", "the model", "sure")
    out().print(table(columns, rows, texts=3))
