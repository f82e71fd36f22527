"""Pretrained models and tokenizers, with a head for the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    TOKENIZER_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TokenizersBackend,
)

from sylva_train._checks import ConfigError, ModelError, check_choice, check_integer
from sylva_train.model_classes import UNSHIFTED
from sylva_train.options import DTYPES, LABELLED, MINILM, POOLINGS, TASKS

from .pooled import PooledClassifier, backbone_class, read_config
from .sources import dequantizing, place, readable, resolve

__all__ = ["load_model", "load_tokenizer", "saved_labels"]

#: Class and known configurations of models that write, by task.
WRITERS = {
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
}


def load_tokenizer(name_or_path: str | Path = MINILM) -> Any:
    """Load a tokenizer; one without a padding token pads with its end of sequence.

    Parameters
    ----------
    name_or_path : str or Path
        ``"minilm"``, a folder, a GGUF file, or a name on the model hub.

    Returns
    -------
    transformers.PreTrainedTokenizerBase

    Raises
    ------
    ModelError
        If it cannot be found, reached or read.
    """
    source = resolve(name_or_path)
    where, options = place(source)
    with readable("model", source):
        config = read_config(source) if options else None
    with readable("tokenizer", source):
        # Only of what is no GGUF file: AutoTokenizer would read that once more for a
        # configuration, which takes ten seconds where the vocabulary is large.
        kind = AutoTokenizer if config is None else tokenizer_class(config)
        tokenizer = kind.from_pretrained(where, **options)
    if config is not None:
        mark_tokens(tokenizer, config)
    # Without files transformers makes one up, to which every word is unknown; T5's has
    # the mark of a word's beginning.
    if len({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}) <= 1:
        msg = (
            f"the tokenizer of `{source}` has no words: its files are missing. Save it"
            " beside the model (`tokenizer.save_pretrained`)."
        )
        raise ModelError(msg)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            msg = (
                f"the tokenizer of `{source}` has neither a padding nor an"
                " end-of-sequence token; add one to its files."
            )
            raise ModelError(msg)
        # Padding is told from text by the attention mask and by labels of -100.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_class(config: Any) -> Any:
    """Return the class that AutoTokenizer takes for a GGUF file of a configuration."""
    kind: Any = TOKENIZER_MAPPING.get(type(config), None)
    # Mistral's own one, where it is installed, reads no such file.
    fits = isinstance(kind, type) and issubclass(kind, TokenizersBackend)
    return kind if fits else TokenizersBackend


def mark_tokens(tokenizer: Any, config: Any) -> None:
    """Let a tokenizer begin, end and pad texts with the tokens that a GGUF file says.

    Not every release of transformers does.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(config, f"{name}_id", None)
        known = isinstance(number, int) and 0 <= number < len(tokenizer)
        if known and getattr(tokenizer, f"{name}_id") != number:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))


def saved_labels(name_or_path: str | Path) -> list[str]:
    """Return the classes that a checkpoint's head tells apart, in order; [] without one.

    Raises
    ------
    ModelError
        If the model cannot be found, reached or read.
    """
    source = resolve(name_or_path)
    with readable("model", source):
        config = read_config(source)
    pooled, native = saved_heads(config)
    return [name for _, name in sorted(config.id2label.items())] * (pooled or native)


