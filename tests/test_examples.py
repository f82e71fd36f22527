"""The example scripts and the README's blocks do what they say, at small sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--limit", "16", "--samples", "8", "--steps", "2"]
EXAMPLES = {
    "hmatrix_covariance.py": (["--n", "256"], "likelihood"),
    "finetune_minilm.py": (SMALL, "loaded again"),
    "pretrain_llama.py": (
        ["model", "--limit", "60", "--steps", "2", "--hidden", "32", "--layers", "1"],
        "saved to model",
    ),
    "peft_trainer.py": (SMALL, "largest difference after loading: 0.0"),
}
# What makes the README's blocks small enough to be run as tests.
SHRINK = {
    'load_data("e2e-rating")': 'load_data("e2e-rating", limit=16)',
    "samples=256": "samples=4, rank=4",
    "epochs=1": "steps=1",
    "(2000)": "(300)",
    "2000)": "300)",
}


def run(arguments, folder):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_blocks(path):
    return re.findall(
        r"^```python\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    arguments, said = EXAMPLES[name]
    assert said in run([ROOT / "examples" / name, *arguments], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "readme",
    ["README.md", "packages/sylva_train/README.md", "packages/hmatrix/README.md"],
)
def test_readme_blocks_run(readme, tmp_path):
    code = "\n".join(python_blocks(ROOT / readme))
    assert code
    for text, small in SHRINK.items():
        code = code.replace(text, small)
    script = tmp_path / "blocks.py"
    script.write_text(code, encoding="utf-8")
    run([script], tmp_path)
