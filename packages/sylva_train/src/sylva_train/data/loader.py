"""Batches of token ids, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from sylva_train._checks import ConfigError, DataError, check_integer
from sylva_train.options import LABELLED
from sylva_train.progress import Report

from .dataset import Text, TextDataset
from .examples import Example, Examples

__all__ = ["Loader", "ending", "pad", "prompt_ids", "spaced"]

#: Label of the positions that do not count in the loss.
IGNORED = -100
# Texts given to the tokenizer at once: enough to be fast, few enough to show progress.
CHUNK = 1024


class Loader:
    """Batches of a data set, the same ones in every run.

    All texts are turned into token ids once, at the start. Batches are padded to their
    longest text, on the right. The loader keeps no position: `epoch` gives the batches
    of an epoch from any of them on, and iteration gives those of epoch 0.

    Parameters
    ----------
    dataset : TextDataset
        The texts, from `load_data`.
    tokenizer : transformers tokenizer
        Needs a padding token.
    batch_size : int
        Texts in a batch.
    max_length : int
        Tokens after which a text is cut, if it has no shorter form (``dataset.shorter``)
        that fits. Of a prompt with a target the beginning is cut, but for the
        beginning-of-sequence token.
    shuffle : bool
        Whether each epoch has an order of its own, or the data set's.
    seed : int
        Seed of the orders.
    drop_last : bool
        Whether to leave out a last batch that is not full.
    bucket : int
        Above 1: that many batches at a time are filled by length, so that less is
        padding; 0 leaves the order alone.
    pack : bool
        Whether to join the texts of a causal language model and cut them to
        ``max_length`` tokens each, instead of padding.
    progress : callable, optional
        Called with (texts tokenised, texts in all).

    Attributes
    ----------
    examples : Examples
        Token ids and labels of each text.
    cut : int
        How many texts, or prompts with their targets, were longer than ``max_length`` and
        lost a part.

    Raises
    ------
    DataError
        If the data set is empty or a text has no token.
    ConfigError
        If an argument cannot be used with this tokenizer or data set.

    Notes
    -----
    A batch is a dict of ``input_ids`` and ``attention_mask``, int64 of shape (batch,
    length), ``token_type_ids`` alike if the tokenizer has them, and ``labels``: of shape
    (batch,) for classification (int64) and regression (float32), else int64 of shape
    (batch, length) with −100 where no loss is due; of texts alone (``load_texts``) only a
    causal language model has some. The labels of a causal language model
    are its input ids, which the model shifts; those of a prompt with a target are the
    target's ids and the end-of-sequence token.

    Examples
    --------
    ``loader.epoch(3, start=7)`` goes on where a run stopped after 7 batches of epoch 3.
    """

    def __init__(
        self,
        dataset: TextDataset,
        tokenizer: Any,
        batch_size: int,
        *,
        max_length: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        bucket: int = 0,
        pack: bool = False,
        progress: Report | None = None,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("max_length", max_length, 2)
        check_integer("seed", seed, 0)
        check_integer("bucket", bucket, 0)
        if not isinstance(cast("object", dataset), TextDataset):
            msg = (
                "`dataset` must be a TextDataset, as `load_data` returns; got a"
                f" {type(dataset).__name__}."
            )
            raise ConfigError(msg)
        check_fit(dataset, tokenizer, max_length, pack=pack)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.bucket = bucket
        self.task = dataset.task
        self.examples = Examples()
        self.cut = 0
        texts: list[Text] = []
        for start in range(0, len(dataset), CHUNK):
            stop = min(start + CHUNK, len(dataset))
            part = fitted(dataset.subset(range(start, stop)), tokenizer, max_length)
            texts += part.texts
            examples, cut = encode(part, tokenizer, max_length, whole=pack)
            self.examples.add(examples)
            self.cut += cut
            if progress is not None:
                progress(stop, len(dataset))
        # With the texts as they are taken, where there were several forms.
        self.dataset = replace(dataset, texts=texts, shorter=[])
        if pack:
            self.examples = self.examples.packed(max_length)
        self.lengths = self.examples.lengths()
        if not self.lengths.all():
            number = int(self.lengths.argmin())
            msg = f"{dataset.name}: example {number} has no token: {dataset.texts[number]!r}."
            raise DataError(msg)
        if not len(self):
            msg = (
                f"`drop_last` leaves no batch: {len(self.examples)} examples are fewer"
                f" than `batch_size` {batch_size}."
            )
            raise ConfigError(msg)

    def __len__(self) -> int:
        full, rest = divmod(len(self.examples), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __repr__(self) -> str:
        return f"Loader({self.dataset!r}, {len(self)} batches of {self.batch_size})"

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.epoch(0)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What tells two loaders' batches apart, as JSON: options and a digest."""
        total = hashlib.sha256()
        for example in self.examples:
            total.update(json.dumps(example, sort_keys=True).encode())
        names = ("batch_size", "shuffle", "seed", "drop_last", "bucket", "max_length")
        options = {name: getattr(self, name) for name in names}
        return options | {"examples": len(self.examples), "sha256": total.hexdigest()}

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the indices of the examples in each batch of an epoch."""
        # Seed and epoch are mixed, not added: epoch 1 of seed 0 is not epoch 0 of seed 1.
        random = np.random.default_rng((self.seed, epoch))
        count, size = len(self.examples), self.batch_size
        order = random.permutation(count) if self.shuffle else np.arange(count)
        window = size * self.bucket if self.bucket > 1 else count
        batches: list[list[int]] = []
        for start in range(0, count, window):
            part = order[start : start + window]
            if self.bucket > 1:
                part = part[np.argsort(self.lengths[part], kind="stable")]
            cuts = [part[i : i + size].tolist() for i in range(0, len(part), size)]
            # A batch that is not full stays last, where `drop_last` finds it.
            full = [cut for cut in cuts if len(cut) == size]
            if self.bucket > 1 and self.shuffle:
                full = [full[i] for i in random.permutation(len(full))]
            batches += full + [cut for cut in cuts if len(cut) < size]
        return batches[: len(self)]

    def positions(self, epoch: int = 0) -> torch.Tensor:
        """Return where in an epoch each example comes: ``rows[loader.positions()]``.

        Raises
        ------
        ConfigError
            If ``drop_last`` leaves examples out.
        """
        order = [index for indices in self.plan(epoch) for index in indices]
        if len(order) < len(self.examples):
            msg = (
                f"`drop_last` leaves out {len(self.examples) - len(order)} examples of"
                f" {self.dataset.name}; evaluate with a loader that keeps them."
            )
            raise ConfigError(msg)
        return torch.tensor(order).argsort()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of an epoch from the one numbered ``start`` on."""
        check_integer("epoch", epoch, 0)
        check_integer("start", start, 0)
        for indices in self.plan(epoch)[start:]:
            yield self.collate([self.examples[i] for i in indices])

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad examples (of ``loader.examples``) to a batch.

        With ``train_dataset=loader.examples`` and ``data_collator=loader.collate`` they
        serve `transformers.Trainer` as well.
        """
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
        }
        kind = getattr(self.tokenizer, "pad_token_type_id", 0)
        for name, fill in (("token_type_ids", kind), ("labels", IGNORED)):
            if name in examples[0]:
                values = [example[name] for example in examples]
                single = isinstance(values[0], int | float)
                batch[name] = torch.tensor(values) if single else pad(values, fill)
        return batch


def pad(rows: Sequence[Sequence[int]], fill: int, side: str = "right") -> torch.Tensor:
    """Return rows as an int64 tensor (rows, longest), filled up on a side."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(
        tensors, batch_first=True, padding_value=fill, padding_side=side
    )


