"""Kronecker factors and choices against other libraries, where these are installed.

``python3 noxfile.py -s peers`` installs them.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sylva_train.config import SylvaConfig
from sylva_train.curvature import collect_curvature
from sylva_train.data import Loader, load_data
from sylva_train.evaluation import evaluate
from sylva_train.targets import find_targets
from tests.sylva_train.jobs import write_mmlu
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
    layers = collect_curvature(
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


@pytest.mark.parametrize("seed", range(3))
def test_choices_are_those_of_lm_eval(seed, tmp_path):
    peer("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    data = load_data(write_mmlu(tmp_path / "mmlu"), task="causal-lm", split="test")
    loader = Loader(data, letter_tokenizer(data.texts), 3, max_length=512)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(loader.tokenizer), hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    found = evaluate(model, loader, "choice", predictions=True)
    peers = HFLM(pretrained=model, tokenizer=loader.tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (text, f" {letter}"), number)
        for text in data.texts
        for number, letter in enumerate("ABCD")
    ]
    likelihoods = [
        value for value, _ in peers.loglikelihood(requests, disable_tqdm=True)
    ]
    expected = [
        "ABCD"[max(range(4), key=lambda i: likelihoods[start + i])]
        for start in range(0, len(requests), 4)
    ]
    assert found["predictions"] == expected


def letter_tokenizer(texts):
    """One that makes a token of each word and of each letter of an option."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words = {w for text in texts for w, _ in split.pre_tokenize_str(text)}
    names = ["[PAD]", "[UNK]", "</s>", *sorted(words | set("ABCD"))]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        eos_token="</s>", model_max_length=512,
    )  # fmt: skip
