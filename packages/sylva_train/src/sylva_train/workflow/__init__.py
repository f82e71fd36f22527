"""Whole jobs over files and folders: what the command line runs, as functions.

A fine-tuning is a folder: ``adapter/`` (PEFT's layout), ``masks.safetensors``,
``scores.safetensors`` where something was scored, ``checkpoints/`` while it runs, and
``sylva.json`` with the task, the options, the classes and, once it is done, the results.
"""

from .diagnosis import diagnose
from .finetuning import finetune
from .heads import heads
from .inspection import (
    describe_masks,
    describe_scores,
    kind_of,
    load_choice,
    mask_entries,
    score_entries,
)
from .outputs import check_file, check_folder, differences
from .prediction import predict, predict_file
from .runs import evaluate_folder, load_folder, merge_folder, read_run
from .scoring import examples_seen, score_file, score_task
from .task import (
    HELD_OUT,
    SCORED,
    Task,
    evaluated_on,
    evaluation_loader,
    load_task,
    located,
    words_of_cuts,
)

__all__ = [
    "HELD_OUT",
    "SCORED",
    "Task",
    "check_file",
    "check_folder",
    "describe_masks",
    "describe_scores",
    "diagnose",
    "differences",
    "evaluate_folder",
    "evaluated_on",
    "evaluation_loader",
    "examples_seen",
    "finetune",
    "heads",
    "kind_of",
    "load_choice",
    "load_folder",
    "load_task",
    "located",
    "mask_entries",
    "merge_folder",
    "predict",
    "predict_file",
    "read_run",
    "score_entries",
    "score_file",
    "score_task",
    "words_of_cuts",
]