def check_fit(
    dataset: TextDataset, tokenizer: Any, max_length: int, *, pack: bool
) -> None:
    """Raise unless data set, tokenizer and options can go together."""
    if not len(dataset):
        msg = f"{dataset.name}: the data set is empty; expected at least one example."
        raise DataError(msg)
    if tokenizer.pad_token_id is None:
        msg = (
            "`tokenizer` has no padding token; take it from"
            " `sylva_train.pretrained.load_tokenizer`, or set `tokenizer.pad_token`."
        )
        raise ConfigError(msg)
    if max_length > tokenizer.model_max_length:
        msg = (
            f"`max_length` must be at most {tokenizer.model_max_length}, the most that"
            f" the tokenizer's model takes; got {max_length}."
        )
        raise ConfigError(msg)
    if pack and (dataset.task != "causal-lm" or dataset.targets):
        msg = "`pack` is for a causal language model on whole texts, without targets."
        raise ConfigError(msg)
    if dataset.task not in LABELLED and isinstance(dataset.texts[0], tuple):
        msg = f"{dataset.name}: pairs of texts are for {' and '.join(LABELLED)} only."
        raise ConfigError(msg)


def fitted(dataset: TextDataset, tokenizer: Any, max_length: int) -> TextDataset:
    """Return the data set with the longest form of each text that is not too long.

    For a causal language model prompt and target together have ``max_length`` tokens.
    """
    if not dataset.shorter:
        return dataset
    texts, shorter = list(dataset.texts), list(dataset.shorter)
    room = [max_length] * len(texts)
    if dataset.task == "causal-lm" and dataset.targets:
        found = tokenizer(dataset.targets, add_special_tokens=False, verbose=False)
        ends = [with_end(ids, tokenizer) for ids in found["input_ids"]]
        room = [max_length - len(ids) for ids in ends]
    left = list(range(len(texts)))
    while left := [i for i in left if shorter[i]]:
        now = tokenizer([texts[i] for i in left], verbose=False)["input_ids"]
        left = [i for i, ids in zip(left, now, strict=True) if len(ids) > room[i]]
        for i in left:
            texts[i], *others = shorter[i]
            shorter[i] = tuple(others)
    return replace(dataset, texts=texts, shorter=[])


