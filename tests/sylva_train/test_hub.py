"""Models and data by their name on a hub: fetched once, and there without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from sylva_train import SylvaConfig, inspect_adapter, predict
from tests.sylva_train.hub import COMMIT, serving
from tests.sylva_train.jobs import SHORT, write_data
from tests.sylva_train.models import make_model
from tests.sylva_train.words import save_folder

MODEL = "models/org/tiny"
TEXTS = ["a b good", "c d bad"]
QUICK = (*SHORT, "--max-length", 16, "--quiet")
JSON = ("--json", "--quiet")
COMMAND = "from sylva_command import main; main()"
PREDICT = f"""
import json, sys, sylva_train
print(json.dumps(sylva_train.predict(sys.argv[1], {TEXTS})))
"""
LOAD = """
import json, sys
import peft, torch, transformers
import sylva_train
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.resize_token_embeddings(44)
model = peft.PeftModel.from_pretrained(model, "org/adapter")
print(json.dumps(model(torch.arange(44)[None]).logits.tolist()))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path) -> Path:
    """What is on the hub: a model, and data with three splits."""
    save_folder(tmp_path / "hub" / MODEL)
    rows = tmp_path / "hub/datasets/org/rows"
    rows.mkdir(parents=True)
    for seed, split in enumerate(("train", "validation", "test")):
        write_data(rows / f"{split}.jsonl", seed=seed)
    return tmp_path / "hub"


def python(code: str, *arguments, home: Path, **variables: str) -> str:
    """Run Python in a process that reads its own HF_* variables, and return stdout."""
    # A proxy would be asked for this machine's hub.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
        and not name.lower().endswith("_proxy")
    }
    # The download counter of `datasets` is elsewhere on the network.
    fixed = {"HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=kept | fixed | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "HF_HUB_OFFLINE" not in variables:  # where `datasets` says that it is its cache
        assert not done.stderr, "no progress and no warnings"
    return done.stdout


def tuned(run: Path) -> dict:
    return json.loads((run / "sylva.json").read_text())


def test_a_model_of_the_hub_is_tuned_and_found_again(tmp_path, root):
    run, home = tmp_path / "run", tmp_path / "cache"
    data = write_data(tmp_path / "train.jsonl")
    with serving(root) as hub:
        online = {"home": home, "HF_ENDPOINT": hub.address}
        options = ["--model", "org/tiny", "--data", data, *QUICK]
        python(COMMAND, "finetune", run, *options, **online)
        asked = [path.removeprefix("/org/tiny/resolve/") for path in hub.asked]
        # By the commit or, in transformers 5.17, by the branch.
        assert {f"{COMMIT}/model.safetensors", "main/model.safetensors"} & set(asked)
        found = json.loads(python(COMMAND, "evaluate", run, *JSON, **online))
    assert found["score"] == tuned(run)["metrics"]["score"]
    assert inspect_adapter(run / "adapter")["base"]["name"] == "org/tiny"
    # The hub is gone; what was fetched is not.
    answers = json.loads(python(PREDICT, run, **online, HF_HUB_OFFLINE="1"))
    assert answers == [list(pair) for pair in predict(run, TEXTS, base=root / MODEL)]


def test_an_adapter_of_the_hub_brings_resized_embeddings(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)  # new rows are random
    options = SylvaConfig(importance="random", density=0.2, block_size=8)
    model = peft.get_peft_model(model, options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says that it adds them
        model.save_pretrained(tmp_path / "hub/models/org/adapter")
    quiet = {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with serving(tmp_path / "hub") as hub:
        online = {"home": tmp_path / "cache", "HF_ENDPOINT": hub.address, **quiet}
        found = python(LOAD, tmp_path / "base", **online)
    expected = model(torch.arange(44)[None]).logits
    assert torch.allclose(torch.tensor(json.loads(found)), expected)
    assert python(LOAD, tmp_path / "base", **online, HF_HUB_OFFLINE="1") == found


def test_data_of_the_hub_is_read_and_found_again(tmp_path, root):
    pytest.importorskip("datasets")
    run, home = tmp_path / "run", tmp_path / "cache"
    with serving(root) as hub:
        online = {"home": home, "HF_ENDPOINT": hub.address}
        options = ["--model", "org/tiny", "--data", "org/rows", *QUICK]
        python(COMMAND, "finetune", run, *options, **online)
        assert f"/datasets/org/rows/resolve/{COMMIT}/train.jsonl" in hub.asked
    assert tuned(run)["task"]["data"] == "org/rows"
    offline = online | {"HF_HUB_OFFLINE": "1"}
    found = json.loads(python(COMMAND, "evaluate", run, *JSON, **offline))
    assert found["data"] == "org/rows[validation]"
    assert found["score"] == tuned(run)["metrics"]["score"]
