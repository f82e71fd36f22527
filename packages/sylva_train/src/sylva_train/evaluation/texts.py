"""Metrics of written texts against references, by the libraries that define them."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import shutil
import string
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Any

from sylva_train._checks import ConfigError, DataError, SylvaError, check_choice
from sylva_train.metrics import GENERATION, key_of

__all__ = ["check_libraries", "score_groups", "score_texts"]

#: What each metric imports; all of it comes with the extra ``metrics``.
LIBRARIES = {
    "bleu": ("sacrebleu",),
    "nist": ("nltk", "sacrebleu"),
    "meteor": ("pycocoevalcap",),
    "rouge-l": ("rouge_score",),
    "rouge-l-coco": ("pycocoevalcap",),
    "cider": ("pycocoevalcap",),
}
#: Seconds that METEOR may take to start, and for each text.
PATIENCE = (600, 1)
# The Penn Treebank's tokens, whose own program needs Java: contractions apart, hyphens and
# the marks inside a number not. Punctuation that the E2E challenge leaves out is no token.
TOKEN = re.compile(
    r"n't\b|\w+?(?=n't\b)|'(?:s|re|ve|ll|m|d)\b|\w+(?:-\w+|(?<=\d)[.,]\d+)*"
    r"|[^\w\s.,:;?!'\"`()\[\]{}-]"
)
# No minus is part of "10-3".
NUMBER = re.compile(r"(?<![0-9])-?[0-9][0-9,]*(?:\.[0-9]+)?")
# What MetaMathQA's answers say last; a model may go on with another question behind it.
SAID = "answer is"

Texts = Sequence[str]
#: For each text the references that it may be like.
References = Sequence[Sequence[str]]


def check_libraries(metric: str) -> None:
    """Raise `ConfigError` if what a metric needs is not installed; say how to get it."""
    for library in LIBRARIES.get(metric, ()):
        if importlib.util.find_spec(library) is None:
            msg = (
                f'`metric` "{metric}" needs {library}: `pip install'
                " 'sylva-train[metrics]'`."
            )
            raise ConfigError(msg)
    if metric == "meteor" and shutil.which("java") is None:
        msg = (
            "METEOR needs Java, and no `java` is on the PATH; install a Java runtime"
            " (Debian: `apt install default-jre-headless`), or do not ask for it."
        )
        raise ConfigError(msg)


def score_texts(
    answers: Texts,
    references: References,
    metric: str | None = None,
    *,
    meteor: bool = False,
) -> dict[str, float]:
    """Score texts by every metric of `GENERATION` that can be computed.

    METEOR alone must be asked for: its Java program takes from seconds to minutes.

    Parameters
    ----------
    answers : sequence of str
        One text a prompt; may be empty.
    references : sequence of sequences of str
        At least one for each of them.
    metric : str, optional
        The metric that must be among those found. Others are left out where their
        library is not installed, and ``"answer"`` where a prompt has no reference with a
        number.
    meteor : bool
        Whether METEOR is wanted beside another metric; it is left out with a warning
        where it cannot be had.

    Returns
    -------
    dict of str to float
        ``bleu``, from 0 to 100: sacrebleu, mteval-v13a's tokens without case. ``nist``:
        n-grams of up to five of the same tokens, any of the references matched, as
        mteval-v13a and the E2E challenge do. ``meteor`` if asked for, from 0 to 1:
        version 1.5 with normalisation, of tokens without punctuation. ``cider``, from 0
        to 10, of the same tokens. ``rouge_l``, from 0 to 1: mean F-measure against the best
        reference, of stems (as Super-NaturalInstructions has it). ``rouge_l_coco``, from 0 to 1: that
        of the E2E challenge, of CIDEr's tokens: the best precision and the best recall of
        any reference, recall weighed more. ``exact_match``, from 0 to 1: without case,
        punctuation and blanks. ``answer``, from 0 to 1: the number after
        the last ``####``, else the last one of the line after "answer is", else the last
        of all is that of a reference (GSM8K).

    Raises
    ------
    ConfigError
        If ``metric`` needs what is not installed.
    MeteorError
        If ``metric`` is ``"meteor"`` and its program fails.
    DataError
        If there is no text, or one without a reference.
    """
    if metric is not None:
        check_choice("metric", metric, GENERATION)
    if not answers or len(answers) != len(references) or not all(references):
        msg = (
            "`references` must be at least one for each answer;"
            f" got {len(answers)} answers and {len(references)} groups of them."
        )
        raise DataError(msg)
    found = {}
    for name in GENERATION:
        if name == "meteor" and not (meteor or metric == name):
            continue
        try:
            check_libraries(name)
            found[key_of(name)] = SCORERS[name](answers, references)
        except SylvaError as error:
            if name == metric:
                raise
            if name == "meteor":
                warnings.warn(f"`meteor` is left out: {error}", stacklevel=2)
    return found


def score_groups(
    answers: Texts, references: References, names: Sequence[str], metric: str
) -> dict[str, float]:
    """Return a metric of each group of texts, by the name that each text has."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    score = SCORERS[metric]
    return {
        name: score(
            [answers[i] for i in places[name]], [references[i] for i in places[name]]
        )
        for name in sorted(places)
    }


class MeteorError(SylvaError, RuntimeError):
    """The Java program of METEOR was started, and failed."""


@functools.cache
def tokenizer() -> Any:
    """Return mteval-v13a's tokenizer."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def words(text: str) -> list[str]:
    """Return mteval-v13a's tokens in lower case: those of BLEU and NIST."""
    return str(tokenizer()(text)).lower().split()


def plain(text: str) -> str:
    """Return tokens without punctuation: those of METEOR and CIDEr."""
    return " ".join(TOKEN.findall(text.lower().replace("’", "'")))


