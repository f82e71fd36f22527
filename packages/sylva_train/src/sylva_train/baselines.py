"""What users would otherwise run: full fine-tuning, PEFT's methods, a pruner, a probe.

Each method turns a pretrained model into one whose trainable parameters are its own;
the training loop is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from ._checks import ConfigError, TargetError
from .config import CURVATURES, IMPORTANCES, SylvaConfig
from .importance import Scores, score
from .layers import embed
from .masks import LayerMask, Masks, select
from .targets import find_targets, matches, weight_view

__all__ = [
    "METHODS",
    "Adapted",
    "Method",
    "adapt",
    "lora_config",
    "parse_method",
    "probe",
    "prune",
    "shira_config",
    "supertuning_config",
]

RULE_LABELS = {
    "kfac-block": "K-FAC decrease of a block",
    "kfac-natural": "K-FAC natural gradient",
    "kfac-element": "K-FAC element by element",
    "fisher-diag": "diagonal Fisher",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "gradient": "gradient",
    "weight-gradient": "weight × gradient",
    "random": "random blocks",
}
CURVATURE_LABELS = {"mlr": "MLR", "hodlr": "HODLR", "dense": "exact factors"}

#: Every method, in the order of a full comparison.
METHODS = (
    "frozen",
    "full",
    "lora",
    "shira",
    "supertuning",
    "kfac-pruner",
    *(f"sylva:kfac:{curvature}" for curvature in CURVATURES),
    *(f"sylva:{rule}" for rule in RULE_LABELS),
)


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Parameters
    ----------
    name : str
        One of `METHODS`.
    label : str
        For people.
    rule, curvature : str or None
        Sylva's scoring rule, and how its Kronecker factors are kept.
    """

    name: str
    label: str
    rule: str | None = None
    curvature: str | None = None


def parse_method(name: str) -> Method:
    """Read a method's name: ``"full"``, ``"sylva:kfac"``, ``"sylva:kfac:dense"``, ...

    Raises
    ------
    ConfigError
        If there is no such method.
    """
    simple = {
        "frozen": "Frozen features + head",
        "full": "Full fine-tuning",
        "lora": "LoRA",
        "shira": "SHiRA, random weights",
        "supertuning": "Super-Tuning, largest weights",
        "kfac-pruner": "K-FAC pruner",
    }
    if name in simple:
        pruner = name == "kfac-pruner"
        return Method(name, simple[name], *(("kfac-pruner", "dense") if pruner else ()))
    kind, _, rest = name.partition(":")
    rule, _, curvature = rest.partition(":")
    known = rule in IMPORTANCES and rule != "kfac-pruner"
    if kind != "sylva" or not known or (curvature and rule != "kfac"):
        msg = f"`method` must be one of {', '.join(METHODS)}; got {name!r}."
        raise ConfigError(msg)
    if rule != "kfac":
        return Method(name, f"Sylva, {RULE_LABELS[rule]}", rule)
    curvature = curvature or CURVATURES[0]
    if curvature not in CURVATURES:
        msg = f"the curvature of `method` must be one of {CURVATURES}; got {name!r}."
        raise ConfigError(msg)
    label = f"Sylva, K-FAC ({CURVATURE_LABELS[curvature]})"
    return Method(f"sylva:kfac:{curvature}", label, rule, curvature)


@dataclass(frozen=True)
class Adapted:
    """A model made trainable by a method.

    Parameters
    ----------
    model : torch.nn.Module
        What to train: the parameters that require a gradient.
    scores, masks : Scores, Masks or None
        Where blocks were chosen.
    trainable, head : int
        Trainable weights of the backbone, and of the head beside them.
    """

    model: nn.Module
    scores: Scores | None
    masks: Masks | None
    trainable: int
    head: int


def lora_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
) -> peft.LoraConfig:
    """Return LoRA options with as many trainable weights as blocks of a density.

    Each layer gets rank ``density · in · out / (in + out)``, rounded, at least 1, and
    scale 2 (``lora_alpha = 2 r``); no dropout.
    """
    ranks = {}
    for name, module in targets.items():
        out, inputs = weight_view(module).shape
        ranks[name] = max(1, round(density * inputs * out / (inputs + out)))
    return peft.LoraConfig(
        r=1,
        lora_alpha=2,
        # PEFT reads the keys as patterns of whole names or endings.
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}": 2 * rank for name, rank in ranks.items()},
        target_modules=list(targets),
        modules_to_save=modules_to_save,
    )


