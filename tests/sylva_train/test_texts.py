"""Metrics of texts agree with the libraries and scripts that define them."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import shutil
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sylva_train._checks import ConfigError, DataError
from sylva_train.data import load_data
from sylva_train.evaluation import check_libraries, score_texts, texts
from sylva_train.metrics import GENERATION

for library in ("nltk", "pycocoevalcap", "rouge_score", "sacrebleu"):
    pytest.importorskip(library)

ANSWERS = [
    "Blue Spice is a coffee shop in the centre of the city.",
    "There is no family-friendly pub, and it isn't near £20.",
    "Cheap food.",
]
REFERENCES = [
    [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a shop.",
    ],
    ["The pub is not family-friendly; it costs £20."],
    ["The food is cheap.", "Cheap food!", "It has cheap, good food."],
]
WORDS = st.lists(st.sampled_from(["a", "pub", "near", "the", "river"]), max_size=12)


@pytest.fixture(autouse=True)
def no_java(request, monkeypatch):
    """Starting Java takes seconds; tests of METEOR say so."""
    if request.node.get_closest_marker("property") is None:
        monkeypatch.setattr(shutil, "which", lambda _: None)


def split(text: str) -> list[str]:
    for mark in ".,;!":
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


def test_bleu_is_that_of_sacrebleu():
    import sacrebleu

    streams = list(itertools.zip_longest(*REFERENCES))
    expected = sacrebleu.corpus_bleu(ANSWERS, streams, lowercase=True).score
    assert score_texts(ANSWERS, REFERENCES)["bleu"] == expected > 0


@given(
    pairs=st.lists(
        st.tuples(WORDS.filter(lambda w: len(w) > 4), WORDS.filter(bool)),
        min_size=1,
        max_size=5,
    )
)
def test_nist_of_single_references_is_that_of_nltk(pairs):
    from nltk.translate.nist_score import corpus_nist

    answers, references = zip(*pairs, strict=True)
    found = texts.nist(
        [" ".join(answer) for answer in answers], [[" ".join(r)] for r in references]
    )
    expected = corpus_nist([[r] for r in references], list(answers))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_nist_matches_any_of_several_references():
    # Both words are found, each in another reference, and each has log2(4/1) bits.
    assert texts.nist(["a b"], [["a c", "d b"]]) == pytest.approx(2.0)


def test_rouge_l_is_the_best_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in group)
        for answer, group in zip(ANSWERS, REFERENCES, strict=True)
    ]
    found = score_texts(ANSWERS, REFERENCES)["rouge_l"]
    assert found == pytest.approx(sum(best) / 3)
    # Of "a b c" in "a x c": two of three words, either way.
    assert texts.rouge_l(["a b c"], [["a x c"]]) == pytest.approx(2 / 3)


def test_cider_is_that_of_pycocoevalcap():
    from pycocoevalcap.cider.cider import Cider

    answers = ["blue spice is a shop", "a cheap pub", ""]
    references = [["blue spice is a coffee shop", "a shop"], ["a cheap pub"], ["food"]]
    expected, _ = Cider().compute_score(
        dict(enumerate(references)), {i: [text] for i, text in enumerate(answers)}
    )
    assert texts.cider(answers, references) == expected > 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It isn't Kid-Friendly, is it?", "it is n't kid-friendly is it"),
        ("the children’s (£20-25) menu -- 3.5 stars...", "the children 's £ 20-25 menu 3.5 stars"),
        ("'The Mill'\n\"café\" & bar; a|||b", "the mill café & bar a | | | b"),
        ("...", ""),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_penn_treebank_without_punctuation(text, tokens):
    assert texts.plain(text) == tokens


def groups():
    """A sentence of each meaning representation, and the others, as its references."""
    data = load_data("e2e-nlg", task="causal-lm", split="validation")
    found = defaultdict(list)
    for text, target in zip(data.texts, data.targets, strict=True):
        found[text].append(target)
    several = [group for group in found.values() if len(group) > 1]
    return [group[0] for group in several], [group[1:] for group in several]


def test_scores_are_those_of_the_e2e_challenge():
    # By measure_scores.py -p of github.com/tuetschek/e2e-metrics, commit 1b9c4d8.
    found = score_texts(*groups())
    assert found["bleu"] == pytest.approx(100 * 0.6278209072243728)
    assert found["nist"] == pytest.approx(8.00511194864532)
    assert found["cider"] == pytest.approx(1.9734622609961392)
    assert found["rouge_l_coco"] == pytest.approx(0.6604817160283654)


@pytest.mark.property
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_meteor_is_that_of_the_e2e_challenge():
    assert texts.meteor(*groups()) == pytest.approx(0.45505749302728193)
    assert texts.meteor(["", "food"], [["a pub"], ["good food", "food"]]) > 0


@given(kept=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=4))
def test_a_text_that_is_a_reference_is_perfect(kept):
    found = score_texts(kept, [["another one", text] for text in kept])
    assert found["rouge_l"] == found["exact_match"] == 1


@pytest.mark.parametrize("answers", [[""], ["food"], ["", "food"], ["?!"], ["\n|||\n"]])
@pytest.mark.parametrize("reference", ["food", "...", "a b c d e f"])
def test_texts_of_no_word_and_of_one_have_scores(answers, reference):
    found = score_texts(answers, [[reference]] * len(answers))
    metrics = {"bleu", "nist", "rouge_l", "rouge_l_coco", "cider", "exact_match"}
    assert found.keys() == metrics
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def test_exact_matches_heed_neither_case_nor_punctuation():
    wanted = [["Yes."], ["no", "an  apple"], ["3"]]
    assert texts.exact_match([" yes", "An apple!", "4"], wanted) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7, and 7 more.\n#### 1,014", 1014),
        ("The answer is: 1,014.", 1014),
        ("It is $7.50 in all", 7.5),
        ("#### -3 of 5", -3),
        ("10-3", 3),
        ("7.", 7),
        ("none", None),
        ("3 #### none", None),
        ("The answer is: 16\n\nQuestion: How many are 3 and 4?", 16),
        ("The answer is 5 * 3 = 15.", 15),
        ("The answer is 4. No, the answer is:\n-8 of 9\n10", 9),
        ("Of 3 the answer is none.", 3),
    ],
)
def test_the_final_number_is_the_answer(text, number):
    found = texts.final_number(text)
    assert found == number if number is None else float(found) == number


def test_answers_are_compared_as_numbers():
    wanted = [["#### 1,000"], ["The answer is: 2.50"], ["#### 3"]]
    assert texts.answer(["1000.0", "2.5 #### 2.5", "no"], wanted) == pytest.approx(
        2 / 3
    )
    assert "answer" not in score_texts(["3"], [["three"]])
    with pytest.raises(DataError, match="'three' has no number"):
        score_texts(["3"], [["three"]], "answer")


@pytest.mark.parametrize(
    "metric", ["bleu", "nist", "rouge-l", "rouge-l-coco", "cider", "meteor"]
)
def test_a_library_that_is_missing_is_named_where_it_is_needed(monkeypatch, metric):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert score_texts(["a"], [["a"]]).keys() == {"exact_match"}
    with pytest.raises(ConfigError, match=r"pip install 'sylva-train\[metrics\]'"):
        score_texts(["a"], [["a"]], metric)


def test_without_java_only_meteor_fails():
    with pytest.raises(ConfigError, match=r"needs Java.*default-jre"):
        score_texts(["a"], [["a"]], "meteor")
    with pytest.warns(UserWarning, match="`meteor` is left out.*needs Java"):
        assert "meteor" not in score_texts(["a"], [["a"]], "bleu", meteor=True)
    for metric in GENERATION:
        if metric != "meteor":
            check_libraries(metric)


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("wc -l < references", 8),  # 2 answers, 4 references each
        ("cat answers | head -c 1 >&2; echo 'out of memory' >&2; exit 3", "out of memory"),
        ("echo much", "could not convert"),
        ("sleep 60", "timed out"),
    ],
)  # fmt: skip
def test_meteors_program_can_neither_hang_nor_print(
    monkeypatch, tmp_path, capfd, script, value
):
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: "java")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(texts, "PATIENCE", (0.5, 0))
    case = ["a\nb", ""], [["a"], ["b", "c", "d", "e"]]
    # Not asked for, it is not even started.
    assert "meteor" not in score_texts(*case, "rouge-l")
    if isinstance(value, int):
        assert score_texts(*case, "meteor")["meteor"] == value
        assert score_texts(*case, "rouge-l", meteor=True)["meteor"] == value
    else:
        with pytest.raises(texts.MeteorError, match=value):
            score_texts(*case, "meteor")
        with pytest.warns(UserWarning, match=f"`meteor` is left out.*{value}"):
            assert "meteor" not in score_texts(*case, "rouge-l", meteor=True)
    assert capfd.readouterr() == ("", "")


def test_every_text_needs_a_reference():
    for answers, references in ([], []), (["a"], [[]]), (["a"], [["a"], ["b"]]):
        with pytest.raises(DataError, match="at least one for each answer"):
            score_texts(answers, references)
