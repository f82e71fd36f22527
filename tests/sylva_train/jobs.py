"""Small jobs on disk: a tiny model, data of a few words, and the command line."""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from typer.testing import CliRunner, Result

from sylva_train.cli import app
from sylva_train.config import SylvaConfig, TaskConfig, TrainingConfig

from .words import save_folder

#: Options of a job that takes no time.
SMALL = ("--block-size", "8", "--importance", "magnitude")
STEPS = ("--steps", "4", "--lr", "0.01", "--batch-size", "8")
SHORT = (*SMALL, "--density", "0.2", *STEPS)


def new_home(factory) -> Path:
    """Make a folder with a small model and data, of pytest's ``tmp_path_factory``."""
    path = factory.mktemp("home")
    save_folder(path / "model")
    write_data(path / "train.jsonl")
    return path


def write_data(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Sentences of three letters and a word that tells their label."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("bad", "good")[number % 2]
        letters = [choose.choice("abcdefgh") for _ in range(3)]
        rows.append({"text": " ".join([*letters, label]), "label": label})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_pairs(path: Path, count: int = 24) -> Path:
    """Pairs of letters and how many of them two sentences share."""
    choose = random.Random(0)
    rows = []
    for _ in range(count):
        one, two = choose.choices("abcdef", k=3), choose.choices("abcdef", k=3)
        near = len(set(one) & set(two)) + 0.25
        rows.append({"one": " ".join(one), "two": " ".join(two), "score": near})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def mmlu_rows(subject: str, split: str, count: int) -> list[list[str]]:
    """Questions with commas, quotes and a line break in their options."""
    return [
        [f"{subject} {split} {n}?", "w, x", 'a "y"', "z", "1\n2", "ABCD"[n % 4]]
        for n in range(count)
    ]


def write_mmlu(
    folder: Path, subjects=("high_school_art", "law"), dev=6, test=2
) -> Path:
    """Write MMLU's folders."""
    for split, count in (("dev", dev), ("val", 1), ("test", test)):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            path = folder / split / f"{subject}_{split}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(mmlu_rows(subject, split, count))
    return folder


def task(home: Path, **options) -> TaskConfig:
    values = {"model": str(home / "model"), "data": str(home / "train.jsonl")}
    return TaskConfig(**(values | {"max_length": 16} | options))


def sylva_config(**options) -> SylvaConfig:
    values = {"block_size": 8, "density": 0.2, "importance": "magnitude"}
    return SylvaConfig(**(values | options))


def training(**options) -> TrainingConfig:
    return TrainingConfig(**({"steps": 4, "batch_size": 8, "lr": 0.01} | options))


def sylva(*arguments, code: int = 0, trace: bool = False) -> Result:
    """Run a command in this process, and check how it ends."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(
        app, [str(argument) for argument in arguments]
    )
    assert result.exit_code == code, result.output
    if code and not trace:
        # Nothing but the message, which is one line.
        assert "Traceback" not in result.output
    return result


def told(result: Result) -> str:
    """The one line that an error is."""
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start_process(*arguments) -> subprocess.Popen:
    """Run a command in a process of its own."""
    code = "from sylva_command import main; main()"
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(process: subprocess.Popen, condition, seconds: float = 240) -> None:
    """Kill a process without warning as soon as a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)
    process.kill()
    process.wait()


def source(home: Path, data: str = "train.jsonl") -> list:
    return ["--model", home / "model", "--data", home / data, "--max-length", 16]


def run_here(done: list):
    """What starts jobs in this process, which a process of its own takes seconds to.

    Adds them to a list.
    """

    def start(job, output: Path, tell, _) -> dict:
        done.append(job)
        path, spec_path = job.files(output)
        spec_path.write_text(json.dumps(job.spec))
        module, _, name = job.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        row = json.loads(json.dumps(function(job.spec, tell)))
        path.write_text(json.dumps(row))
        return row

    return start


def children(text: str) -> list[int]:
    """Processes whose command line has a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found
