"""Models write as they do by hand, whatever the batch, and are left as they were."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train.config import TaskConfig, TrainingConfig
from sylva_train.data import Loader, TextDataset
from sylva_train.evaluation import evaluate, score_texts, texts
from sylva_train.layers import merge
from sylva_train.training import train
from tests.sylva_train.models import make_model, make_peft, make_plain, snapshot
from tests.sylva_train.words import word_tokenizer

for library in ("nltk", "pycocoevalcap", "rouge_score", "sacrebleu"):
    pytest.importorskip(library)

PROMPTS = ["a good film", "bad", "not good", "a b c d e f", "film", "b a d", "c"]
TARGETS = ["good", "bad"]
SHORT = GenerationConfig(max_new_tokens=5)
KINDS = ["gpt2", "llama", "t5"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """METEOR takes seconds to start."""
    monkeypatch.setattr(texts.shutil, "which", lambda _: None)


def loader(kind="gpt2", prompts=PROMPTS, targets=None, size=3, **options):
    """Batches of prompts, each with a target or with those given."""
    task = "seq2seq" if kind == "t5" else "causal-lm"
    targets = targets or [TARGETS[i % 2] for i in range(len(prompts))]
    data = TextDataset("toy", task, list(prompts), targets=list(targets), **options)
    tokenizer = word_tokenizer("seq2seq" if kind == "t5" else "decoder")
    return Loader(data, tokenizer, size, max_length=16)


@torch.no_grad()
def writer(kind, seed=3):
    """A random model that does not write the same word for ever, nor padding only."""
    model = make_model(kind, seed)
    if kind == "t5":
        model.shared.weight[0] = 0
        for name, parameter in model.named_parameters():
            if ".block." in name and parameter.ndim == 2:
                parameter.mul_(10)
    return model


def answers(model, batches, generation=SHORT, metric="rouge-l"):
    return evaluate(model, batches, metric, predictions=True, generation=generation)[
        "predictions"
    ]


@torch.no_grad()
def by_hand(model, batches, new=5):
    """Greedy answers, a prompt at a time, without a cache."""
    tokenizer = batches.tokenizer
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    found = []
    for prompt in batches.dataset.texts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = torch.tensor([[0]]) if model.config.is_encoder_decoder else ids
        start = written.shape[1]
        for _ in range(new):
            if model.config.is_encoder_decoder:
                logits = model(input_ids=ids, decoder_input_ids=written).logits
            else:
                logits = model(input_ids=written).logits
            best = logits[:, -1].argmax(-1, keepdim=True)
            written = torch.cat([written, best], 1)
            if int(best) in ends:
                break
        text = tokenizer.decode(written[0, start:], skip_special_tokens=True)
        found.append(text.strip())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 9])
def test_answers_are_those_of_greedy_steps(kind, size):
    model, batches = writer(kind), loader(kind, size=size)
    expected = by_hand(model, batches)
    assert len(set(expected)) > 1
    assert answers(model, batches) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_where_the_models_own_configuration_says(kind):
    model, batches = writer(kind), loader(kind)
    before = by_hand(model, batches)
    word = next(text for text in before if len(text.split()) > 1).split()[0]
    stop = batches.tokenizer.convert_tokens_to_ids(word)
    model.generation_config.eos_token_id = [stop]
    expected = by_hand(model, batches)
    assert expected != before
    assert answers(model, batches) == expected


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_options_of_a_task_reach_the_search(kind):
    model, batches = writer(kind), loader(kind)
    options = {"num_beams": 4, "length_penalty": -3.0, "no_repeat_ngram_size": 1}
    config = TaskConfig(max_new_tokens=6, **options).generation
    expected = []
    for prompt in PROMPTS:
        ids = batches.tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(
            ids, max_new_tokens=6, do_sample=False, **options, eos_token_id=[1, 4],
            pad_token_id=0, attention_mask=torch.ones_like(ids),
        )[0, 0 if kind == "t5" else ids.shape[1] :]  # fmt: skip
        expected.append(batches.tokenizer.decode(found, skip_special_tokens=True))
    model.generation_config.eos_token_id = [1]
    assert answers(model, batches, config) == expected
    greedy = TaskConfig(max_new_tokens=6, no_repeat_ngram_size=1).generation
    assert all(
        len(set(text.split())) == len(text.split())
        for text in answers(model, batches, greedy)
    )


def byte_tokenizer():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: number for number, letter in enumerate(["</s>", *alphabet])}
    inner = Tokenizer(models.BPE(ids, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_before_a_stop_string(several):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    model = GPT2LMHeadModel(config).eval()
    data = TextDataset("toy", "causal-lm", ["é b", "c"], targets=["d", "e"])
    batches = Loader(data, tokenizer, 2)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(1)
    before = answers(model, batches, GenerationConfig(**options))
    # Not the character that parts of others are read as.
    stop = next(letter for letter in before[0][3:] if letter.isascii())
    options["stop_strings"] = [stop, "##"] if several else stop
    torch.manual_seed(1)
    found = answers(model, batches, GenerationConfig(**options))
    assert found[0] == before[0].partition(stop)[0].strip()
    assert len(found[0]) < len(before[0])


@pytest.mark.parametrize(
    "options", [{"max_length": 20}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_options_that_do_not_suit_an_answer_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"`generation`.*`{name}`"):
        answers(writer("gpt2"), loader("gpt2"), GenerationConfig(**options))


def test_rows_of_one_text_are_one_prompt_with_several_references():
    model = writer("gpt2")
    batches = loader(prompts=["a", "b", "a", "a"], targets=["good", "bad", "film", "c"])
    found = evaluate(model, batches, "bleu", predictions=True, generation=SHORT)
    assert found["prompts"] == ["a", "b"]
    assert found["references"] == [["good", "film", "c"], ["bad"]]
    assert found["examples"] == 2
    assert (found["metric"], found["higher_is_better"]) == ("bleu", True)
    assert found["score"] == found["bleu"]
    scores = score_texts(found["predictions"], found["references"])
    assert {name: found[name] for name in scores} == scores
    assert scores.keys() >= {"bleu", "nist", "rouge_l", "cider", "exact_match"}


def test_the_beginning_of_a_long_prompt_is_cut_with_a_warning():
    model = writer("gpt2")  # of length 16
    batches = loader(prompts=["a " * 9 + "b c", "good"], targets=["c", "c"])
    with pytest.warns(UserWarning, match="1 of 2 prompts of toy were cut .* 6 tokens"):
        found = answers(model, batches, GenerationConfig(max_new_tokens=10))
    kept = loader(prompts=["a a a a b c", "good"], targets=["c", "c"])
    assert found == by_hand(model, kept, new=10)
    with pytest.raises(ConfigError, match="`max_new_tokens` must be below 16"):
        answers(model, batches, GenerationConfig(max_new_tokens=16))


@pytest.mark.parametrize("metric", ["rouge-l", "choice"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_no_trace_is_left(kind, metric):
    model = make_model(kind)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    model.get_submodule("transformer.h.0" if kind == "gpt2" else "encoder").eval()
    modes = [module.training for module in model.modules()]
    configs = copy.deepcopy([model.config.to_dict(), model.generation_config.to_dict()])
    state, weights = torch.get_rng_state(), snapshot(model)
    first = evaluate(model, loader(kind), metric, generation=SHORT)
    assert first == evaluate(model, loader(kind), metric, generation=SHORT)
    assert [module.training for module in model.modules()] == modes
    assert [model.config.to_dict(), model.generation_config.to_dict()] == configs
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert SHORT.to_diff_dict().keys() == {"max_new_tokens", "transformers_version"}


@pytest.mark.parametrize("metric", ["rouge-l", "choice"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_write_as_the_merged_model_does(kind, metric):
    model = make_plain(kind)
    found = answers(model, loader(kind), metric=metric)
    assert found == answers(make_peft_twin(kind, model), loader(kind), metric=metric)
    assert found == answers(merge(model), loader(kind), metric=metric)


def make_peft_twin(kind, plain):
    """The same weights inside a `PeftModel`."""
    model = make_peft(kind)
    values = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = name.removeprefix("base_model.model.").replace(
                "modules_to_save.default.", ""
            )
            own = own.replace("original_module.", "")
            if own in values:
                parameter.copy_(values[own])
    model.train().eval()  # writes the blocks into the dense weights
    return model


@pytest.mark.parametrize(
    ("kind", "task"), [("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_lora_writes_as_the_merged_model_does(kind, task):
    config = peft.LoraConfig(
        r=2,
        task_type=task,
        init_lora_weights=False,
        target_modules="all-linear",
        fan_in_fan_out=kind == "gpt2",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(make_model(kind), config)
    found = answers(model, loader(kind))
    assert found == answers(model.merge_and_unload(), loader(kind))
    assert found != answers(make_model(kind), loader(kind))


@pytest.mark.parametrize("metric", ["rouge-l", "choice"])
def test_training_takes_the_same_course_with_evaluations_in_it(metric):
    weights = []
    for every in (None, 1):
        model, batches = make_plain("gpt2"), loader()
        model.train()
        train(
            model,
            batches,
            TrainingConfig(steps=3, eval_every=every, lr=0.05),
            evaluate=functools.partial(
                evaluate, loader=batches, metric=metric, generation=SHORT
            ),
            progress=False,
        )
        weights.append(snapshot(model))
    assert all(torch.equal(weights[0][name], t) for name, t in weights[1].items())


def test_what_cannot_be_written_is_refused():
    model = make_model("gpt2")
    plain = TextDataset("plain", "causal-lm", ["a b"])
    with pytest.raises(DataError, match='plain: `metric` "bleu" needs prompts with'):
        evaluate(model, Loader(plain, word_tokenizer("decoder"), 1), "bleu")
    with pytest.raises(ConfigError, match="needs a `Loader`"):
        evaluate(model, list(loader()), "bleu")
    classes = TextDataset("toy", "classification", ["a", "b"], [0, 1], ["x", "y"])
    with pytest.raises(ConfigError, match="not of classes"):
        evaluate(model, Loader(classes, word_tokenizer(), 1), "choice")
    with pytest.raises(ConfigError, match="method `generate`; got Linear"):
        evaluate(torch.nn.Linear(1, 1), loader(), "rouge-l")


# Multiple choice


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, target):
    """Of a target's tokens after a prompt, without the end of the sequence."""
    words = target.split()
    if model.config.is_encoder_decoder:
        source = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = torch.tensor([[0, *tokenizer.convert_tokens_to_ids(words)]])
        logits = model(input_ids=source, decoder_input_ids=ids).logits
    else:
        ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits
    found = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(found[-len(words) :].sum())


