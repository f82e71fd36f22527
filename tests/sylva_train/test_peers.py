"""Kronecker factors against those of other libraries, where these are installed.

``python3 noxfile.py -s peers`` installs them.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sylva_train.config import SylvaConfig
from sylva_train.curvature import collect_curvature
from sylva_train.targets import find_targets
from tests.sylva_train.models import make_batch, make_model, random

TOLERANCE = {"rtol": 1e-6, "atol": 1e-12}
KINDS = ["mlr", "hodlr", "dense"]


def peer(name):
    with warnings.catch_warnings():  # of their own imports
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def padded_batches():
    """Batches of padded sentences of different lengths."""
    made = []
    for seed in range(3):
        batch = make_batch("bert", seed)
        lengths = torch.tensor([6, 3, 4])
        batch["attention_mask"] = (torch.arange(6) < lengths[:, None]).long()
        made.append(batch)
    return made


def factors(model, batches, kind, loss=None):
    """Factors whose blocks have full rank, from samples in float64."""
    config = SylvaConfig(
        curvature=kind, levels=2, rank=64, exact_below=0, block_size=4, samples=10**6
    )
    targets = find_targets(model)
    layers, _ = collect_curvature(
        model, targets, batches, config, ["factors", "gradient"], loss=loss
    )
    return {name: layers[name] for name in targets}


def dense(factor):
    return factor.product(torch.eye(factor.matrix.shape[0], dtype=torch.float64))


@pytest.fixture(scope="module")
def kronfluence_factors():
    """A and G of a small BERT by kronfluence, in float64; its A has a row for the bias."""
    peer("kronfluence")
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):  # noqa: ARG002
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits
            return F.cross_entropy(logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_attention_mask(self, batch):
            return batch["attention_mask"]

    task = Classification()
    batches = padded_batches()
    samples = [
        {key: value[i] for key, value in batch.items()}
        for batch in batches
        for i in range(3)
    ]
    double = {
        "activation_covariance_dtype": torch.float64,
        "gradient_covariance_dtype": torch.float64,
    }
    _, found = fit_covariance_matrices_with_loader(
        model=prepare_model(make_model().double(), task),
        state=State(cpu=True),
        task=task,
        loader=torch.utils.data.DataLoader(samples, batch_size=3),
        factor_args=FactorArguments(use_empirical_fisher=True, **double),
        disable_tqdm=True,
    )

    def mean(side, name):
        count = found[f"num_{side}_covariance_processed"][name]
        return found[f"{side}_covariance"][name] / count

    return {
        name: (mean("activation", name), mean("gradient", name))
        for name in found["activation_covariance"]
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_kronfluence(kind, kronfluence_factors):
    model = make_model().double()
    layers = factors(model, padded_batches(), kind)
    assert len(layers) == 13
    for name, layer in layers.items():
        A, G = kronfluence_factors[name]
        inputs = layer.A.matrix.shape[0]
        torch.testing.assert_close(dense(layer.A), A[:inputs, :inputs], **TOLERANCE)
        torch.testing.assert_close(dense(layer.G), G, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_curvlinops(kind):
    curvlinops = peer("curvlinops")
    model = nn.Sequential(
        nn.Linear(20, 24, bias=False), nn.Tanh(), nn.Linear(24, 20, bias=False),
        nn.Tanh(), nn.Linear(20, 5, bias=False),
    ).double()  # fmt: skip
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(parameter.shape, torch.float64, seed) / 4
    pairs = [
        (random((7, 20), torch.float64, seed), torch.arange(7) % 5) for seed in range(3)
    ]
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), pairs,
        fisher_type="empirical", check_deterministic=False,
    )  # fmt: skip
    X = [
        random(p.shape, torch.float64, 9 + i) for i, p in enumerate(model.parameters())
    ]
    expected = operator @ X
    layers = factors(
        model,
        [{"x": x, "labels": y} for x, y in pairs],
        kind,
        loss=lambda m, batch: F.cross_entropy(m(batch["x"]), batch["labels"]),
    )
    for layer, x, want in zip(layers.values(), X, expected, strict=True):
        got = layer.G.product(layer.A.product(x.T).T)
        torch.testing.assert_close(got, want, **TOLERANCE)
