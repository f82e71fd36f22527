"""Adapters and the embeddings of their base: resized, tied, trained whole."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sylva_train._checks import AdapterError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.layers import embed
from sylva_train.selection import select
from sylva_train.tuner import load_adapter, save_adapter
from tests.sylva_train.models import TENSORS, logits, same, snapshot, train_step


def make_language_model(*, tied):
    """A language model, whose input and output embeddings may be one weight."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, intermediate_size=24,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("saved_whole", "tied"),
    [(None, False), (None, True), (["embed_tokens", "lm_head"], False)],
)
def test_a_base_whose_vocabulary_was_resized(saved_whole, tied, tmp_path):
    make_language_model(tied=tied).save_pretrained(tmp_path / "base")

    def base(rows=44):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if rows != 40:
            model.resize_token_embeddings(rows)  # new rows are random
        return model

    options = SylvaConfig(
        importance="random", density=0.3, block_size=8, modules_to_save=saved_whole
    )
    model = peft.get_peft_model(base(), options).eval()
    ids = torch.arange(36, 44)[None]
    train_step(model, {"input_ids": ids, "labels": ids})
    batch = {"input_ids": ids}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # PEFT says that it adds embeddings
        model.save_pretrained(tmp_path / "a")
    assert any("embed_tokens" in name for name in load_file(tmp_path / "a" / TENSORS))
    for door in (peft.PeftModel.from_pretrained, load_adapter):
        loaded = door(base(), tmp_path / "a")
        assert torch.equal(logits(loaded, batch), logits(model, batch))
    if saved_whole is None:
        options = peft.PeftConfig.from_pretrained(tmp_path / "a")
        with pytest.raises(AdapterError, match="without a `config`"):
            peft.PeftModel.from_pretrained(base(), tmp_path / "a", config=options)
        before = base(40)
        kept = snapshot(before)
        with pytest.raises(AdapterError, match=r"resize_token_embeddings\(44\)"):
            load_adapter(before, tmp_path / "a")
        assert same(snapshot(before), kept)
        before = base()
        before.model.norm.weight.data += 1
        kept = snapshot(before)
        with pytest.raises(AdapterError, match="made for the base"):
            peft.PeftModel.from_pretrained(before, tmp_path / "a")
        assert same(snapshot(before), kept)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # PEFT's
def test_tied_embeddings_that_are_trained_whole(tmp_path):
    options = SylvaConfig(importance="magnitude", density=0.3, block_size=8)
    both, ids = ["embed_tokens", "lm_head"], torch.arange(8)[None]
    batch = {"input_ids": ids}
    model = make_language_model(tied=True)
    masks = select(score(model, config=options), 0.3, 8)
    with pytest.raises(TargetError, match="name all that share it"):
        embed(model, masks, modules_to_save=["lm_head"])
    embed(model, masks, modules_to_save=both)
    train_step(model, batch | {"labels": ids})
    save_adapter(model, tmp_path / "one")
    for door in (peft.PeftModel.from_pretrained, load_adapter):
        loaded = door(make_language_model(tied=True), tmp_path / "one")
        assert torch.equal(logits(loaded, batch), logits(model, batch))

    options = SylvaConfig(masks=masks, modules_to_save=both)
    model = peft.get_peft_model(make_language_model(tied=True), options)
    train_step(model, batch | {"labels": ids})
    save_adapter(model, tmp_path / "two")
    before = make_language_model(tied=True)
    kept = snapshot(before)
    with pytest.raises(AdapterError, match="share one in this model"):
        load_adapter(before, tmp_path / "two")
    assert same(snapshot(before), kept)
    loaded = load_adapter(make_language_model(tied=False), tmp_path / "two")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
