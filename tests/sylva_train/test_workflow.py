"""Whole jobs from Python: what they read, keep, refuse and give back."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from sylva_train import (
    AdapterError,
    ConfigError,
    DataError,
    Masks,
    OutputExistsError,
    Scores,
    TargetError,
    evaluate_folder,
    finetune,
    load_folder,
    merge_folder,
    predict,
    score,
    select,
)
from sylva_train.workflow import load_task, score_file, score_task
from sylva_train.workflow.task import read_data
from tests.sylva_train.jobs import (
    contents,
    new_home,
    sylva_config,
    task,
    training,
    write_data,
)
from tests.sylva_train.models import same, snapshot
from tests.sylva_train.words import TINY, save_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, data, and a finished run; not to be changed."""
    path = new_home(tmp_path_factory)
    run(path, path / "run")
    return path


def run(home: Path, output: Path, **options):
    steps = options.pop("training", training())
    config = options.pop("sylva", sylva_config())
    return finetune(task(home), config, steps, output, **(QUIET | options))


QUIET = {"progress": False}


# Runs


def test_a_run_is_what_its_parts_are(home):
    """Scoring, choosing and the masks of a run are those of the functions for it."""
    made = load_task(task(home), seed=0)
    config = sylva_config()
    masks = select(score(made.model, config=config), 0.2, 8)
    kept = Masks.load(home / "run" / "masks.safetensors")
    assert kept.digest() == masks.digest()


def test_only_blocks_and_head_differ_from_the_base(home):
    base = load_task(task(home), seed=0).model.state_dict()
    model, _, _ = load_folder(home / "run")
    masks = Masks.load(home / "run" / "masks.safetensors")
    merged = importlib.import_module("sylva_train").merge(model).state_dict()
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        changed = tensor != base[name]
        if layer in masks:
            assert not (changed & ~masks[layer].dense()).any()
            assert changed.any()
        elif not name.startswith("classifier"):
            assert not changed.any()


def test_the_same_run_again_is_the_same(home, tmp_path):
    run(home, tmp_path / "again")
    name = "adapter/adapter_model.safetensors"
    assert contents(home / "run")[name] == contents(tmp_path / "again")[name]


def test_scores_made_before_are_the_runs_own(home, tmp_path):
    scores = score_file(task(home), sylva_config(), tmp_path / "s", progress=False)
    run(home, tmp_path / "run", scores=Scores.load(tmp_path / "s"))
    name = "adapter/adapter_model.safetensors"
    assert contents(home / "run")[name] == contents(tmp_path / "run")[name]
    assert scores.metadata["data"] == str(home / "train.jsonl")


def test_of_scores_the_layers_that_are_named_are_taken(home, tmp_path):
    scores = score_file(task(home), sylva_config(), tmp_path / "s", progress=False)
    config = sylva_config(target_modules=["query"])
    run(home, tmp_path / "run", sylva=config, scores=scores, training=training(steps=1))
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    assert set(masks) == {name for name in scores if name.endswith("query")}
    assert set(Scores.load(tmp_path / "run" / "scores.safetensors")) == set(masks)
    with pytest.raises(ConfigError, match=r"leave `.*key` in, of which there are no"):
        run(
            home,
            tmp_path / "other",
            sylva=sylva_config(target_modules=["key", "query"]),
            scores=Scores.load(tmp_path / "run" / "scores.safetensors"),
        )
    assert not (tmp_path / "other").exists()


def test_of_masks_the_layers_that_are_named_are_taken(home, tmp_path):
    made = load_task(task(home), seed=0)
    config = sylva_config(importance="random", target_modules=["key", "query"])
    masks = select(score(made.model, config=config), config.density, config.block_size)
    one = sylva_config(importance="random", target_modules=["query"])
    record = run(
        home, tmp_path / "run", masks=masks, sylva=one, training=training(steps=1)
    )
    trained = Masks.load(tmp_path / "run" / "masks.safetensors")
    assert set(trained) == {name for name in masks if name.endswith("query")}
    assert record["blocks"] == trained.blocks
    config.target_modules = ["query", "value"]
    with pytest.raises(ConfigError, match=r"leave `.*value` in, of which there are no"):
        run(home, tmp_path / "other", masks=masks, sylva=config)
    assert not (tmp_path / "other").exists()


