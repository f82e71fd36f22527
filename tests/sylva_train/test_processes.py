"""Several processes score together: the scores of one, the same masks in each."""

from __future__ import annotations

import faulthandler
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sylva_train.importance import Scores, score
from sylva_train.selection import select
from tests.sylva_train.models import make_batch, make_model
from tests.sylva_train.test_passes import config, smallest_budget

FULL = {"rank": 28, "damping": 0.1}


def batches(name, count):
    return [make_batch(name, seed) for seed in range(count)]


def run(rank, name, count, options, *, extra):
    """Score in one process of a group."""
    given = batches(name, count)
    if extra.get("own batches") == rank:
        given.reverse()
    if extra.get("damaged") == rank:
        given[rank]["labels"] = given[rank]["labels"] + 100  # its first batch
    told = []

    def progress(*_):
        told.append(1)
        if len(told) == extra.get("stop"):
            raise InterruptedError

    full = OSError(28, "No space left on device") if extra.get("full") else None
    with mock.patch.object(Scores, "save", side_effect=full) if full else nullcontext():
        scores = score(
            make_model(name), given, config(samples=3 * count, **options),
            checkpoint=extra.get("checkpoint"), checkpoint_minutes=0.0, progress=progress,
        )  # fmt: skip
    return dict(scores), scores.metadata, select(scores, 0.3, 4).digest()


def work(rank, size, jobs, folder):
    """Run jobs in one process of a group; what came of each, or its error, in a file."""
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    found = []
    for *job, extra in jobs:
        try:
            found.append(run(rank, *job, extra=extra))
        except Exception as error:  # noqa: BLE001 - what it is, is tested
            found.append(f"{type(error).__name__}: {error}")
    torch.save(found, Path(folder, f"found-{rank}"))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def group(request, tmp_path_factory):
    """What each of 2 or 3 processes found for every job below, by job and rank."""
    size = request.param
    kept = str(tmp_path_factory.mktemp("kept"))
    budget = smallest_budget("llama", config(**FULL))
    jobs = {
        "full": ("llama", 5, FULL, {}),
        "budget": ("llama", 5, {**FULL, "memory_budget": budget}, {}),
        "dense": ("bert", 5, {"curvature": "dense"}, {}),
        "hodlr": ("bert", 5, {"curvature": "hodlr", **FULL}, {}),
        "low rank": ("llama", 5, {"rank": 2}, {}),
        "cut": ("llama", 5, {"curvature": "hodlr", "rank": 6, "damping": 0.1}, {}),
        "one batch": ("llama", 1, FULL, {}),
        "fisher": ("bert", 5, {"importance": "fisher-diag"}, {}),
        "gradient": ("bert", 4, {"importance": "gradient"}, {}),
        "other batches": ("bert", 3, FULL, {"own batches": 1}),
        "damaged": ("bert", 5, FULL, {"damaged": 1}),
        "full disk": (
            "llama",
            5,
            {**FULL, "memory_budget": budget},
            {"checkpoint": f"{kept}/full", "full": True},
        ),
        "stopped": ("llama", 5, FULL, {"checkpoint": kept, "stop": 4}),
        "resumed": ("llama", 5, FULL, {"checkpoint": kept}),
    }
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(work, (size, list(jobs.values()), folder), nprocs=size)
    found = [torch.load(f"{folder}/found-{r}", weights_only=False) for r in range(size)]
    return dict(zip(jobs, zip(*found, strict=True), strict=True)), jobs


def alone(job):
    name, count, options, _ = job
    return score(
        make_model(name), batches(name, count), config(samples=3 * count, **options)
    )


def blocks(layers):
    return {name: layer.blocks(4) for name, layer in layers.items()}


EQUAL = [
    "full",
    "budget",
    "dense",
    "hodlr",
    "low rank",
    "one batch",
    "fisher",
    "gradient",
    "resumed",
]


@pytest.mark.parametrize("case", EQUAL)
def test_scores_are_those_of_one_process(group, case):
    found, jobs = group
    expected = alone(jobs[case])
    for layers, metadata, _ in found[case]:
        assert metadata["samples"] == expected.metadata["samples"]
        for name, got in blocks(layers).items():
            wanted = expected[name].blocks(4)
            # HODLR has full rank here; what else is added up is linear in the samples.
            # A block's score is a sum of parts of both signs.
            atol = 1e-3 * float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("case", [*EQUAL, "cut"])
def test_all_processes_choose_the_same_blocks(group, case):
    found, _ = group
    assert len({digest for *_, digest in found[case]}) == 1
    first = blocks(found[case][0][0])
    for layers, *_ in found[case][1:]:
        assert all(torch.equal(first[n], b) for n, b in blocks(layers).items())


def test_truncated_factors_agree_as_far_as_they_are_cut(group):
    found, jobs = group
    expected = alone(jobs["cut"])
    for name, got in blocks(found["cut"][0][0]).items():
        want = expected[name].blocks(4).flatten()
        pair = torch.stack([got.flatten(), want]).log()
        assert torch.corrcoef(pair)[0, 1] > 0.9, name


def test_a_budget_changes_nothing(group):
    found, _ = group
    whole, parts = (blocks(found[case][0][0]) for case in ("full", "budget"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resuming_changes_nothing(group):
    found, _ = group
    assert all(error == "InterruptedError: " for error in found["stopped"])
    whole, resumed = (blocks(found[case][0][0]) for case in ("full", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_processes_with_different_batches_are_refused(group):
    found, _ = group
    for error in found["other batches"]:
        assert error.startswith("ConfigError: process 1 has other batches")


def test_an_error_in_one_process_stops_all(group):
    found, _ = group
    errors = list(found["damaged"])
    assert errors.pop(1).startswith("IndexError")
    for error in errors:
        assert error.startswith("SylvaError: stopped because process 1 failed")


def test_what_the_first_process_cannot_write_stops_all(group):
    found, _ = group
    first, *others = found["full disk"]
    assert first.startswith("OSError: [Errno 28] No space left")
    for error in others:
        assert error.startswith("SylvaError: stopped because process 0 failed: OSError")
