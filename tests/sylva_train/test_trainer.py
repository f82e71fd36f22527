"""Adapters in transformers: its own loading, Trainer, generation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import BertConfig, Trainer, TrainingArguments

from sylva_train.layers import embedded_layers, merge
from sylva_train.optimizer import SparseAdamW
from sylva_train.pretrained import PooledClassifier
from sylva_train.targets import weight_view
from sylva_train.tuner import inspect_adapter, load_adapter
from tests.sylva_train.models import (
    OPTIONS,
    TENSORS,
    dense_blocks,
    logits,
    make_batch,
    make_model,
    make_peft,
    make_trained,
    same,
    snapshot,
    train_step,
    trainable,
    transformers_loads_heads,
)
from tests.sylva_train.words import TINY


def test_transformers_loads_two_adapters_itself(pair):
    if not transformers_loads_heads():
        pytest.skip("this transformers leaves saved heads out, LoRA's too")
    _, expected, folder = pair
    make_trained().save_pretrained(folder / "one")
    base, batch = make_model(), make_batch()
    base.load_adapter(folder / "one")
    assert torch.equal(logits(base, batch), expected["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of every second adapter
        base.load_adapter(folder / "other", "other")
    assert same(
        {k: v for k, v in snapshot(merge_layers(base)).items() if "LayerNorm" in k},
        {k: v for k, v in snapshot(make_model()).items() if "LayerNorm" in k},
    )


def merge_layers(model):
    return merge(copy.deepcopy(model))


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(2, 40, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids[0] % 3}


def make_trainer(model, folder, optimizer=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **{"logging_strategy": "no", "per_device_train_batch_size": 4} | options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        eval_dataset=Samples(),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sparse", [False, True], ids=["AdamW", "SparseAdamW"])
def test_trainer_trains_blocks_and_head_alone(tmp_path, checkpointing, sparse):
    model = make_peft()
    optimizer = SparseAdamW(model, lr=5e-3) if sparse else None
    trainer = make_trainer(
        model,
        tmp_path,
        optimizer,
        max_steps=3,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    live = trainable(model)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in live) or name.endswith("base_layer.weight")
    trainer.save_model(str(tmp_path / "final"))
    files = {p.name for p in (tmp_path / "final").iterdir()}
    assert {TENSORS, OPTIONS} <= files
    assert "model.safetensors" not in files
    expected = logits(model.eval(), make_batch())
    loaded = load_adapter(make_model(), tmp_path / "final")
    assert torch.equal(logits(loaded, make_batch()), expected)
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_gradient_checkpointing_changes_no_result(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = make_peft()
        make_trainer(
            model,
            tmp_path / str(checkpointing),
            max_steps=2,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
        ).train()
        results.append(logits(model.eval(), make_batch()))
    assert float((results[0] - results[1]).abs().max()) < 1e-5


def test_trainer_accumulates_the_mean_of_a_pooled_classifier(tmp_path):
    sizes = TINY | {"vocab_size": 40, "num_labels": 3}
    config = BertConfig(
        **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    gradients = []
    for size in (4, 2):
        torch.manual_seed(0)
        model = PooledClassifier(config)
        trainer = make_trainer(
            model,
            tmp_path / str(size),
            max_steps=1,
            gradient_accumulation_steps=4 // size,
            save_strategy="no",
            per_device_train_batch_size=size,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer.train()
        (step,) = [s for s in trainer.state.log_history if "grad_norm" in s]
        gradients.append((step["grad_norm"], step["loss"]))
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)


@pytest.mark.parametrize("sparse", [False, True], ids=["AdamW", "SparseAdamW"])
def test_trainer_resumes_where_it_stopped(tmp_path, sparse):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }

    def run(folder, steps, resume=None):
        model = make_peft()
        optimizer = SparseAdamW(model, lr=5e-3) if sparse else None
        trainer = make_trainer(model, folder, optimizer, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        return logits(model.eval(), make_batch())

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 5, str(tmp_path / "half" / "checkpoint-2"))
    assert torch.equal(whole, resumed)
    inspect_adapter(tmp_path / "half" / "checkpoint-4")


def test_trainer_goes_back_to_the_best_checkpoint(tmp_path):
    model = make_peft()
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that it is not the last one
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    expected = logits(load_adapter(make_model(), best), make_batch())
    assert torch.equal(logits(model.eval(), make_batch()), expected)
    assert same(snapshot(model.unload()), snapshot(make_model()))


def test_a_state_after_the_last_step_is_up_to_date():
    model = make_peft()
    values = [p for p in model.parameters() if p.requires_grad]
    train_step(model, make_batch(), torch.optim.AdamW(values, lr=0.1))
    state = model.state_dict()
    for name, layer in embedded_layers(model).items():
        weight = state[f"{name}.base_layer.weight"]
        got = dense_blocks(weight, layer.mask())
        assert torch.equal(got, layer.sylva_values["default"].detach())
    merged = copy.deepcopy(model).merge_and_unload()
    for name in embedded_layers(model):
        weight = weight_view(merged.get_submodule(name[17:]))
        assert torch.equal(weight, state[f"{name}.base_layer.weight"])


def test_autocast_and_copies():
    model, batch = make_trained(), make_batch()
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = twin(**batch).loss
    loss.backward()
    layers = embedded_layers(twin).values()
    assert all(layer.sylva_values["default"].grad is not None for layer in layers)
    train_step(twin, batch)
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(twin, batch), expected)
    assert same(snapshot(twin.unload()), snapshot(model.unload()))


def test_generation_uses_the_adapter(tmp_path):
    model = make_trained("llama")
    ids = make_batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(input_ids=ids, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(got, merged.generate(input_ids=ids, **options))
