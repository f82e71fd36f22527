"""The training loop: laws of one step, of a run, and of what it leaves alone."""

import copy
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sylva_train._checks import ConfigError, DataError, NonFiniteError
from sylva_train.config import TrainingConfig
from sylva_train.curvature import default_loss
from sylva_train.evaluation import evaluate
from sylva_train.kernels import gather_blocks
from sylva_train.layers import embedded_layers
from sylva_train.optimizer import SparseAdamW
from sylva_train.options import SCHEDULES
from sylva_train.targets import weight_view
from sylva_train.training import make_scheduler, pick_device, setup, train
from sylva_train.training.gradient import clip_gradient
from tests.sylva_train.models import same
from tests.sylva_train.toy import (
    HaltError,
    ToyLoader,
    stop_at,
    toy_base,
    toy_model,
    weights,
)

CONFIG = TrainingConfig(lr=1e-2, steps=8)


def run(model=None, loader=None, **options):
    model = model or toy_model()
    options = {"lr": 1e-2, "steps": 8} | options
    parts = {k: options.pop(k) for k in list(options) if not hasattr(CONFIG, k)}
    result = train(
        model,
        ToyLoader() if loader is None else loader,
        TrainingConfig(**options),
        **parts,
    )
    return model, result


def consistent(model):
    """Whether the dense weights show the blocks' values."""
    return all(
        torch.equal(
            gather_blocks(
                weight_view(layer.base_layer),
                layer.sylva_indices["default"].long(),
                layer.sylva_values["default"].shape[-1],
            ),
            layer.sylva_values["default"],
        )
        for layer in embedded_layers(model).values()
    )


# ------------------------------------------------------------------------- determinism


def test_a_seed_decides_every_bit_of_the_weights():
    first, second, other = run()[0], run()[0], run(seed=1)[0]
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_the_random_generators_of_the_caller_are_left_alone():
    def draw():
        return float(torch.rand(1)), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    seed()
    wanted = draw()
    seed()
    run()
    assert draw() == wanted


def test_the_random_generators_of_the_caller_have_no_say():
    torch.manual_seed(3)
    first, _ = run()
    torch.manual_seed(4)
    assert same(weights(first), weights(run()[0]))


def test_evaluation_does_not_change_the_course_of_training():
    def evaluate(model):
        assert not model.training
        return {"accuracy": float(torch.rand(1))}

    plain, _ = run()
    evaluated, result = run(evaluate=evaluate, eval_every=3)
    assert same(weights(plain), weights(evaluated))
    assert [r["step"] for r in result.history if "score" in r] == [3, 6, 8]
    assert result.metrics == {"accuracy": result.history[-1]["score"]}


def test_data_to_evaluate_on_is_enough_to_evaluate():
    model, result = run(eval_loader=ToyLoader(), eval_every=5)
    assert [r["step"] for r in result.history if "score" in r] == [5, 8]
    assert result.metrics == evaluate(model, ToyLoader())
    assert result.history[-1]["score"] == result.metrics["accuracy"]


# ---------------------------------------------------------------------------- one step


def test_the_norm_of_a_float16_gradient_may_be_beyond_its_numbers():
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 2000.0)
    norm = clip_gradient({"weight": weight}, 1.0, "step 1")
    assert norm == pytest.approx(64 * 2000)
    assert float(weight.grad.norm()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("limit", [1e-3, 0.0, 1e3])
def test_the_gradient_of_all_weights_together_is_clipped(limit):
    model = toy_model(dropout=0.0)
    before = weights(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 1.0)
    _, result = run(
        model, optimizer=optimizer, steps=1, max_grad_norm=limit, warmup=0.0
    )
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in trained.items()])
    norm = result.history[0]["grad_norm"]
    assert norm > 1e-2
    wanted = limit if 0 < limit < norm else norm
    assert moved.norm().item() == pytest.approx(wanted, rel=1e-3)


