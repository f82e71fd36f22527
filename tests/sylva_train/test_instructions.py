"""Instruction data in its own layouts becomes prompts with targets."""

from __future__ import annotations

import gzip
import json

import pytest

from sylva_train import DataError, Loader, load_data
from tests.sylva_train.layouts import (
    MESSAGES,
    instruction_task,
    write_gsm8k,
    write_instructions,
    write_metamath,
    write_oasst,
)
from tests.sylva_train.words import word_tokenizer

# What Tk-Instruct's collator makes of the task below, two examples and no explanation.
PROMPT = """Definition: Answer the question of task003_three.

 Positive Example 1 -
Input: Is a?
 Output: yes a.

 Positive Example 2 -
Input: Is b?
 Output: yes b.

Now complete the following example -
Input: Is 0?
Output: """


# Super-NaturalInstructions


def test_a_prompt_has_definition_two_examples_and_the_input(tmp_path):
    folder = write_instructions(tmp_path / "ni")
    data = load_data(folder, task="seq2seq", split="test")
    assert data.texts[0] == PROMPT
    # Every output of a test instance is a reference, in a row of its own.
    assert data.targets == ["0", "yes 0", "1", "yes 1", "2", "yes 2"]
    assert data.groups == ["task003_three"] * 6
    assert [len(forms) for forms in data.shorter] == [2] * 6
    assert data.shorter[0][1] == PROMPT.replace(
        PROMPT[PROMPT.index(" Positive") : PROMPT.index("Now")], ""
    )


def test_instances_of_training_tasks_are_a_choice_with_one_output(tmp_path):
    folder = write_instructions(tmp_path / "ni", instances=30)
    options = {"task": "causal-lm", "per_task": 5}
    data = load_data(folder, **options)
    assert len(data) == 10  # two tasks
    assert all(len(target) <= 2 for target in data.targets)
    assert data.texts == load_data(folder, **options).texts
    assert data.texts != load_data(folder, seed=1, **options).texts
    first = load_data(folder, task="causal-lm", split="test", per_task=2)
    assert first.targets == ["0", "yes 0", "1", "yes 1"]
    assert len(load_data(folder, task="causal-lm", limit=3)) == 3


def test_examples_that_do_not_fit_are_left_out(tmp_path):
    folder = write_instructions(tmp_path / "ni", long=20)  # examples of 40 words
    data = load_data(folder, task="seq2seq", split="test")
    tokenizer = word_tokenizer("seq2seq")
    for length, examples in ((150, 2), (90, 1), (60, 0), (10, 0)):
        loader = Loader(data, tokenizer, 2, max_length=length)
        counts = {text.count("Positive Example") for text in loader.dataset.texts}
        assert counts == {examples}
        assert max(loader.lengths) <= length
    assert data.texts[0].count("Positive Example") == 2
    # For a causal language model the target needs room, too.
    causal = load_data(folder, task="causal-lm", split="test")
    size = len(tokenizer(causal.texts[0])["input_ids"]) - 1
    for length, examples in ((size + 3, 2), (size, 1)):
        loader = Loader(causal, word_tokenizer("decoder"), 2, max_length=length)
        assert loader.dataset.texts[0].count("Positive Example") == examples


@pytest.mark.parametrize("part", ["Definition", "Instances", "Positive Examples"])
def test_a_task_without_a_part_is_named(tmp_path, part):
    folder = write_instructions(tmp_path / "ni")
    path = folder / "tasks" / "task002_two.json"
    task = instruction_task("two")
    task.pop(part)
    path.write_text(json.dumps(task))
    with pytest.raises(DataError, match=f"task002_two.*KeyError: '{part}'"):
        load_data(folder, task="seq2seq")


def test_tasks_that_are_no_tasks_are_named(tmp_path):
    folder = write_instructions(tmp_path / "ni")
    for path in sorted((folder / "tasks").iterdir()):
        path.write_text(json.dumps(instruction_task(path.stem) | {"Instances": []}))
    with pytest.raises(DataError, match="the tasks have no instances"):
        load_data(folder, task="seq2seq")
    path.write_text("{")
    with pytest.raises(DataError, match=rf"{path.name}: expected a task in JSON"):
        load_data(folder, task="seq2seq", split="test")