def test_masks_bring_the_options_they_were_made_with(home, tmp_path):
    made = load_task(task(home), seed=0)
    config = sylva_config(importance="random", seed=4, density=0.5, block_size=16)
    masks = select(score(made.model, config=config), 0.5, 16, "model")
    with pytest.warns(UserWarning, match="`block_size` is 16 there and 8 here"):
        record = run(home, tmp_path / "run", masks=masks)
    for name in ("importance", "seed", "density", "block_size"):
        assert record["sylva"][name] == getattr(config, name)
    assert record["sylva"]["scope"] == "model"


def test_blocks_in_few_columns(home, tmp_path):
    config = sylva_config(density=0.1, block_size=8, max_columns=0.3)
    record = run(home, tmp_path / "run", sylva=config, training=training(steps=1))
    assert record["sylva"]["max_columns"] == 0.3
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    columns = {n: set(m.indices[:, 1].tolist()) for n, m in masks.items()}
    for name, mask in masks.items():
        assert len(columns[name]) <= max(1, 0.3 * mask.grid_shape[1])
    first = [c for n, c in columns.items() if n.endswith(("query", "key", "value"))][:3]
    limit = max(1, 0.3 * next(iter(masks.values())).grid_shape[1])
    assert len(set.union(*first)) <= limit


def test_kfac_runs_keep_their_scores(home, tmp_path):
    config = sylva_config(importance="kfac", samples=8, levels=1, rank=4)
    run(home, tmp_path / "run", sylva=config, training=training(steps=1))
    scores = Scores.load(tmp_path / "run" / "scores.safetensors")
    assert (scores.rule, scores.metadata["samples"]) == ("kfac", 8)


def test_the_scoring_of_a_killed_run_goes_on(home, tmp_path, monkeypatch):
    options = {"sylva": sylva_config(importance="gradient", samples=24)}
    run(home, tmp_path / "whole", **options)
    module = importlib.import_module("sylva_train.workflow.scoring")
    real, ran = module.score, []

    def loss(model, batch):
        ran.append(len(batch["labels"]))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return model(**batch).loss

    now = {"loss": loss, "checkpoint_minutes": 0.0}
    monkeypatch.setattr(module, "score", lambda *a, **given: real(*a, **given | now))
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(OutputExistsError, match=r"run\.unfinished.*interrupted"):
        run(home, tmp_path / "run", **options)
    run(home, tmp_path / "run", resume=True, **options)
    assert ran == [8, 8, 8, 8]  # three batches, the second of them twice
    assert not (tmp_path / "run.unfinished").exists()
    for name in ("scores.safetensors", "adapter/adapter_model.safetensors"):
        assert contents(tmp_path / "run")[name] == contents(tmp_path / "whole")[name]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"density": 1e-6}, "leaves no whole block"),
        ({"spread": 1.0, "max_columns": 0.5}, "`spread` keeps blocks apart"),
    ],
)
def test_what_nothing_can_be_chosen_with_is_told_before_scoring(
    home, tmp_path, monkeypatch, options, told
):
    monkeypatch.delattr("sylva_train.workflow.finetuning.score_task")
    with pytest.raises(ConfigError, match=told):
        run(home, tmp_path / "run", sylva=sylva_config(**options))
    assert not any(tmp_path.iterdir())


def test_a_device_that_is_not_there_stops_before_the_data(home, tmp_path):
    about = task(home, data="nowhere.csv")
    wrong = training(device="nothing")
    with pytest.raises(ConfigError, match="`device` must be"):
        finetune(about, sylva_config(), wrong, tmp_path / "run", **QUIET)
    with pytest.raises(ConfigError, match="`device` must be"):
        score_file(about, sylva_config(), tmp_path / "s", device="nothing", **QUIET)


def test_the_base_model_is_not_replaced_by_what_was_made_of_it(home):
    before = contents(home / "model")
    with pytest.raises(OutputExistsError, match="is the base model"):
        merge_folder(home / "run", home / "model", overwrite=True)
    assert contents(home / "model") == before