def test_a_loss_that_is_not_finite_changes_no_weight():
    calls = []

    def loss(model, batch):
        calls.append(0)
        return default_loss(model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    good = toy_model()
    with pytest.raises(HaltError):
        run(good, callbacks=[stop_at(2)])
    bad = toy_model()
    with pytest.raises(NonFiniteError, match=r"loss is nan in step 3 .*`lr`"):
        run(bad, loss=loss)
    assert same(weights(good), weights(bad))
    assert consistent(bad)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = toy_model()
    before = weights(model)
    model.classifier.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(
        NonFiniteError, match=r"`classifier.weight` is not finite in step 1"
    ):
        run(model)
    assert same(before, weights(model))


# --------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "steps"), [(0.0, 7), (0.06, 50), (0.3, 10), (1.0, 5)]
)
def test_schedules_are_those_of_transformers(schedule, warmup, steps):
    config = TrainingConfig(schedule=schedule, warmup=warmup)
    ours, theirs = (
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.5) for _ in "12"
    )
    name = "constant_with_warmup" if schedule == "constant" else schedule
    mine = make_scheduler(ours, config, steps)
    reference = transformers.get_scheduler(
        name, theirs, int(np.ceil(warmup * steps)), steps
    )
    for _ in range(steps):
        assert ours.param_groups[0]["lr"] == pytest.approx(
            theirs.param_groups[0]["lr"], rel=1e-12, abs=1e-15
        )
        for optimizer, scheduler in ((ours, mine), (theirs, reference)):
            optimizer.step()
            scheduler.step()


def test_the_history_has_the_rates_of_the_schedule():
    _, result = run(steps=10, lr=1.0, warmup=0.2, schedule="linear")
    rates = [record["lr"] for record in result.history]
    assert rates == pytest.approx([0, 0.5, *(1 - i / 8 for i in range(8))])


