"""What a language model writes after prompts, in batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from sylva_train._checks import ConfigError
from sylva_train.data import Loader, ending, pad, prompt_ids
from sylva_train.model_classes import is_encoder_decoder
from sylva_train.progress import Report

__all__ = ["cut", "generated", "options", "source_ids", "write"]

#: Tokens that a model writes at most, where nothing is said.
MAX_NEW_TOKENS = 64


def options(
    model: Any, tokenizer: Any, given: GenerationConfig | None, **fixed: Any
) -> GenerationConfig:
    """Return how to generate: as given, greedily where nothing is said.

    The model's own configuration, which is left alone, fills the rest up; an answer ends
    at its end-of-sequence tokens and at the tokenizer's.

    Raises
    ------
    ConfigError
        If a length is given that counts the prompt too, or more answers than one.
    """
    chosen = copy.deepcopy(given) if given else GenerationConfig()
    if chosen.max_length is not None and chosen.max_new_tokens is None:
        msg = (
            f"`generation` has `max_length` {chosen.max_length}, which counts the prompt's"
            " tokens too; give `max_new_tokens`."
        )
        raise ConfigError(msg)
    if (chosen.num_return_sequences or 1) > 1:
        msg = (
            "`generation`: one answer a prompt is scored, so that `num_return_sequences`"
            f" must be 1; got {chosen.num_return_sequences}."
        )
        raise ConfigError(msg)
    own = getattr(model, "generation_config", None)
    ends = {tokenizer.eos_token_id}
    for config in (chosen, own):
        value = getattr(config, "eos_token_id", None)
        ends |= set(value) if isinstance(value, list) else {value}
    defaults = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_beams": 1,
        "do_sample": False,
        # Where training switched it off, for gradient checkpointing say.
        "use_cache": True,
    }
    fixed["eos_token_id"] = sorted(ends - {None}) or None
    fixed["pad_token_id"] = tokenizer.pad_token_id
    fixed["return_dict_in_generate"] = True
    for name, value in defaults.items():
        if getattr(chosen, name) is None:
            fixed.setdefault(name, value)
    for name, value in fixed.items():
        setattr(chosen, name, value)
    return chosen


@torch.no_grad()
def generated(
    model: Any,
    loader: Loader,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    progress: Report | None = None,
    **inputs: torch.Tensor,
) -> Iterator[tuple[list[int], Any]]:
    """Yield what `generate` returns for batches of prompts, which are in evaluation mode.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The model.
    loader : Loader
        Its tokenizer, and the size of its batches.
    prompts : sequence of sequences of int
        Token ids. Those of like length come together.
    config : transformers.GenerationConfig
        From `options`.
    progress : callable, optional
        Called with (batches done, batches in all).
    **inputs : torch.Tensor, shape (1, length)
        Given with each prompt.

    Yields
    ------
    indices : list of int
        The prompts of a batch.
    output : transformers.utils.ModelOutput
        Its ``sequences`` without the prompts, and ``logits`` if they are wanted.
    """
    device = next(model.parameters()).device
    decoder = not is_encoder_decoder(model)
    side, fill = "left" if decoder else "right", loader.tokenizer.pad_token_id
    # The longest first: what does not fit into the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = loader.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for number, indices in enumerate(batches):
        ids = pad([prompts[i] for i in indices], fill, side)
        mask = pad([[1] * len(prompts[i]) for i in indices], 0, side)
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            tokenizer=loader.tokenizer if config.stop_strings else None,
            **{name: value.expand(len(ids), -1) for name, value in inputs.items()},
        )
        if decoder:
            output.sequences = output.sequences[:, ids.shape[1] :]
        yield indices, output
        if progress is not None:
            progress(number + 1, len(batches))


def source_ids(texts: Sequence[str], loader: Loader) -> list[list[int]]:
    """Return token ids for an encoder, cut as the loader cuts them."""
    options = {"truncation": True, "max_length": loader.max_length}
    found: list[list[int]] = loader.tokenizer(list(texts), **options)["input_ids"]
    return found


def cut(
    model: Any, loader: Loader, prompts: list[list[int]], new: int
) -> list[list[int]]:
    """Keep the end of prompts, with room for new tokens; warn if a beginning is lost.

    Raises
    ------
    ConfigError
        If the model has not even room for the new tokens.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and new >= room:
        msg = f"`max_new_tokens` must be below {room}, the model's length; got {new}."
        raise ConfigError(msg)
    most = loader.max_length if room is None else min(loader.max_length, room - new)
    long = sum(len(prompt) > most for prompt in prompts)
    if long:
        msg = (
            f"{long} of {len(prompts)} prompts of {loader.dataset.name} were cut at their"
            f" beginning, to {most} tokens; a larger `max_length` (`--max-length`) keeps"
            " more, where the model has room."
        )
        warnings.warn(msg, stacklevel=2)
    return [ending(prompt, most, loader.tokenizer) for prompt in prompts]


def write(
    model: Any,
    loader: Loader,
    texts: Sequence[str],
    generation: GenerationConfig | None = None,
    progress: Report | None = None,
) -> list[str]:
    """Return what a model writes after each of some prompts.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model or an encoder-decoder, in evaluation mode.
    loader : Loader
        Its tokenizer, task, batch size and length.
    texts : sequence of str
        The prompts.
    generation : transformers.GenerationConfig, optional
        How to generate; see `options`.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    list of str
        Without stop strings, and blanks around them.

    Raises
    ------
    ConfigError
        If the model has no room for an answer, or an option does not suit one.
    """
    tokenizer = loader.tokenizer
    config = options(model, tokenizer, generation)
    if loader.task == "seq2seq":
        prompts = source_ids(texts, loader)
    else:
        prompts = cut(
            model, loader, prompt_ids(texts, tokenizer), config.max_new_tokens
        )
    stops = config.stop_strings or ()
    stops = [stops] if isinstance(stops, str) else stops
    answers = [""] * len(texts)
    for indices, output in generated(model, loader, prompts, config, progress):
        found = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        for index, answer in zip(indices, found, strict=True):
            for stop in stops:
                answer = answer.partition(stop)[0]  # noqa: PLW2901
            answers[index] = answer.strip()
    return answers
