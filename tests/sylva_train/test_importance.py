"""Scores against brute force: autograd's own gradients, sample by sample, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train import masks as masks_module
from sylva_train._checks import AdapterError, ConfigError, DataError, NonFiniteError
from sylva_train._files import write_tensors
from sylva_train.config import IMPORTANCES, KRONECKER, NEEDS_DATA, SylvaConfig
from sylva_train.curvature import describe_factor
from sylva_train.curvature.collect import Collector
from sylva_train.importance import Scores, score, score_rules
from sylva_train.importance.rules import RULES

LAYER = "bert.encoder.layer.1.intermediate.dense"


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def batches(sizes=(5, 4), padding=(9, 6), pad=0):
    """Batches whose rows have different lengths; ``pad`` fills the padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size, length in zip(sizes, padding, strict=True):
        lengths = torch.randint(2, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(1, 50, (size, length), generator=generator)
        ids = torch.where(mask.bool(), ids, pad)
        labels = torch.randint(0, 3, (size,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def config(**options):
    defaults = {"block_size": 8, "levels": 2, "rank": 4, "samples": 9}
    defaults |= {"exact_below": 0}
    return SylvaConfig(**{"exclude_modules": ["pooler.dense"], **defaults, **options})


def per_sample(model, data, name):
    """Inputs, output gradients and weight gradient of every sample, padding cut off."""
    module = model.get_submodule(name)
    model.double().eval()
    found = []
    for batch in data:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            kept = {}
            module.register_forward_hook(
                lambda _, args, y, kept=kept: kept.update(x=args[0], y=y)
            )
            one = {
                k: v[i : i + 1, :length] if v.dim() == 2 else v[i : i + 1]
                for k, v in batch.items()
            }
            loss = model(**one).loss
            module._forward_hooks.clear()
            g, w = torch.autograd.grad(loss, [kept["y"], module.weight])
            found.append((kept["x"].detach()[0], g[0], w))
    return found


def kfac_reference(samples, damping, tokens):
    if tokens == "expand":
        X, g = (torch.cat([s[i] for s in samples]) for i in (0, 1))
    else:
        X, g = (torch.stack([s[i].mean(0) for s in samples]) for i in (0, 1))
    A, G = X.T @ X / len(X), g.T @ g / len(g)
    Γ = torch.stack([s[2] for s in samples]).mean(0)
    A, G = (M + damping * M.trace() / len(M) * torch.eye(len(M)) for M in (A, G))
    s_in = (Γ * (G @ Γ)).sum(0) / A.inverse().diagonal()
    s_out = (Γ * (Γ @ A)).sum(1) / G.inverse().diagonal()
    return torch.outer(s_out, s_in)


def blocked(matrix, size):
    return matrix.unflatten(1, (-1, size)).sum(2).unflatten(0, (-1, size)).sum(1)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_kfac_with_exact_factors_is_the_papers_formula(tokens):
    options = config(curvature="dense", tokens=tokens, damping=0.1)
    scores = score(bert(), batches(), options)
    samples = per_sample(bert(), batches(), LAYER)
    expected = blocked(kfac_reference(samples, 0.1, tokens), 8)
    torch.testing.assert_close(scores[LAYER].blocks(8), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("curvature", ["mlr", "hodlr"])
def test_hierarchical_factors_of_full_rank_give_the_exact_scores(curvature):
    exact = score(bert(), batches(), config(curvature="dense", damping=0.1))
    options = config(curvature=curvature, rank=48, damping=0.1)
    scores = score(bert(), batches(), options)
    for name in exact:
        torch.testing.assert_close(
            scores[name].blocks(8), exact[name].blocks(8), rtol=5e-3, atol=1e-30
        )


@pytest.mark.filterwarnings("ignore:.*not positive")
def test_small_factors_are_exact():
    exact = score(bert(), batches(), config(curvature="dense"))
    small = score(bert(), batches(), config(curvature="mlr", exact_below=49))
    cut = score(bert(), batches(), config(curvature="mlr", exact_below=48))
    for name in exact:
        one, other, third = (s[name].blocks(8) for s in (exact, small, cut))
        assert torch.equal(one, other)
        assert torch.equal(one, third) == (48 not in exact[name].shape)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("gradient", lambda _, g: g.mean(0).abs()),
        ("weight-gradient", lambda w, g: (w * g.mean(0)).abs()),
        ("fisher-diag", lambda _, g: g.square().mean(0)),
        ("magnitude", lambda w, _: w.abs()),
    ],
)
def test_rivals_are_their_formulas(rule, reference):
    scores = score(bert(), batches(), config(importance=rule))
    model = bert()
    gradients = torch.stack([s[2] for s in per_sample(model, batches(), LAYER)])
    weight = model.get_submodule(LAYER).weight.detach()
    expected = blocked(reference(weight, gradients), 8)
    torch.testing.assert_close(scores[LAYER].blocks(8), expected, rtol=1e-4, atol=1e-12)


def damped_factors(samples, damping=0.1):
    """A, G, with damping, and the mean gradient."""
    X, g = (torch.cat([s[i] for s in samples]) for i in (0, 1))
    A, G = X.T @ X / len(X), g.T @ g / len(g)
    A, G = (M + damping * M.trace() / len(M) * torch.eye(len(M)) for M in (A, G))
    return A, G, torch.stack([s[2] for s in samples]).mean(0)


def element_reference(A, G, Γ, size):
    costs = torch.outer(G.inverse().diagonal(), A.inverse().diagonal())
    return blocked(Γ.square() / costs, size)


def natural_reference(A, G, Γ, size):
    """The natural step of the whole matrix at once, with the Kronecker product built."""
    step = torch.linalg.solve(torch.kron(G, A), Γ.flatten()).view_as(Γ)
    return blocked(Γ * step, size)


def block_reference(A, G, Γ, size):
    """Block by block, with the Kronecker product of its own part of the factors."""
    scores = torch.zeros(len(G) // size, len(A) // size, dtype=torch.float64)
    for i, j in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        fisher = torch.kron(G[rows, rows], A[columns, columns])
        gradient = Γ[rows, columns].flatten()
        scores[i, j] = gradient @ torch.linalg.solve(fisher, gradient)
    return scores


KRONECKER_RULES = {
    "kfac-element": element_reference,
    "kfac-natural": natural_reference,
    "kfac-block": block_reference,
}


@pytest.mark.parametrize("curvature", ["dense", "mlr", "hodlr"])
@pytest.mark.parametrize("rule", KRONECKER_RULES)
def test_kronecker_rules_are_their_formulas(rule, curvature):
    options = config(importance=rule, curvature=curvature, rank=48, damping=0.1)
    scores = score(bert(), batches(), options)
    A, G, Γ = damped_factors(per_sample(bert(), batches(), LAYER))
    expected = KRONECKER_RULES[rule](A, G, Γ, 8)
    torch.testing.assert_close(
        scores[LAYER].blocks(8), expected, rtol=5e-3, atol=1e-5 * float(expected.max())
    )


def test_the_natural_gradients_parts_sum_to_its_decrease():
    """The whole is what a block as large as the layer gains alone."""
    found = score_rules(
        bert(), batches(), config(block_size=32, damping=0.1), ["kfac-natural"]
    )
    parts = found["kfac-natural"]["bert.encoder.layer.0.attention.self.query"]
    whole = score(
        bert(), batches(), config(importance="kfac-block", block_size=32, damping=0.1)
    )["bert.encoder.layer.0.attention.self.query"]
    torch.testing.assert_close(parts.blocks(32), whole.blocks(32), rtol=1e-2, atol=0)


@pytest.mark.parametrize("curvature", ["dense", "mlr"])
def test_blocks_that_are_cut_off_score_what_is_there(curvature):
    """20 divides neither 48 nor 32: the last block is 8 × 12."""
    options = config(
        importance="kfac-block",
        curvature=curvature,
        rank=48,
        block_size=20,
        damping=0.1,
    )
    scores = score(bert(), batches(), options)[LAYER].blocks(20)
    A, G, Γ = damped_factors(per_sample(bert(), batches(), LAYER))
    assert scores.shape == (3, 2)
    fisher = torch.kron(G[40:, 40:], A[20:, 20:])
    gradient = Γ[40:, 20:].flatten()
    expected = gradient @ torch.linalg.solve(fisher, gradient)
    torch.testing.assert_close(scores[2, 1], expected, rtol=5e-3, atol=0)


def test_rules_of_one_pass_are_those_of_their_own():
    rules = list(IMPORTANCES)
    together = score_rules(bert(), batches(), config(damping=0.1), rules)
    assert list(together) == rules
    for rule in rules:
        alone = score(bert(), batches(), config(importance=rule, damping=0.1))
        assert together[rule].metadata == alone.metadata
        for name in alone:
            expected = alone[name].blocks(8)
            torch.testing.assert_close(together[rule][name].blocks(8), expected)


def test_every_rule_is_known_with_what_it_needs():
    assert set(RULES) == set(IMPORTANCES)
    assert {rule for rule, (_, needs) in RULES.items() if needs} == NEEDS_DATA
    assert {r for r, (_, needs) in RULES.items() if "factors" in needs} == KRONECKER
    with pytest.raises(ConfigError, match="rules"):
        score_rules(bert(), batches(), config(), ["luck"])


def test_scores_that_do_not_add_up_serve_their_block_size_alone(tmp_path):
    scores = score(bert(), batches(), config(importance="kfac-block"))
    scores.save(tmp_path / "scores.safetensors")
    for each in (scores, Scores.load(tmp_path / "scores.safetensors")):
        with pytest.raises(ConfigError, match="must be 8"):
            each[LAYER].blocks(16)


def test_score_files_of_the_first_format_are_read(tmp_path):
    path = tmp_path / "scores.safetensors"
    grid = torch.rand(6, 4, dtype=torch.float64)
    header = {
        "format": "sylva-scores/1",
        "layers": {"a": {"shape": [48, 32], "unit": 8}},
        "metadata": {"importance": "gradient"},
    }
    write_tensors(path, {"a.grid": grid}, header)
    loaded = Scores.load(path)
    assert torch.equal(loaded["a"].blocks(8), grid)
    assert loaded["a"].blocks(16).shape == (3, 2)


def test_wanda_is_its_formula():
    scores = score(bert(), batches(), config(importance="wanda"))
    model = bert()
    X = torch.cat([s[0] for s in per_sample(model, batches(), LAYER)])
    weight = model.get_submodule(LAYER).weight.detach()
    expected = blocked(weight.abs() * X.square().mean(0).sqrt(), 8)
    torch.testing.assert_close(scores[LAYER].blocks(8), expected, rtol=1e-4, atol=0)


def test_pruner_saliency_is_its_formula():
    options = config(importance="kfac-pruner", curvature="dense", damping=0.1)
    scores = score(bert(), batches(), options)
    samples = per_sample(model := bert(), batches(), LAYER)
    X, g = (torch.cat([s[i] for s in samples]) for i in (0, 1))
    A, G = X.T @ X / len(X), g.T @ g / len(g)
    a, b = (
        (M + 0.1 * M.trace() / len(M) * torch.eye(len(M))).inverse().diagonal()
        for M in (A, G)
    )
    weight = model.get_submodule(LAYER).weight.detach()
    expected = blocked(weight.square() / torch.outer(b, a), 8)
    torch.testing.assert_close(scores[LAYER].blocks(8), expected, rtol=2e-3, atol=0)


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
    collector.start(batch, 1)
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


def test_a_layer_that_gets_no_gradient_is_named():
    model = bert()
    model.unused = nn.Linear(32, 32)
    options = config(target_modules=["unused", "query"])
    with pytest.raises(ConfigError, match="unused"):
        score(model, batches(), options)


def test_a_zero_gradient_scores_zero():
    scores = score(bert(), batches(), config(), loss=lambda m, b: m(**b).loss * 0)
    assert not any(bool(s.blocks(8).any()) for s in scores.values())
    masks_module.select(scores, density=0.1, block_size=8)


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