def shira_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
    *,
    seed: int = 0,
) -> peft.ShiraConfig:
    """Return options of SHiRA with as many trainable weights as blocks of a density.

    Single weights at random (Bhardwaj et al. 2024); PEFT gives each layer ``r · (in +
    out)`` of them, with one ``r`` for all layers, which is rounded to at least 1.

    Raises
    ------
    TargetError
        If a layer is not one that PEFT's SHiRA knows.
    """
    check_linear("shira", targets)
    shapes = [weight_view(module).shape for module in targets.values()]
    r = density * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)
    # A small layer beside large ones has no room for the r of all.
    most = min(m * n // (m + n) for m, n in shapes)
    return peft.ShiraConfig(
        r=min(max(1, round(r)), most),
        random_seed=seed,
        target_modules=list(targets),
        modules_to_save=modules_to_save,
    )


def supertuning_config(
    targets: Mapping[str, nn.Module],
    density: float,
    modules_to_save: list[str] | None = None,
) -> peft.PeftConfig:
    """Return options of Super-Tuning with the largest weights of each layer, by number.

    Raises
    ------
    TargetError
        If a layer is not one that PEFT's Super-Tuning knows.
    """
    from peft.tuners import SupertuningConfig

    check_linear("supertuning", targets)
    return SupertuningConfig(
        sparsity=1 - density,
        target_modules=list(targets),
        modules_to_save=modules_to_save,
    )


def check_linear(method: str, targets: Mapping[str, nn.Module]) -> None:
    """Raise `TargetError` unless all layers are `torch.nn.Linear`."""
    other = {
        name: type(module).__name__
        for name, module in targets.items()
        if not isinstance(module, nn.Linear)
    }
    if other:
        name, kind = next(iter(other.items()))
        msg = (
            f"PEFT's {method} takes torch.nn.Linear layers alone; `{name}` is a {kind}."
            " Leave the method out of `methods`."
        )
        raise TargetError(msg)


@torch.no_grad()
def prune(model: nn.Module, masks: Mapping[str, LayerMask]) -> nn.Module:
    """Set every weight of the masked layers outside the blocks to zero, in place."""
    for name, mask in masks.items():
        weight = weight_view(model.get_submodule(name))
        weight.mul_(mask.dense().to(weight.device))
    return model


def adapt(
    method: Method,
    model: nn.Module,
    config: SylvaConfig,
    loader: Iterable[Mapping[str, Any]] | None = None,
    *,
    scores: Scores | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Adapted:
    """Make a pretrained model trainable by a method, in place.

    Parameters
    ----------
    method : Method
        From `parse_method`; ``"frozen"`` has nothing to train and is `probe`'s.
    model : torch.nn.Module
        The pretrained model.
    config : SylvaConfig
        Targets, density, block size, scoring options, modules to train whole.
    loader : iterable of batches, optional
        What to score with.
    scores : Scores, optional
        Computed before; nothing is scored then.
    progress : callable, optional
        Called with (samples scored, samples in all).

    Returns
    -------
    Adapted

    Raises
    ------
    ConfigError, TargetError, DataError, NonFiniteError
        As `sylva_train.score` and `sylva_train.select`.
    """
    masks = None
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    if method.name == "full":
        model.requires_grad_(True)
    elif method.name in {"lora", "shira", "supertuning"}:
        options: peft.PeftConfig
        budget = (targets, config.density, config.modules_to_save)
        if method.name == "lora":
            options = lora_config(*budget)
        elif method.name == "shira":
            options = shira_config(*budget, seed=config.seed)
            invariants = torch.sparse.check_sparse_tensor_invariants
            if not invariants.is_enabled():
                invariants.disable()  # as it is, but said: torch warns otherwise
        else:
            options = supertuning_config(*budget)
        # PEFT draws LoRA's first factors from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            model = peft.get_peft_model(model, options)
    elif method.rule is not None:
        scoring = replace(
            config,
            importance=method.rule,
            curvature=method.curvature or config.curvature,
        )
        if scores is None:
            scores = score(model, loader, scoring, progress=progress)
        masks = select(
            scores, config.density, config.block_size, config.scope, config.spread
        )
        if method.name == "kfac-pruner":
            prune(model, masks)
        embed(model, masks, modules_to_save=config.modules_to_save)
    else:
        msg = f"`method` {method.name!r} has nothing to train; see `probe`."
        raise ConfigError(msg)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(
        size for name, size in sizes.items() if is_head(name, config.modules_to_save)
    )
    trainable = masks.trainable if masks is not None else sum(sizes.values()) - head
    return Adapted(model, scores, masks, trainable, head)


def is_head(parameter: str, modules_to_save: list[str] | None) -> bool:
    """Whether a parameter belongs to a module that is trained whole."""
    parts = parameter.split(".")
    return any(
        matches(".".join(parts[:end]), modules_to_save) for end in range(1, len(parts))
    )


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    eval_features: np.ndarray,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, int]:
    """Fit the best linear head on frozen features.

    Logistic regression on standardised features, its regularisation chosen by 3-fold
    cross-validation: the strongest form of "frozen features + head", so that what
    fine-tuning adds is not overstated.

    Parameters
    ----------
    features : numpy.ndarray, shape (n, d)
        Of the training texts.
    labels : numpy.ndarray, shape (n,)
        Their classes.
    eval_features : numpy.ndarray, shape (m, d)
        Of the evaluation texts.
    seed : int
        Seed of the folds.

    Returns
    -------
    predictions : numpy.ndarray, shape (m,)
        Classes of the evaluation texts.
    trainable : int
        Weights of the head.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    head = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]},
        cv=StratifiedKFold(3, shuffle=True, random_state=seed),
    )
    # Its products are so small that BLAS threads cost ten times what they save.
    with threadpool_limits(1):
        head.fit(features, labels)
    model = head.best_estimator_[-1]
    return head.predict(eval_features), model.coef_.size + model.intercept_.size