def test_missing_tasks_and_splits_are_named(tmp_path):
    folder = write_instructions(tmp_path / "ni")
    with pytest.raises(DataError, match=r"no file validation_tasks\.txt.*test_tasks"):
        load_data(folder, task="seq2seq", split="validation")
    (folder / "tasks" / "task001_one.json").unlink()
    with pytest.raises(DataError, match=r"task001_one\.json: the file cannot be read"):
        load_data(folder, task="seq2seq")


# OASST1

CONVERSATIONS = {
    "### Human: Who are you?\n### Assistant:": "An assistant.",
    "### Human: Who are you?\n### Assistant: An assistant.\n### Human: Whose?\n"
    "### Assistant:": "Yours.",
    "### Human: Who are you?\n### Assistant: An assistant.\n### Human: Really?\n"
    "### Assistant:": "Yes.",
}


@pytest.mark.parametrize("name", ["m.messages.jsonl", "m.messages.jsonl.gz"])
@pytest.mark.parametrize("trees", [False, True])
def test_the_best_reply_follows_its_thread(tmp_path, trees, name):
    path = write_oasst(tmp_path / name, trees=trees)
    data = load_data(path, task="causal-lm")
    assert dict(zip(data.texts, data.targets, strict=True)) == CONVERSATIONS
    assert len(data) == 3


def test_a_thread_goes_with_a_message_that_was_taken_out(tmp_path):
    rows = [dict(row) for row in MESSAGES]
    rows[2]["review_result"] = False  # the better reply
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert load_data(path, task="causal-lm").targets == ["Nobody."]
    rows[0]["parent_id"] = "m5"  # in a circle
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match="no prompt has a target"):
        load_data(path, task="causal-lm")


def test_damaged_archives_and_rows_are_named(tmp_path):
    path = write_oasst(tmp_path / "m.jsonl.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"m\.jsonl\.gz: the file cannot be read"):
        load_data(path, task="causal-lm")
    rows = [{k: v for k, v in MESSAGES[0].items() if k != "role"}, MESSAGES[2]]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(DataError, match=r"m\.jsonl\.gz: a row lacks.*'role'"):
        load_data(path, task="causal-lm")


# Alpaca, MetaMathQA and GSM8K


def test_an_instruction_keeps_its_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say yes.", "input": "", "output": "yes"},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows))
    data = load_data(path, task="causal-lm")
    first, second = data.texts
    assert first.endswith(
        "task, paired with an input that provides further context. Write a response that"
        " appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
        "1 and 2\n\n### Response:"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nSay yes.\n\n### Response:"
    )
    assert data.targets == ["3", "yes"]


def test_conversations_of_messages_are_told_to_be_prompts(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(DataError, match="prompts and completions first"):
        load_data(path, task="causal-lm")


def test_metamath_is_asked_as_in_pefts_comparison(tmp_path):
    path = write_metamath(tmp_path / "MetaMathQA-395K.json")
    data = load_data(path, task="causal-lm")
    assert data.texts[0] == "Question: What is 1 + 1? Think step by step.\nAnswer:"
    assert data.targets[0].endswith("The answer is: 2")
    rows = json.loads(path.read_text())
    rows[1]["response"] *= 40
    path.write_text(json.dumps(rows))
    assert len(load_data(path, task="causal-lm")) == 2


def test_gsm8k_is_asked_alike(tmp_path):
    pytest.importorskip("pyarrow")
    data = load_data(write_gsm8k(tmp_path / "main"), task="causal-lm", split="test")
    assert data.texts == ["Question: What is 2 + 2? Think step by step.\nAnswer:"]
    assert data.targets == ["It is <<2+2=4>>4.\n#### 4"]


def test_columns_that_are_asked_for_are_taken_as_they_are(tmp_path):
    path = write_metamath(tmp_path / "MetaMathQA-395K.json")
    columns = {"text_column": "query", "target_column": "response"}
    data = load_data(path, task="causal-lm", **columns)
    assert data.texts[0] == "What is 1 + 1?"
