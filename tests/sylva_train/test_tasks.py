"""What jobs read: data, splits, tokenizers and classes, and what they refuse first."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig

from sylva_train import ConfigError, DataError, ModelError, TrainingConfig, finetune
from sylva_train.data import Loader, TextDataset
from sylva_train.pretrained import load_model
from sylva_train.progress import Progress
from sylva_train.workflow import load_task
from sylva_train.workflow.task import (
    check_ids,
    head_order,
    located,
    read_data,
    tell_of_cuts,
)
from tests.sylva_train.jobs import sylva_config, task, training, write_data
from tests.sylva_train.words import TINY, VOCABULARY, save_folder, word_tokenizer

QUIET = {"progress": False}


def test_a_tenth_of_a_single_file_is_held_out(home):
    parts = read_data(task(home), seed=3)
    assert [len(part) for part in parts] == [36, 4]
    assert not set(parts[0].texts) & set(parts[1].texts)
    again = read_data(task(home), seed=3)
    assert [p.texts for p in parts] == [p.texts for p in again]
    other = read_data(task(home), seed=4)
    assert other[1].texts != parts[1].texts
    # The same again where only the evaluation is asked for.
    labels = parts[0].label_names
    _, alone = read_data(task(home), seed=3, labels=labels, training=False)
    assert alone.texts == parts[1].texts


def test_no_text_is_both_trained_on_and_held_out(home, tmp_path):
    rows = (home / "train.jsonl").read_text().splitlines()
    path = tmp_path / "doubled.jsonl"
    path.write_text("\n".join(rows[:20] * 2))
    rest, tenth = read_data(task(home, data=str(path)), seed=0)
    assert not set(rest.texts) & set(tenth.texts)
    assert (len(rest), len(tenth)) == (36, 4)


@pytest.mark.parametrize("upper", [False, True])
def test_data_takes_the_order_of_a_head_that_knows_its_classes(home, tmp_path, upper):
    begun = load_task(task(home))
    names = begun.train.label_names
    model, tokenizer = load_model(home / "model", labels=names[::-1])
    if upper:
        model.config.id2label = {i: n.upper() for i, n in enumerate(names[::-1])}
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    found = load_task(task(home, model=str(tmp_path / "saved")))
    assert torch.equal(found.model.classifier.weight, model.classifier.weight)
    assert found.model.config.id2label == dict(enumerate(names[::-1]))
    for ours, theirs in (
        (found.train, begun.train),
        (found.held_out, begun.held_out),
    ):
        assert ours.label_names == names[::-1]
        assert [names[::-1][i] for i in ours.labels] == [
            names[i] for i in theirs.labels
        ]


def test_data_of_other_classes_keeps_its_order(home):
    names = load_task(task(home)).train.label_names
    assert head_order(names, ["LABEL_0", "LABEL_1"]) == names
    assert head_order(names, [*names[::-1], "other"]) == names
    assert head_order(names, []) == names


def test_a_split_of_a_single_file_is_refused_before_training(home, tmp_path):
    config = task(home, eval_split="test")
    with pytest.raises(ConfigError, match=r"`eval_split` is 'test'.* `eval_data`"):
        finetune(config, sylva_config(), training(), tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    # Scoring evaluates nothing, and other data to evaluate on say it all.
    assert load_task(config, evaluation=False).held_out is None
    other = write_data(tmp_path / "other.jsonl", 6, seed=1)
    made = load_task(task(home, eval_data=str(other), eval_split="test"))
    assert len(made.held_out) == 6


def test_a_tenth_is_held_out_by_name(home):
    named = load_task(task(home, eval_split="held-out"))
    assert named.held_out.texts == load_task(task(home)).held_out.texts


def test_one_example_is_not_divided(home, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "a", "label": "good"}\n')
    (tmp_path / "two.jsonl").write_text(
        '{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n'
    )
    with pytest.raises(DataError, match="two classes"):
        load_task(task(home, data=str(data)))
    limited = task(home, data=str(tmp_path / "two.jsonl"), limit=1)
    with pytest.raises(ConfigError, match="eval_data"):
        load_task(limited)


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_done(
    home, tmp_path
):
    path = save_folder(tmp_path / "other", BertConfig(**TINY | {"vocab_size": 10}))
    for rule in ("magnitude", "gradient"):
        with pytest.raises(ModelError, match=r"number \d+, the model vectors for 10"):
            finetune(
                task(home, model=str(path)),
                sylva_config(importance=rule),
                training(),
                tmp_path / "run",
            )
    assert not (tmp_path / "run").exists()


def test_tokens_of_targets_must_be_the_models_too():
    tokenizer = word_tokenizer("seq2seq")
    data = TextDataset("toy", "seq2seq", ["a b"], targets=["z not"])
    loader = Loader(data, tokenizer, 1)
    model = nn.Module()
    model.get_input_embeddings = lambda: nn.Embedding(VOCABULARY, 1)
    check_ids(loader, model)
    model.get_input_embeddings = lambda: nn.Embedding(VOCABULARY - 1, 1)
    with pytest.raises(ModelError, match=f"number {VOCABULARY - 1}, the model vectors"):
        check_ids(loader, model)


def test_a_length_that_the_tokenizer_does_not_take_is_refused_first(home, tmp_path):
    with pytest.raises(ConfigError, match="at most 512"):
        finetune(
            task(home, max_length=600), sylva_config(), training(), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_splits_of_a_folder_are_read(home, tmp_path):
    write_data(tmp_path / "train.jsonl", 20)
    write_data(tmp_path / "dev.jsonl", 6, seed=1)
    training_, held_out = read_data(task(home, data=str(tmp_path)), seed=0)
    assert (len(training_), len(held_out)) == (20, 6)
    with pytest.raises(DataError, match="'test'"):
        read_data(task(home, data=str(tmp_path), eval_split="test"), seed=0)


def test_jobs_tell_how_many_texts_are_too_long(home, capsys, tmp_path):
    dataset = TextDataset("toy", "causal-lm", ["a b c", "a b c d"], targets=["e", "f"])
    loader = Loader(dataset, word_tokenizer("decoder"), 2, max_length=5)
    with Progress() as bars:
        tell_of_cuts(loader, bars)
        tell_of_cuts(Loader(dataset, word_tokenizer("decoder"), 2), bars)
    assert capsys.readouterr().err == (
        "1 of 2 prompts lose their beginning: with their targets they have more than 5"
        " tokens (toy). A larger `max_length` (`--max-length`) keeps more.\n"
    )
    finetune(task(home, max_length=4), sylva_config(), training(), tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("texts lose their end: they have more than 4 tokens") == 2


def test_evaluation_data_may_lie_elsewhere(home, tmp_path):
    other = write_data(tmp_path / "other.jsonl", 6, seed=1)
    found = read_data(task(home, eval_data=str(other)), seed=0)
    assert [len(part) for part in found] == [40, 6]


def test_scoring_takes_the_first_examples_of_training_by_length(home):
    made = load_task(task(home, data="e2e-rating", limit=64, max_length=32), seed=5)
    few = made.score_loader(samples=10, batch_size=4, seed=5)
    unfilled = made.loader(TrainingConfig(batch_size=10, bucket=0, seed=5))
    assert few.dataset.texts == [made.train.texts[i] for i in unfilled.plan(0)[0]]
    lengths = [few.lengths[i] for indices in few.plan(0) for i in indices]
    assert lengths == sorted(lengths)


def test_training_fills_batches_by_length_in_random_order(home):
    made = load_task(task(home, data="e2e-rating", limit=64, max_length=32), seed=5)
    filled, chance = (
        made.loader(TrainingConfig(batch_size=4, bucket=bucket, seed=5))
        for bucket in (8, 0)
    )

    def padding(loader):
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in loader)

    assert padding(filled) < padding(chance)
    firsts = [filled.lengths[indices[0]] for indices in filled.plan(0)]
    assert firsts != sorted(firsts)


def test_a_metric_of_another_task_is_refused_before_training(home, tmp_path):
    with pytest.raises(ConfigError, match="metric"):
        finetune(
            task(home, metric="perplexity"),
            sylva_config(),
            training(),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_paths_are_made_whole_and_names_left_alone(home, monkeypatch):
    monkeypatch.chdir(home)
    found = located(task(home, model="model", data="train.jsonl"))
    assert found.model == str(home / "model")
    assert found.data == str(home / "train.jsonl")
    names = task(home, model="minilm", data="e2e-rating", eval_data="glue:sst2")
    assert located(names) == names
