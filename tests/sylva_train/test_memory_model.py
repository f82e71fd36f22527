"""The memory model of the benchmarks against what a small model holds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_memory")
    monkeypatch.setattr(module, "BLOCK", 8)
    yield module
    for name in ("bench_memory", "_common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("key_heads", "tied"), [(2, False), (1, True)])
def test_the_memory_model_is_within_five_percent(bench, key_heads, tied):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )
    rows = bench.compare(config, 48, [0.1])
    assert len(rows) == 10
    for row in rows:
        for key in ("model over measured", "model over measured, activations"):
            assert row[key] == pytest.approx(1, abs=0.05)
    kept = {(r["method"], r["checkpointing"]): r["activations"] for r in rows}
    for checkpointing in (False, True):
        few, plain, lora = (
            kept[name, checkpointing]
            for name in ("Sylva, few columns", "Sylva", "LoRA, bfloat16")
        )
        assert few < plain <= lora