def bleu(answers: Texts, references: References) -> float:
    """Return the BLEU of the corpus by sacrebleu."""
    from sacrebleu import BLEU

    most = max(map(len, references))
    streams: list[Any] = [
        [group[i] if i < len(group) else None for group in references]
        for i in range(most)
    ]
    # `force` only keeps sacrebleu from warning of texts that seem to be tokenized.
    scorer = BLEU(lowercase=True, force=True)
    return float(scorer.corpus_score(list(answers), streams).score)


def nist(answers: Texts, references: References, order: int = 5) -> float:
    """Return the NIST score of the corpus.

    nltk's own counts the matches of one reference only, the best, and so is lower than
    the NIST script where there are several; with one reference they agree.
    """
    from nltk.translate.nist_score import nist_length_penalty
    from nltk.util import everygrams

    def count(tokens: list[str]) -> Counter[tuple[str, ...]]:
        return Counter(everygrams(tokens, max_len=order))

    texts = [words(text) for text in answers]
    groups = [[words(text) for text in group] for group in references]
    seen: Counter[tuple[str, ...]] = Counter()
    gained, possible = [0.0] * order, [0] * order
    for group in groups:
        for tokens in group:
            seen.update(count(tokens))
            seen[()] += len(tokens)
    for text, group in zip(texts, groups, strict=True):
        best: Counter[tuple[str, ...]] = Counter()
        for tokens in group:
            best |= count(tokens)
        for gram, times in (count(text) & best).items():
            gained[len(gram) - 1] += times * math.log2(seen[gram[:-1]] / seen[gram])
        for n in range(order):
            possible[n] += max(len(text) - n, 0)
    length = sum(sum(map(len, group)) / len(group) for group in groups)
    if not length:
        return 0.0
    total = sum(g / p for g, p in zip(gained, possible, strict=True) if p)
    return float(total * nist_length_penalty(length, sum(map(len, texts))))


def meteor(answers: Texts, references: References) -> float:
    """Return METEOR 1.5 of the corpus, by the Java program inside pycocoevalcap.

    pycocoevalcap's class talks to the program line by line, and waits for ever where a
    line is not answered; files and a limit of time cannot hang.
    """
    import pycocoevalcap

    home = Path(next(iter(pycocoevalcap.__path__)))
    most = max(map(len, references))
    # Every text needs as many references; repeated ones change nothing.
    padded = [list(group) + [group[0]] * (most - len(group)) for group in references]
    lines = {
        "answers": map(plain, answers),
        "references": (plain(text) for group in padded for text in group),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in lines.items():
            text = "".join(f"{line}\n" for line in texts)
            Path(folder, name).write_text(text, encoding="utf-8")
        command = [
            "java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar",
            str(home / "meteor" / "meteor-1.5.jar"), "answers", "references",
            "-l", "en", "-norm", "-r", str(most), "-q",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=PATIENCE[0] + PATIENCE[1] * len(answers),
            )
            return float(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            msg = f"METEOR's Java program failed: {said[-1] if said else error}"
            raise MeteorError(msg) from error


def rouge_l(answers: Texts, references: References) -> float:
    """Return the mean ROUGE-L F-measure against the best reference, by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return fmean(
        scorer.score_multi(group, text)["rougeL"].fmeasure
        for text, group in zip(answers, references, strict=True)
    )


def rouge_l_coco(answers: Texts, references: References) -> float:
    """Return the ROUGE-L of image captions and the E2E challenge, by pycocoevalcap."""
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    return fmean(
        scorer.calc_score([plain(text)], list(map(plain, group)))
        for text, group in zip(answers, references, strict=True)
    )


def cider(answers: Texts, references: References) -> float:
    """Return the CIDEr of the corpus by pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider

    wanted = {i: [plain(t) for t in group] for i, group in enumerate(references)}
    given = {i: [plain(text)] for i, text in enumerate(answers)}
    if not any(map(any, wanted.values())):  # pycocoevalcap stumbles over no word at all
        return 0.0
    return float(Cider().compute_score(wanted, given)[0])


def folded(text: str) -> str:
    """Return a text without case, punctuation and repeated blanks."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(kept.split())


def exact_match(answers: Texts, references: References) -> float:
    """Return the fraction of the texts that are a reference."""
    return fmean(
        folded(text) in map(folded, group)
        for text, group in zip(answers, references, strict=True)
    )


def final_number(text: str) -> Decimal | None:
    """Return the number that a text ends in; None without one.

    It is the first after the last ``####``, else the last of the line that follows the
    last "answer is", else the last of all.
    """
    _, mark, after = text.rpartition("####")
    found = NUMBER.findall(after)
    if mark:
        found = found[:1]
    elif SAID in text.lower():
        line = text.lower().rpartition(SAID)[2].lstrip(": \n").partition("\n")[0]
        found = NUMBER.findall(line) or found
    return Decimal(found[-1].replace(",", "")) if found else None


def answer(answers: Texts, references: References) -> float:
    """Return the fraction of the texts whose final number is that of a reference.

    Raises
    ------
    DataError
        If no reference of a text has a number.
    """
    hits = []
    for text, group in zip(answers, references, strict=True):
        numbers = {final_number(reference) for reference in group} - {None}
        if not numbers:
            msg = f'`metric` "answer": the reference {group[0]!r} has no number.'
            raise DataError(msg)
        hits.append(final_number(text) in numbers)
    return sum(hits) / len(hits)


SCORERS: dict[str, Callable[[Texts, References], float]] = {
    "bleu": bleu,
    "nist": nist,
    "meteor": meteor,
    "rouge-l": rouge_l,
    "rouge-l-coco": rouge_l_coco,
    "cider": cider,
    "exact-match": exact_match,
    "answer": answer,
}