def encode(
    dataset: TextDataset, tokenizer: Any, max_length: int, *, whole: bool
) -> tuple[list[Example], int]:
    """Return token ids and labels of each text, and how many were too long.

    ``whole``: without a cut.
    """
    if dataset.targets and dataset.task == "causal-lm":
        return encode_prompts(dataset, tokenizer, max_length)
    texts: list[Any] = dataset.texts
    columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
    options = {} if whole else {"truncation": True, "max_length": max_length}
    # A `verbose` tokenizer warns of long texts, which packing cuts afterwards.
    found = tokenizer(*map(list, columns), verbose=False, **options)
    cut = set() if whole else shortened(found, max_length)
    names = [n for n in ("input_ids", "token_type_ids") if n in found]
    examples = [
        dict(zip(names, values, strict=True))
        for values in zip(*(found[name] for name in names), strict=True)
    ]
    if dataset.labels:
        for example, label in zip(examples, dataset.labels, strict=True):
            example["labels"] = label
    elif dataset.targets:
        targets = tokenizer(
            text_target=dataset.targets, truncation=True, max_length=max_length
        )
        cut |= shortened(targets, max_length)
        for example, ids in zip(examples, targets["input_ids"], strict=True):
            example["labels"] = ids
    elif dataset.task == "causal-lm":
        for example in examples:
            ids = with_end(begun_once(example["input_ids"], tokenizer), tokenizer)
            ids = ids if whole else ids[:max_length]
            example |= {"input_ids": ids, "labels": ids}
            example.pop("token_type_ids", None)
    return examples, len(cut)


def shortened(found: Any, max_length: int) -> set[int]:
    """Return which of the texts that a tokenizer was given lost tokens."""
    full = {i for i, ids in enumerate(found["input_ids"]) if len(ids) == max_length}
    # Tokenizers in Python do not say what they cut off.
    parts = getattr(found, "encodings", None)
    return full if parts is None else {i for i in full if parts[i].overflowing}


def with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-sequence token, where there is one that is not there yet."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def encode_prompts(
    dataset: TextDataset, tokenizer: Any, max_length: int
) -> tuple[list[Example], int]:
    """Join prompts and targets for a causal language model; only targets have labels.

    Where neither has a space between them, one is put there. What is too long is cut at
    the prompt's beginning, after the beginning-of-sequence token, and only then at the
    target's end. Returned with the examples is how many of them were too long.
    """
    texts = [str(text) for text in dataset.texts]
    targets = [
        spaced(text, target)
        for text, target in zip(texts, dataset.targets, strict=True)
    ]
    prompts = prompt_ids(texts, tokenizer)
    answers = answer_ids(texts, targets, prompts, tokenizer)
    examples, cut = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = with_end(answer, tokenizer)
        cut += len(prompt) + len(ids) > max_length
        # One prompt token at least: the first position has no prediction.
        ids = ids[: max_length - 1]
        kept = ending(prompt, max_length - len(ids), tokenizer)
        labels = [IGNORED] * len(kept) + ids
        examples.append({"input_ids": kept + ids, "labels": labels})
    return examples, cut


def answer_ids(
    texts: Sequence[str],
    targets: Sequence[str],
    prompts: Sequence[list[int]],
    tokenizer: Any,
) -> list[list[int]]:
    """Return the token ids of targets as they are behind their prompts.

    Some tokenizers (SentencePiece) mark the beginning of a text as that of a word, so that
    a target by itself has other tokens than in its place. Where a token would join the
    two, it is taken by itself, since a prompt to be answered ends where it ends.
    """
    whole = prompt_ids([a + b for a, b in zip(texts, targets, strict=True)], tokenizer)
    found = [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt else []
        for ids, prompt in zip(whole, prompts, strict=True)
    ]
    if alone := [number for number, ids in enumerate(found) if not ids]:
        wanted = [targets[number] for number in alone]
        every = tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"]
        for number, ids in zip(alone, every, strict=True):
            found[number] = ids
    return found


def spaced(text: str, target: str) -> str:
    """Put a space before what follows a prompt, unless there is one already."""
    return target if text[-1].isspace() or target[0].isspace() else f" {target}"


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of prompts, whole, for a causal language model to go on."""
    found = tokenizer(list(texts), verbose=False)["input_ids"]
    return [without_end(begun_once(ids, tokenizer), tokenizer) for ids in found]


def begun_once(ids: list[int], tokenizer: Any) -> list[int]:
    """Take away the beginning-of-sequence token of a text that brings its own.

    Chat templates write one, and tokenizers that begin each text with it another.
    """
    return ids[1:] if ids[:2] == 2 * [tokenizer.bos_token_id] else ids


def ending(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Return the end of a prompt, behind the token that all of the model's texts begin with."""
    start = ids[:1] if ids[:1] == [tokenizer.bos_token_id] and room > 1 else []
    return ids if len(ids) <= room else start + ids[len(ids) - room + len(start) :]


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Take away the end-of-sequence token that some tokenizers close a prompt with."""
    end = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
