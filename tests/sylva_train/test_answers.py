"""Commands that fine-tune language models and score what they write or choose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train._checks import ConfigError, DataError
from sylva_train.config import TaskConfig
from sylva_train.data import load_data, load_texts
from sylva_train.evaluation import texts
from sylva_train.workflow import evaluate_folder, finetune
from sylva_train.workflow.task import Task, read_data
from tests.sylva_train.jobs import (
    SMALL,
    STEPS,
    sylva,
    sylva_config,
    task,
    told,
    training,
    write_mmlu,
)
from tests.sylva_train.words import TINY, VOCABULARY, save_folder, word_tokenizer

for library in ("nltk", "pycocoevalcap", "rouge_score", "sacrebleu"):
    pytest.importorskip(library)

T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2}


@pytest.fixture(scope="module", autouse=True)
def no_java():
    """METEOR takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts.shutil, "which", lambda _: None)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, no_java) -> Path:
    """A model of each kind, prompts with two targets each, and a run of each."""
    path = tmp_path_factory.mktemp("home")
    llama = LlamaConfig(**TINY, tie_word_embeddings=False, num_key_value_heads=2)
    save_folder(path / "causal-lm", llama, LlamaForCausalLM, word_tokenizer("decoder"))
    t5 = T5Config(**T5, num_heads=2, decoder_start_token_id=0)
    kind = T5ForConditionalGeneration
    save_folder(path / "seq2seq", t5, kind, word_tokenizer("seq2seq"))
    rows = [
        {"prompt": f"{a} {b}", "completion": [f"{b} {a}", "good film"]}
        for a in "abcde"
        for b in "fghi"
    ]
    write_rows(path / "train.jsonl", rows)
    for name in ("causal-lm", "seq2seq"):
        sylva("finetune", path / f"run-{name}", *options(path, name))
    return path


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def options(home: Path, name: str) -> list:
    return [
        "--model", home / name, "--task", name, "--data", home / "train.jsonl",
        "--max-length", 16, "--max-new-tokens", 3, "--metric", "rouge-l",
        "--eval-every", 2, "--density", 0.2, *SMALL, *STEPS, "--quiet",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq"])
def test_a_run_is_scored_by_what_its_model_writes(home, name):
    run = json.loads((home / f"run-{name}" / "sylva.json").read_text())
    found = json.loads(sylva("evaluate", home / f"run-{name}", "--json", "-q").stdout)
    found.pop("data")
    assert found == run["metrics"]
    assert found["metric"] == "rouge-l"
    assert found["score"] == found["rouge_l"] == run["history"][-1]["score"]
    assert "score" in run["history"][1]
    assert found["examples"] == 2  # a tenth of the prompts
    shown = sylva("inspect", home / f"run-{name}").stdout
    assert f"rouge-l {found['score']:.1%} on 2 examples" in shown


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq"])
def test_answers_are_written_to_a_file(home, tmp_path, name):
    command = [
        "evaluate", home / f"run-{name}", "--data", home / "train.jsonl", "--metric",
        "bleu", "--num-beams", 2, "--answers", tmp_path / "answers.jsonl",
    ]  # fmt: skip
    shown = sylva(*command).stdout
    assert "20 examples" in shown
    assert "exact match" in shown
    assert "predictions" not in shown
    rows = [
        json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()
    ]
    assert [row["prompt"] for row in rows][:5] == ["a f", "a g", "a h", "a i", "b f"]
    assert rows[0]["references"] == ["f a", "good film"]
    assert all(len(row["answer"].split()) <= 3 for row in rows)
    assert len(rows) == 20
    assert "exists" in told(sylva(*command, code=2))
    sylva(*command, "--overwrite", "--eval-limit", 3)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq"])
def test_prompts_without_targets_get_the_same_answers(home, tmp_path, name):
    command = ["evaluate", home / f"run-{name}", "--data", home / "train.jsonl"]
    sylva(*command, "--metric", "bleu", "--answers", tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, lines)}
    prompts = [*answers, "a f"]  # a prompt may stand twice
    rows = [{"id": number, "prompt": text} for number, text in enumerate(prompts)]
    data = write_rows(tmp_path / "new.jsonl", rows)
    shown = sylva("predict", home / f"run-{name}", "--data", data, "-q").stdout
    found = [json.loads(line) for line in shown.splitlines()]
    assert found == [row | {"prediction": answers[row["prompt"]]} for row in rows]
    short = ["--max-new-tokens", 1]
    shown = sylva("predict", home / f"run-{name}", "--data", data, *short).stdout
    texts = [json.loads(line)["prediction"] for line in shown.splitlines()]
    assert all(len(text.split()) <= 1 for text in texts)


