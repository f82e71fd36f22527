"""How well a model does on a loader's data, without a trace left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from sylva_train._checks import ConfigError, DataError, check_choice
from sylva_train._torch import preserved_modes
from sylva_train.data import Loader, TextDataset
from sylva_train.metrics import ANSWERS, CHOICE, MEANS, METRICS, key_of
from sylva_train.progress import Report

from .choice import choice_metrics
from .generation import write
from .labels import label_metrics
from .texts import check_libraries, score_groups, score_texts

__all__ = ["check_prompts", "evaluate"]


def evaluate(
    model: nn.Module,
    loader: Iterable[Mapping[str, torch.Tensor]],
    metric: str | None = None,
    *,
    meteor: bool = False,
    predictions: bool = False,
    generation: GenerationConfig | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Evaluate a model on labelled batches, or by what it writes after prompts.

    Parameters
    ----------
    model : torch.nn.Module
        Returns ``logits``. Run in evaluation mode, without gradients; every module's
        mode is restored afterwards. To write, a model of `transformers`, or one of PEFT
        around it.
    loader : Loader or iterable of batches
        Labels of shape (batch,) are classes, or numbers if they are floating point; of
        shape (batch, length) they are tokens; −100 where none counts. They are shifted,
        as those of a causal language model are, unless the model is an encoder-decoder,
        or its class's name ends in ``ForMaskedLM`` or ``ForTokenClassification``, or it
        has classes for at most half of the tokens that it knows. To write or to choose, a
        `Loader` of prompts with targets.
    metric : str, optional
        The ``score``, one of `sylva_train.metrics.METRICS`; by default ``"accuracy"`` for classes,
        ``"pearson"`` for numbers and ``"perplexity"`` for tokens. Of a language model
        also what it writes can be scored (``"bleu"``, ``"nist"``, ``"meteor"``,
        ``"rouge-l"``, ``"rouge-l-coco"``, ``"cider"``, ``"exact-match"``, ``"answer"``;
        needs ``pip install 'sylva-train[metrics]'``), or which of the targets it finds
        likeliest (``"choice"``).
    meteor : bool
        Whether to have METEOR beside another metric of what a model writes.
    predictions : bool
        Whether to return the predictions as well, in the order of the data set.
    generation : transformers.GenerationConfig, optional
        How to write: beams, length and the like. By default greedily, 64 tokens at most.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    dict
        For classes ``accuracy``, ``f1`` (macro average over the classes that occur or
        are predicted), ``f1_binary`` (of two classes, the second's, as GLUE reports for
        MRPC and QQP; of a `Loader` ``positive`` names it), ``mcc`` (Matthews correlation coefficient) and ``loss`` (mean
        cross-entropy). For numbers the correlations ``pearson`` and ``spearman``, 0
        where either side is constant, and ``mse`` (mean squared error). For tokens
        ``loss`` (mean over all tokens that count, whatever the batches), ``perplexity``
        (its exponential) and ``token_accuracy``.

        For what a model writes ``bleu``, ``nist``, ``rouge_l``, ``rouge_l_coco``,
        ``cider``, ``exact_match``, ``answer`` and, if asked for, ``meteor``, as
        `sylva_train.evaluation.score_texts` has them; rows with the same text are one
        example with several references. For what it chooses ``choice``, the fraction of
        right options. Where the data set has groups (MMLU's subjects, the tasks of
        Super-NaturalInstructions) ``groups`` has the score of each, if that is ``choice``,
        or a mean over the texts: ``rouge_l``, ``rouge_l_coco``, ``exact_match``, ``answer``.

        For all of them ``score``, ``metric``, ``higher_is_better`` and ``examples``. With
        ``predictions`` the NumPy arrays ``predictions``, ``labels`` and ``logits``; of a
        language model lists of a prompt an item, ``prompts``, ``references`` (a list
        each) and ``predictions``.

    Raises
    ------
    ConfigError
        If the metric is unknown, or is not one for this model or these labels, or needs
        what is not installed; or the loader leaves examples out.
    DataError
        If there is no batch, or one without labels; or targets do not suit the metric.
    NonFiniteError
        If a logit is NaN or infinite.
    """
    if metric is not None:
        check_choice("metric", metric, METRICS)
    if isinstance(loader, Loader):
        loader.positions()  # refuses a loader that leaves examples out
    with preserved_modes(model):
        model.eval()
        if metric in ANSWERS:
            check_libraries(metric)
            checked = check_writer(model, loader, metric)
            found = answer_metrics(
                model, checked, metric, meteor, predictions, generation, progress
            )
        else:
            found, metric = label_metrics(
                model, loader, metric, predictions=predictions, progress=progress
            )
    return found | {
        "score": found[key_of(metric)],
        "metric": metric,
        "higher_is_better": METRICS[metric],
    }


def check_prompts(dataset: TextDataset, metric: str | None) -> None:
    """Raise `DataError` if a metric of answers is to be had of texts without targets."""
    if metric in ANSWERS and not dataset.targets:
        msg = (
            f'{dataset.name}: `metric` "{metric}" needs prompts with targets, and these'
            " texts have none; name their column (`target_column`)."
        )
        raise DataError(msg)


def check_writer(model: nn.Module, loader: Any, metric: str) -> Loader:
    """Return the loader, if it has prompts and the model can write after them.

    Raises
    ------
    ConfigError
        If it has not, or it cannot.
    DataError
        If there is no target.
    """
    if not isinstance(loader, Loader) or loader.task == "classification":
        msg = f'`metric` "{metric}" needs a `Loader` of prompts with targets, not of classes.'
        raise ConfigError(msg)
    check_prompts(loader.dataset, metric)
    if not hasattr(model, "generate"):
        kind = type(model).__name__
        msg = f'`metric` "{metric}" needs a model with a method `generate`; got {kind}.'
        raise ConfigError(msg)
    return loader


def answer_metrics(
    model: Any,
    loader: Loader,
    metric: str,
    meteor: bool,
    predictions: bool,
    generation: GenerationConfig | None,
    progress: Report | None,
) -> dict[str, Any]:
    """Return the metrics of what a model writes or chooses."""
    data = loader.dataset
    found: dict[str, Any]
    if metric == CHOICE:
        prompts = [str(text) for text in data.texts]
        references = [[target] for target in data.targets]
        found, answers = choice_metrics(model, loader, progress)
    else:
        targets: dict[str, list[str]] = {}
        for text, target in zip(data.texts, data.targets, strict=True):
            targets.setdefault(str(text), []).append(target)
        prompts, references = list(targets), list(targets.values())
        answers = write(model, loader, prompts, generation, progress)
        scores = score_texts(answers, references, metric, meteor=meteor)
        found = {**scores, "examples": len(prompts)}
        if data.groups and metric in MEANS:
            group_of = dict(zip(map(str, data.texts), data.groups, strict=True))
            names = [group_of[prompt] for prompt in prompts]
            found["groups"] = score_groups(answers, references, names, metric)
    if predictions:
        found |= {"prompts": prompts, "references": references, "predictions": answers}
    return found
