"""Configurations of experiments: shipped ones train, files are read or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sylva_train import ConfigError, SylvaConfig, load_config
from sylva_train.config_files import config_names, load_rates
from sylva_train.reproduce import TABLES, load_settings, with_values
from tests.sylva_train import layouts
from tests.sylva_train.jobs import source, sylva, told, write_mmlu
from tests.sylva_train.words import VOCABULARY, save_folder, word_tokenizer

WIDTH = 64
GLUE = {
    "mnli": "MNLI", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI",
    "qqp": "QQP", "rte": "RTE", "stsb": "STS-B",
}  # fmt: skip
NAMES = (
    *(f"roberta-large-{name}" for name in GLUE),
    "gpt2-large-e2e", "llama-3.2-3b-metamathqa", "llama-7b-oasst1",
    "t5-large-natural-instructions",
)  # fmt: skip
#: Of models that are at hand.
SMALLER = ("llama-small-e2e", "minilm-e2e-rating")
#: What fits a paper's options to a model of two layers and a few rows.
SMALL = [
    "--steps", 2, "--batch-size", 4, "--accumulate", 1, "--samples", 8, "--levels", 1,
    "--rank", 4, "--block-size", 8, "--density", 0.2, "--max-new-tokens", 2,
    "--num-beams", 2, "--quiet",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """METEOR takes many seconds to start; its own tests are elsewhere."""
    found = shutil.which
    monkeypatch.setattr(
        shutil,
        "which",
        lambda name, *rest: None if name == "java" else found(name, *rest),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Random models of the paper's architectures; not to be changed."""
    home = tmp_path_factory.mktemp("models")
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "pad_token_id": 0,
    }
    roberta = RobertaConfig(**shape, max_position_embeddings=514, type_vocab_size=1)
    names = ["input_ids", "attention_mask"]
    encoder = word_tokenizer("encoder", model_input_names=names)
    save_folder(home / "roberta", roberta, RobertaForMaskedLM, encoder)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 512}
    gpt2 = GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=4, eos_token_id=4)
    save_folder(home / "gpt2", gpt2, GPT2LMHeadModel, word_tokenizer("decoder"))
    letters = shape | {"vocab_size": VOCABULARY + 4}
    llama = LlamaConfig(
        **letters, num_key_value_heads=2, bos_token_id=4, eos_token_id=4
    )
    decoder = word_tokenizer("decoder", model_max_length=2048)
    decoder.add_tokens([AddedToken(letter, single_word=True) for letter in "ABCD"])
    save_folder(home / "llama", llama, LlamaForCausalLM, decoder)
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_layers": 2}
    t5 = T5Config(
        vocab_size=VOCABULARY, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=4, **sizes,
    )  # fmt: skip
    tokenizer = word_tokenizer("seq2seq")
    save_folder(home / "t5", t5, T5ForConditionalGeneration, tokenizer)
    return home


def write_data(name: str, home: Path) -> list:
    """Write a configuration's data as it is downloaded, and return its flags."""
    task = GLUE.get(name.removeprefix("roberta-large-"))
    if task:
        return ["--data", layouts.write_glue(home, task, times=6)]
    if name == "gpt2-large-e2e":
        return ["--data", layouts.write_e2e(home / "e2e-dataset", times=4)]
    if name == "t5-large-natural-instructions":
        return ["--data", layouts.write_instructions(home / "ni", instances=8)]
    if name == "llama-7b-oasst1":
        for split in ("train", "validation"):
            layouts.write_oasst(home / f"{split}.jsonl.gz", times=4)
        return ["--data", home, "--eval-data", write_mmlu(home / "mmlu")]
    if name == "llama-small-e2e":
        return ["--limit", 16, "--eval-limit", 3]
    layouts.write_gsm8k(home / "main", times=4)
    data = layouts.write_metamath(home / "MetaMathQA-395K.json", times=4)
    return ["--data", data, "--eval-data", home / "main"]


