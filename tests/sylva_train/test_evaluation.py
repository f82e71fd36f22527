"""Metrics agree with their definitions, and evaluation leaves no trace."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train.data import Loader, TextDataset
from sylva_train.evaluation import evaluate
from sylva_train.metrics import METRICS
from sylva_train.pretrained import PooledClassifier
from tests.sylva_train.counting import Allocations
from tests.sylva_train.words import TINY, VOCABULARY, word_tokenizer

TEXTS = ["a good film", "bad", "not good", "a b c d e f", "film", "b a d", "c"]


class Fixed(nn.Module):
    """Gives the logits that its input names."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.dropout(self.table[input_ids[:, 0]]))


def fixed(logits, labels, size=3):
    """Model and batches with these logits and labels."""
    rows = torch.arange(len(labels))[:, None]
    batches = [
        {
            "input_ids": rows[i : i + size],
            "labels": torch.as_tensor(labels[i : i + size]),
        }
        for i in range(0, len(labels), size)
    ]
    return Fixed(logits), batches


def language_model(kind: str):
    torch.manual_seed(0)
    if kind == "decoder":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def texts(task: str, targets=()) -> TextDataset:
    return TextDataset("toy", task, list(TEXTS), targets=list(targets))


@given(
    truth=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    size=st.integers(1, 7),
)
def test_classification_metrics_follow_their_definitions(truth, seed, size):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(truth), 3)).astype(np.float32)
    found = evaluate(*fixed(logits, truth, size))
    truth, guess = np.array(truth), logits.argmax(1)
    table = np.array(
        [[((truth == i) & (guess == j)).sum() for j in range(3)] for i in range(3)]
    )
    right, rows, columns = np.diag(table), table.sum(1), table.sum(0)
    used = (rows + columns) > 0
    f1 = (2 * right[used] / (rows + columns)[used]).mean()
    n, c = len(truth), right.sum()
    spread = math.sqrt(float((n**2 - columns @ columns) * (n**2 - rows @ rows)))
    mcc = (c * n - rows @ columns) / spread if spread else 0.0
    exact = logits.astype(np.float64)
    chosen = exact[np.arange(n), truth]
    loss = (np.log(np.exp(exact).sum(1)) - chosen).mean()
    expected = {"accuracy": c / n, "f1": f1, "mcc": mcc, "loss": loss}
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert found["examples"] == n
    assert found["score"] == found["accuracy"]


@given(
    truth=st.lists(st.integers(0, 1), min_size=1, max_size=30), seed=st.integers(0, 99)
)
def test_binary_f1_is_that_of_the_second_class(truth, seed):
    logits = np.random.default_rng(seed).normal(size=(len(truth), 2))
    found = evaluate(*fixed(logits, truth), "f1-binary")
    truth, guess = np.array(truth) == 1, logits.argmax(1) == 1
    wrong = (truth != guess).sum()
    right = 2 * (truth & guess).sum()
    assert found["score"] == pytest.approx(right / (right + wrong) if right else 0.0)


def test_binary_f1_is_for_two_classes():
    with pytest.raises(ConfigError, match="'f1-binary' is for two classes"):
        evaluate(*fixed(np.eye(3), [0, 1, 2]), "f1-binary")


def test_the_class_of_binary_f1_is_named():
    data = TextDataset("toy", "classification", ["a", "b"], [0, 1], ["ham", "spam"])
    model = PooledClassifier(BertConfig(**TINY, num_labels=2))
    batches = Loader(data, word_tokenizer(), 2, max_length=8)
    assert evaluate(model, batches)["positive"] == "spam"


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1-binary", "mcc", "loss"])
def test_the_metric_is_the_score(metric):
    model, batches = fixed([[1, 0], [0, 1], [2, 0]], [0, 1, 1])
    found = evaluate(model, batches, metric)
    assert found["metric"] == metric
    assert found["score"] == found[metric.replace("-", "_")]
    assert found["higher_is_better"] == METRICS[metric]