def test_a_scheduler_that_is_passed_in_decides():
    model = toy_model()
    optimizer = SparseAdamW(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    _, result = run(model, steps=4, optimizer=optimizer, scheduler=scheduler)
    assert [r["lr"] for r in result.history] == pytest.approx([1, 1, 0.1, 0.1])


# --------------------------------------------------------------------------- whole runs


def test_training_learns():
    _, result = run(toy_model(dropout=0.0), steps=90, lr=2e-2)
    losses = [record["loss"] for record in result.history]
    assert np.mean(losses[-6:]) < 0.3 * np.mean(losses[:6])


def test_epochs_see_every_batch_and_steps_decide_over_epochs():
    assert run(steps=None, epochs=2)[1].steps == 2 * 6
    assert run(steps=None, epochs=2, accumulate=4)[1].steps == 2 * 2
    assert run(steps=15)[1].steps == 15


def test_only_what_requires_a_gradient_moves():
    model = toy_model()
    before = weights(model)
    run(model)
    assert consistent(model)
    inactive = ~model.bert.encoder.layer[0].attention.self.query.mask().dense()
    for name, parameter in model.named_parameters():
        if name.endswith("query.base_layer.weight") and ".0." in name:
            assert torch.equal(parameter[inactive], before[name][inactive])
            assert not torch.equal(parameter, before[name])
        elif name.endswith("base_layer.weight"):
            continue
        else:
            assert parameter.requires_grad != torch.equal(parameter, before[name]), name


def test_dense_weights_are_written_whatever_the_optimizer():
    model = toy_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    run(model, optimizer=torch.optim.SGD(trained, 0.1))
    assert consistent(model)


def test_full_fine_tuning_and_lora_train_in_the_same_loop():
    full = toy_base()
    lora = get_peft_model(
        toy_base(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    )
    for model in (full, lora):
        before = weights(model)
        run(model)
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved <= parameter.requires_grad
        assert not same(before, weights(model))


def test_a_run_leaves_modes_and_gradients_clean():
    model = toy_model().eval()
    model.classifier.train()
    run(model)
    assert model.classifier.training
    assert not model.bert.training
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_leaves_dense_weights_consistent():
    model = toy_model().eval()
    before = weights(model)
    with pytest.raises(HaltError):
        run(model, callbacks=[stop_at(3)])
    assert consistent(model)
    assert not same(before, weights(model))
    assert not model.training


def test_times_leave_out_the_first_steps():
    _, result = run(steps=6)
    seconds = [record["seconds"] for record in result.history]
    assert result.seconds_per_step == pytest.approx(np.median(seconds[2:]))
    low, high = result.step_seconds_iqr
    assert low <= result.seconds_per_step <= high
    assert result.train_seconds == pytest.approx(sum(seconds))
    short = run(steps=2)[1]
    assert short.seconds_per_step is None
    assert short.step_seconds_iqr is None


def test_callbacks_see_every_step():
    seen = []
    _, result = run(callbacks=[lambda record: seen.append(copy.copy(record))])
    assert seen == result.history
    assert [record["step"] for record in seen] == list(range(1, 9))


def test_a_list_of_batches_is_run_through_in_each_epoch():
    batches = list(ToyLoader(samples=8))
    fixed = ToyLoader(samples=8)
    fixed.epoch = lambda epoch, start=0: ToyLoader.epoch(fixed, 0, start)  # noqa: ARG005
    (one, first), (other, second) = (
        run(loader=loader, epochs=3, steps=None) for loader in (batches, fixed)
    )
    assert first.steps == second.steps == 6
    assert same(one.state_dict(), other.state_dict())


def test_a_data_loader_shuffles_by_the_run_and_not_by_its_caller():
    rows = [{k: v[0] for k, v in b.items()} for b in ToyLoader(samples=8, batch_size=1)]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(rows, 3, shuffle=True)
        found.append(run(loader=loader, epochs=2, steps=None))
    assert found[0][1].steps == 6
    assert same(*(model.state_dict() for model, _ in found))


# ---------------------------------------------------------------------------- arguments


def test_parts_that_do_not_fit_are_named():
    model = toy_model()
    foreign = torch.optim.SGD(toy_model().parameters(), 0.1)
    with pytest.raises(ConfigError, match="`optimizer` trains a parameter"):
        run(model, optimizer=foreign)
    with pytest.raises(ConfigError, match="`scheduler` must be given together"):
        run(model, scheduler=make_scheduler(foreign, CONFIG, 8))
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(own)
    with pytest.raises(ConfigError, match="needs a metric"):
        run(model, optimizer=own, scheduler=plateau)
    with pytest.raises(ConfigError, match="LBFGS"):
        run(model, optimizer=torch.optim.LBFGS(own.param_groups[0]["params"]))
    with pytest.raises(ConfigError, match="`resume` needs `output`"):
        run(model, resume=True)
    with pytest.raises(ConfigError, match=r"`epoch\(epoch, start\)`.*of type list"):
        run(model, list(ToyLoader()), output="never")
    with pytest.raises(
        ConfigError, match=r"`loader` must have a length.*list_iterator"
    ):
        run(model, iter(list(ToyLoader())))
    with pytest.raises(DataError, match="`loader` has no batch"):
        run(model, ToyLoader(samples=0))
    once = ToyLoader()
    once.epoch = lambda epoch, start=0: () if epoch else ToyLoader.epoch(once, 0, start)
    with pytest.raises(DataError, match="`loader` gave no batch in epoch 1"):
        run(model, once)
    for nothing in (toy_base().requires_grad_(False), torch.nn.ReLU()):
        with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
            run(nothing)


def test_devices_that_are_not_there_are_named():
    # the last two have names, but PyTorch was built without them, or lacks their module
    for name in ("coffee machine", "meta", "mtia", "hpu"):
        with pytest.raises(ConfigError, match="`device` must be"):
            pick_device(name)
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees no CUDA"):
            pick_device("cuda:1")


def test_a_gpu_that_is_not_there_or_shared_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1"):
        assert pick_device(name) == torch.device(name)
    with pytest.raises(ConfigError, match=r"'cuda:2', but there are 2 GPUs"):
        pick_device("cuda:2")
    monkeypatch.setattr(setup, "rank_and_size", lambda: (0, 2))
    assert pick_device("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match="each of 2 processes has its own"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    ("found", "name", "inputs", "moved"),
    [
        (["cpu"], "cuda", "cuda", "cuda"),
        (["cuda:1"], "cuda", "cuda:1", None),
        (["cuda:1"], "auto", "cuda:1", None),
        (["cuda:0"], "cuda:1", "cuda:1", "cuda:1"),
        (["cuda:1", "cuda:0"], "cuda", "cuda:1", None),
        (["cuda:0", "cuda:1"], "cuda:1", "cuda:1", None),
        (["cuda:0", "cpu"], "cuda:1", "cuda:1", "cuda:1"),
        (["cpu"], "cpu", "cpu", None),
    ],
)
def test_inputs_go_where_the_model_is(monkeypatch, found, name, inputs, moved):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model = Mock()
    model.parameters.return_value = [Mock(device=torch.device(d)) for d in found]
    assert setup.place(model, name) == torch.device(inputs)
    assert [c.args for c in model.to.mock_calls] == (
        [(torch.device(moved),)] if moved else []
    )


@pytest.mark.parametrize(("terminal", "progress"), [(1, True), (0, True), (1, False)])
def test_progress_is_for_terminals(monkeypatch, capsys, terminal, progress):
    monkeypatch.setattr("sylva_train.progress.PATIENCE", 0.0)
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, str(terminal))

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=progress, callbacks=[stop])
    out, err = capsys.readouterr()
    assert not out
    assert ("step 3" in err) == bool(terminal and progress)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_is_moved_to_its_device():
    model, result = run(device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert result.steps == 8
    assert consistent(model)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="`warmup` is a fraction"):
        TrainingConfig(warmup=100)
