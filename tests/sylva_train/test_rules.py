"""Rules against brute force: autograd's own gradients, sample by sample, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.curvature import Factor, LayerCurvature
from sylva_train.importance import score, score_rules
from sylva_train.importance.rules import RULES, Inputs
from sylva_train.options import FACTORS, IMPORTANCES, KRONECKER, NEEDS_DATA
from tests.sylva_train.counting import Allocations
from tests.sylva_train.scored import LAYER, batches, bert, blocked, config, per_sample


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


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-3), ("float64", 1e-6)])
@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_kfac_with_exact_factors_is_the_papers_formula(tokens, dtype, rtol):
    options = config(importance="kfac", curvature="dense", tokens=tokens, damping=0.1)
    scores = score(bert().to(getattr(torch, dtype)), batches(), options)
    samples = per_sample(bert(), batches(), LAYER)
    expected = blocked(kfac_reference(samples, 0.1, tokens), 8)
    torch.testing.assert_close(scores[LAYER].blocks(8), expected, rtol=rtol, atol=0)


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


def diagonal_reference(A, G, _, size):
    return blocked(torch.outer(G.diagonal(), A.diagonal()).sqrt(), size)


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


def test_diagonal_of_the_factors():
    scores = score(bert(), batches(), config(importance="kfac-diag"))
    factors = damped_factors(per_sample(bert(), batches(), LAYER), damping=0.0)
    torch.testing.assert_close(
        scores[LAYER].blocks(8), diagonal_reference(*factors, 8), rtol=1e-5, atol=0.0
    )
    assert scores.metadata.keys().isdisjoint(FACTORS)  # it has no use for them


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


def layer_inputs(shape, **options):
    """What a rule sees of a layer with exact factors."""
    generator = torch.Generator().manual_seed(0)
    out, in_ = shape
    X, g = (torch.randn(2 * n, n, generator=generator) for n in (in_, out))
    layer = LayerCurvature(
        A=Factor(X.T @ X),
        G=Factor(g.T @ g),
        gradient=torch.randn(shape, generator=generator),
        input_squares=X.square().mean(0),
        output_squares=g.square().mean(0),
    )
    weight = torch.randn(shape, generator=generator).bfloat16()
    return Inputs(weight, layer, SylvaConfig(**options), generator)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"random", "fisher-diag"}))
def test_a_rule_has_one_copy_of_a_layers_numbers_at_most(rule, monkeypatch):
    shape, size = (70, 110), 8
    inputs = layer_inputs(shape, block_size=size)
    whole = RULES[rule][0](inputs).blocks(size)
    monkeypatch.setattr("sylva_train.curvature.factors.LARGEST_PART", 1000)
    with Allocations() as found:
        parts = RULES[rule][0](replace(inputs)).blocks(size)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    large = [each for each in found.shapes if math.prod(each) >= math.prod(shape)]
    # The factors are squares, one of them larger than the layer.
    copies = [each for each in large if len(each) != 2 or each[0] != each[1]]
    assert len(copies) == (rule == "kfac-natural"), copies


@pytest.mark.parametrize("which", ["A", "G"])
@pytest.mark.parametrize("rule", sorted(r for r in RULES if "factors" in RULES[r][1]))
def test_where_no_input_or_no_gradient_arrives_nothing_matters(rule, which):
    factors = {"A": torch.eye(20), "G": torch.eye(12)}
    factors[which].zero_()
    layer = LayerCurvature(
        **{name: Factor(matrix) for name, matrix in factors.items()},
        gradient=torch.zeros(12, 20),
    )
    inputs = Inputs(
        torch.ones(12, 20), layer, SylvaConfig(block_size=8), torch.Generator()
    )
    blocks = RULES[rule][0](inputs).blocks(8)
    assert blocks.shape == (2, 3)
    assert not blocks.any()
