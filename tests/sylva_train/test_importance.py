"""Scoring: what counts, what is refused, and the file of scores."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train._checks import (
    AdapterError,
    ConfigError,
    DataError,
    NonFiniteError,
    TargetError,
)
from sylva_train.config import SylvaConfig
from sylva_train.curvature import describe_factor
from sylva_train.curvature.collect import Collector
from sylva_train.data import TextDataset
from sylva_train.evaluation import evaluate
from sylva_train.importance import Scores, score
from sylva_train.layers import embed, merge
from sylva_train.options import NEEDS_DATA
from sylva_train.overlaps import agreement
from sylva_train.selection import select
from tests.sylva_train.counting import Allocations
from tests.sylva_train.scored import LAYER, batches, bert, blocked, config


def test_scores_that_do_not_add_up_serve_their_block_size_alone(tmp_path):
    scores = score(bert(), batches(), config(importance="kfac-block"))
    scores.save(tmp_path / "scores.safetensors")
    for each in (scores, Scores.load(tmp_path / "scores.safetensors")):
        with pytest.raises(ConfigError, match="must be 8"):
            each[LAYER].blocks(16)


@pytest.mark.parametrize("rule", sorted(NEEDS_DATA))
def test_padding_counts_for_nothing(rule):
    """Longer padding with other tokens in it gives the same scores."""
    short = batches((5, 4), (9, 6))
    long = []
    for batch in short:
        width = (0, 15 - batch["input_ids"].shape[1])
        long.append(
            {
                "input_ids": nn.functional.pad(batch["input_ids"], width, value=7),
                "attention_mask": nn.functional.pad(batch["attention_mask"], width),
                "labels": batch["labels"],
            }
        )
    options = config(importance=rule, curvature="dense", damping=0.1)
    one, other = (score(bert(), data, options) for data in (short, long))
    for name in one:
        torch.testing.assert_close(
            one[name].blocks(8), other[name].blocks(8), rtol=1e-3, atol=1e-12
        )


def test_batching_of_the_samples_does_not_matter():
    (batch,) = batches((6,), (7,))
    pieces = [{k: v[i : i + s] for k, v in batch.items()} for i, s in ((0, 4), (4, 2))]
    for rule in sorted(NEEDS_DATA):
        options = config(importance=rule, curvature="dense", samples=6, damping=0.1)
        one, other = (score(bert(), data, options) for data in ([batch], pieces))
        torch.testing.assert_close(
            one[LAYER].blocks(8), other[LAYER].blocks(8), rtol=1e-3, atol=1e-12
        )


def test_a_batch_is_copied_once_to_a_wider_type():
    model = nn.Sequential(nn.Linear(24, 40)).bfloat16()
    batch = {"x": torch.randn(4, 16, 24).bfloat16(), "labels": torch.zeros(4)}
    options = SylvaConfig(target_modules=["0"], importance="gradient", block_size=8)
    with Allocations() as found:
        score(
            model, [batch], options, loss=lambda m, b: m(b["x"]).square().mean()
        )  # fmt: skip
    wide = [
        shape
        for shape, dtype in found.made
        if dtype == torch.float32 and math.prod(shape) >= 4 * 16 * 24
    ]
    assert wide == [(64, 24), (64, 40)]


def test_samples_bounds_what_is_drawn():
    scores = score(bert(), batches(), config(samples=7))
    assert scores.metadata["samples"] == 7
    first = [{k: v[:2] for k, v in batches()[1].items()}]
    expected = score(bert(), [batches()[0], *first], config(samples=9))
    torch.testing.assert_close(scores[LAYER].blocks(8), expected[LAYER].blocks(8))


def test_the_model_is_left_as_it_was():
    model = bert().train()
    model.bert.embeddings.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    score(model, batches(), config())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain = score(bert(), batches(), config())
    model = bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    scores = score(model, batches(), config())
    torch.testing.assert_close(scores[LAYER].blocks(8), plain[LAYER].blocks(8))


def test_same_seed_same_bits():
    for rule in ("kfac", "random"):
        one, two = (score(bert(), batches(), config(importance=rule)) for _ in "ab")
        for name in one:
            assert torch.equal(one[name].blocks(8), two[name].blocks(8))


def test_language_models_score_their_tokens():
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(small)
    (batch,) = batches((4,), (8,))
    batch["labels"] = batch["input_ids"].masked_fill(
        ~batch["attention_mask"].bool(), -100
    )
    options = SylvaConfig(importance="gradient", block_size=8, samples=4)
    scores = score(model, [batch], options)
    model.eval()
    model(**batch).loss.backward()
    # The loss is a mean over tokens, and scores are of the mean over tokens.
    for name in scores:
        gradient = model.get_submodule(name).weight.grad.T
        expected = blocked(gradient.abs().double(), 8)
        torch.testing.assert_close(
            scores[name].blocks(8), expected, rtol=1e-3, atol=1e-9
        )
    assert "lm_head" not in scores


def test_encoder_decoder_tokens_are_told_apart():
    torch.manual_seed(0)
    small = T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(small)
    # Encoder and decoder of one length, so that shapes alone cannot tell.
    (batch,) = batches((4,), (7,))
    labels = batch["input_ids"].flip(0)
    batch["labels"] = labels.masked_fill(~batch["attention_mask"].flip(0).bool(), -100)
    counts = {}
    collector = Collector({}, SylvaConfig(), frozenset())
    collector.start(batch, 1, seq2seq=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows = collector.rows(name, torch.zeros(4, 7, module.out_features))
            counts[name] = rows
    encoder, decoder = batch["attention_mask"].bool(), batch["labels"].ne(-100)
    for name, rows in counts.items():
        cross = ".EncDecAttention.k" in name or ".EncDecAttention.v" in name
        expected = decoder if name.startswith("decoder") and not cross else encoder
        assert torch.equal(rows, expected), name
    scores = score(model, [batch], SylvaConfig(block_size=8, samples=4, rank=4))
    assert len(scores) == len(counts)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_nan_while_scoring_is_refused(where):
    model = bert()
    data = batches()
    if where == "weight":
        with torch.no_grad():
            model.get_submodule(LAYER).weight[0, 0] = float("nan")

    def loss(model, batch):
        value = model(**batch).loss
        if where == "loss":
            return value * float("inf")
        # A finite loss whose gradient is NaN: sqrt at zero.
        return value + (value - value).abs().sqrt() if where == "gradient" else value

    with pytest.raises(NonFiniteError, match="batch 1"):
        score(model, data, config(), loss=loss)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_batch_without_a_label_that_counts_is_told_as_such():
    data = batches()
    data[1]["labels"][:] = -100
    with pytest.raises(NonFiniteError, match=r"batch 2 .* no label in it counts"):
        score(bert(), data, config())


def test_nan_weights_are_refused_by_rules_without_data():
    model = bert()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="intermediate"):
        score(model, None, config(importance="magnitude"))


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="dataloader"):
        score(bert(), None, config())
    with pytest.raises(DataError, match="no batch"):
        score(bert(), [], config())
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in batches()]
    with pytest.raises(DataError, match="labels"):
        score(bert(), unlabelled, config())
    with pytest.raises(ConfigError, match="larger than"):
        score(bert(), batches(), config(block_size=64))
    scores = score(bert(), None, config(importance="random"))
    with pytest.raises(ConfigError, match="multiple of 8"):
        scores[LAYER].blocks(12)


class Rows(Dataset):
    """A data set of two samples, by their number."""

    def __init__(self):
        self.rows = batches((2,), (6,))[0]

    def __getitem__(self, number):
        return {name: value[[0, 1][number]] for name, value in self.rows.items()}


def pair(number):
    return torch.ones(3), torch.tensor(number)


@pytest.mark.parametrize("use", [score, evaluate])
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (TextDataset("x", "classification", ["a"], [0]), "none out of a TextDataset"),
        (Rows(), "a single sample out of a Rows"),
        (DataLoader([pair(0), pair(1)]), "a list out of a DataLoader"),
        ([{"labels": [1]}], "a mapping without such a tensor out of a list"),
        (batches()[0], "a str out of a dict"),
    ],
)
def test_what_gives_no_batches_is_told_as_such(use, given, got):
    with pytest.raises(
        DataError, match=f"loader` must give batches.*got {got}. Texts go"
    ):
        use(bert(), given)


def test_streams_and_data_sets_without_a_length_are_batched():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Rows()[0], Rows()[1]])

    loader = DataLoader(Stream(), batch_size=2)
    assert evaluate(bert(), loader)["examples"] == 2
    found, expected = (score(bert(), d, config()) for d in (loader, [Rows().rows]))
    torch.testing.assert_close(found[LAYER].blocks(8), expected[LAYER].blocks(8))


def test_a_model_with_an_adapter_is_scored_without_it():
    model = bert()
    scores = score(model, batches(), config())
    embed(model, select(scores, 0.2, 8))
    with pytest.raises(TargetError, match=r"base_layer` is inside an adapter's layer"):
        score(model, batches(), config())
    found = score(merge(model), batches(), config())
    for name, layer in scores.items():
        torch.testing.assert_close(found[name].blocks(8), layer.blocks(8))


@pytest.mark.parametrize("value", [torch.ones(3), (torch.ones(()),), 1.0])
def test_a_loss_is_one_number(value):
    with pytest.raises(ConfigError, match="`loss` must return a batch's mean loss"):
        score(bert(), batches(), config(), loss=lambda *_: value)


def test_a_layer_that_gets_no_gradient_is_named():
    model = bert()
    model.unused = nn.Linear(32, 32)
    options = config(target_modules=["unused", "query"])
    with pytest.raises(ConfigError, match="unused"):
        score(model, batches(), options)


def test_a_zero_gradient_scores_zero():
    scores = score(bert(), batches(), config(), loss=lambda m, b: m(**b).loss * 0)
    assert not any(bool(s.blocks(8).any()) for s in scores.values())
    select(scores, density=0.1, block_size=8)


def test_scores_survive_their_file(tmp_path):
    for rule in ("kfac", "gradient"):
        scores = score(bert(), batches(), config(importance=rule))
        scores.save(tmp_path / "scores.safetensors")
        loaded = Scores.load(tmp_path / "scores.safetensors")
        assert loaded.metadata == json.loads(json.dumps(scores.metadata))
        for name in scores:
            assert torch.equal(loaded[name].blocks(8), scores[name].blocks(8))
            assert loaded[name].shape == scores[name].shape


def test_a_damaged_score_file_is_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    score(bert(), batches(), config()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged"):
        Scores.load(path)


@pytest.mark.parametrize("curvature", ["mlr", "dense"])
def test_a_singular_factor_asks_for_damping(curvature):
    options = config(curvature=curvature, damping=0.0, samples=1)
    with pytest.raises(ConfigError, match="damping"):
        score(bert(), batches(), options)


@pytest.mark.parametrize("curvature", ["mlr", "hodlr"])
def test_a_factor_of_full_rank_is_described_without_error(curvature):
    options = config(curvature=curvature, rank=48)
    entry = describe_factor(bert(), LAYER, batches(), options)
    assert entry["error"] < 1e-5
    assert entry["dense_bytes"] == 32 * 32 * 4
    assert len(entry["magnitude"]) == len(entry["approximation"]) == 32
    assert len(entry["level_bytes"]) == entry["levels"] + 1 == 3
    total = sum(entry["level_bytes"])
    assert total == entry["bytes"]
    # An MLR matrix is a sum of positive semidefinite terms: traces add up.
    if curvature == "mlr":
        trace = sum(map(sum, entry["singular_values"]))
        assert trace == pytest.approx(sum(entry["spectrum_dense"]), rel=1e-4)


def test_a_changed_score_file_is_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    score(bert(), batches(), config()).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="changed"):
        Scores.load(path)


def test_what_is_no_model_is_refused():
    with pytest.raises(TargetError, match=r"torch\.nn\.Module; got a int"):
        score(3)


@pytest.mark.parametrize("rule", ["gradient", "fisher-diag", "kfac-natural"])
def test_gradients_of_many_terms_are_told_apart_in_half_precision(rule):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).half()
    with torch.no_grad():
        half[2].weight.mul_(0.05)
    x, labels = torch.randn(8192, 16).half(), torch.randint(16, (8192,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).float(), batch["labels"])

    options = SylvaConfig(importance=rule, block_size=4, samples=8192)
    one = score(half, [{"x": x, "labels": labels}], options, loss=loss)
    exact = score(
        half.double(), [{"x": x.double(), "labels": labels}], options, loss=loss
    )
    assert agreement(exact, one, block_size=4)["least"]["spearman"] > 0.99
