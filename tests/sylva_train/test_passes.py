"""Scoring below a memory budget: several passes, the same scores to the bit."""

from __future__ import annotations

import gc
import types

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sylva_train._checks import ConfigError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.curvature import collect_curvature, curvature_bytes
from sylva_train.curvature.factors import accumulator
from sylva_train.curvature.planning import fill, plan_passes, size_words
from sylva_train.importance import score
from sylva_train.options import memory_bytes
from sylva_train.selection import select
from sylva_train.targets import Calls, find_targets, input_owners, is_same
from tests.sylva_train.models import make_batch, make_model

RULES = ("kfac", "kfac-pruner", "gradient", "fisher-diag")


def data(name):
    return [make_batch(name, seed) for seed in (1, 2, 3)]


def config(**options):
    small = {"block_size": 4, "levels": 2, "rank": 3, "samples": 8, "damping": 0.1}
    small |= {"exact_below": 0}
    return SylvaConfig(**small | options)


def layer_bytes(name, options, wanted=("factors", "gradient")):
    return {
        layer: curvature_bytes(tuple(module.weight.shape), options, wanted)
        for layer, module in find_targets(make_model(name)).items()
    }


def smallest_budget(name, options, wanted=("factors", "gradient")):
    """What the largest layer needs by itself."""
    return max(
        sum(parts.values()) for parts in layer_bytes(name, options, wanted).values()
    )


def bits(scores):
    return {
        (name, part): getattr(layer, part)
        for name, layer in scores.items()
        for part in ("s_out", "s_in", "grid")
        if getattr(layer, part) is not None
    }


def assert_same(one, other):
    first, second = bits(one), bits(other)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:.*not positive")
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("curvature", ["mlr", "hodlr", "dense"])
def test_passes_give_the_bits_of_one_pass(name, curvature):
    options = config(curvature=curvature)
    budget = smallest_budget(name, options)
    lines = []
    whole = score(make_model(name), data(name), options)
    parts = score(
        make_model(name),
        data(name),
        config(curvature=curvature, memory_budget=budget),
        log=lines.append,
    )
    assert_same(whole, parts)
    assert "passes" in lines[0]
    assert parts.metadata == whole.metadata


@pytest.mark.parametrize("rule", RULES[1:])
def test_every_rule_can_be_scored_in_passes(rule):
    whole = score(make_model("bert"), data("bert"), config(importance=rule))
    options = config(importance=rule, memory_budget=16000)
    lines = []
    assert_same(
        whole, score(make_model("bert"), data("bert"), options, log=lines.append)
    )
    assert "passes" in lines[0] or rule == "fisher-diag"


def live_bytes():
    """Bytes of all tensors there are, each memory counted once."""
    gc.collect()
    # What the compiler left of other tests has no memory: subclasses, and stand-ins.
    kinds = (torch.Tensor, nn.Parameter)
    tensors = [t for t in gc.get_objects() if type(t) in kinds]
    storages = (
        t.untyped_storage()
        for t in tensors
        if t.device.type == "cpu" and not torch._is_functional_tensor(t)
    )
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.filterwarnings("ignore:.*not positive")
@pytest.mark.parametrize("curvature", ["mlr", "hodlr", "dense"])
def test_tensors_held_between_batches_stay_below_the_budget(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))
    batches = [{"x": torch.randn(4, 96)} for _ in range(3)]
    plain = config(curvature=curvature, samples=12, levels=3, rank=4)
    alone = sum(curvature_bytes((96, 96), plain).values())
    budget = 2 * alone
    held = []

    def measure(*_):
        held.append(live_bytes() - before)

    def run(**options):
        held.clear()
        chosen = config(curvature=curvature, samples=12, levels=3, rank=4, **options)
        return score(
            model, batches, chosen, progress=measure,
            loss=lambda m, b: m(b["x"]).square().mean(),
        )  # fmt: skip

    before = live_bytes()
    whole = run()
    # The measure sees what one pass holds; without a budget it is all six layers.
    assert max(held) >= 6 * alone
    del whole
    before = live_bytes()
    run(memory_budget=budget)
    # Scores of the layers that are done, by blocks, and activations' leftovers.
    rest = 6 * 24 * 24 * 8 + 4 * 96 * 4 * 4
    assert len(held) == 9
    assert max(held) <= budget + rest
    assert max(held) >= alone


