"""Batches come in a fixed order, and have what a model's loss asks for."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from sylva_train._checks import ConfigError, DataError
from sylva_train.data import Loader, TextDataset, ending, load_data, prompt_ids
from sylva_train.data.examples import Examples
from tests.sylva_train.words import word_tokenizer


def numbers(n: int, length: int = 3) -> TextDataset:
    """Texts of different lengths that carry their own number as the label."""
    texts = [
        " ".join("abc"[(i + k) % 3] for k in range(1 + i % length)) for i in range(n)
    ]
    return TextDataset(
        "toy", "classification", texts, list(range(n)), [str(i) for i in range(n)]
    )


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 9),
    bucket=st.integers(0, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_each_example_once(count, size, bucket, shuffle, epoch):
    loader = Loader(
        numbers(count), word_tokenizer(), size, shuffle=shuffle, bucket=bucket
    )
    plan = loader.plan(epoch)
    flat = [index for batch in plan for index in batch]
    assert sorted(flat) == list(range(count))
    assert len(plan) == len(loader)
    assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1)
    assert torch.tensor(flat)[loader.positions(epoch)].tolist() == list(range(count))


@given(start=st.integers(0, 8), bucket=st.integers(0, 3), epoch=st.integers(0, 3))
def test_any_position_goes_on_with_the_same_batches(start, bucket, epoch):
    loaders = [
        Loader(numbers(23), word_tokenizer(), 4, shuffle=True, seed=5, bucket=bucket)
        for _ in range(2)
    ]
    whole, rest = list(loaders[0].epoch(epoch)), list(loaders[1].epoch(epoch, start))
    assert len(rest) == max(0, len(whole) - start)
    for one, other in zip(whole[start:], rest, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_order_depends_on_seed_and_epoch_alone():
    plans = {
        (seed, epoch): str(
            Loader(numbers(20), word_tokenizer(), 4, shuffle=True, seed=seed).plan(
                epoch
            )
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(plans.values())) == 9
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 the global state must not matter
    loader = Loader(numbers(20), word_tokenizer(), 4, shuffle=True, seed=1)
    list(loader.epoch(0))
    assert str(loader.plan(2)) == plans[1, 2]


def test_padding_is_masked_and_no_longer_than_needed():
    batch = next(iter(Loader(numbers(3), word_tokenizer(), 3)))
    assert {name: t.dtype for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels"), torch.int64
    )
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)
    assert batch["labels"].tolist() == [0, 1, 2]


def test_buckets_pad_less():
    padded = [
        sum(b["input_ids"].numel() for b in loader)
        for loader in (
            Loader(numbers(60, 9), word_tokenizer(), 4, shuffle=True, bucket=bucket)
            for bucket in (0, 8)
        )
    ]
    assert padded[1] < 0.8 * padded[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_a_bucket_come_by_length_only_where_the_data_keep_their_order(
    shuffle,
):
    loader = Loader(numbers(60, 9), word_tokenizer(), 4, shuffle=shuffle, bucket=15)
    longest = [loader.lengths[batch].max() for batch in loader.plan(0)]
    assert (longest != sorted(longest)) == shuffle


def test_drop_last_drops_the_rest_only():
    loader = Loader(numbers(11), word_tokenizer(), 4, shuffle=True, drop_last=True)
    assert [len(batch) for batch in loader.plan(0)] == [4, 4]
    assert len(list(loader)) == len(loader) == 2
    with pytest.raises(ConfigError, match="`drop_last` leaves out 3 examples"):
        loader.positions()
    with pytest.raises(ConfigError, match="`drop_last` leaves no batch"):
        Loader(numbers(3), word_tokenizer(), 4, drop_last=True)


def test_texts_are_cut_to_max_length():
    loader = Loader(numbers(9, 9), word_tokenizer(), 9, max_length=4)
    assert next(iter(loader))["input_ids"].shape == (9, 4)


def test_texts_that_lose_a_part_are_counted():
    texts = ["a", "a b", "a b c", ("a b", "c d"), "d e f g"]  # of 3, 4, 5, 7, 6 tokens
    for kind in (texts[:3] + texts[4:], [texts[3], ("a", "b")]):
        data = TextDataset("toy", "classification", kind, [0] * len(kind), ["a", "b"])
        loader = Loader(data, word_tokenizer(), 2, max_length=5)
        assert loader.cut == 1
        assert Loader(data, word_tokenizer(), 2).cut == 0
    data = TextDataset("toy", "causal-lm", ["a b c d e", "a b c d"])
    decoder = word_tokenizer("decoder")
    assert Loader(data, decoder, 2, max_length=4).cut == 1
    assert Loader(data, decoder, 2, max_length=4, pack=True).cut == 0
    data = TextDataset("toy", "causal-lm", ["a b", "a b c"], targets=["c"] * 2)
    assert Loader(data, decoder, 2, max_length=4).cut == 1
    data = TextDataset("toy", "seq2seq", ["a b", "a b c d", "a"], targets=["a b c"] * 3)
    assert Loader(data, word_tokenizer("seq2seq"), 2, max_length=4).cut == 1
    data = TextDataset("toy", "seq2seq", ["a b", "a b c d"], targets=["a b c d", "a"])
    assert Loader(data, word_tokenizer("seq2seq"), 2, max_length=4).cut == 2


def test_bad_loaders_are_refused():
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match="empty"):
        Loader(numbers(0), tokenizer, 4)
    with pytest.raises(ConfigError, match="`max_length` must be at most 512"):
        Loader(numbers(3), tokenizer, 4, max_length=513)
    with pytest.raises(ConfigError, match="no padding token"):
        Loader(numbers(3), word_tokenizer(pad_token=None), 4)
    with pytest.raises(ConfigError, match="`batch_size`"):
        Loader(numbers(3), tokenizer, 0)
    with pytest.raises(ConfigError, match="`pack`"):
        Loader(numbers(3), tokenizer, 4, pack=True)
    pairs = TextDataset("toy", "causal-lm", [("a", "b")])
    with pytest.raises(ConfigError, match="pairs of texts are for classification"):
        Loader(pairs, word_tokenizer("decoder"), 4)
    silent = TextDataset("toy", "classification", ["a", ""], [0, 1], ["no", "yes"])
    with pytest.raises(DataError, match="example 1 has no token: ''"):
        Loader(silent, word_tokenizer("decoder"), 4)


def test_identity_tells_data_and_options_apart():
    def identity(n=5, **options):
        return json.dumps(Loader(numbers(n), word_tokenizer(), 2, **options).identity)

    assert identity() == identity()
    changes = ("seed", 1), ("max_length", 3), ("shuffle", True), ("bucket", 2)
    changed = {identity(**{k: v}) for k, v in (*changes, ("drop_last", True))}
    assert len({identity(), identity(6), *changed}) == 7


def test_progress_counts_texts():
    calls = []
    Loader(numbers(2500), word_tokenizer(), 4, progress=lambda *c: calls.append(c))
    assert calls == [(1024, 2500), (2048, 2500), (2500, 2500)]


# --- language models -------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return word_tokenizer("decoder")(text)["input_ids"]


END = ids("</s>")


def test_whole_texts_are_their_own_labels_but_for_padding(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a b\nc\n\n\nd\n")
    data = load_data(path, task="causal-lm")
    assert data.texts == ["a b\nc", "d"]
    batch = next(iter(Loader(data, word_tokenizer("decoder"), 2)))
    assert batch["input_ids"].tolist() == [ids("a b c") + END, ids("d") + END + [0, 0]]
    assert batch["labels"].tolist() == [
        ids("a b c") + END,
        ids("d") + END + [-100, -100],
    ]


def test_padding_with_the_end_token_still_has_no_label():
    data = TextDataset("toy", "causal-lm", ["a b", "a"])
    tokenizer = word_tokenizer("decoder", pad_token="</s>")
    batch = next(iter(Loader(data, tokenizer, 2)))
    assert batch["labels"][1].tolist() == ids("a") + END + [-100]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0]


def test_only_the_answer_to_a_prompt_has_labels(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"input": "a b c", "output": "d"}\n')
    data = load_data(path, task="causal-lm")
    batch = next(iter(Loader(data, word_tokenizer("decoder"), 1)))
    assert batch["input_ids"].tolist() == [ids("a b c d") + END]
    assert batch["labels"].tolist() == [[-100] * 3 + ids("d") + END]


@pytest.mark.parametrize(
    ("prompt", "target", "tokens"),
    [
        ("b:", "a", ["▁", "b", ":", "▁a", "</s>"]),
        ("b\n", "a", ["▁", "b", "\n", "a", "</s>"]),
        # A token would join prompt and answer, and the prompt is answered without it.
        ("b: ", "a", ["▁", "b", ":", "▁", "▁a", "</s>"]),
    ],
)
def test_answers_have_the_tokens_that_they_have_behind_their_prompts(
    prompt, target, tokens
):
    """A SentencePiece vocabulary marks the beginning of each text as that of a word."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", ":", "\n", "▁a", "▁▁"]
    merges = [("▁", "▁"), ("▁", "a")]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<unk>"
    )
    data = TextDataset("toy", "causal-lm", [prompt], targets=[target])
    (example,) = Loader(data, tokenizer, 1, max_length=16).examples
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == tokens
    asked = len(tokenizer(prompt)["input_ids"])
    assert example["labels"][:asked] == [-100] * asked
    assert example["labels"][asked:] == example["input_ids"][asked:]


