"""Every option of the command line, written once."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

from sylva_train.metrics import METRICS
from sylva_train.options import CURVATURES, DTYPES, IMPORTANCES, METHODS, SCHEDULES

__all__ = ["FLAGS", "annotated"]

either = ", ".join


class Flag(NamedTuple):
    """What the help says of an option, but for its default.

    Parameters
    ----------
    metavar : str
        Stands for the value; empty for a switch.
    help : str
        What it is: unit and choices.
    """

    metavar: str
    help: str


#: The options by their parameters, in the groups and the order of the help.
PANELS = {
    "Task": {
        "model": Flag(
            "NAME|PATH", "minilm, a folder, a GGUF file, or a name on the hub."
        ),
        "base": Flag(
            "NAME|PATH",
            "Where the run's base model is now, if it is not where it was.",
        ),
        "dtype": Flag(
            "TYPE", f"Type of the model's weights: {either(DTYPES)} (the checkpoint's)."
        ),
        "task": Flag("TASK", "classification, regression, causal-lm or seq2seq."),
        "data": Flag(
            "DATA",
            "A built-in task (e2e-rating, e2e-nlg), a .csv, .tsv, .jsonl or .parquet"
            " file, a folder with a file a split, or a name for `datasets`.",
        ),
        "eval_data": Flag(
            "DATA",
            "The same to evaluate on; without it a split of the data, or a tenth of"
            " one file.",
        ),
        "eval_split": Flag(
            "SPLIT",
            "Split to evaluate on, where there are splits; held-out: a tenth of the"
            " training data.",
        ),
        "split": Flag("SPLIT", "Split of the data, where it has splits."),
        "text_column": Flag(
            "COLUMN",
            "Column of the texts: name, or number from 0; two of them make pairs.",
        ),
        "label_column": Flag("COLUMN", "Column of the labels or numbers, likewise."),
        "target_column": Flag("COLUMN", "Column of the texts to generate, likewise."),
        "limit": Flag("N", "Most examples to train on; all without it."),
        "eval_limit": Flag("N", "Most examples to evaluate on; all without it."),
        "per_task": Flag(
            "N", "Most instances of each task of Super-NaturalInstructions."
        ),
        "max_length": Flag("N", "Length at which texts are cut, in tokens."),
        "pooling": Flag(
            "HOW",
            "How a classifier reads a text: by the mean of its tokens (mean), in the"
            " model's own way (native), or what suits the model (auto).",
        ),
        "metric": Flag(
            "METRIC",
            f"Score to report: {either(METRICS)}; by default accuracy,"
            " pearson or perplexity.",
        ),
        "meteor": Flag(
            "",
            "With another metric of what a language model writes METEOR too, by Java.",
        ),
        "max_new_tokens": Flag(
            "N",
            "Most tokens of an answer, where a language model writes one.",
        ),
        "num_beams": Flag("N", "Beams that answers are searched with; 1: greedily."),
        "length_penalty": Flag(
            "X", "With beams: above 0 favours long answers, below 0 short ones."
        ),
        "no_repeat_ngram_size": Flag(
            "N", "Tokens in a row that no answer may have twice; 0: no such rule."
        ),
    },
    "Comparison": {
        "methods": Flag(
            "NAMES",
            f"With commas between them, out of {either(METHODS)}. Without it compare"
            " runs all of them, and reproduce the table's.",
        ),
        "seeds": Flag("N,N,…", "Seeds to run each method with."),
        "learning_rates": Flag(
            "M=X,…",
            "Peak learning rates, like full=2e-4,sylva=1e-3, instead of MiniLM's.",
        ),
        "configs": Flag(
            "NAME,…",
            "Models and tasks: configurations of the package (`sylva configs`) or"
            " files, with commas between them.",
        ),
        "values": Flag(
            "V,V,…",
            "Values of the option that the table varies, instead of the paper's.",
        ),
        "tune": Flag(
            "X,X,…",
            "Multiples of each method's learning rate to choose the best of, like"
            " 0.3,1,3, on a tenth of the training data.",
        ),
        "scale": Flag(
            "SCALE",
            "Of table2, fig4 and fig5: small (a CPU, minutes) or paper (its sizes, on"
            " GPUs).",
        ),
        "workers": Flag(
            "N",
            "Runs at a time, which share the cores: sooner done, but times say little.",
        ),
        "against": Flag(
            "FILE|DIR",
            "Scores or masks to hold it against, or the folder of a fine-tuning: how"
            " far the two agree.",
        ),
    },
    "What to train": {
        "target_modules": Flag(
            "NAMES",
            "Layers that may be trained: all-linear, names or endings of names with"
            " commas between them, or a regular expression.",
        ),
        "exclude_modules": Flag("NAMES", "Layers to leave out, likewise."),
        "modules_to_save": Flag(
            "NAMES", "Modules to train whole; by default a classifier's new head."
        ),
        "density": Flag("X", "Fraction of the blocks to train, above 0, at most 1."),
        "sparsity": Flag("X", "The same as the fraction not to train: 1 - density."),
        "block_size": Flag("N", "Side of a block, in weights."),
        "scope": Flag(
            "SCOPE",
            "Blocks compete within each layer, or across the model by scores relative"
            " to their layer's mean or as they are: layer, model, absolute.",
        ),
        "max_columns": Flag(
            "X",
            "Fraction of a layer's block columns that may have blocks, at least the"
            " density; less keeps less of the activations.",
        ),
        "allocation": Flag(
            "X",
            "Power of a layer's mean score that its density is proportional to; 0:"
            " the same for all layers. Without it 4 for kfac-natural and kfac-block, 0"
            " for others.",
        ),
        "spread": Flag(
            "X",
            "How many times its share of the blocks a row or column may have, at least"
            " 1; 0: no limit. Without it 1 for kfac-natural and kfac-block, 0 for"
            " others.",
        ),
        "masks": Flag("FILE", "Train these blocks: a file of masks."),
        "scores": Flag("FILE", "Choose blocks by these: a file of sylva score."),
    },
    "Scoring": {
        "importance": Flag(
            "RULE", f"Rule that scores the weights: {either(IMPORTANCES)}."
        ),
        "curvature": Flag(
            "KIND",
            "Form of the Kronecker factors of the kfac rules:"
            f" {either(CURVATURES)} (exact).",
        ),
        "levels": Flag("N", "Depth of the factors' hierarchy."),
        "rank": Flag("N", "Rank of the factors' blocks."),
        "exact_below": Flag("N", "Size below which a factor is kept exactly."),
        "samples": Flag(
            "N",
            "Examples to score with; without it a thirtieth of those that the training"
            " sees, 128 to 1024 of them, and 1024 in sylva score.",
        ),
        "tokens": Flag(
            "HOW", "A sample is each token (expand) or a text's mean (reduce)."
        ),
        "damping": Flag(
            "X", "Added to a factor's diagonal, in units of its mean eigenvalue."
        ),
        "memory_budget": Flag(
            "SIZE",
            "Most memory for the layers' statistics, like 20GB: more passes over the"
            " data.",
        ),
        "host_budget": Flag(
            "SIZE",
            "Most main memory for gradients, like 64GB, where --memory-budget is too"
            " small for them on a GPU: fewer passes.",
        ),
        "checkpoint_minutes": Flag(
            "X", "Minutes between savings of unfinished scoring, for --resume."
        ),
    },
    "Training": {
        "epochs": Flag("N", "Passes over the data."),
        "steps": Flag("N", "Optimizer steps in all, instead of epochs."),
        "batch_size": Flag("N", "Examples in a batch."),
        "bucket": Flag(
            "N", "Batches filled together by length, to pad less; 0: by chance."
        ),
        "accumulate": Flag("N", "Batches in an optimizer step."),
        "lr": Flag("X", "Peak learning rate."),
        "weight_decay": Flag("X", "Decoupled weight decay."),
        "warmup": Flag("X", "Fraction of the steps in which the rate rises."),
        "schedule": Flag("NAME", f"The rate's course after that: {either(SCHEDULES)}."),
        "max_grad_norm": Flag("X", "Norm at which gradients are clipped; 0: never."),
        "eval_every": Flag(
            "N", "Steps between evaluations; without it, at the end only."
        ),
        "save_every": Flag(
            "N", "Steps between checkpoints; without it, after each epoch."
        ),
    },
    "Seed and device": {
        "seed": Flag("N", "Seed of the head, the order, dropout and samples."),
        "device": Flag("NAME", "auto (CUDA if there is one), cpu, cuda or cuda:N."),
    },
    "Output": {
        "report_only": Flag("", "Only write report and table of finished runs."),
        "resume": Flag("", "Go on with an interrupted job of the same options."),
        "overwrite": Flag("", "Replace an output that exists."),
        "draw": Flag("FILE", "Draw the blocks and their scores as a page of HTML."),
        "answers": Flag(
            "FILE",
            "Write prompts, references and answers to this file, a line of JSON each.",
        ),
        "out": Flag(
            "FILE",
            "Write the rows with their predictions to this file, .jsonl or .csv;"
            " without it they are printed, a line of JSON each.",
        ),
        "json": Flag("", "Print JSON."),
        "quiet": Flag("", "Show no progress."),
        "config_file": Flag(
            "NAME|FILE",
            "A configuration that sylva configs lists, or a .yaml, .toml or .json"
            " file with such sections or with names of flags; those on the command"
            " line win.",
        ),
        "debug": Flag("", "Show where an error arose."),
    },
}

#: By parameter, its group and what is said of it, in the order of the help.
FLAGS = {
    name: (panel, flag)
    for panel, flags in PANELS.items()
    for name, flag in flags.items()
}
#: Names of options that do not follow from the parameter's.
NAMES = {
    "base": ("--model",),
    "config_file": ("--config",),
    "quiet": ("--quiet", "-q"),
}


def annotated(name: str, kind: Any, **extra: Any) -> Any:
    """Return the annotation of a parameter of a type; ``extra`` is Typer's."""
    panel, flag = FLAGS[name]
    # A switch has one name: Typer would add another one that turns it off.
    switch = () if flag.metavar else (f"--{name.replace('_', '-')}",)
    option = typer.Option(
        *NAMES.get(name, switch),
        help=flag.help,
        rich_help_panel=panel,
        # Without one, Typer would show a switch to take a value, <bool>.
        metavar=flag.metavar or " ",
        **extra,
    )
    return Annotated[kind, option]