def test_the_papers_experiments_are_there():
    assert config_names() == sorted((*NAMES, *SMALLER))
    shown = sylva("configs").stdout
    assert all(name in shown for name in NAMES)
    told_of = json.loads(sylva("configs", "roberta-large-stsb").stdout)
    assert set(told_of) == {"about", "task", "sylva", "training"}


@pytest.mark.filterwarnings("ignore:`meteor` is left out")
@pytest.mark.parametrize("name", [*NAMES, "llama-small-e2e"])
def test_each_configuration_scores_and_trains(name, models, tmp_path):
    task, config, training = load_config(name)
    base = "roberta" if name.startswith("roberta") else name.partition("-")[0]
    (tmp_path / "data").mkdir()
    data = write_data(name, tmp_path / "data")
    output, model = tmp_path / "run", ["--model", models / base]
    sylva("finetune", output, "--config", name, *model, *data, *SMALL)
    run = json.loads((output / "sylva.json").read_text())
    assert run["finished"]
    assert (output / "scores.safetensors").exists()
    assert math.isfinite(run["history"][-1]["loss"])
    assert run["metrics"]["metric"] == (task.metric or "perplexity")
    # What the flags did not change is as the configuration says.
    kept = {"max_length", "task", "dtype", "pooling", "metric", "eval_split"}
    assert {n: run["task"][n] for n in kept} == {n: getattr(task, n) for n in kept}
    assert run["sylva"]["importance"] == config.importance
    for field in ("lr", "weight_decay", "schedule", "warmup", "max_grad_norm"):
        assert run["training"][field] == getattr(training, field)


# Files