def test_what_is_written_is_scored_by_group_where_the_score_is_a_mean():
    names = list("xyxyzxy")
    model, batches = writer("gpt2"), loader(groups=names)
    found = evaluate(model, batches, "rouge-l", predictions=True, generation=SHORT)
    for name, value in found["groups"].items():
        own = [n for n, group in enumerate(names) if group == name]
        texts_of = [
            [found[part][n] for n in own] for part in ("predictions", "references")
        ]
        assert value == score_texts(*texts_of)["rouge_l"]
    assert list(found["groups"]) == ["x", "y", "z"]
    assert "groups" not in evaluate(model, batches, "bleu", generation=SHORT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("options", [TARGETS, ["not good", "not bad"]])
def test_the_choice_is_the_likeliest_target(kind, size, options):
    model = make_model(kind, seed=5)
    targets = [options[i % 2] for i in range(len(PROMPTS))]
    batches = loader(kind, targets=targets, size=size)
    expected = [
        max(options, key=lambda o: log_likelihood(model, batches.tokenizer, prompt, o))
        for prompt in PROMPTS
    ]
    found = evaluate(model, batches, "choice", predictions=True)
    assert found["predictions"] == expected
    assert found["references"] == [[target] for target in targets]
    hits = [a == b for a, b in zip(expected, targets, strict=True)]
    assert found["choice"] == found["score"] == sum(hits) / 7
    assert found["examples"] == 7


def test_options_that_cannot_be_told_apart_are_refused():
    model = make_model("gpt2")
    for targets, words in (
        (["good"] * 7, "2 to 26 different options.*got 1"),
        (["a", "a b"] * 3 + ["c"], "share it; call them by letters"),
        (["a b", "a c", "b"] * 2 + ["b"], "share it"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(model, loader(targets=targets), "choice")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        evaluate(model, loader(), "choice")


def test_letters_that_no_question_has_for_an_answer_are_options():
    batches = loader(prompts=["I. f\nA. b\nB. c\nC. d\n"], targets=["A"])
    tokenizer = batches.tokenizer
    tokenizer.add_tokens(["A", "B", "C"])
    model = make_model("gpt2")
    model.resize_token_embeddings(40)
    head = model.lm_head.weight.data
    ids = tokenizer.convert_tokens_to_ids(["A", "B", "C"])
    state = model.transformer(
        **tokenizer(batches.dataset.texts[0], return_tensors="pt")
    )
    head[ids] = torch.tensor([1.0, 2.0, 3.0])[:, None] * state[0][0, -1]
    assert answers(model, batches, metric="choice") == ["C"]


def test_groups_have_scores_of_their_own():
    names = ["x", "y", "x", "y", "z", "x", "y"]
    found = evaluate(
        make_model("gpt2", seed=5), loader(groups=names), "choice", predictions=True
    )
    hits = [
        prediction in wanted
        for prediction, wanted in zip(
            found["predictions"], found["references"], strict=True
        )
    ]
    assert list(found["groups"]) == ["x", "y", "z"]
    for name, value in found["groups"].items():
        own = [hit for hit, group in zip(hits, names, strict=True) if group == name]
        assert value == sum(own) / len(own)
