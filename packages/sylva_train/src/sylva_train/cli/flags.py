"""Every option of the command line, written once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sylva_train.options import (
    CURVATURES,
    DTYPES,
    IMPORTANCES,
    METHODS,
    METRICS,
    SCHEDULES,
)

__all__ = ["FLAGS", "PANELS", "Flag"]

PANELS = (
    "Task", "Comparison", "What to train", "Scoring", "Training", "Seed and device",
    "Output",
)  # fmt: skip
TASK, COMPARISON, PARTS, SCORING, TRAINING, RUN, OUTPUT = PANELS


@dataclass(frozen=True)
class Flag:
    """A command-line option.

    Parameters
    ----------
    kind : type
        Of its value, where it is a field of a configuration.
    panel : str
        Group in the help.
    help : str
        What it is: unit and choices; the default is printed after it.
    names : tuple of str
        Its names, where they do not follow from the parameter's.
    metavar : str
        Stands for the value.
    """

    kind: Any
    panel: str
    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None

    def annotate(self, kind: Any = None, **extra: Any) -> Any:
        """Return the annotation of a parameter."""
        option = typer.Option(
            *self.names,
            help=self.help,
            rich_help_panel=self.panel,
            metavar=self.metavar,
            **extra,
        )
        return Annotated[self.kind if kind is None else kind, option]


def flag(kind: Any, panel: str, help: str, *names: str, metavar: str = "") -> Flag:
    """Write down an option."""
    # A switch takes no value; Typer would show one, <bool>.
    return Flag(kind, panel, help, names, metavar or (" " if kind is bool else None))


def either(choices: Collection[str]) -> str:
    """List choices."""
    return ", ".join(choices)


#: Fields of the configurations, and options that several commands have.
FLAGS: dict[str, Flag] = {
    "model": flag(
        str, TASK, "minilm, a folder, or a name on the hub.", metavar="NAME|DIR"
    ),
    "dtype": flag(
        str,
        TASK,
        f"Type of the model's weights: {either(DTYPES)} (the checkpoint's).",
        metavar="TYPE",
    ),
    "task": flag(
        str, TASK, "classification, regression, causal-lm or seq2seq.", metavar="TASK"
    ),
    "data": flag(
        str,
        TASK,
        "A built-in task (e2e-rating, e2e-nlg), a .csv, .tsv, .jsonl or .parquet file, a folder"
        " with a file a split, or a name for `datasets`.",
        metavar="DATA",
    ),
    "eval_data": flag(
        str | None,
        TASK,
        "The same to evaluate on; without it a split of the data, or a tenth of one file.",
        metavar="DATA",
    ),
    "eval_split": flag(
        str,
        TASK,
        "Split to evaluate on, where there are splits; held-out: a tenth of the training"
        " data.",
        metavar="SPLIT",
    ),
    "split": flag(
        str | None, TASK, "Split of the data, where it has splits.", metavar="SPLIT"
    ),
    "text_column": flag(
        str | None,
        TASK,
        "Column of the texts: name, or number from 0; two of them make pairs.",
        metavar="COLUMN",
    ),
    "label_column": flag(
        str | None, TASK, "Column of the labels or numbers, likewise.", metavar="COLUMN"
    ),
    "target_column": flag(
        str | None, TASK, "Column of the texts to generate, likewise.", metavar="COLUMN"
    ),
    "limit": flag(
        int | None, TASK, "Most examples to train on; all without it.", metavar="N"
    ),
    "eval_limit": flag(
        int | None, TASK, "Most examples to evaluate on; all without it.", metavar="N"
    ),
    "per_task": flag(
        int,
        TASK,
        "Most instances of each task of Super-NaturalInstructions.",
        metavar="N",
    ),
    "max_length": flag(
        int, TASK, "Length at which texts are cut, in tokens.", metavar="N"
    ),
    "pooling": flag(
        str, TASK, "How a classifier reads a text: auto, mean or native.", metavar="HOW"
    ),
    "metric": flag(
        str | None,
        TASK,
        f"Score to report: {either(METRICS)}; by default accuracy,"
        " pearson or perplexity.",
        metavar="METRIC",
    ),
    "max_new_tokens": flag(
        int,
        TASK,
        "Tokens of an answer at most, for the metrics of what a language model writes.",
        metavar="N",
    ),
    "num_beams": flag(
        int, TASK, "Beams that answers are searched with; 1: greedily.", metavar="N"
    ),
    "length_penalty": flag(
        float,
        TASK,
        "With beams: above 0 favours long answers, below 0 short ones.",
        metavar="X",
    ),
    "no_repeat_ngram_size": flag(
        int,
        TASK,
        "Tokens in a row that no answer may have twice; 0: no such rule.",
        metavar="N",
    ),
    "target_modules": flag(
        str,
        PARTS,
        "Layers that may be trained: all-linear, names or endings of names with commas"
        " between them, or a regular expression.",
        metavar="NAMES",
    ),
    "exclude_modules": flag(
        str | None, PARTS, "Layers to leave out, likewise.", metavar="NAMES"
    ),
    "modules_to_save": flag(
        str | None,
        PARTS,
        "Modules to train whole; by default a classifier's new head.",
        metavar="NAMES",
    ),
    "density": flag(
        float,
        PARTS,
        "Fraction of the blocks to train, above 0, at most 1.",
        metavar="X",
    ),
    "sparsity": flag(
        float | None,
        PARTS,
        "The same as the fraction not to train: 1 - density.",
        metavar="X",
    ),
    "block_size": flag(int, PARTS, "Side of a block, in weights.", metavar="N"),
    "scope": flag(
        str,
        PARTS,
        "Blocks compete within each layer, or across the model by scores relative to"
        " their layer's mean or as they are: layer, model, absolute.",
        metavar="SCOPE",
    ),
    "max_columns": flag(
        float,
        PARTS,
        "Fraction of a layer's block columns that may have blocks, at least the density;"
        " less keeps less of the activations.",
        metavar="X",
    ),
    "allocation": flag(
        float | None,
        PARTS,
        "Power of a layer's mean score that its density is proportional to; 0: the same"
        " for all layers; what suits the rule without it.",
        metavar="X",
    ),
    "spread": flag(
        float | None,
        PARTS,
        "How many times its share of the blocks a row or column may have; 0: no limit;"
        " what suits the rule without it.",
        metavar="X",
    ),
    "importance": flag(str, SCORING, f"Rule: {either(IMPORTANCES)}.", metavar="RULE"),
    "curvature": flag(
        str,
        SCORING,
        f"Factors of the kfac rules: {either(CURVATURES)} (exact).",
        metavar="KIND",
    ),
    "levels": flag(int, SCORING, "Depth of the factors' hierarchy.", metavar="N"),
    "rank": flag(int, SCORING, "Rank of the factors' blocks.", metavar="N"),
    "exact_below": flag(
        int, SCORING, "Size below which a factor is kept exactly.", metavar="N"
    ),
    "samples": flag(int, SCORING, "Examples to score with.", metavar="N"),
    "tokens": flag(
        str,
        SCORING,
        "A sample is each token (expand) or a text's mean (reduce).",
        metavar="HOW",
    ),
    "damping": flag(
        float,
        SCORING,
        "Added to a factor's diagonal, in units of its mean eigenvalue.",
        metavar="X",
    ),
    "memory_budget": flag(
        str | None,
        SCORING,
        "Most memory for the layers' statistics, like 20GB: more passes over the data.",
        metavar="SIZE",
    ),
    "host_budget": flag(
        str | None,
        SCORING,
        "Most main memory for gradients, like 64GB, where --memory-budget is too small for"
        " them on a GPU: fewer passes.",
        metavar="SIZE",
    ),
    "checkpoint_minutes": flag(
        float,
        SCORING,
        "Minutes between savings of unfinished scoring, for --resume.",
        metavar="X",
    ),
    "epochs": flag(int, TRAINING, "Passes over the data.", metavar="N"),
    "steps": flag(
        int | None, TRAINING, "Optimizer steps in all, instead of epochs.", metavar="N"
    ),
    "batch_size": flag(int, TRAINING, "Examples in a batch.", metavar="N"),
    "bucket": flag(
        int, TRAINING, "Batches filled by length together; 0: none.", metavar="N"
    ),
    "accumulate": flag(int, TRAINING, "Batches in an optimizer step.", metavar="N"),
    "lr": flag(float, TRAINING, "Peak learning rate.", metavar="X"),
    "weight_decay": flag(float, TRAINING, "Decoupled weight decay.", metavar="X"),
    "warmup": flag(
        float, TRAINING, "Fraction of the steps in which the rate rises.", metavar="X"
    ),
    "schedule": flag(
        str,
        TRAINING,
        f"The rate's course after that: {either(SCHEDULES)}.",
        metavar="NAME",
    ),
    "max_grad_norm": flag(
        float, TRAINING, "Norm at which gradients are clipped; 0: never.", metavar="X"
    ),
    "eval_every": flag(
        int | None,
        TRAINING,
        "Steps between evaluations; without it, at the end only.",
        metavar="N",
    ),
    "save_every": flag(
        int | None,
        TRAINING,
        "Steps between checkpoints; without it, after each epoch.",
        metavar="N",
    ),
    "seed": flag(
        int, RUN, "Seed of the head, the order, dropout and samples.", metavar="N"
    ),
    "device": flag(
        str,
        RUN,
        "auto (CUDA if there is one), cpu, cuda or cuda:N.",
        metavar="NAME",
    ),
    "methods": flag(
        str,
        COMPARISON,
        f"With commas between them, out of {either(METHODS)}.",
        metavar="NAMES",
    ),
    "seeds": flag(str, COMPARISON, "Seeds to run each method with.", metavar="N,N,…"),
    "learning_rates": flag(
        str | None,
        COMPARISON,
        "Peak learning rates, like full=2e-4,sylva=1e-3, instead of the tuned ones.",
        metavar="M=X,…",
    ),
    "configs": flag(
        str,
        COMPARISON,
        "Models and tasks: configurations of the package (`sylva configs`) or files, with"
        " commas between them.",
        metavar="NAME,…",
    ),
    "values": flag(
        str | None,
        COMPARISON,
        "Values of the option that the table varies, instead of the paper's.",
        metavar="V,V,…",
    ),
    "tune": flag(
        str | None,
        COMPARISON,
        "Multiples of each method's learning rate to choose the best of, like 0.3,1,3,"
        " on a tenth of the training data.",
        metavar="X,X,…",
    ),
    "scale": flag(
        str,
        COMPARISON,
        "Of table2, fig4 and fig5: small (a CPU, minutes) or paper (its sizes, on GPUs).",
        metavar="SCALE",
    ),
    "workers": flag(
        int,
        COMPARISON,
        "Runs at a time, which share the cores: sooner done, but times say little.",
        metavar="N",
    ),
    "masks": flag(
        Path | None, PARTS, "Train these blocks: a file of masks.", metavar="FILE"
    ),
    "scores": flag(
        Path | None,
        PARTS,
        "Choose blocks by these: a file of sylva score.",
        metavar="FILE",
    ),
    "against": flag(
        Path | None,
        COMPARISON,
        "Scores or masks to hold it against, or the folder of a fine-tuning: how far the"
        " two agree.",
        metavar="FILE|DIR",
    ),
    "report_only": flag(
        bool, OUTPUT, "Only write report and table of finished runs.", "--report-only"
    ),
    "resume": flag(
        bool, OUTPUT, "Go on with an interrupted job of the same options.", "--resume"
    ),
    "overwrite": flag(bool, OUTPUT, "Replace an output that exists.", "--overwrite"),
    "draw": flag(
        Path | None,
        OUTPUT,
        "Draw the blocks and their scores as a page of HTML.",
        metavar="FILE",
    ),
    "answers": flag(
        Path | None,
        OUTPUT,
        "Write prompts, references and answers to this file, a line of JSON each.",
        metavar="FILE",
    ),
    "out": flag(
        Path | None,
        OUTPUT,
        "Write the rows with their predictions to this file, .jsonl or .csv; without it"
        " they are printed, a line of JSON each.",
        metavar="FILE",
    ),
    "json": flag(bool, OUTPUT, "Print JSON.", "--json"),
    "quiet": flag(bool, OUTPUT, "Show no progress.", "--quiet", "-q"),
    "config_file": flag(
        str | None,
        OUTPUT,
        "A configuration that sylva configs lists, or a .yaml, .toml or .json file with"
        " such sections or with names of flags; those on the command line win.",
        "--config",
        metavar="NAME|FILE",
    ),
    "debug": flag(bool, OUTPUT, "Show where an error arose.", "--debug"),
}
