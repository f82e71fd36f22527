"""The command line answers at once where nothing is computed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "matplotlib",
    "sklearn",
    "scipy",
}
WATCHED = f"""
import sys, sylva_command
try:
    sylva_command.main()
finally:
    print("imported", *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["finetune", "--help"], 0),
        (["compare", "--help"], 0),
        (["demo", "--help"], 0),
        (["reproduce", "--help"], 0),
        (["configs", "minilm-e2e-rating"], 0),
        (["finetune", "run", "--densty", "0.5"], 2),
        (["finetune", "run", "--density", "7"], 2),
        (["score", "scores.safetensors", "--config", "unknown"], 2),
    ],
)
def test_help_and_errors_of_options_import_nothing_slow(arguments, code, tmp_path):
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "imported"


def test_the_package_has_everything_and_registers_its_tuner():
    code = """
import sylva_train
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
assert "SYLVA" in PEFT_TYPE_TO_TUNER_MAPPING
assert all(hasattr(sylva_train, name) for name in sylva_train.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
