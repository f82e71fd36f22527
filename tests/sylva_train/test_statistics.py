"""Running statistics of a base model, which training changes and an adapter may not hold."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from sylva_train._checks import AdapterError
from sylva_train.config import SylvaConfig, TrainingConfig
from sylva_train.layers import embed
from sylva_train.training import train
from sylva_train.tuner import load_adapter, save_adapter
from tests.sylva_train.models import random_masks, same, snapshot
from tests.sylva_train.test_architectures import DATA, Batches, Small, loss


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, lambda size: spectral_norm(nn.Linear(size, size))]
)
def test_running_statistics_are_to_be_kept_with_the_adapter(norm, tmp_path):
    words = "running statistics of `norm.*`, a (BatchNorm1d|_SpectralNorm)"

    def make():
        model = Small(lambda m, x: m.b(m.norm(m.a(x))), norm=norm(8))
        return model.eval()

    model = make()
    masks = random_masks(model, ["a"], block_size=4)
    with pytest.warns(UserWarning, match=words):
        embed(make(), masks)
    with pytest.warns(UserWarning, match=words):
        peft.get_peft_model(make(), SylvaConfig(masks=masks))
    embed(model, masks, modules_to_save=["norm"])
    train(model, Batches(DATA), TrainingConfig(steps=2, lr=0.1), loss=loss)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make(), tmp_path / "a")
    assert not same(snapshot(make().norm), snapshot(model.norm))
    with torch.no_grad():
        assert torch.equal(model(DATA[0]["x"]), loaded(DATA[0]["x"]))


@pytest.mark.filterwarnings("ignore:training changes the running statistics")
def test_a_refused_adapter_says_that_running_statistics_changed(tmp_path):
    def make():
        return Small(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(8)).eval()

    model = embed(make(), random_masks(make(), ["a"], block_size=4))
    train(model, Batches(DATA), TrainingConfig(steps=1), loss=loss)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="running statistics of `norm`, which this"):
        load_adapter(make(), tmp_path / "a")


def test_running_statistics_are_no_matter_of_an_adapter_that_is_only_used(tmp_path):
    def make():
        return Small(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(8)).eval()

    model = make()
    with pytest.warns(UserWarning, match="running statistics"):
        embed(model, random_masks(model, ["a"], block_size=4))
    save_adapter(model, tmp_path / "a")
    # A warning is an error here.
    load_adapter(make(), tmp_path / "a")
    peft.PeftModel.from_pretrained(make(), tmp_path / "a")