def load_model(
    name_or_path: str | Path = MINILM,
    *,
    task: str = "classification",
    labels: Sequence[str] | None = None,
    pooling: str = "auto",
    dtype: str = "float32",
    dropout: float | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load a pretrained model and its tokenizer.

    Parameters
    ----------
    name_or_path : str or Path
        ``"minilm"`` (all-MiniLM-L6-v2 from a Python package), a folder, a GGUF file, whose
        weights are dequantized, or a name on the model hub.
    task : str
        ``"classification"``, ``"regression"``, ``"causal-lm"`` or ``"seq2seq"``. A
        regression's head has one output and the mean squared error as its loss.
    labels : sequence of str, optional
        Classes of the new head. A head that the checkpoint has is kept, output by output,
        if it has as many classes; without ``labels`` it must be there.
    pooling : str
        ``"mean"``: `PooledClassifier`; ``"native"``: the model's own class for sequence
        classification; ``"auto"``: native where the checkpoint has such a head for as
        many classes, else the mean for encoders (models with a masked-LM form), native
        for decoders and encoder-decoders.
    dtype : str
        Type of the weights, one of `DTYPES`.
    dropout : float, optional
        Replaces each of the model's dropout probabilities; by default they stay.
    seed : int
        Seed of a new head.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode, on the CPU.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a padding token.

    Raises
    ------
    ModelError
        If the model cannot be found, reached or read, or lacks weights.
    ConfigError
        If an option has a value that cannot be used.

    Examples
    --------
    >>> from sylva_train.pretrained import load_model
    >>> model, tokenizer = load_model("minilm", labels=["no", "yes"])
    >>> model.classifier
    Linear(in_features=384, out_features=2, bias=True)
    """
    check_choice("task", task, TASKS)
    check_choice("pooling", pooling, POOLINGS)
    check_choice("dtype", dtype, DTYPES)
    check_integer("seed", seed, 0)
    if labels is not None:
        check_labels(labels, task)
    source = resolve(name_or_path)
    tokenizer = load_tokenizer(name_or_path)
    with readable("model", source):
        config = read_config(source)
        # Classifiers on GPT-2 and LLaMA look for the last token that is not padding.
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        if dropout is not None:
            set_dropout(config, dropout)
        options = {"dtype": dtype, "config": config}
        if task == "regression":
            config.problem_type, labels = "regression", ["number"]
        elif config.problem_type == "regression":
            config.problem_type = None
        if task in LABELLED:
            model = load_classifier(source, config, labels, pooling, options, seed)
        else:
            check_kind(source, config, task)
            model = load_whole(WRITERS[task][0], source, options)
            if task == "causal-lm" and getattr(model, "loss_type", "") is None:
                # What transformers would take all the same, with a warning (GPT-2).
                model.loss_type = "ForCausalLM"
    return model.eval(), tokenizer


def check_labels(labels: Sequence[str], task: str) -> None:
    """Raise `ConfigError` unless these can be a classifier's classes."""
    if task != "classification":
        msg = f'`labels` are for `task` "classification"; got {task!r}.'
        raise ConfigError(msg)
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) != len(labels):
        msg = f"`labels` must be at least two different classes; got {labels!r}."
        raise ConfigError(msg)


def saved_heads(config: Any) -> tuple[bool, bool]:
    """Whether a checkpoint is a `PooledClassifier`, or has a native head."""
    kinds = config.architectures or []
    native = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    return PooledClassifier.__name__ in kinds, native


def check_kind(source: str, config: Any, task: str) -> None:
    """Raise `ConfigError` if a model writes for the other task, or would learn to copy."""
    # transformers has a class for causal language modelling of such a one all the same.
    encoder = (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "xlnet"
    )
    causal = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if encoder and not (causal or getattr(config, "causal", False)):
        msg = (
            f"`{source}` is an encoder, of type {config.model_type}, which sees the tokens"
            f' that it would predict; `task` "{task}" needs another model.'
        )
        raise ConfigError(msg)
    able = [other for other, (_, kinds) in WRITERS.items() if type(config) in kinds]
    if able and task not in able:
        msg = (
            f"`{source}` is a model of type {config.model_type}, which is for `task`"
            f' "{able[0]}"; got "{task}".'
        )
        raise ConfigError(msg)
    kind = getattr(WRITERS[task][1].get(type(config), None), "__name__", None)
    if kind in UNSHIFTED:
        rest = (
            'load it with `task="seq2seq"`.'
            if "seq2seq" in able
            else "take another model."
        )
        msg = (
            f"`{source}` would be a {kind}, whose loss compares what it says at each token"
            f" with that token, so that it would learn to copy: {rest}"
        )
        raise ConfigError(msg)


