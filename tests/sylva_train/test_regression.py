"""A number for each text or pair of texts: read, scored, trained, evaluated, kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from sylva_train import (
    ConfigError,
    DataError,
    Loader,
    SylvaConfig,
    TaskConfig,
    evaluate,
    evaluate_folder,
    finetune,
    load_data,
    load_folder,
    load_model,
    load_tokenizer,
    predict,
    score,
)
from sylva_train.workflow import load_task
from tests.sylva_train.jobs import (
    STEPS,
    sylva,
    sylva_config,
    task,
    told,
    training,
    write_pairs,
)
from tests.sylva_train.test_evaluation import fixed
from tests.sylva_train.words import TINY, save_folder, word_tokenizer

PAIRS = {"task": "regression", "text_column": ["one", "two"], "label_column": "score"}


@pytest.fixture(scope="module", params=["mean", "native"])
def home(tmp_path_factory, request) -> Path:
    """Pairs, and a BERT that is pooled or a RoBERTa with its own head."""
    path = tmp_path_factory.mktemp("home")
    if request.param == "mean":
        save_folder(path / "model")
    else:
        # Its positions begin after the one of padding.
        config = RobertaConfig(**(TINY | {"type_vocab_size": 2}))
        save_folder(path / "model", config, RobertaModel)
    write_pairs(path / "train.jsonl")
    (path / "pooling").write_text(request.param)
    return path


def options(home: Path) -> dict:
    return PAIRS | {"pooling": (home / "pooling").read_text()}


def loaded(home: Path):
    data = load_data(home / "train.jsonl", **PAIRS)
    pooling = (home / "pooling").read_text()
    model, tokenizer = load_model(home / "model", task="regression", pooling=pooling)
    return data, model, tokenizer


# Data


def test_numbers_are_read_as_they_are(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("sentence,score\na,1\nb,-2.5\nc,1e-3\n")
    data = load_data(path, task="regression")
    assert (data.labels, data.label_names) == ([1.0, -2.5, 1e-3], [])
    assert all(type(label) is float for label in data.labels)


def test_a_test_set_without_labels_is_told_as_such(tmp_path):
    """Its correlations would be 0: `datasets` gives each row of STS-B's a -1."""
    path = tmp_path / "test.csv"
    path.write_text("sentence,score\na,-1\nb,-1.0\n")
    with pytest.raises(DataError, match=r"column 'score' is -1, as in test sets"):
        load_data(path, task="regression")


def test_a_first_row_with_a_number_is_no_header(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,0.5\nb,2\n")
    data = load_data(path, task="regression", text_column=0, label_column=1)
    assert data.labels == [0.5, 2.0]
    path.write_text("text,how much\na,0.5\nb,2\n")
    data = load_data(path, task="regression", text_column=0, label_column=1)
    assert data.labels == [0.5, 2.0]


@pytest.mark.parametrize("column", [None, "label"])
def test_numbers_are_no_classes(tmp_path, column):
    path = tmp_path / "rated.csv"
    lines = [f"text {n},{n / 8 + 0.3:.3f}" for n in range(24)]
    path.write_text("\n".join(["text,label", *lines]))
    with pytest.raises(
        DataError, match=r'24 different numbers.*`task` is "regression"'
    ):
        load_data(path, label_column=column)
    # A scale with few values may well be classes.
    path.write_text(
        "\n".join(["text,label", *(f"text {n},{n % 4 / 2}" for n in range(24))])
    )
    assert load_data(path, label_column=column).label_names == [
        "0.0",
        "0.5",
        "1.0",
        "1.5",
    ]


@pytest.mark.parametrize("value", ['"high"', "true", "null", "NaN", '"inf"', "[1]"])
def test_what_is_no_finite_number_is_refused_with_its_line(tmp_path, value):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a", "score": 1}}\n{{"text": "b", "score": {value}}}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: expected a finite number"):
        load_data(path, task="regression")


def test_a_regression_has_no_classes(tmp_path):
    path = write_pairs(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="a regression has no classes"):
        load_data(path, labels=["a", "b"], **PAIRS)


# Model and metrics