def test_long_prompts_keep_the_token_that_texts_begin_with():
    tokenizer = word_tokenizer("encoder", bos_token="[CLS]")
    start, sep = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    prompt = [start, 5, 6, 7, sep]
    assert ending(prompt, 5, tokenizer) == prompt
    assert ending(prompt, 3, tokenizer) == [start, 7, sep]
    assert ending(prompt, 2, tokenizer) == [start, sep]
    assert ending(prompt, 1, tokenizer) == [sep]
    assert ending(prompt[1:], 2, tokenizer) == [7, sep]
    data = TextDataset("toy", "causal-lm", ["a b c d"], targets=["good"])
    (example,) = Loader(data, tokenizer, 1, max_length=4).examples
    assert example["labels"][:3] == [-100] * 3
    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["[CLS]", "d", "[SEP]", "good"]


@pytest.mark.parametrize("targets", [["good"], []])
def test_texts_that_bring_their_beginning_begin_once(targets):
    """As those of chat templates do; others may begin so without the tokenizer's help."""
    tokenizer = word_tokenizer("encoder", bos_token="[CLS]")
    found = []
    for text in ("a b", "[CLS] a b"):
        data = TextDataset("toy", "causal-lm", [text], targets=targets)
        (example,) = Loader(data, tokenizer, 1, max_length=8).examples
        found.append(tokenizer.convert_ids_to_tokens(example["input_ids"])[:3])
    assert found == [["[CLS]", "a", "b"]] * 2
    assert prompt_ids(["[CLS] a b"], tokenizer) == prompt_ids(["a b"], tokenizer)