def load_classifier(
    source: str,
    config: Any,
    labels: Sequence[str] | None,
    pooling: str,
    options: Mapping[str, Any],
    seed: int,
) -> Any:
    """Load a model with a classification head, saved or new."""
    pooled, native = saved_heads(config)
    if pooling == "auto":
        encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        mean = pooled or (encoder and not config.is_encoder_decoder)
        kept = native and (labels is None or len(labels) == config.num_labels)
        mean |= config.model_type == "xlnet"
        pooling = "mean" if mean and not kept else "native"
    if pooling == "native" and pooled:
        msg = f'`{source}` was saved with `pooling="mean"`; load it so.'
        raise ConfigError(msg)
    if pooling == "native" and config.model_type == "xlnet":
        msg = (
            f"`{source}` is of type xlnet, whose own class reads a text's last position,"
            ' which is padding in a batch; load it with `pooling="mean"`.'
        )
        raise ConfigError(msg)
    if labels is None and not (pooled if pooling == "mean" else native):
        msg = (
            f"`labels` must be given: `{source}` has no head to classify with. A language"
            ' model is loaded with `task="causal-lm"` or `"seq2seq"`.'
        )
        raise ConfigError(msg)
    # transformers draws the weights of a new head from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if pooling == "native":
            set_labels(config, labels)
            return load_whole(
                AutoModelForSequenceClassification, source, options, new_head=True
            )
        if pooled:
            model = load_whole(PooledClassifier, source, options)
            set_labels(model.config, labels)
            if model.num_labels == model.config.num_labels:
                return model
            return PooledClassifier(model.config, model.backbone)
        kind, extra = backbone_class(config)
        backbone = load_whole(kind, source, options, **extra)
        set_labels(backbone.config, labels)
        return PooledClassifier(backbone.config, backbone)


def set_labels(config: Any, labels: Sequence[str] | None) -> None:
    """Write the classes to a configuration, which gives it ``num_labels`` too."""
    if labels is not None:
        config.id2label = {i: str(label) for i, label in enumerate(labels)}
        config.label2id = {str(label): i for i, label in enumerate(labels)}


def load_whole(
    kind: Any,
    source: str,
    options: Mapping[str, Any],
    *,
    new_head: bool = False,
    **extra: Any,
) -> Any:
    """Load a model and make sure that the checkpoint had all of its weights.

    Parameters
    ----------
    kind : class
        Model or auto class.
    source : str
        Folder, GGUF file or name.
    options, **extra
        For ``from_pretrained``.
    new_head : bool
        Whether weights outside of the backbone may be new.

    Raises
    ------
    ModelError
        If weights are missing or of another shape: they would be random.
    """
    with dequantizing(source) as (where, more):
        # A new head is of another shape than the checkpoint's; other weights must not be.
        model, info = kind.from_pretrained(
            where,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{**more, **options, **extra},
        )
    # Adapters name their base by this: the GGUF file, not its folder.
    model.name_or_path = model.config.name_or_path = source
    inside = f"{model.base_model_prefix}." if new_head else ""
    wrong = sorted(w for w in info["mismatched_keys"] if w[0].startswith(inside))
    if place(source)[1]:
        # transformers 5.17 takes such weights of a GGUF file without a word
        wrong = wrong or sorted(misshapen(model))
    if wrong:
        name, found, expected = wrong[0]
        says, advice = "config.json says", "Take both from the same model"
        if place(source)[1]:
            says = "metadata say, as transformers reads them"
            advice = "Get the model in the format of transformers"
        msg = (
            f"the checkpoint `{source}` has {len(wrong)} weights of other shapes than its"
            f" {says}, such as `{name}`: {tuple(found)} instead of {tuple(expected)}."
            f" {advice}."
        )
        raise ModelError(msg)
    missing = sorted(name for name in info["missing_keys"] if name.startswith(inside))
    if missing:
        wrapped = any(".base_layer." in name for name in info["unexpected_keys"])
        why = (
            "it was saved with an adapter inside: `sylva_train.merge` the model before"
            " `save_pretrained`"
            if wrapped
            else "it is incomplete, or of another architecture or task"
        )
        msg = (
            f"the checkpoint `{source}` lacks {len(missing)} weights of"
            f" {type(model).__name__}, such as `{missing[0]}`; {why}."
        )
        raise ModelError(msg)
    return model


def misshapen(model: nn.Module) -> Iterator[tuple[str, torch.Size, tuple[int, int]]]:
    """Yield the linear layers' weights that are not of the shape the layers say."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = module.out_features, module.in_features
            if module.weight.shape != expected:
                yield f"{name}.weight", module.weight.shape, expected


def set_dropout(config: Any, dropout: float) -> None:
    """Write every dropout probability of a configuration.

    Raises
    ------
    ConfigError
        If it is no probability below 1.
    """
    if not 0 <= dropout < 1:
        msg = f"`dropout` must be at least 0 and below 1; got {dropout!r}."
        raise ConfigError(msg)
    # BERT's *_dropout_prob, GPT-2's *_pdrop, LLaMA's attention_dropout, ...; BART's
    # layerdrop leaves out whole layers.
    for name, value in vars(config).items():
        if isinstance(value, float) and "drop" in name and "layerdrop" not in name:
            setattr(config, name, dropout)