def test_instructions_without_answers_are_prompts_as_in_training(home, tmp_path):
    row = {"instruction": "a b", "input": "c"}
    data = write_rows(tmp_path / "new.jsonl", [row])
    found, _ = load_texts(data, task="causal-lm")
    write_rows(data, [row | {"output": "d"}])
    assert found.texts == load_data(data, task="causal-lm").texts
    assert "### Response:" in found.texts[0]


def test_answers_need_a_metric_of_answers(home, tmp_path):
    command = ["evaluate", home / "run-causal-lm", "--answers", tmp_path / "a.jsonl"]
    message = told(sylva(*command, "--metric", "perplexity", code=2))
    assert "`--answers` are there for a `--metric` of what a model writes" in message
    message = told(sylva(*command, "--metric", "meteor", code=2))
    assert "needs Java" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq"])
def test_choices_are_scored_by_subject(home, tmp_path, name):
    rows = [
        {"input": f"{x} ?", "output": x, "subject": s}
        for x in "abab"
        for s in ("x", "y")
    ]
    file = write_rows(tmp_path / "questions.jsonl", rows)
    command = ["evaluate", home / f"run-{name}", "--data", file, "--metric", "choice"]
    found = json.loads(sylva(*command, "--json", "-q").stdout)
    assert found["examples"] == 8
    assert found["groups"].keys() == {"x", "y"}
    assert found["choice"] == pytest.approx(sum(found["groups"].values()) / 2)
    shown = [line.split() for line in sylva(*command, "-q").stdout.splitlines()]
    assert ["choice", f"{found['choice']:.2%}"] in shown
    assert ["x", f"{found['groups']['x']:.2%}"] in shown


def test_letters_that_a_tokenizer_does_not_know_are_refused(home, tmp_path):
    folder = write_mmlu(tmp_path / "mmlu")
    command = ["evaluate", home / "run-causal-lm", "--data", folder, "--split", "test"]
    message = told(sylva(*command, "--metric", "choice", "-q", code=1))
    assert "share it; call them by letters" in message


def test_texts_without_targets_stop_before_anything_is_done(home, tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"text": f"a {i}"} for i in range(20)])
    config = TaskConfig(
        model="nowhere", task="causal-lm", data=str(file), metric="choice"
    )
    with pytest.raises(DataError, match="needs prompts with targets"):
        finetune(config, sylva_config(), training(), tmp_path / "run", progress=False)
    config = task(home, metric="bleu")
    with pytest.raises(ConfigError, match="`metric` must be one of 'accuracy'"):
        finetune(config, sylva_config(), training(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_without_java_a_run_of_meteor_does_not_begin(home, tmp_path):
    config = task(home, task="causal-lm", metric="meteor")
    with pytest.raises(ConfigError, match="needs Java"):
        finetune(config, sylva_config(), training(), tmp_path / "run", progress=False)


def test_other_data_is_evaluated_on_without_what_was_trained_on(home, tmp_path):
    """Which may lie on another machine."""
    other = str(home / "train.jsonl")
    changes = {"data": str(tmp_path / "gone.jsonl"), "eval_data": other}
    config = TaskConfig(task="causal-lm", **changes)
    training, found = read_data(config, seed=0, training=False)
    assert training is None
    assert len(found) == 40


def test_no_prompt_is_both_trained_on_and_held_out(home):
    config = TaskConfig(task="causal-lm", data=str(home / "train.jsonl"), metric="bleu")
    train, held_out = read_data(config, seed=1)
    assert not set(train.texts) & set(held_out.texts)
    assert (len(train), len(held_out)) == (36, 4)


def test_a_limit_counts_prompts(home):
    config = TaskConfig(
        task="causal-lm", data="e2e-nlg", metric="bleu", eval_limit=5, limit=7
    )
    train, held_out = read_data(config, seed=1)
    assert len(train) == 7
    assert len(set(held_out.texts)) == 5
    assert len(held_out) > 20
    assert Task(config, nn.Module(), None, train, held_out).eval_examples == 5
    other = dataclasses.replace(config, metric=None)
    assert Task(other, nn.Module(), None, train, held_out).eval_examples == len(
        held_out
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1"),
        ({"num_beams": 0}, "`num_beams`"),
        ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size`"),
        ({"length_penalty": float("nan")}, "`length_penalty` must be finite; got nan"),
    ],
)
def test_options_of_writing_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        TaskConfig(**options)


def test_options_of_writing_may_change_from_call_to_call(home, tmp_path):
    run, file = home / "run-causal-lm", tmp_path / "answers.jsonl"
    changes = {"max_new_tokens": 1, "metric": "exact-match"}
    assert evaluate_folder(run, changes, answers=file)["metric"] == "exact-match"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert all(len(row["answer"].split()) <= 1 for row in rows)
