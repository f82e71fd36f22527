"""Tables of conversations, instructions and questions, as prompts with targets.

OpenAssistant Conversations (A. Köpf et al., NeurIPS 2023,
<https://arxiv.org/abs/2304.07327>), Alpaca (R. Taori et al. 2023,
<https://github.com/tatsu-lab/stanford_alpaca>), MetaMathQA (L. Yu et al., ICLR 2024,
<https://arxiv.org/abs/2309.12284>) and GSM8K (K. Cobbe et al. 2021,
<https://arxiv.org/abs/2110.14168>).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sylva_train._checks import DataError

from .files import Row, Table

__all__ = ["as_prompts"]

#: Who speaks in a conversation, as Guanaco's prompts have it.
SPEAKERS = {"prompter": "### Human:", "assistant": "### Assistant:"}
#: The prompt of PEFT's comparison on MetaMathQA and GSM8K.
QUESTION = "Question: {} Think step by step.\nAnswer:"
#: Alpaca's prompts, which tell whether there is an input.
INSTRUCTION = (
    "Below is an instruction that describes a task{}. Write a response that appropriately"
    " completes the request.\n\n### Instruction:\n{}\n\n{}### Response:"
)
PAIRED = ", paired with an input that provides further context"
#: Characters of a query and its response at most, as that comparison has them.
METAMATH_LENGTH = 1300

Numbered = list[tuple[int, Row]]


def as_prompts(table: Table) -> Table:
    """Return prompts and targets of a table whose columns are known, else the table.

    Raises
    ------
    DataError
        If a row lacks a part, or nothing in the table can be a prompt with its target.
    """
    form = form_of(table)
    if form is None:
        return table
    try:
        rows = form(table.rows)
    except (AttributeError, KeyError, TypeError) as error:
        msg = (
            f"{table.name}: a row lacks what others of its kind have"
            f" ({type(error).__name__}: {error})."
        )
        raise DataError(msg) from error
    if not rows:
        msg = f"{table.name}: no prompt has a target; expected at least one."
        raise DataError(msg)
    return replace(table, columns=("prompt", "target"), width=2, rows=rows)


def form_of(table: Table) -> Callable[[Numbered], Numbered] | None:
    """Return what makes prompts of a table's rows, by its columns."""
    columns = set(table.columns)
    if columns >= {"message_id", "role", "text"}:
        return conversations
    if columns >= {"message_tree_id", "prompt"}:
        return trees
    if columns >= {"instruction", "output"}:
        return alpaca
    if columns >= {"query", "response", "type", "original_question"}:
        return metamath
    if columns == {"question", "answer"} and "####" in str(table.rows[0][1]["answer"]):
        return gsm8k
    return None


def alpaca(rows: Numbered) -> Numbered:
    """Return instructions, each with its input if it has one, and their outputs."""
    found: Numbered = []
    for number, row in rows:
        given = row.get("input")
        inputs = (PAIRED, f"### Input:\n{given}\n\n") if given else ("", "")
        prompt = INSTRUCTION.format(inputs[0], row["instruction"], inputs[1])
        found.append((number, {"prompt": prompt, "target": row["output"]}))
    return found


def metamath(rows: Numbered) -> Numbered:
    """Return MetaMathQA's queries and responses, without the longest."""
    return [
        (n, {"prompt": QUESTION.format(row["query"]), "target": row["response"]})
        for n, row in rows
        if len(f"{row['query']} {row['response']}") <= METAMATH_LENGTH
    ]


def gsm8k(rows: Numbered) -> Numbered:
    """Return GSM8K's questions and answers, asked as those of MetaMathQA are."""
    return [
        (n, {"prompt": QUESTION.format(row["question"]), "target": row["answer"]})
        for n, row in rows
    ]


def trees(rows: Numbered) -> Numbered:
    """Return prompts and replies of OASST1's trees, a tree a row."""
    return conversations([message for row in rows for message in messages(*row)])


def messages(number: int, tree: Mapping[str | int, Any]) -> Iterator[tuple[int, Row]]:
    """Yield the messages of a tree, flat, with the line of the tree."""
    left = [(tree["prompt"], None)]
    while left:
        message, parent = left.pop(0)
        yield number, message | {"parent_id": parent}
        left += [(reply, message["message_id"]) for reply in message.get("replies", ())]


def conversations(rows: Numbered) -> Numbered:
    """Return what was said before, and the best reply, of each message by a human.

    The best is the one of the lowest rank that was not taken out; loss is due for it
    alone.
    """
    kept = {
        row["message_id"]: row
        for _, row in rows
        if not row.get("deleted") and row.get("review_result") is not False
    }
    replies = defaultdict(list)
    for row in kept.values():
        replies[row.get("parent_id")].append(row)
    found: Numbered = []
    for number, row in rows:
        answers = replies[row["message_id"]]
        thread = ancestors(row, kept)
        if row["role"] != "prompter" or not answers or not thread:
            continue
        best = min(answers, key=rank_of)
        said = [f"{SPEAKERS[m['role']]} {m['text'].strip()}\n" for m in thread]
        prompt = f"{''.join(said)}{SPEAKERS['assistant']}"
        found.append((number, {"prompt": prompt, "target": best["text"].strip()}))
    return found


def rank_of(message: Row) -> float:
    """Return where a message stands among the replies to one; those unranked are last."""
    rank = message.get("rank")
    return float("inf") if rank is None else rank


def ancestors(message: Row, kept: Mapping[str, Row]) -> list[Row]:
    """Return the thread that ends in a message, or nothing if a part was taken out."""
    thread: list[Row] = []
    identity = message["message_id"]
    while identity is not None:
        # A thread longer than all messages would be one that turns in a circle.
        if identity not in kept or len(thread) == len(kept):
            return []
        thread.append(kept[identity])
        identity = kept[identity].get("parent_id")
    return thread[::-1]
