"""Scoring layers that are called otherwise than once, with the samples first."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    OPTConfig,
    OPTForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from sylva_train import SylvaConfig
from sylva_train._checks import ConfigError
from sylva_train.importance import score, score_rules
from sylva_train.targets import weight_view
from tests.sylva_train.models import DECODER, ENCODER, VOCABULARY

BLOCK = 8


class Calls(nn.Module):
    """Two layers, the first of them called in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, length, _ = x.shape
        if self.way == "again":
            x = torch.tanh(self.first(torch.tanh(self.first(x))))
        elif self.way == "again, of parts":
            x = torch.cat([self.first(x[:, :2]), self.first(x[:, 2:]).tanh()], 1)
        elif self.way == "again, recomputed":
            for _ in range(2):
                x = checkpoint(
                    lambda x: self.first(x).tanh(),
                    x.requires_grad_(),
                    use_reentrant=True,
                )
        elif self.way == "in a row":
            x = self.first(x.flatten(0, 1)).unflatten(0, (samples, length)).tanh()
        elif self.way == "time first":
            x = self.first(x.transpose(0, 1)).transpose(0, 1).tanh()
        elif self.way == "one time":  # Longformer's global tokens
            x = x + self.first(x[:, :1].transpose(0, 1)).transpose(0, 1).tanh()
        elif self.way == "in windows":
            windows = torch.stack([x, 2 * x], 1).flatten(0, 1)
            x = self.first(windows).tanh().unflatten(0, (samples, 2)).sum(1)
        elif self.way == "one for all":  # positions
            x = x * self.first(
                torch.linspace(-1, 1, length)[:, None].to(x).expand(1, -1, 8)
            )
        elif self.way == "some rows":  # an expert
            rows = x.flatten(0, 1)
            chosen = (rows[:, 0] > 0).nonzero().flatten()
            part = self.first(rows[chosen]).tanh()
            x = rows.index_add(0, chosen, part).unflatten(0, (samples, length))
        elif self.way == "then in place":
            x = self.first(x).relu_()
        return self.last(x.mean(1))


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def made(*sizes):
    """Batches of so many samples, of so many tokens each."""
    return [
        {
            "x": torch.randn(n, t, 8, dtype=torch.float64),
            "labels": torch.randint(8, (n,)),
        }
        for n, t in sizes
    ]


def reference(model, batches, of):
    """Each sample's gradient of every layer, float64 (samples, out, in)."""
    model = model.eval()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for batch in batches:
        for i in range(len(batch["labels"])):
            model.zero_grad()
            of(model, {k: v[i : i + 1] for k, v in batch.items()}).backward()
            for name, module in layers.items():
                if module.weight.dim() == 2 and module.weight.grad is not None:
                    gradient = module.weight.grad
                    same = weight_view(module).shape == gradient.shape
                    found[name].append((gradient if same else gradient.T).clone())
    return {name: torch.stack(values) for name, values in found.items() if values}