def test_predictions_come_in_the_order_of_the_data():
    torch.manual_seed(0)
    model = PooledClassifier(BertConfig(**TINY, num_labels=3))
    data = TextDataset(
        "toy", "classification", list(TEXTS), [0, 1, 2, 0, 1, 2, 0], ["a", "b", "c"]
    )
    tokenizer = word_tokenizer()
    plain = evaluate(model, Loader(data, tokenizer, 1), predictions=True)
    mixed = evaluate(
        model,
        Loader(data, tokenizer, 3, shuffle=True, seed=4, bucket=2),
        predictions=True,
    )
    np.testing.assert_allclose(plain["logits"], mixed["logits"], rtol=1e-4, atol=1e-5)
    assert plain["labels"].tolist() == mixed["labels"].tolist() == data.labels
    assert plain["predictions"].tolist() == plain["logits"].argmax(1).tolist()
    assert "predictions" not in evaluate(model, Loader(data, tokenizer, 1))
    dropping = Loader(data, tokenizer, 3, drop_last=True)
    with pytest.raises(ConfigError, match="`drop_last`"):
        evaluate(model, dropping)


def test_evaluation_leaves_no_trace():
    model, batches = fixed(np.eye(3), [0, 1, 2])
    model.train()
    model.dropout.eval()
    state, weights = torch.get_rng_state(), model.table.clone()
    first, second = evaluate(model, batches), evaluate(model, batches)
    assert first == second
    assert first["accuracy"] == 1
    assert model.training
    assert not model.dropout.training
    assert model.table.grad is None
    assert torch.equal(model.table, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    model, _ = fixed(np.eye(3), [0])
    model.train()
    with pytest.raises(IndexError):
        evaluate(
            model, [{"input_ids": torch.tensor([[9]]), "labels": torch.tensor([0])}]
        )
    assert model.training


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_language_model_loss_is_the_mean_over_tokens(kind, size):
    model = language_model(kind)
    tokenizer = word_tokenizer(kind)
    data = texts("causal-lm") if kind == "decoder" else texts("seq2seq", TEXTS[::-1])
    found = evaluate(model, Loader(data, tokenizer, size, bucket=2))
    total = count = hits = 0
    with torch.no_grad():
        for batch in Loader(data, tokenizer, 1):
            output = model.eval()(**batch)
            shift = kind == "decoder"
            tokens = batch["labels"][0, int(shift) :]
            guess = output.logits[0].argmax(-1)[: -1 if shift else None]
            total += float(output.loss) * len(tokens)
            count += len(tokens)
            hits += int((guess == tokens).sum())
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["token_accuracy"] == hits / count
    assert found["score"] == found["perplexity"]
    assert not found["higher_is_better"]
    assert found["examples"] == len(TEXTS)


class Bigrams(nn.Module):
    """The logits of a token's successor are a row of a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16))

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=nn.functional.embedding(input_ids, self.table))


def test_the_logits_of_a_large_vocabulary_are_not_copied(monkeypatch):
    torch.manual_seed(0)
    model, ids = Bigrams(), torch.randint(64, (5, 40))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(5, 40) < 0.2, -100)}
    whole = evaluate(model, [batch])
    monkeypatch.setattr("sylva_train.evaluation.labels.LARGEST_PART", 1000)
    with Allocations() as found:
        parts = evaluate(model, [batch])
    for name in ("loss", "token_accuracy"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)
    large = [shape for shape in found.shapes if math.prod(shape) > 1000]
    assert large == [(5, 40, 64)]  # the model's own
    none = {**batch, "labels": torch.full_like(ids, -100)}
    assert evaluate(model, [batch, none])["loss"] == parts["loss"]


def test_a_loss_whose_exponential_is_no_number_has_a_perplexity():
    model = Fixed(torch.tensor([[0.0, 1e4]]).expand(1, 3, 2))
    batch = {"input_ids": torch.zeros(1, 3).long(), "labels": torch.zeros(1, 3).long()}
    found = evaluate(model, [batch])
    assert found["loss"] == pytest.approx(1e4)
    assert math.isfinite(found["perplexity"])


def test_tokens_of_prompts_do_not_count():
    model, tokenizer = language_model("decoder"), word_tokenizer("decoder")
    data = texts("causal-lm", ["good"] * len(TEXTS))
    whole = TextDataset("toy", "causal-lm", [f"{text} good" for text in TEXTS])
    answers = evaluate(model, Loader(data, tokenizer, 4))
    everything = evaluate(model, Loader(whole, tokenizer, 4))
    assert answers["loss"] != pytest.approx(everything["loss"], rel=1e-3)


class Tagger(BertForTokenClassification):
    """Whose name tells nothing."""


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification, Tagger])
def test_labels_of_each_token_are_not_shifted(kind):
    torch.manual_seed(0)
    model = kind(BertConfig(**TINY, num_labels=3)).eval()
    labels = torch.randint(3, (4, 6)).masked_fill(torch.rand(4, 6) < 0.3, -100)
    batch = {"input_ids": torch.randint(2, VOCABULARY, (4, 6)), "labels": labels}
    found = evaluate(model, [batch])
    assert evaluate(torch.compile(model, backend="eager"), [batch]) == found
    with torch.no_grad():
        output = model(**batch)
    assert found["loss"] == pytest.approx(float(output.loss), rel=1e-6)
    hits = output.logits.argmax(-1).eq(labels).sum() / labels.ne(-100).sum()
    assert found["token_accuracy"] == pytest.approx(float(hits))


def test_classes_that_do_not_count_are_left_out():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    model, batches = fixed(logits, [0, -100, 1, -100], size=2)
    expected = evaluate(*fixed(logits[[0, 2]], [0, 1]))
    found = evaluate(model, batches)
    for name in ("accuracy", "f1", "f1_binary", "mcc", "loss"):
        assert found[name] == pytest.approx(expected[name])
    with pytest.raises(DataError, match="no label counts"):
        evaluate(*fixed(logits, [-100] * 4))


def test_several_classes_at_once_are_refused():
    model = Fixed(torch.zeros(4, 3))
    batch = {"input_ids": torch.arange(4)[:, None], "labels": torch.ones(4, 3)}
    with pytest.raises(ConfigError, match="several classes at once"):
        evaluate(model, [batch])


def test_infinite_logits_are_an_error():
    model, batches = fixed([[1, 0], [0, 1], [0, 1], [math.nan, 1]], [0, 1, 1, 0])
    with pytest.raises(NonFiniteError, match="batch 1 are NaN or infinite"):
        evaluate(model, batches)


def test_what_a_model_returns_has_logits():
    class Pairs(Fixed):
        def forward(self, input_ids):
            return (super().forward(input_ids).logits,)

    batch = {"input_ids": torch.arange(4)[:, None], "labels": torch.tensor([0] * 4)}
    with pytest.raises(ConfigError, match=r"`logits`.*; Pairs returned a tuple"):
        evaluate(Pairs(torch.zeros(4, 3)), [batch])


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([0, 3, 1, 1]), DataError, "from 0 to 2, the model's; got 0 to 3"),
        (torch.tensor([0, -1, 1, 1]), DataError, "got -1 to 1"),
        (
            torch.zeros(4, 1, dtype=torch.int64),
            ConfigError,
            "labels of samples have one",
        ),
        ([0] * 4, DataError, "batch 0 has no `labels` .* must be a tensor"),
    ],
)
def test_labels_that_cannot_be_the_models_are_refused(labels, error, words):
    batch = {"input_ids": torch.arange(4)[:, None], "labels": labels}
    with pytest.raises(error, match=words):
        evaluate(Fixed(torch.zeros(4, 3)), [batch])


def test_labels_are_integers_of_any_size():
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1]])
    for kind in (torch.int32, torch.bool, torch.uint8):
        labels = torch.tensor([1, 0, 0]).to(kind)
        batch = {"input_ids": torch.arange(3)[:, None], "labels": labels}
        assert evaluate(Fixed(logits), [batch])["accuracy"] == pytest.approx(2 / 3)


def test_a_number_to_predict_is_finite():
    batch = {
        "input_ids": torch.arange(3)[:, None],
        "labels": torch.tensor([1, math.nan, 2]),
    }
    with pytest.raises(DataError, match="labels are NaN"):
        evaluate(Fixed(torch.ones(3, 1)), [batch])


def test_bad_arguments_are_refused():
    model, batches = fixed(np.eye(2), [0, 1])
    with pytest.raises(ConfigError, match="`metric` must be one of"):
        evaluate(model, batches, "auc")
    with pytest.raises(ConfigError, match=r"labels that are classes.*'perplexity'"):
        evaluate(model, batches, "perplexity")
    with pytest.raises(DataError, match="no batch"):
        evaluate(model, [])
    with pytest.raises(DataError, match="batch 0 has no `labels`"):
        evaluate(model, [{"input_ids": torch.tensor([[0]])}])
    loader = Loader(texts("causal-lm"), word_tokenizer("decoder"), 4)
    with pytest.raises(ConfigError, match="`predictions`"):
        evaluate(language_model("decoder"), loader, predictions=True)


def test_progress_counts_batches():
    calls = []
    model, batches = fixed(np.eye(5), range(5), 2)
    evaluate(model, batches, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