def test_no_batch_is_much_larger_than_those_of_training(home, tmp_path, monkeypatch):
    """Scoring and evaluation fit where training does."""
    sizes: dict[str, set[int]] = {"scoring": set(), "evaluation": set()}

    def noting(module, name, part, place):
        function = getattr(importlib.import_module(module), name)

        def noted(*args, **options):
            loader = args[place] if len(args) > place else options["loader"]
            sizes[part] |= {len(batch["input_ids"]) for batch in loader}
            return function(*args, **options)

        monkeypatch.setattr(f"{module}.{name}", noted)

    noting("sylva_train.workflow.scoring", "score", "scoring", 1)
    noting("sylva_train.workflow.finetuning", "evaluate", "evaluation", 1)
    config, few = sylva_config(importance="gradient"), training(batch_size=2, steps=1)
    run(home, tmp_path / "run", sylva=config, training=few)
    assert sizes == {"scoring": {2}, "evaluation": {4}}
    score_file(task(home), config, tmp_path / "s.safetensors", batch_size=3, **QUIET)
    assert max(sizes["scoring"]) == 3


def test_a_finished_run_is_given_back(home):
    before = contents(home / "run")
    record = run(home, home / "run", resume=True)
    assert record == json.loads((home / "run" / "sylva.json").read_text())
    assert contents(home / "run") == before


def test_resume_begins_where_there_is_nothing(home, tmp_path):
    assert run(home, tmp_path / "run", resume=True)["finished"]


