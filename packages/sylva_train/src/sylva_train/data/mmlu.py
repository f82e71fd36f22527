"""MMLU in its own folders, as five-shot prompts.

D. Hendrycks et al.: Measuring Massive Multitask Language Understanding. ICLR 2021,
<https://arxiv.org/abs/2009.03300>.
"""

from __future__ import annotations

from pathlib import Path

from sylva_train._checks import DataError

from .files import Row, Table, read_table

__all__ = ["is_mmlu", "read_mmlu"]

#: Examples before each question; ``dev/`` has as many of each subject.
SHOTS = 5
LETTERS = tuple("ABCD")
#: Folder of each split; the examples themselves are what there is to train on.
FOLDERS = {"train": "dev", "dev": "dev", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "val"
)


def is_mmlu(folder: Path) -> bool:
    """Whether a folder has the examples of a subject where MMLU has them."""
    return any(folder.glob("dev/*_dev.csv"))


def read_mmlu(folder: Path, split: str) -> Table:
    """Read a split of all subjects: columns ``subject``, ``input`` and ``output``.

    Parameters
    ----------
    folder : Path
        With ``dev/``, ``val/`` or ``test/`` and in them ``SUBJECT_dev.csv`` and the like,
        without a header: question, four options, letter of the answer.
    split : str
        ``"validation"`` or ``"test"``: each question after five examples of ``dev/``,
        where these are too long after fewer of them, as the authors have it;
        ``"train"``: these examples, each by itself.

    Raises
    ------
    DataError
        If there is no such split, or a row is no question.
    """
    name = FOLDERS.get(split, split)
    files = sorted(folder.glob(f"{name}/*_{name}.csv"))
    if not files:
        msg = f"{folder}: no file {name}/SUBJECT_{name}.csv for the split {split!r}."
        raise DataError(msg)
    rows: list[tuple[int, Row]] = []
    shorter: list[tuple[str, ...]] = []
    for file in files:
        subject = file.stem.removesuffix(f"_{name}")
        about = subject.replace("_", " ")
        before = [
            f"The following are multiple choice questions (with answers) about {about}.\n\n"
        ]
        if name != "dev":
            examples = questions(folder / "dev" / f"{subject}_dev.csv")[:SHOTS]
            for _, text, answer in examples:
                before.append(f"{before[-1]}{text} {answer}\n\n")
        *fewer, most = before
        for line, text, answer in questions(file):
            row: Row = {"subject": subject, "input": most + text, "output": answer}
            rows.append((line, row))
            shorter.append(tuple(start + text for start in reversed(fewer)))
    columns = ("subject", "input", "output")
    return Table(f"{folder}/{name}", columns, 3, rows, shorter=tuple(shorter))


def questions(file: Path) -> list[tuple[int, str, str]]:
    """Return line, question with its options, and answer of each row.

    Raises
    ------
    DataError
        If a row has other than six fields, or its answer is no letter of an option.
    """
    table = read_table(file, lambda *_: False)
    found = []
    for line, row in table.rows:
        fields = [str(row[number]).strip() for number in range(table.width)]
        if len(fields) != 6 or fields[-1] not in LETTERS:
            msg = (
                f"{file}:{line}: expected a question, four options and one of"
                f" {', '.join(LETTERS)}; got {len(fields)} fields, the last {fields[-1]!r}."
            )
            raise DataError(msg)
        options = zip(LETTERS, fields[1:5], strict=True)
        lines = [fields[0], *(f"{letter}. {option}" for letter, option in options)]
        found.append((line, "\n".join([*lines, "Answer:"]), fields[-1]))
    return found
