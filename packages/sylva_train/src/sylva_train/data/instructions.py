"""Super-NaturalInstructions in its own folders, with the prompts of Tk-Instruct.

Y. Wang et al.: Super-NaturalInstructions: Generalization via Declarative Instructions on
1600+ NLP Tasks. EMNLP 2022, <https://arxiv.org/abs/2204.07705>.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sylva_train._checks import DataError

from .files import Row, Table

__all__ = ["is_instructions", "read_instructions"]

#: Examples before each input.
SHOTS = 2


def is_instructions(folder: Path) -> bool:
    """Whether a folder has tasks and their splits where natural-instructions has them."""
    return (folder / "tasks").is_dir() and (folder / "splits" / "default").is_dir()


def read_instructions(
    folder: Path, names: Sequence[str], *, per_task: int, seed: int
) -> Table:
    """Read a split: prompts, each with its task's name and shorter forms, and targets.

    A prompt is the task's definition, two positive examples and the input; its shorter
    forms have one example and none.

    Parameters
    ----------
    folder : Path
        With ``tasks/TASK.json`` and ``splits/default/SPLIT_tasks.txt``.
    names : sequence of str
        Names of the split, of which the first that is there counts. To train on
        (``"train"``) instances are chosen by chance, with their first output. Of other
        splits they are the first ones, which the authors have balanced, with a row for
        each output.
    per_task : int
        Instances of each task at most.
    seed : int
        Seed of the choice.

    Raises
    ------
    DataError
        If there is no such split, or a task's file is missing or of another form.
    """
    lists = folder / "splits" / "default"
    files = [lists / f"{name}_tasks.txt" for name in names]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        have = ", ".join(sorted(file.name for file in lists.glob("*_tasks.txt")))
        msg = (
            f"{lists}: no file {files[0].name} for the split {names[0]!r}; the folder has"
            f" {have or 'no list of tasks'}."
        )
        raise DataError(msg)
    training = "train" in names
    random = np.random.default_rng(seed)
    rows: list[tuple[int, Row]] = []
    shorter: list[tuple[str, ...]] = []
    for name in source.read_text(encoding="utf-8").split():
        task = read_task(folder / "tasks" / f"{name}.json")
        every = task["Instances"]
        order = random.permutation(len(every)) if training else np.arange(len(every))
        chosen = sorted(order[:per_task].tolist())
        for number in chosen:
            first, *others = prompts(task, every[number]["input"])
            for output in outputs(every[number])[: 1 if training else None]:
                row: Row = {"subject": name, "prompt": first, "target": output}
                rows.append((len(rows) + 1, row))
                shorter.append(tuple(others))
    if not rows:
        msg = f"{source}: the tasks have no instances; expected at least one."
        raise DataError(msg)
    columns = ("subject", "prompt", "target")
    return Table(str(source), columns, 3, rows, shorter=tuple(shorter))


def read_task(file: Path) -> dict[str, Any]:
    """Read a task's file.

    Raises
    ------
    DataError
        If it is missing or of another form.
    """
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{file}: the file cannot be read; {error.strerror or error}."
        raise DataError(msg) from error
    except ValueError as error:
        msg = f"{file}: expected a task in JSON; {error}."
        raise DataError(msg) from error
    try:
        prompts(task, "")
        for instance in task["Instances"]:
            instance["input"].strip()
            outputs(instance)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        msg = (
            f"{file}: expected `Definition`, `Positive Examples` and `Instances` with"
            f" `input` and `output`, as natural-instructions has them; got a file without"
            f" ({type(error).__name__}: {error})."
        )
        raise DataError(msg) from error
    return task  # type: ignore[no-any-return]


def outputs(instance: dict[str, Any]) -> list[str]:
    """Return an instance's outputs that are not blank."""
    found = instance["output"]
    every = [found] if isinstance(found, str) else found
    return [output for output in every if output.strip()]


def prompts(task: dict[str, Any], text: str) -> list[str]:
    """Return the prompt of an input with all examples, and with ever fewer."""
    found = task["Definition"]
    definition = found if isinstance(found, str) else found[0]
    parts = []
    for number, example in enumerate(task["Positive Examples"][:SHOTS], start=1):
        given = f" Positive Example {number} -\nInput: {example['input'].strip()}"
        answer = f" Output: {example['output'].strip()}"
        parts.append(f"{ended(given)}\n{ended(answer)}\n\n")
    before = ended(f"Definition: {definition.strip()}")
    question = ended(f"Now complete the following example -\nInput: {text.strip()}")
    return [
        f"{before}\n\n{''.join(parts[:count])}{question}\nOutput: "
        for count in range(len(parts), -1, -1)
    ]


def ended(text: str) -> str:
    """Return a text that ends in a full stop, if in no other mark."""
    return text if text[-1] in string.punctuation else f"{text}."