def test_the_loss_is_the_mean_squared_error(home):
    data, model, tokenizer = loaded(home)
    batch = next(iter(Loader(data, tokenizer, 5)))
    assert batch["labels"].dtype == torch.float32
    output = model(**batch)
    assert output.logits.shape == (5, 1)
    expected = (output.logits[:, 0] - batch["labels"]).square().mean()
    torch.testing.assert_close(output.loss, expected)


@given(
    seed=st.integers(0, 99),
    count=st.integers(2, 20),
    size=st.integers(1, 7),
    ties=st.booleans(),
)
def test_metrics_are_those_of_scipy(seed, count, size, ties):
    random = np.random.default_rng(seed)
    guess, truth = random.normal(size=(2, count)).astype(np.float32)
    guess[0], truth[0] = -9, 9  # neither is constant
    if ties:
        truth = truth.round()
    found = evaluate(*fixed(guess[:, None], truth, size))
    exact = guess.astype(float), truth.astype(float)
    assert found["pearson"] == pytest.approx(np.corrcoef(*exact)[0, 1], abs=1e-9)
    ranks = [scipy.stats.rankdata(values) for values in exact]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert found["mse"] == pytest.approx(np.mean((exact[0] - exact[1]) ** 2))
    assert found["score"] == found["pearson"]
    assert not evaluate(*fixed(guess[:, None], truth, size), "mse")["higher_is_better"]


def test_constants_correlate_with_nothing():
    found = evaluate(*fixed([[1.0], [1.0]], [0.0, 2.0]))
    assert (found["pearson"], found["spearman"], found["mse"]) == (0, 0, 1)


def test_predictions_are_numbers_in_the_order_of_the_data(home):
    data, model, tokenizer = loaded(home)
    mixed = Loader(data, tokenizer, 5, shuffle=True, bucket=2)
    found = evaluate(model, mixed, predictions=True)
    assert found["labels"].tolist() == data.labels
    assert found["predictions"].tolist() == found["logits"][:, 0].tolist()


def test_several_outputs_have_no_number():
    with pytest.raises(ConfigError, match=r'one output.*task="regression"'):
        evaluate(*fixed([[1.0, 2.0]], [0.5]))


def test_a_classifier_of_a_regression_is_trained_on_classes(home):
    data, model, tokenizer = loaded(home)
    model.save_pretrained(home / "numbers")
    tokenizer.save_pretrained(home / "numbers")
    pooling = (home / "pooling").read_text()
    model, _ = load_model(home / "numbers", labels=["no", "yes"], pooling=pooling)
    batch = next(iter(Loader(data, tokenizer, 5)))
    batch["labels"] = torch.tensor([0, 1, 1, 0, 1])
    output = model(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)


# Scores


