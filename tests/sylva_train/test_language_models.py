"""Language models load by what they are to do: go on with a text, or answer one."""

from __future__ import annotations

import pytest
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetLMHeadModel,
)

from sylva_train._checks import ConfigError
from sylva_train.data import Loader, TextDataset
from sylva_train.pretrained import load_model
from tests.sylva_train.test_pretrained import GPT2, TEXTS, XLNET, decoder_folder
from tests.sylva_train.words import TINY, VOCABULARY, save_folder, word_tokenizer


def test_language_models_load_by_task(tmp_path):
    decoder = decoder_folder(tmp_path / "a", GPT2LMHeadModel, GPT2Config(**GPT2))
    model, tokenizer = load_model(decoder, task="causal-lm")
    assert isinstance(model, GPT2LMHeadModel)
    assert model.loss_type == "ForCausalLM"  # without which transformers warns
    data = TextDataset("toy", "causal-lm", list(TEXTS))
    batch = next(iter(Loader(data, tokenizer, 5)))
    assert model(**batch).loss.isfinite()
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    path = save_folder(
        tmp_path / "b", config, T5ForConditionalGeneration, word_tokenizer("seq2seq")
    )
    model, tokenizer = load_model(path, task="seq2seq")
    data = TextDataset("toy", "seq2seq", list(TEXTS), targets=list(TEXTS))
    assert model(**next(iter(Loader(data, tokenizer, 5)))).loss.isfinite()


@pytest.mark.parametrize(
    ("kind", "config", "task", "other"),
    [
        (T5ForConditionalGeneration, T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4,
            d_ff=8, num_layers=1, num_heads=2), "causal-lm", "seq2seq"),
        (GPT2LMHeadModel, GPT2Config(**GPT2), "seq2seq", "causal-lm"),
    ],
)  # fmt: skip
def test_a_model_that_writes_otherwise_names_its_task(
    tmp_path, kind, config, task, other
):
    path = save_folder(tmp_path, config, kind)
    with pytest.raises(ConfigError, match=f'for `task` "{other}"; got "{task}"'):
        load_model(path, task=task)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(BertForMaskedLM, BertConfig(**TINY)), (XLNetLMHeadModel, XLNET)],
)
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_encoders_do_not_predict_what_they_see(tmp_path, kind, config, task):
    path = save_folder(tmp_path / "model", config, kind, word_tokenizer("decoder"))
    with pytest.raises(ConfigError, match=r"is an encoder, of type (bert|xlnet)"):
        load_model(path, task=task)


def test_a_decoder_that_would_learn_to_copy_is_refused(tmp_path):
    """The loss of BART's decoder compares each output with the token that was read."""
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    layers |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCABULARY, **layers, **heads)
    tokenizer = word_tokenizer("decoder")
    path = save_folder(tmp_path, config, BartForConditionalGeneration, tokenizer)
    with pytest.raises(ConfigError, match=r'BartForCausalLM.*copy.*`task="seq2seq"`'):
        load_model(path, task="causal-lm")
    load_model(path, task="seq2seq")