def test_long_prompts_lose_their_beginning():
    data = TextDataset("toy", "causal-lm", ["a b c d"], targets=["e"])
    example = Loader(data, word_tokenizer("decoder"), 1, max_length=4).examples[0]
    assert example["input_ids"] == ids("c d e") + END
    data = TextDataset("toy", "causal-lm", ["a b"], targets=["c d e f"])
    example = Loader(data, word_tokenizer("decoder"), 1, max_length=3).examples[0]
    assert example == {"input_ids": ids("b c d"), "labels": [-100, *ids("c d")]}


def test_packing_keeps_every_token():
    data = TextDataset("toy", "causal-lm", ["a b c", "d", "e f g"])
    loader = Loader(data, word_tokenizer("decoder"), 2, max_length=4, pack=True)
    joined = [i for example in loader.examples for i in example["input_ids"]]
    assert joined == ids("a b c </s> d </s> e f g </s>")
    assert [len(example["input_ids"]) for example in loader.examples] == [4, 4, 2]


def test_seq2seq_labels_are_the_targets(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("mr,ref\na b,c\nd,e f\n")
    data = load_data(path, task="seq2seq", text_column="mr", target_column="ref")
    batch = next(iter(Loader(data, word_tokenizer("seq2seq"), 2)))
    assert batch["input_ids"].tolist() == [ids("a b") + END, ids("d") + END + [0]]
    assert batch["labels"].tolist() == [ids("c") + END + [-100], ids("e f") + END]


def test_examples_are_kept_in_four_bytes_a_token():
    def made(count=500, tokens=128):
        rows = np.random.default_rng(0).integers(300, 30000, (count, tokens)).tolist()
        return [{"input_ids": row, "labels": row} for row in rows]

    tracemalloc.start()
    try:
        examples = Examples()
        examples.add(made())
        examples.add(made(3, 5))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 6 * 500 * 128
    expected = made() + made(3, 5)
    assert list(examples) == expected
    assert examples[-1] == expected[-1]
    assert examples[499:501] == expected[499:501]
    with pytest.raises(IndexError):
        examples[len(expected)]
    assert examples.largest("input_ids") == max(
        max(row["input_ids"]) for row in expected
    )
    assert examples.lengths().tolist() == [128] * 500 + [5] * 3


@pytest.mark.parametrize("label", [[1, 0], [0.5, -2.0], [[7, -100], [8]]])
def test_examples_have_their_labels_as_they_were(label):
    rows = [{"input_ids": [1, 2, 3], "labels": label[0]}]
    rows += [{"input_ids": [], "labels": label[1]}]
    examples = Examples()
    examples.add(rows)
    assert json.dumps(list(examples)) == json.dumps(rows)


def test_texts_by_themselves_are_no_data_set():
    with pytest.raises(ConfigError, match="as `load_data` returns; got a list"):
        Loader(["a", "b"], word_tokenizer(), 2)
