"""Gradients of batches of any size add up to those of a large one."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sylva_train._checks import DataError
from sylva_train.config import TrainingConfig
from sylva_train.curvature import default_loss
from sylva_train.layers import embed
from sylva_train.training import train
from sylva_train.training.gradient import accumulate_gradient
from tests.sylva_train.models import random_masks
from tests.sylva_train.toy import ToyLoader, toy_model


def gradient(model, batches):
    model.zero_grad()
    accumulate_gradient(model, batches, default_loss, "the test")
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def cut(batch, sizes):
    parts = {name: tensor.split(sizes) for name, tensor in batch.items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(len(sizes))]


def close(found, wanted):
    return (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_batches_of_any_size_add_up_to_the_large_one():
    model = toy_model(dropout=0.0).train()
    (large,) = ToyLoader(batch_size=22).epoch(0)
    wanted = gradient(model, [large])
    assert close(gradient(model, cut(large, [9, 9, 4])), wanted)
    assert not close(gradient(model, [large, *cut(large, [9, 9, 4])[:1]]), wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
@pytest.mark.parametrize("wrapped", ["no", "peft", "compiled"])
def test_a_language_model_weighs_batches_by_tokens_that_count(wrapped):
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    if wrapped == "peft":
        # Without a task, whose wrapper would be named after it.
        model = get_peft_model(
            model, LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
        )
    elif wrapped == "compiled":
        model = torch.compile(model, backend="eager")
    ids = torch.randint(16, (5, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(
        torch.arange(8) >= torch.tensor([8, 2, 3, 5, 2])[:, None], -100
    )
    large = {"input_ids": ids, "labels": labels}
    assert close(gradient(model, cut(large, [1, 2, 2])), gradient(model, [large]))
    with pytest.raises(DataError, match="for each token"):
        gradient(model, [{"input_ids": ids, "labels": torch.ones(5).long()}])


def test_samples_without_a_label_do_not_count():
    model = toy_model(dropout=0.0).train()
    (large,) = ToyLoader(batch_size=22).epoch(0)
    large["labels"][:8] = -100
    assert close(gradient(model, cut(large, [9, 9, 4])), gradient(model, [large]))


def test_a_run_with_accumulation_follows_the_run_with_large_batches():
    finals = []
    for batch_size, accumulate in ((4, 3), (12, 1)):
        model = toy_model(dropout=0.0)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], 0.1
        )
        loader = ToyLoader(batch_size=batch_size)
        config = TrainingConfig(lr=1e-2, accumulate=accumulate, epochs=2)
        result = train(model, loader, config, optimizer=optimizer)
        assert result.steps == 4
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert close(*finals)


def test_gradients_of_many_terms_are_not_lost_in_half_precision():
    torch.manual_seed(0)
    half = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)
    ).half()
    with torch.no_grad():
        half[2].weight.mul_(0.05)
    embed(half, random_masks(half, ["0", "2"], 0.5, 4))
    x, labels = torch.randn(8192, 16).half(), torch.randint(16, (8192,))

    def loss(model, batch):
        outputs = model(batch["x"].to(next(model.parameters()).dtype))
        return torch.nn.functional.cross_entropy(outputs.float(), batch["labels"])

    found = []
    for model in (half, copy.deepcopy(half).float()):
        model.zero_grad()
        accumulate_gradient(model, [{"x": x, "labels": labels}], loss, "the test")
        found += [[m.sylva_values["default"].grad for m in (model[0], model[2])]]
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() < 0.01 * wanted.norm()