def test_bytes_from_shapes_are_the_bytes_that_are_held():
    wanted = ["factors", "gradient", "fisher", "inputs"]
    for name in ("llama", "bert"):
        model, options = make_model(name), config()
        targets = find_targets(model)
        layers = collect_curvature(model, targets, data(name), options, wanted)
        sizes = layer_bytes(name, options, wanted)
        shared = layers.collector.owner
        expected = sum(
            sum(parts.values()) - (parts["A"] if shared[layer] != layer else 0)
            for layer, parts in sizes.items()
        )
        sums = layers.collector.sums.values()
        held = [getattr(part, "nbytes", 0) for s in sums for part in vars(s).values()]
        assert sum(held) == expected


def test_squares_are_the_diagonals_of_the_factors():
    model = make_model()
    layers = collect_curvature(
        model, find_targets(model), data("bert"), config(curvature="dense"),
        ["factors", "inputs", "outputs"],
    )  # fmt: skip
    for layer in layers.values():
        torch.testing.assert_close(layer.output_squares, layer.G.matrix.diagonal())
        torch.testing.assert_close(layer.input_squares, layer.A.matrix.diagonal())


def test_a_batch_without_a_mask_has_no_padding():
    """Of BERT's last layer queries have a gradient at the first token only."""
    masked = [
        batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
        for batch in data("bert")
    ]
    options = config(curvature="dense")
    one, other = (score(make_model(), d, options) for d in (data("bert"), masked))
    for name in one:
        torch.testing.assert_close(
            one[name].blocks(4), other[name].blocks(4), rtol=1e-3, atol=1e-30
        )


@given(st.integers(0, 400), st.sampled_from(["llama", "t5"]))
def test_plan_keeps_the_order_and_the_budget(extra, name):
    model, options = make_model(name), config()
    budget = smallest_budget(name, options) + 100 * extra
    options.memory_budget = budget
    targets = find_targets(model)
    owner = input_owners(targets, lambda: model(**make_batch(name)))
    plan = plan_passes(targets, options, ["factors", "gradient"], lambda: owner)
    assert [n for part in plan for n in part.names] == list(targets)
    assert all(part.names and part.nbytes <= budget for part in plan)
    sizes = layer_bytes(name, options)
    total = sum(sum(parts.values()) for parts in sizes.values())
    if total <= budget:  # nobody asks then which layers share an input
        assert [part.nbytes for part in plan] == [total]
        return
    for part in plan:
        inputs = {owner[n]: sizes[n]["A"] for n in part.names}
        rest = sum(sizes[n]["G"] + sizes[n]["gradient"] for n in part.names)
        assert part.nbytes == sum(inputs.values()) + rest


def llama_7b():
    """The linear layers of LLaMA-7B, without memory, and which share an input."""
    shapes = {f"{part}_proj": (4096, 4096) for part in "qkvo"}
    shapes |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up": "gate"}
    targets, owner = {}, {}
    for layer in range(32):
        for name, (out, inputs) in shapes.items():
            targets[f"{layer}.{name}"] = nn.Linear(
                inputs, out, bias=False, device="meta", dtype=torch.bfloat16
            )
            owner[f"{layer}.{name}"] = f"{layer}.{first.get(name, name)}"
    return targets, owner


def test_factors_of_llama_7b_take_a_tenth_of_the_exact_ones():
    targets, owner = llama_7b()
    sizes = [
        plan_passes(
            targets, SylvaConfig(curvature=c, memory_budget="1TB"), ["factors"], dict
        )
        for c in ("mlr", "hodlr", "dense")
    ]
    mlr, hodlr, dense = (plan[0].nbytes for plan in sizes)
    assert mlr <= 0.1 * dense
    assert hodlr <= 0.1 * dense
    # With the gradients they fit 20 GB in two passes.
    options = SylvaConfig(memory_budget="20GB")
    plan = plan_passes(targets, options, ["factors", "gradient"], lambda: owner)
    assert len(plan) == 2


def test_shared_inputs_are_counted_once():
    model = make_model("llama")
    owner = input_owners(find_targets(model), lambda: model(**make_batch("llama")))
    first = "model.layers.0."
    assert owner[f"{first}self_attn.v_proj"] == f"{first}self_attn.q_proj"
    assert owner[f"{first}mlp.up_proj"] == f"{first}mlp.gate_proj"
    assert owner[f"{first}mlp.down_proj"] == f"{first}mlp.down_proj"
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_above_the_budget_is_named():
    budget = smallest_budget("bert", config()) - 1
    with pytest.raises(
        ConfigError, match=r"is [\d,]+ bytes, but .*intermediate.*needs .* bytes"
    ):
        score(make_model(), data("bert"), config(memory_budget=budget))


def test_an_iterator_cannot_be_run_through_twice():
    options = config(memory_budget=smallest_budget("bert", config()))
    with pytest.raises(ConfigError, match="iterator"):
        score(make_model(), iter(data("bert")), options)