def write(path: Path, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    return path


def test_a_file_of_sections_gives_the_three_configurations(tmp_path):
    content = {
        "about": "mine",
        "task": {"model": "./bert", "text_column": ["a", "b"], "limit": 10},
        "sylva": {"density": 1, "target_modules": ["query"], "memory_budget": "1GB"},
        "training": {"lr": 0.5, "seed": 3, "steps": None},
    }
    task, config, training = load_config(write(tmp_path / "x.json", content))
    assert (task.model, task.text_column, task.limit) == ("./bert", ["a", "b"], 10)
    assert (config.density, config.target_modules) == (1, ["query"])
    assert (training.lr, training.seed, training.steps) == (0.5, 3, None)
    toml = "about = 'mine'\n[sylva]\ndensity = 0.25\n"
    _, config, _ = load_config(write(tmp_path / "x.toml", toml))
    assert config.density == 0.25
    assert config.samples == SylvaConfig().samples


WRONG = {
    "section": ({"tasks": {}, "about": ""}, "no section 'tasks'; did you mean 'task'?"),
    "field": (
        {"training": {"learning_rate": 1}},
        "section 'training' has no field 'learning_rate'; known are epochs, steps,",
    ),
    "fact": ({"sylva": {"masks": "x"}}, "section 'sylva' has no field 'masks'"),
    "peft": ({"sylva": {"inference_mode": True}}, "has no field 'inference_mode'"),
    "type": (
        {"training": {"lr": "fast"}},
        "section 'training': 'lr' must be a number; got 'fast'.",
    ),
    "integer": (
        {"task": {"limit": 1.5}},
        "section 'task': 'limit' must be an integer or null; got 1.5.",
    ),
    "truth": ({"training": {"steps": True}}, "'steps' must be an integer or null"),
    "list": (
        {"sylva": {"target_modules": [1]}},
        "'target_modules' must be a list or a text or null; got [1].",
    ),
    "value": ({"sylva": {"density": 2}}, "section 'sylva': `density`"),
    "shape": ({"task": {}, "sylva": 3}, "section 'sylva' must be names and values"),
    "about": ({"about": 3}, "section 'about' must be a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_file_section_and_field(tmp_path, case):
    content, words = WRONG[case]
    path = write(tmp_path / "x.json", content)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert words in str(raised.value)
    if case != "value":  # of which the flag tells
        message = told(sylva("finetune", tmp_path / "run", "--config", path, code=2))
        assert words in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("roberta-large-rtee", "did you mean 'roberta-large-rte'?"),
        ("sst2", "there is no 'sst2'; known are gpt2-large-e2e, llama-3.2-3b"),
        ("nowhere.json", "there is no such file"),
        ("x.txt", "expected one of the suffixes"),
        ("bad.json", "not valid JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.txt", "a")
    write(tmp_path / "bad.json", "{")
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        load_config(name)


def test_flags_win_and_commands_take_their_own_fields(home, tmp_path):
    content = {
        "task": {"max_length": 16, "eval_limit": 2},
        "sylva": {"importance": "magnitude", "block_size": 8, "density": 0.5},
        "training": {"steps": 1, "batch_size": 8, "lr": 0.25},
    }
    path = write(tmp_path / "mine.json", content)
    base = ["--config", path, *source(home)[:4]]
    sylva("finetune", tmp_path / "a", *base, "--sparsity", 0.75, "--steps", 2)
    run = json.loads((tmp_path / "a" / "sylva.json").read_text())
    assert (run["sylva"]["density"], run["sylva"]["block_size"]) == (0.25, 8)
    assert (run["training"]["steps"], run["training"]["lr"]) == (2, 0.25)
    assert (run["task"]["max_length"], run["task"]["eval_limit"]) == (16, 2)
    sylva("score", tmp_path / "s.safetensors", *base)  # without training's part
    both = {"sylva": {"seed": 1}, "training": {"seed": 2}}
    path = write(tmp_path / "both.json", both)
    message = told(sylva("finetune", tmp_path / "b", "--config", path, code=2))
    assert "'seed' is 2, and 1 before it; a flag sets both" in message


# Learning rates by method


def test_rates_by_method_are_a_section_of_their_own(tmp_path):
    rates = {"full": 1e-3, "sylva:random": 2}
    path = write(tmp_path / "x.json", {"task": {}, "learning_rates": rates})
    assert load_rates(path) == rates
    assert load_config(path)[0].model == "minilm"
    assert load_rates("roberta-large-stsb") == {}
    wrong = write(tmp_path / "y.json", {"learning_rates": {"full": "fast"}})
    with pytest.raises(ConfigError, match="'learning_rates': 'full' must be a number"):
        load_rates(wrong)


def test_a_setting_is_its_configuration_with_rates_for_every_method(tmp_path):
    content = {
        "training": {"lr": 4e-2}, "learning_rates": {"lora": 0.5}, "task": {"limit": 9},
    }  # fmt: skip
    path = write(tmp_path / "mine.json", content)
    ((name, found),) = load_settings(
        [str(path)], seeds=(3,), steps=7, limit=None
    ).items()
    assert name == "mine"
    assert (found.seeds, found.training.steps, found.task.limit) == ((3,), 7, 9)
    # Ten times Sylva's rate for MiniLM, so ten times that of full fine-tuning too.
    assert found.rate("full") == pytest.approx(4e-3)
    assert found.rate("sylva:random") == pytest.approx(4e-2)
    assert found.rate("lora") == 0.5
    with pytest.raises(ConfigError, match="'mine' stands twice"):
        load_settings([str(path), str(path)])


def test_values_are_of_the_options_type():
    assert with_values(TABLES["table5"], ["8", "16"]).values == (8, 16)
    assert with_values(TABLES["table4"], ["0.5"]).values == (0.5,)
    assert with_values(TABLES["tokens"], ["reduce"]).values == ("reduce",)
    with pytest.raises(ConfigError, match="must be ints"):
        with_values(TABLES["table5"], ["x"])
    with pytest.raises(ConfigError, match="table3 varies none"):
        with_values(TABLES["table3"], ["1"])


def test_settings_of_the_benchmarks_can_be_read():
    files = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").iterdir())
    settings = load_settings([str(path) for path in files])
    assert {"llama-e2e-text", "llama-film-text"} <= settings.keys()
    for setting in settings.values():
        assert setting.task.task == "causal-lm"
        assert setting.rate("lora") != setting.rate("sylva:kfac-natural")