def check(model, batches, of):
    """Hold gradients and diagonal Fishers against sample after sample."""
    options = SylvaConfig(block_size=BLOCK, samples=100)
    rules = ("gradient", "fisher-diag")
    scores = score_rules(model, batches, options, rules, loss=of)
    for name, gradients in reference(model, batches, of).items():
        if name not in scores["gradient"]:
            continue
        each = gradients.mean(0).abs(), gradients.square().mean(0)
        for rule, expected in zip(rules, each, strict=True):
            rows, columns = (-(-n // BLOCK) * BLOCK for n in expected.shape)
            padded = torch.zeros(rows, columns, dtype=torch.float64)
            padded[: expected.shape[0], : expected.shape[1]] = expected
            blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            torch.testing.assert_close(
                scores[rule][name].blocks(BLOCK),
                blocks.sum((1, 3)),
                rtol=1e-6,
                atol=1e-18,
                msg=lambda text, n=name, r=rule: f"{n}, {r}: {text}",
            )


@pytest.mark.parametrize(
    "way",
    [
        "again", "again, of parts", "again, recomputed", "in a row", "time first",
        "one time", "in windows", "then in place",
    ],
)  # fmt: skip
def test_layers_are_scored_however_they_are_called(way):
    torch.manual_seed(0)
    check(Calls(way).double(), made((4, 5), (3, 5), (1, 4)), loss)


@pytest.mark.parametrize("way", ["one for all", "some rows"])
def test_rows_that_are_of_no_one_sample_take_batches_of_one(way):
    torch.manual_seed(0)
    model = Calls(way).double()
    check(model, made((1, 5), (1, 7), (1, 4)), loss)
    options = SylvaConfig(block_size=BLOCK, importance="fisher-diag")
    if way == "one for all":  # as a sample of its own
        assert (
            score(model, made((4, 5)), options, loss=loss)["first"].blocks(BLOCK).sum()
            > 0
        )
        return
    with pytest.raises(ConfigError, match=r"`first` .* with batches of one sample"):
        score(model, made((4, 5), (4, 5)), options, loss=loss)


def test_windows_that_may_be_time_are_not_guessed_at():
    torch.manual_seed(0)
    options = SylvaConfig(block_size=BLOCK, importance="fisher-diag")
    with pytest.raises(ConfigError, match="cannot be told apart"):
        score(Calls("in windows").double(), made((3, 3)), options, loss=loss)


def test_patches_of_all_images_in_one_row_are_of_no_one_sample():
    """As Pixtral has them; a tensor of that shape may be what all samples share."""

    def images(model, batch):
        packed = batch["x"].flatten(0, 1)[None]
        y = model.first(packed).tanh().unflatten(1, batch["x"].shape[:2])[0]
        return F.cross_entropy(model.last(y.mean(1)), batch["labels"])

    torch.manual_seed(0)
    model = Calls("").double()
    batches = [b | {"image_sizes": torch.ones(len(b["x"]), 2)} for b in made((4, 5))]
    options = SylvaConfig(block_size=BLOCK, importance="fisher-diag")
    with pytest.raises(ConfigError, match=r"`first` .* with batches of one sample"):
        score(model, batches, options, loss=images)
    check(model, [{k: v[:1] for k, v in b.items()} for b in batches], images)
    by_rows, by_samples = (
        score(model, batches, SylvaConfig(block_size=BLOCK, tokens=way), loss=images)
        for way in ("expand", "reduce")
    )
    first = by_samples["first"].blocks(BLOCK)
    torch.testing.assert_close(first, by_rows["first"].blocks(BLOCK))


FAMILIES = {
    # One layer of weights, called again and again.
    "albert": lambda: AlbertForSequenceClassification(
        AlbertConfig(**ENCODER, embedding_size=16)
    ),
    # All tokens in a row.
    "opt": lambda: OPTForSequenceClassification(
        OPTConfig(**DECODER, ffn_dim=28, word_embed_proj_dim=16)
    ),
    # Time first.
    "xlnet": lambda: XLNetForSequenceClassification(
        XLNetConfig(
            vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=28,
            num_labels=3,
        )
    ),
    # All choices in a row.
    "choice": lambda: BertForMultipleChoice(BertConfig(**ENCODER)),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore:"all-linear" is')
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_call_layers_in_ways_of_their_own(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().double()
    batches = []
    for samples, length in ((3, 6), (2, 5)):
        shape = (samples, 4, length) if family == "choice" else (samples, length)
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, ..., length - 2 :] = 0
        if family == "xlnet":
            mask = mask.flip(1)
        ids = torch.randint(2, VOCABULARY, shape) * mask
        labels = torch.randint(3, (samples,))
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    check(model, batches, lambda model, batch: model(**batch).loss)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_tokens_in_a_row_give_the_scores_of_tokens_by_sample(tokens):
    torch.manual_seed(0)
    data = [{"x": torch.randn(4, 5, 8).double(), "labels": torch.randint(8, (4,))}]
    found = []
    for way in ("in a row", "time first"):
        torch.manual_seed(1)
        options = SylvaConfig(block_size=BLOCK, samples=9, tokens=tokens, damping=0.1)
        found.append(score(Calls(way).double(), data, options, loss=loss))
    one, other = found
    for name in one:
        torch.testing.assert_close(one[name].blocks(BLOCK), other[name].blocks(BLOCK))


@pytest.mark.parametrize("rule", ["fisher-diag", "gradient", "kfac-natural"])
def test_statistics_are_not_rounded_under_autocast(rule):
    """Of a model that keeps autocast out, as of a mixed one, they are the same."""
    torch.manual_seed(0)
    model = Calls("again")
    batch = {"x": torch.randn(4, 5, 8), "labels": torch.randint(8, (4,))}
    options = SylvaConfig(block_size=BLOCK, samples=4, importance=rule, tokens="reduce")

    def plain(model, batch):
        with torch.autocast("cpu", enabled=False):
            return loss(model, batch)

    one = score(model, [batch], options, loss=plain)
    with torch.autocast("cpu", torch.bfloat16):
        other = score(model, [batch], options, loss=plain)
    for name in one:
        assert torch.equal(one[name].blocks(BLOCK), other[name].blocks(BLOCK))


def test_labels_that_do_not_count_weigh_nothing():
    """The mean over all labels that count, whatever batch they are in."""
    torch.manual_seed(0)
    model = Calls("again").double()
    x, labels = torch.randn(6, 5, 8).double(), torch.randint(8, (6,))
    labels[:2] = -100
    whole = {"x": x, "labels": labels}
    parts = [{name: value[i : i + 3] for name, value in whole.items()} for i in (0, 3)]
    options = SylvaConfig(block_size=BLOCK, samples=6, importance="gradient")
    one, other = (score(model, data, options, loss=loss) for data in ([whole], parts))
    for name in one:
        torch.testing.assert_close(one[name].blocks(BLOCK), other[name].blocks(BLOCK))