def test_other_batches_in_another_pass_are_refused():
    class Shuffled:
        times = 0

        def __iter__(self):
            self.times += 1
            yield make_batch(seed=self.times)

    options = config(memory_budget=smallest_budget("bert", config()))
    with pytest.raises(ConfigError, match="other batches than in the first pass"):
        score(make_model(), Shuffled(), options)


@pytest.mark.parametrize("budget", ["", "0", "-1GB", "20 parsecs", 0, "GB", 1.5e-3])
def test_nonsense_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="memory_budget"):
        SylvaConfig(memory_budget=budget)


def test_budgets_have_units():
    assert memory_bytes("1.5 kB") == 1500
    assert memory_bytes("2GiB") == 2**31
    assert memory_bytes("7") == memory_bytes(7) == 7


def test_scores_of_a_float64_model_are_added_up_in_float64():
    model = make_model().double()
    layers = collect_curvature(
        model, find_targets(model), data("bert"), config(curvature="dense"),
        ["factors", "gradient"],
    )  # fmt: skip
    for name in layers:
        assert layers[name].gradient.dtype == torch.float64
        assert layers[name].A.matrix.dtype == torch.float64


def offloaded(name, folder=None):
    """A model whose weights accelerate brings to the layers that run."""
    model = make_model(name)
    if folder is None:
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, torch.device("cpu"))
    return model


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("rule", ["kfac", "magnitude", "weight-gradient"])
def test_weights_that_are_brought_for_each_layer_score_alike(where, rule, tmp_path):
    model = offloaded("llama", tmp_path if where == "disk" else None)
    targets = find_targets(model)
    assert all(module.weight.is_meta for module in targets.values())
    scores = score(model, data("llama"), config(importance=rule))
    assert_same(
        scores, score(make_model("llama"), data("llama"), config(importance=rule))
    )
    assert all(module.weight.is_meta for module in targets.values())
    assert select(scores, 0.2, 4).trainable


def test_weights_that_nothing_loads_are_refused():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(TargetError, match="meta device"):
        score(model, data("bert"), config())


def packed(kind):
    """A model with one layer of another kind."""
    model = make_model()
    layer = model.bert.encoder.layer[1].output.dense
    if kind == "Linear4bit":  # bitsandbytes' own class, told by its name
        layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    elif kind == "config":
        model.config.quantization_config = types.SimpleNamespace(quant_method="gptq")
    else:
        layer.weight = nn.Parameter(layer.weight.data.to(getattr(torch, kind)), False)
    return model


@pytest.mark.parametrize("kind", ["Linear4bit", "config", "int8", "float8_e4m3fn"])
def test_quantized_models_are_refused(kind):
    with pytest.raises(TargetError, match="quantized"):
        score(packed(kind), data("bert"), config(importance="magnitude"))


def test_each_of_many_layers_is_planned_once():
    class Read(dict):
        count = 0

        def values(self):
            Read.count += 1
            return super().values()

    sizes = {str(i): Read(A=1, G=1, gradient=2) for i in range(100)}
    passes = fill(sizes, {}, budget=200)
    assert [len(part.names) for part in passes] == [50, 50]
    assert Read.count == len(sizes)


def test_who_reads_an_input_is_looked_for_among_its_readers(monkeypatch):
    compared = []

    def same(one, other):
        compared.append(one)
        return is_same(one, other)

    monkeypatch.setattr("sylva_train.targets.inputs.is_same", same)
    calls = Calls()
    for i, x in enumerate(torch.zeros(100, 1).split(1)):
        for part in ("gate", "up"):
            calls.note(f"{i}.{part}", x)
    owners = {name: calls.first_reader(name) for name in calls.inputs}
    assert owners == {name: f"{name.partition('.')[0]}.gate" for name in owners}
    assert len(compared) == len(owners)


def test_the_factor_of_a_vocabulary_is_no_larger_than_the_gradient():
    sizes = curvature_bytes((128_256, 4096), SylvaConfig())
    assert sizes["G"] < sizes["gradient"]
    # Leaves of a usual size are as deep as asked for.
    levels = [
        accumulator(n, torch.empty(0, device="meta"), SylvaConfig()).tree.levels
        for n in (4096, 11_008, 32_000, 32_769, 128_256)
    ]
    assert levels == [4, 4, 4, 5, 6]


@pytest.mark.parametrize(
    ("size", "words"),
    [(999, "999 bytes"), (999_499, "999 kB"), (999_600_000, "1 GB"), (1.5e9, "1.5 GB")],
)
def test_bytes_are_told_in_three_digits(size, words):
    assert size_words(size) == words
