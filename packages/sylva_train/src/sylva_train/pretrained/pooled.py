"""A classifier on the mean of a pretrained model's last hidden states."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sylva_train._files import write_text
from sylva_train._torch import preserved_modes
from sylva_train.data import Loader
from sylva_train.progress import Report

from .sources import gguf_config, place

__all__ = [
    "PooledClassifier",
    "backbone_class",
    "mean_pool",
    "pooled_features",
    "read_config",
]

#: Stands before the backbone's ``model_type`` in a saved classifier's ``config.json``.
SAVED = "sylva-pooled-"


def mean_pool(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean of the hidden states over the tokens that are not padding.

    Parameters
    ----------
    hidden : torch.Tensor, shape (batch, length, width)
        Last hidden states.
    attention_mask : torch.Tensor, shape (batch, length), optional
        1 for tokens, 0 for padding.

    Returns
    -------
    torch.Tensor, shape (batch, width)
        In the type of ``hidden``; sums are float32 at least.
    """
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    if attention_mask is None:
        return wide.mean(1).to(hidden.dtype)
    mask = attention_mask.unsqueeze(-1).to(wide.dtype)
    # A row of nothing but padding has the mean 0, not 0 / 0.
    return ((wide * mask).sum(1) / mask.sum(1).clamp_min(1)).to(hidden.dtype)


def backbone_class(config: Any) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """Return the class of a bare encoder or decoder, and arguments to build it with."""
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))
    # BERT's pooler would be trained by nobody, and is not what is pooled here.
    has_pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return kind, {"add_pooling_layer": False} if has_pooler else {}


def read_config(source: str) -> Any:
    """Return a model's configuration; that of a saved `PooledClassifier` too."""
    if place(source)[1]:
        return gguf_config(source)
    fields, _ = PreTrainedConfig.get_config_dict(source)
    kind = str(fields.get("model_type", ""))
    if not kind.startswith(SAVED):
        return AutoConfig.from_pretrained(source)
    fields["model_type"] = kind.removeprefix(SAVED)
    return AutoConfig.for_model(**fields)


class PooledClassifier(PreTrainedModel):
    """A bare pretrained model, the mean of its hidden states, and a linear head.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The backbone's; ``num_labels`` is the head's.
    backbone : transformers.PreTrainedModel, optional
        The pretrained model; without it, one with random weights.

    Notes
    -----
    The pooling of sentence-transformers (Reimers and Gurevych 2019), which the MiniLM
    encoders were trained with. The head, ``classifier``, has no dropout before it. Every
    parameter of the backbone's layers gets a gradient: there is no unused pooler.

    `sylva_train.load_model` loads a saved one. Classes of `transformers` refuse it: they
    know no pooling by the mean, and would take random weights for its own.
    """

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    #: The loss is a batch's mean: Trainer is to divide it by the batches of a step.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any, backbone: PreTrainedModel | None = None) -> None:
        # First the backbone: which attention it has, eager alone in MPNet and DeBERTa, it
        # writes to the configuration, where this class would ask for another one.
        if backbone is None:
            kind, options = backbone_class(config)
            backbone = kind(config, **options)
        super().__init__(config)
        self.backbone = backbone
        self.num_labels = config.num_labels
        width = backbone.get_input_embeddings().weight
        self.classifier = nn.Linear(
            config.hidden_size,
            config.num_labels,
            device=width.device,
            dtype=width.dtype,
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> None:
        """Write weights and configuration as `transformers` does, under another type.

        Parameters
        ----------
        save_directory : path
            The folder.
        *args, **options
            Those of `transformers.PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **options)
        path = Path(save_directory) / "config.json"
        if path.exists():  # only the main process writes it
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["model_type"] = SAVED + self.config.model_type
            write_text(path, json.dumps(fields, indent=2))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits, and with labels the mean loss.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids : torch.Tensor, shape (batch, length)
            From the tokenizer.
        labels : torch.Tensor, shape (batch,)
            Classes (int64) for the cross-entropy; where ``config.problem_type`` is
            ``"regression"``, numbers for the squared error.
        **kwargs
            What else the backbone takes (``inputs_embeds``, ``output_attentions``, ...).

        Returns
        -------
        transformers.modeling_outputs.SequenceClassifierOutput
            ``logits`` of shape (batch, classes) and ``loss`` in float32.
        """
        kwargs.pop("return_dict", None)
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(mean_pool(output.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            if self.config.problem_type == "regression":
                loss = F.mse_loss(logits.float().squeeze(-1), labels.float())
            else:
                loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


@torch.no_grad()
def pooled_features(
    model: nn.Module, loader: Loader, *, progress: Report | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a frozen backbone knows of each text: its mean hidden state.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A classifier; its head is not used.
    loader : Loader
        The texts.
    progress : callable, optional
        Called with (batches done, batches in all).

    Returns
    -------
    features : numpy.ndarray, shape (n, width), float32
        In the order of the data set.
    labels : numpy.ndarray, shape (n,)
        Classes (int64) or numbers (float32).
    """
    backbone = cast(nn.Module, model.base_model)
    device = next(model.parameters()).device
    rows, labels = [], []
    with preserved_modes(model):
        model.eval()
        for batch in loader:
            inputs = {n: t.to(device) for n, t in batch.items() if n != "labels"}
            hidden = backbone(**inputs).last_hidden_state
            pooled = mean_pool(hidden, inputs["attention_mask"])
            rows.append(pooled.float().cpu())
            labels.append(batch["labels"])
            if progress is not None:
                progress(len(rows), len(loader))
    order = loader.positions()
    return torch.cat(rows)[order].numpy(), torch.cat(labels)[order].numpy()