def test_resume_refuses_what_is_no_run(home, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="no run to go on with"):
        run(home, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": training(steps=5)}, "`steps` is 4 there and 5 here"),
        ({"sylva": sylva_config(target_modules=["query"])}, "`target_modules`"),
    ],
)
def test_resume_refuses_other_options(home, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(home, home / "run", resume=True, **changes)


@pytest.mark.filterwarnings("ignore:the masks were made with other options")
def test_resume_refuses_other_masks(home, tmp_path):
    made = load_task(task(home), seed=0)
    masks = [
        select(
            score(made.model, config=sylva_config(importance="random", seed=s)), 0.2, 8
        )
        for s in (0, 1)
    ]
    run(home, tmp_path / "run", masks=masks[0])
    run(home, tmp_path / "run", masks=masks[0], resume=True)
    with pytest.raises(ConfigError, match="other masks or scores"):
        run(home, tmp_path / "run", masks=masks[1], resume=True)


def test_a_damaged_record_is_named(home, tmp_path):
    (tmp_path / "sylva.json").write_text('{"format": "sylva-run/1",')
    with pytest.raises(AdapterError, match=r"sylva\.json` is damaged"):
        load_folder(tmp_path)
    (tmp_path / "sylva.json").write_text('{"format": "other"}')
    with pytest.raises(AdapterError, match="not of the format"):
        evaluate_folder(tmp_path)
    with pytest.raises(AdapterError, match="not the folder of a fine-tuning"):
        merge_folder(tmp_path / "nothing", tmp_path / "merged")


def test_modules_to_save_that_are_not_there(home, tmp_path):
    config = sylva_config(modules_to_save=["pooler"])
    with pytest.raises(TargetError, match="pooler"):
        run(home, tmp_path / "run", sylva=config)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_made_is_refused_first(home, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="is not writable"):
        run(home, tmp_path / "run")


def test_an_output_below_a_file_is_refused_first(home, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        run(home, tmp_path / "file" / "run")


def test_scores_are_not_written_over_a_folder(home, tmp_path):
    with pytest.raises(OutputExistsError, match="is a folder"):
        score_file(task(home), sylva_config(), tmp_path, overwrite=True)


def test_scoring_leaves_the_model_alone(home):
    made = load_task(task(home), seed=0)
    before = snapshot(made.model)
    score_task(made, sylva_config(importance="gradient", samples=8), device="cpu")
    assert same(before, snapshot(made.model))


# Use


def test_predictions_are_the_models(home):
    texts = ["a b good", "c d bad", "a"]
    model, tokenizer, record = load_folder(home / "run")
    found = predict(home / "run", texts)
    for text, (label, probability) in zip(texts, found, strict=True):
        logits = model(**tokenizer([text], return_tensors="pt")).logits[0].detach()
        assert label == record["labels"][int(logits.argmax())]
        assert probability == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)


def test_predictions_do_not_depend_on_the_side_a_tokenizer_pads(home, tmp_path):
    texts = ["a b c good d a", "b", "bad c"]
    base = tmp_path / "base"
    shutil.copytree(home / "model", base)
    options = json.loads((base / "tokenizer_config.json").read_text())
    options["padding_side"] = "left"
    (base / "tokenizer_config.json").write_text(json.dumps(options))
    found = predict(home / "run", texts, base=str(base))
    for (label, p), (other, q) in zip(predict(home / "run", texts), found, strict=True):
        assert (label, p) == (other, pytest.approx(q, rel=1e-6))


def test_predictions_come_in_batches_of_any_number(home):
    texts = ["a b c good", "b b", "bad c d a", "a", "good a"]
    whole = predict(home / "run", texts)
    parts = predict(home / "run", texts, batch_size=2)
    assert [label for label, _ in parts] == [label for label, _ in whole]
    assert [p for _, p in parts] == pytest.approx([p for _, p in whole], rel=1e-5)
    assert predict(home / "run", []) == []
    with pytest.raises(
        ConfigError, match=r"a list of texts; got one: pass \['a good'\]"
    ):
        predict(home / "run", "a good")


def test_a_model_learns_what_the_data_has(home, tmp_path):
    longer = training(steps=60, lr=0.03)
    record = run(home, tmp_path / "run", training=longer)
    assert record["history"][-1]["loss"] < 0.1 < record["history"][0]["loss"]
    data = load_task(task(home), seed=0).train
    right = [data.label_names[i] for i in data.labels]
    assert [label for label, _ in predict(tmp_path / "run", data.texts)] == right


def test_a_limit_holds_for_a_held_out_tenth(home):
    _, tenth = read_data(task(home), seed=0)
    rest, few = read_data(task(home, eval_limit=2), seed=0)
    assert (len(rest), len(few)) == (36, 2)
    assert set(few.texts) < set(tenth.texts)
    found = evaluate_folder(home / "run", {"eval_limit": 2})
    assert found["examples"] == 2
    assert found["data"] == f"{home / 'train.jsonl'} (a tenth held out)"


def test_a_file_has_no_split_to_evaluate(home):
    with pytest.raises(ConfigError, match=r"`split` must not be given .* got 'test'"):
        evaluate_folder(home / "run", {"eval_split": "test"})


def test_evaluation_takes_the_models_classes(home, tmp_path):
    data = tmp_path / "new.jsonl"
    data.write_text('{"text": "a", "label": "superb"}\n')
    with pytest.raises(DataError, match="superb"):
        evaluate_folder(home / "run", {"eval_data": str(data)})
    data.write_text('{"text": "a", "label": "good"}\n')  # one class is enough here
    found = evaluate_folder(home / "run", {"eval_data": str(data)})
    assert found["examples"] == 1
    with pytest.raises(ConfigError, match="metric"):
        evaluate_folder(home / "run", {"metric": "perplexity"})


def test_a_causal_model_is_finetuned_and_evaluated(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.sylva_train.words import word_tokenizer

    small = LlamaConfig(**TINY, tie_word_embeddings=False, num_key_value_heads=2)
    save_folder(tmp_path / "model", small, LlamaForCausalLM, word_tokenizer("decoder"))
    write_data(tmp_path / "train.jsonl")
    options = {"task": "causal-lm", "text_column": "text", "max_new_tokens": 4}
    config = task(tmp_path, **options)
    record = finetune(config, sylva_config(), training(), tmp_path / "run", **QUIET)
    assert record["labels"] == []
    assert record["head"] == 0
    found = evaluate_folder(tmp_path / "run")
    assert found["perplexity"] == pytest.approx(record["metrics"]["perplexity"])
    (answer,) = predict(tmp_path / "run", ["a"])
    assert isinstance(answer, str)
