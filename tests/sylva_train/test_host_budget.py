"""Mean gradients in main memory: fewer passes below a memory budget, the same scores."""

from __future__ import annotations

import pytest
import torch

from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig
from sylva_train.curvature import Store, collect_curvature, planning, settings
from sylva_train.curvature.hooks import Collector
from sylva_train.curvature.planning import plan_passes
from sylva_train.importance import score
from sylva_train.targets import find_targets
from tests.sylva_train.models import make_batch, make_model
from tests.sylva_train.test_passes import (
    assert_same,
    config,
    data,
    llama_7b,
    smallest_budget,
)

WANTED = ("factors", "gradient")


class Elsewhere:
    """A tensor that has to be brought for every sum, as one beside a GPU has."""

    def __init__(self, tensor):
        self.tensor, self.nbytes = tensor.clone(), tensor.nbytes

    def to(self, *_, **__):
        return self.tensor.clone()

    def copy_(self, tensor):
        self.tensor.copy_(tensor)


@pytest.fixture
def beside(monkeypatch):
    """Have this CPU's memory taken for a device's, and count what is kept elsewhere."""
    kept = []

    def placed(self, gradient):
        if not self.hosted:
            return gradient
        kept.append(gradient.nbytes)
        return Elsewhere(gradient)

    monkeypatch.setattr(planning, "weight_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(Collector, "placed", placed)
    return kept


def test_gradients_of_llama_7b_beside_the_device_spare_a_pass():
    targets, owner = llama_7b()
    options = SylvaConfig(memory_budget="20GB", host_budget="40GB")
    (part,) = plan_passes(targets, options, WANTED, lambda: owner)
    one = max(module.weight.numel() for module in targets.values()) * 4
    factors, *_ = plan_passes(
        targets, SylvaConfig(memory_budget="8GB"), ("factors",), lambda: owner
    )
    assert factors.names == part.names
    # On the device are the factors, and one gradient at a time.
    assert part.nbytes <= factors.nbytes + one
    assert 26e9 < part.host_bytes <= 40e9


@pytest.mark.parametrize(
    ("budget", "host", "passes"),
    [
        ("20GB", None, 2),
        ("20GB", "30GB", 2),  # both stay below it, and are no fewer
        ("40GB", "40GB", 1),  # all of it fits the device
        ("4GB", "12GB", 3),  # as many as the main memory asks for
        ("4GB", "100MB", 8),  # not enough for a gradient
    ],
)
def test_main_memory_is_used_where_it_spares_a_pass(budget, host, passes):
    targets, owner = llama_7b()
    options = SylvaConfig(memory_budget=budget, host_budget=host)
    plan = plan_passes(targets, options, WANTED, lambda: owner)
    assert len(plan) == passes
    assert [n for part in plan for n in part.names] == list(targets)
    limit = planning.memory_bytes(host) or 0
    assert all(part.host_bytes <= limit for part in plan)


def test_gradients_of_a_model_on_a_cpu_stay_where_they_are():
    options = config(memory_budget=smallest_budget("bert", config()), host_budget="1GB")
    targets = find_targets(make_model())
    plan = plan_passes(targets, options, WANTED, dict)
    assert len(plan) > 1
    assert not any(part.host_bytes for part in plan)


@pytest.mark.parametrize("rule", ["kfac-natural", "weight-gradient"])
def test_gradients_that_come_and_go_give_the_bits_of_those_that_stay(beside, rule):
    whole = score(make_model("llama"), data("llama"), config(importance=rule))
    assert not beside
    lines = []
    options = config(importance=rule, memory_budget="16kB", host_budget="1MB")
    found = score(make_model("llama"), data("llama"), options, log=lines.append)
    assert_same(whole, found)
    assert len(beside) == len(found)
    assert "of main memory" in lines[0]


def test_unfinished_sums_go_back_to_where_they_were(beside, tmp_path):
    model, options = make_model(), config(memory_budget="16kB", host_budget="1MB")
    targets = find_targets(model)
    collector = Collector(targets, options, frozenset(WANTED), (*targets,))
    with collector.attached(), torch.enable_grad():
        batch = make_batch()
        collector.start(batch, 1)
        model(**batch).loss.backward()
    store = Store(tmp_path, 0, settings(model, targets, options))
    store.save(collector, 1, "")
    again = Collector(targets, options, frozenset(WANTED), (*targets,), hosted=True)
    assert store.load(again) == (1, "")
    assert len(beside) == len(targets)
    for name, sums in again.sums.items():
        assert torch.equal(sums.gradient.tensor, collector.sums[name].gradient)


@pytest.mark.parametrize("budget", ["", "0", "-1GB"])
def test_nonsense_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="`host_budget` must be"):
        SylvaConfig(host_budget=budget)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_adds_to_gradients_in_pinned_memory():
    def run(**options):
        model = make_model("llama").cuda()
        chosen = config(**options)
        return collect_curvature(
            model, find_targets(model), data("llama"), chosen, WANTED
        )

    whole = run()
    parts = run(memory_budget="16kB", host_budget="1MB")
    assert parts.plan[0].host_bytes
    for name in whole:
        parts[name]  # its pass has been run
        rest = parts.collector.sums.values()
        assert all(sums.gradient.is_pinned() for sums in rest)
        assert parts[name].gradient.is_cuda
        torch.testing.assert_close(parts[name].gradient, whole[name].gradient)
