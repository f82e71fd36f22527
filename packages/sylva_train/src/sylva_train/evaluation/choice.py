"""Multiple choice: the option that a language model finds likeliest after a prompt."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence
from typing import Any

import torch

from sylva_train._checks import DataError, NonFiniteError
from sylva_train.data import Loader, TextDataset, spaced
from sylva_train.progress import Report

from .generation import cut, generated, options, source_ids

__all__ = ["choice_metrics"]

#: More different targets than letters are no options of a multiple choice.
MOST = 26


def choice_metrics(
    model: Any, loader: Loader, progress: Report | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Choose one of the data's targets for each prompt, by its first token that differs.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model or an encoder-decoder, in evaluation mode.
    loader : Loader
        Prompts whose targets are the right options.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    found : dict
        ``choice``: the fraction of right ones; ``examples``; and where the data set has
        groups, ``groups``: that fraction of each, by name.
    chosen : list of str
        The options.

    Raises
    ------
    DataError
        If the targets are no options, or cannot be told apart by one token.
    NonFiniteError
        If a logit is NaN or infinite.
    """
    data = loader.dataset
    choices = options_of(data)
    if not 2 <= len(choices) <= MOST:
        msg = (
            f'{data.name}: `metric` "choice" needs targets that are 2 to {MOST} different'
            f" options, such as A, B, C and D; got {len(choices)}."
        )
        raise DataError(msg)
    config = options(
        model, loader.tokenizer, None, max_new_tokens=1, output_logits=True
    )
    prompts, tokens, inputs = questions(model, loader, choices)
    chosen = [""] * len(prompts)
    for indices, output in generated(
        model, loader, prompts, config, progress, **inputs
    ):
        wanted = torch.tensor([tokens[i] for i in indices])
        logits = output.logits[0].float().cpu().gather(1, wanted)
        if not torch.isfinite(logits).all():
            msg = (
                "the logits of a prompt are NaN or infinite: training diverged or the"
                " weights are damaged."
            )
            raise NonFiniteError(msg)
        for index, best in zip(indices, logits.argmax(1).tolist(), strict=True):
            chosen[index] = choices[best]
    hits = [
        option == wanted for option, wanted in zip(chosen, data.targets, strict=True)
    ]
    found: dict[str, Any] = {"choice": sum(hits) / len(hits), "examples": len(hits)}
    if data.groups:
        found["groups"] = by_group(hits, data.groups)
    return found, chosen


def questions(
    model: Any, loader: Loader, choices: Sequence[str]
) -> tuple[list[list[int]], list[list[int]], dict[str, torch.Tensor]]:
    """Return what the model is asked.

    Returns
    -------
    prompts, tokens : list of list of int
        Token ids of each prompt, and the token by which each option is told then.
    inputs : dict of str to torch.Tensor
        What goes with every prompt.
    """
    texts, name = [str(text) for text in loader.dataset.texts], loader.dataset.name
    if loader.task == "seq2seq":
        begun, firsts = apart(
            loader.tokenizer(text_target=choices)["input_ids"], choices, name
        )
        inputs = {}
        if begun:  # after the token that a decoder starts with, which generate adds
            device = next(model.parameters()).device
            inputs["decoder_input_ids"] = torch.tensor([begun], device=device)
        return source_ids(texts, loader), [firsts] * len(texts), inputs
    whole = [text + spaced(text, option) for text in texts for option in choices]
    # Together with the prompt, since a tokenizer may join the two.
    rows = loader.tokenizer(whole, verbose=False)["input_ids"]
    size = len(choices)
    pairs = [
        apart(rows[i : i + size], choices, name) for i in range(0, len(rows), size)
    ]
    prompts = cut(model, loader, [begun for begun, _ in pairs], 1)
    return prompts, [firsts for _, firsts in pairs], {}


def options_of(data: TextDataset) -> list[str]:
    """Return the targets, and where they are letters all that the prompts list.

    A sample of the questions may have no D for an answer.
    """
    found = set(data.targets)
    if all(len(target) == 1 and target in string.ascii_uppercase for target in found):
        for text in map(str, data.texts):
            lines = set(re.findall(r"^([A-Z])[.)]\s", text, re.MULTILINE))
            # From A on without a gap: "I." is a numeral.
            found |= set(
                itertools.takewhile(lines.__contains__, string.ascii_uppercase)
            )
    return sorted(found)


def apart(
    rows: Sequence[Sequence[int]], choices: Sequence[str], name: str
) -> tuple[list[int], list[int]]:
    """Return the tokens that all rows begin with, and the next one of each.

    Raises
    ------
    DataError
        If two rows have the same one.
    """
    columns = enumerate(zip(*rows, strict=False))
    differ = (number for number, column in columns if len(set(column)) > 1)
    shared = next(differ, min(map(len, rows)))
    firsts = [row[shared] for row in rows if len(row) > shared]
    if len(set(firsts)) < len(rows):
        msg = (
            f'{name}: `metric` "choice" tells options apart by their first token that'
            f" differs, and some of {list(choices)} share it; call them by letters."
        )
        raise DataError(msg)
    return list(rows[0][:shared]), firsts


def by_group(hits: Sequence[bool], groups: Sequence[str]) -> dict[str, float]:
    """Return the fraction of hits in each group, by name."""
    parts: dict[str, list[bool]] = {name: [] for name in sorted(set(groups))}
    for hit, name in zip(hits, groups, strict=True):
        parts[name].append(hit)
    return {name: sum(part) / len(part) for name, part in parts.items()}
