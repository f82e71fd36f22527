"""A tokenizer of whole words and tiny model folders: no file of the network's."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "good", "bad", "film", "not"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def word_tokenizer(kind: str = "encoder", **options) -> PreTrainedTokenizerFast:
    """``[CLS] … [SEP]`` around texts for an encoder, nothing for a decoder."""
    ids = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 512}
    if kind == "encoder":
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        names["eos_token"] = "</s>"
    if kind == "seq2seq":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | options))


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def save_folder(path, config=None, kind=BertModel, tokenizer=None, seed: int = 0):
    """Write a random model and a tokenizer to a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config or BertConfig(**TINY)).save_pretrained(path)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    return path