def test_scores_are_of_the_gradient_of_the_squared_error(home):
    data, model, tokenizer = loaded(home)
    config = SylvaConfig(importance="gradient", samples=len(data), block_size=1)
    scores = score(model, Loader(data, tokenizer, 7), config)  # the last batch is small
    (batch,) = Loader(data, tokenizer, len(data))
    (model(**batch).logits[:, 0] - batch["labels"]).square().mean().backward()
    for name, layer in scores.items():
        expected = model.get_submodule(name).weight.grad.abs()
        torch.testing.assert_close(
            layer.blocks(1).double(), expected.double(), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("rule", ["kfac", "kfac-pruner", "fisher-diag", "wanda"])
def test_every_kind_of_rule_scores_a_regression(home, rule):
    data, model, tokenizer = loaded(home)
    config = SylvaConfig(importance=rule, samples=12, levels=1, rank=4, block_size=8)
    scores = score(model, Loader(data, tokenizer, 6), config)
    assert all(bool(layer.blocks(8).isfinite().all()) for layer in scores.values())
    assert any(float(layer.blocks(8).max()) > 0 for layer in scores.values())


# Whole jobs


def moved(home: Path, folder: Path, factor: float, shift: float) -> TaskConfig:
    """The task with other numbers."""
    lines = (home / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"score": factor * row["score"] + shift} for row in rows]
    (folder / "moved.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return task(home, data=str(folder / "moved.jsonl"), **options(home))


@pytest.mark.parametrize(("factor", "shift"), [(1000, 5000), (0.001, 0.5)])
def test_numbers_of_any_size_are_learnt_alike(home, tmp_path, factor, shift):
    """The head begins with their mean and deviation, as if they were brought to 0 ± 1."""
    errors = []
    for about in (moved(home, tmp_path, 1, 0), moved(home, tmp_path, factor, shift)):
        loaded = load_task(about)
        deviation = np.std(loaded.train.labels)
        found = evaluate(loaded.model, loaded.eval_loader(training()))
        errors.append(found["mse"] / deviation**2)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    output = tmp_path / "run"
    run = finetune(about, sylva_config(), training(), output, progress=False)
    again = evaluate_folder(output)
    assert again["mse"] == pytest.approx(run["metrics"]["mse"], rel=1e-4)


def test_a_head_that_stays_as_it_is_begins_as_it_was(home, tmp_path):
    """Its adapter has no head, and is for a model with the one that was drawn."""
    about, config = moved(home, tmp_path, 9, 5), sylva_config(modules_to_save=[])
    finetune(about, config, training(), tmp_path / "run", progress=False)
    evaluate_folder(tmp_path / "run")


def test_a_saved_head_keeps_its_weights(home, tmp_path):
    about = moved(home, tmp_path, 9, 5)
    model = load_task(about).model
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(home / "model").save_pretrained(tmp_path / "model")
    about = dataclasses.replace(about, model=str(tmp_path / "model"), pooling="auto")
    again = load_task(about).model
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_numbers_far_from_a_head_without_a_bias_are_warned_of(home, tmp_path):
    config = LlamaConfig(**TINY, num_key_value_heads=2)
    save_folder(tmp_path / "model", config, LlamaForCausalLM, word_tokenizer("decoder"))
    near = moved(home, tmp_path, 1, 0)
    near = dataclasses.replace(near, model=str(tmp_path / "model"), pooling="auto")
    load_task(near)  # a warning would be an error
    moved(home, tmp_path, 0.01, 50)
    with pytest.warns(UserWarning, match=r"moved\.jsonl are 50 ± .*no bias"):
        load_task(near)


def test_a_whole_job_from_scores_to_the_merged_model(home, tmp_path):
    config = sylva_config(importance="kfac", samples=8, levels=1, density=0.5)
    steps = training(steps=60, lr=0.03)
    about = task(home, metric="spearman", **options(home))
    run = finetune(about, config, steps, tmp_path / "run", progress=False)
    assert (run["labels"], run["metrics"]["metric"]) == ([], "spearman")
    losses = [step["loss"] for step in run["history"]]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert run["head"] > 0
    found = json.loads(sylva("evaluate", tmp_path / "run", "--json").stdout)
    for name in ("spearman", "pearson", "mse"):
        assert found[name] == pytest.approx(run["metrics"][name], abs=1e-6)
    assert "spearman" in sylva("evaluate", tmp_path / "run").stdout
    sylva("inspect", tmp_path / "run")

    sylva("merge", tmp_path / "run", tmp_path / "whole")
    data = load_data(home / "train.jsonl", **PAIRS)
    model, tokenizer, _ = load_folder(tmp_path / "run")
    merged, _ = load_model(tmp_path / "whole", task="regression")
    batch = next(iter(Loader(data, tokenizer, 8)))
    batch.pop("labels")
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits)
    found = predict(tmp_path / "run", data.texts[:8])
    assert found == pytest.approx(merged(**batch).logits[:, 0].tolist(), rel=1e-5)


def test_a_metric_of_another_task_is_refused_before_any_work(home, tmp_path):
    base = ["finetune", tmp_path / "run", "--task", "regression", *STEPS]
    base += ["--model", home / "model", "--data", home / "train.jsonl"]
    for metric in ("accuracy", "f1-binary", "perplexity"):
        message = told(sylva(*base, "--metric", metric, code=2))
        assert "must be one of 'pearson', 'spearman', 'mse'" in message
