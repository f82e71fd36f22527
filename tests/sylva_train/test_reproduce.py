"""Tables like the paper's: what is run, at which rates, and what is written down."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from sylva_train._checks import ConfigError, NonFiniteError, OutputExistsError
from sylva_train.cli.comparing import row_text
from sylva_train.comparison import Comparison, provenance, single
from sylva_train.comparison.tuning import TUNING_SEED
from sylva_train.report import svg_file
from sylva_train.reproduce import TABLES, Table, reproduce
from sylva_train.reproduce.pictures import draw
from sylva_train.reproduce.quality import Plan
from sylva_train.reproduce.settings import with_values
from sylva_train.reproduce.tables import markdown
from tests.sylva_train import jobs

pytestmark = pytest.mark.usefixtures("quick_collections")

SWEEP = Table(
    name="sweep",
    title="Densities",
    methods=("lora", "sylva:magnitude"),
    option="density",
    values=(0.25, 0.5),
)


def setting(home: Path, **options) -> Comparison:
    values = {
        "task": jobs.task(home),
        "sylva": jobs.sylva_config(samples=8, levels=1, rank=4),
        "training": jobs.training(steps=2),
        "methods": ("full",),
        "seeds": (0,),
        "learning_rates": {"lora": 0.02, "sylva": 0.01},
    }
    return Comparison(**(values | options))


def test_a_table_of_values_is_written_in_every_form(here, home, tmp_path):
    output = tmp_path / "out"
    settings = {"tiny": setting(home, seeds=(0, 1))}
    found = reproduce(SWEEP, settings, output, command="sylva again")
    assert len(here) == len(found["runs"]) == 2 * 2 * 2
    densities = {job.spec["sylva"]["density"] for job in here}
    assert densities == {0.25, 0.5}
    # A rank is at least 1 and layers are tiny: the budgets are the same but for that.
    trained = {(r["method"], r["value"]): r["trainable"] for r in found["runs"]}
    assert trained["lora", 0.5] > trained["lora", 0.25]
    assert trained["sylva:magnitude", 0.5] == 2 * trained["sylva:magnitude", 0.25]
    kept = json.loads((output / "results.json").read_text())
    assert kept == json.loads(json.dumps(found))
    table = (output / "table.md").read_text()
    for words in ("# Densities", "**tiny**", "| LoRA | 0.25 |", "±", "sylva again"):
        assert words in table
    assert "not tuned" in table
    # The option that the table varies is not a setting of it.
    assert "examples; blocks of" in table
    rows = list(csv.DictReader((output / "table.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [r["score"] for r in found["runs"]]
    assert {row["lr"] for row in rows} == {"0.02", "0.01"}
    picture = (output / "table.svg").read_text()
    for words in ("tiny", "Sylva, magnitude, 0.5", "accuracy, %"):
        assert words in picture
    with pytest.raises(OutputExistsError, match="go on with it"):
        reproduce(SWEEP, {"tiny": setting(home)}, output)


def test_a_table_of_methods_has_a_line_a_setting(here, home, tmp_path, monkeypatch):
    table = Table(name="t", title="T", methods=("full", "sylva:random"))
    monkeypatch.chdir(home)
    settings = {
        "one": setting(Path()),
        "two": setting(Path(), task=jobs.task(Path(), metric="loss")),
    }
    found = reproduce(table, settings, tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "|  | metric | Full fine-tuning | Sylva, random blocks |" in lines
    (first,) = [line for line in lines if line.startswith("| one | accuracy, % |")]
    (second,) = [line for line in lines if line.startswith("| two | loss |")]
    assert first != second
    # Files are named as they were given, not by where they are on this machine.
    for name in ("table.md", "table.csv", "results.json"):
        assert str(home) not in (tmp_path / "out" / name).read_text()
    assert "one: `model`, train.jsonl (" in "".join(lines)
    assert {run["value"] for run in found["runs"]} == {None}


def test_rates_are_chosen_on_training_data_with_a_seed_of_their_own(
    here, home, tmp_path
):
    # Of three multiples one is hopeless, one does nothing.
    settings = {"tiny": setting(home, training=jobs.training(steps=12))}
    found = reproduce(SWEEP, settings, tmp_path / "out", tune=(1e-6, 1.0))
    tuning = [job for job in here if job.name.startswith("tune-")]
    assert len(tuning) == 2 * 2 * 2
    assert {job.spec["training"]["seed"] for job in tuning} == {TUNING_SEED}
    assert {job.spec["task"]["eval_split"] for job in tuning} == {"held-out"}
    assert [job.name.startswith("tune-") for job in here] == [True] * 8 + [False] * 4
    best = {}
    for row in found["tuning"]:
        key = row["method"], row["value"]
        best[key] = max(best.get(key, (-1, 0)), (row["score"], -row["lr"]))
    for row in found["runs"]:
        score, rate = best[row["method"], row["value"]]
        tied = [
            r["lr"] for r in found["tuning"]
            if (r["method"], r["value"], r["score"]) == (row["method"], row["value"], score)
        ]  # fmt: skip
        assert row["lr"] in tied, (rate, row)
    assert "1e-06, 1 times" in (tmp_path / "out" / "table.md").read_text()


def test_a_rate_at_which_a_method_diverges_is_not_chosen(here, home, tmp_path):
    settings = {"tiny": setting(home, training=jobs.training(steps=4))}
    table = dataclasses.replace(SWEEP, methods=("full",), values=(0.25,))
    told = []
    found = reproduce(
        table, settings, tmp_path / "out", tune=(1e30, 1.0), watch=told.append
    )
    high, low = found["tuning"]
    assert (high["score"], low["score"] is None) == (None, False)
    assert "NaN" in high["diverged"] or "nan" in high["diverged"]
    assert [run["lr"] for run in found["runs"]] == [low["lr"]]
    texts = [row_text(event.row) for event in told if event.kind == "end"]
    assert [text == "diverged" for text in texts] == [True, False, False]
    with pytest.raises(NonFiniteError, match=r"diverged at every rate .* smaller"):
        reproduce(table, settings, tmp_path / "other", tune=(1e30,))


def test_a_run_that_diverges_does_not_stop_the_table(here, home, tmp_path, monkeypatch):
    run = single.run

    def diverging(spec, tell=None):
        if spec["sylva"]["density"] == 0.25 and (
            spec["method"] == "lora" or spec["training"]["seed"] == 1
        ):
            raise NonFiniteError("the loss is NaN")
        return run(spec, tell or (lambda *_: None))

    monkeypatch.setattr(single, "run", diverging)
    output = tmp_path / "out"
    settings = {"tiny": setting(home, seeds=(0, 1))}
    found = reproduce(SWEEP, settings, output)
    assert [run["score"] is None for run in found["runs"]].count(True) == 3
    lines = (output / "table.md").read_text().splitlines()
    cells = [line.split(" | ") for line in lines if " | 0.25 | " in line]
    assert cells[0][2:4] == ["–", "(2 of 2 diverged)"]
    assert cells[1][3].endswith(" (1 of 2 diverged)")
    rows = list(csv.DictReader((output / "table.csv").read_text().splitlines()))
    assert [row["score"] for row in rows].count("") == 3
    assert "Sylva, magnitude, 0.25" in (output / "table.svg").read_text()
    lost = dataclasses.replace(SWEEP, methods=("lora",), values=(0.25,))
    with pytest.raises(NonFiniteError, match=r"every run of tiny diverged .*NaN"):
        reproduce(lost, settings, tmp_path / "lost")


def test_options_of_scoring_share_a_rate(home):
    shared = Plan(TABLES["table7"], {"a": setting(home)}, (0.5, 1.0))
    methods = len(TABLES["table7"].methods)
    assert len(shared.tuning()) == 2 * methods
    rows = {key: {"score": key[1]} for key in shared.tuning()}
    assert set(shared.rates(rows).values()) == {0.01}
    own = Plan(TABLES["table5"], {"a": setting(home)}, (0.5, 1.0))
    assert len(own.tuning()) == 2 * 3 * methods


@pytest.mark.parametrize(
    ("name", "texts", "values"),
    [
        ("table5", ["16", "32", "16"], (16, 32)),  # none counts twice
        ("allocation", ["1", "0.5"], (1.0, 0.5)),  # by default none of a type
        ("tokens", ["reduce"], ("reduce",)),
    ],
)
def test_values_are_of_their_options_type(name, texts, values):
    assert with_values(TABLES[name], texts).values == values


def test_lower_is_better_where_it_is(home):
    by_loss = setting(home, task=jobs.task(home, metric="loss"))
    plan = Plan(SWEEP, {"a": by_loss}, (1.0, 2.0))
    rows = {key: {"score": key[1]} for key in plan.tuning()}
    assert set(plan.rates(rows).values()) == {0.02, 0.01}
    assert plan.rates(rows)[plan.cells[0]] == 0.02  # lora


def test_language_models_are_tuned_by_their_perplexity(home):
    task = jobs.task(home, task="causal-lm", metric="bleu", eval_data="elsewhere.jsonl")
    plan = Plan(SWEEP, {"a": setting(home, task=task)}, (1.0, 2.0))
    specs = [job.spec["task"] for job in plan.tuning().values()]
    assert {(s["metric"], s["eval_data"]) for s in specs} == {("perplexity", None)}
    rows = {key: {"score": key[1]} for key in plan.tuning()}
    assert plan.rates(rows)[plan.cells[0]] == 0.02  # the lower
    assert {job.spec["task"]["metric"] for _, job in plan.runs({})} == {"bleu"}


def test_finished_runs_are_kept_and_settings_added(here, home, tmp_path):
    output = tmp_path / "out"
    table = dataclasses.replace(SWEEP, methods=("sylva:magnitude",), values=(0.25,))
    reproduce(table, {"a": setting(home)}, output, tune=(1.0,))
    assert len(here) == 1 + 1
    both = {"a": setting(home, seeds=(0, 1)), "b": setting(home)}
    found = reproduce(table, both, output, tune=(1.0,), resume=True)
    assert len(here) == 2 + 1 + 1 + 1
    assert {(r["setting"], r["seed"]) for r in found["runs"]} == {
        ("a", 0), ("a", 1), ("b", 0),
    }  # fmt: skip
    other = {"a": setting(home, training=jobs.training(steps=3))}
    with pytest.raises(ConfigError, match="`steps` is 2 there and 3 here"):
        reproduce(table, other, output, resume=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"table": "table9"}, "`table` must be one of 'table3', 'table4'"),
        ({"settings": {}}, "`settings` must have at least one"),
        ({"tune": (0.0,)}, "`tune` must be a finite number above 0"),
        ({"table": Table(name="x", title="", option="density", values=(2,))}, "density"),
        ({"table": Table(name="x", title="", methods=("luck",))}, "`method` must be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_run(home, tmp_path, arguments, words):
    values = {"table": SWEEP, "settings": {"a": setting(home)}} | arguments
    with pytest.raises(ConfigError, match=words):
        reproduce(**values, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_makes_a_table_of_a_configuration(here, home, tmp_path):
    config = {
        "task": {"model": str(home / "model"), "data": str(home / "train.jsonl")},
        "sylva": {"block_size": 8, "density": 0.25, "samples": 8, "levels": 1},
        "training": {"steps": 2, "batch_size": 8, "lr": 0.01},
    }
    (tmp_path / "mine.json").write_text(json.dumps(config))
    output, base = tmp_path / "out", ["reproduce", "table5", tmp_path / "out"]
    options = [
        "--configs", tmp_path / "mine.json", "--values", "8,16", "--seeds", 0,
        "--methods", "sylva:magnitude",
    ]  # fmt: skip
    shown = jobs.sylva(*base, *options)
    assert "2/2" in shown.stderr
    assert "Sensitivity to the block size" in shown.stdout
    assert {job.spec["sylva"]["block_size"] for job in here} == {8, 16}
    assert (output / "table.svg").exists()
    again = jobs.sylva(*base, *options, "--resume")
    assert "finished before" in again.stderr
    assert len(here) == 2
    message = jobs.told(jobs.sylva("reproduce", "table9", output, code=2))
    assert "`experiment` must be one of" in message


def test_measurements_are_written_and_resumed(here, monkeypatch, tmp_path):
    from sylva_train.reproduce import measuring

    spec = {
        "in_features": 32, "out_features": 32, "sequence": 8, "repeats": 1,
        "device": "cpu", "block_size": 16, "density": 0.25,
    }  # fmt: skip
    small = dataclasses.replace(measuring.MEASUREMENTS["fig5"], jobs=lambda _: [spec])
    monkeypatch.setitem(measuring.MEASUREMENTS, "fig5", small)
    output = tmp_path / "out"
    result = jobs.sylva("reproduce", "fig5", output)
    assert "32 × 32" in result.stdout
    names = {path.name for path in output.iterdir()}
    assert names == {"results.json", "table.md", "table.csv", "figure.svg", "runs"}
    jobs.sylva("reproduce", "fig5", output, "--resume")
    assert "Latency of a layer" in jobs.sylva("inspect", output).stdout
    shown = json.loads(jobs.sylva("inspect", output, "--json").stdout)
    assert shown == json.loads((output / "results.json").read_text())
    assert len(here) == 1


def test_scales_are_small_or_the_papers(tmp_path):
    base = ["reproduce", "fig4", tmp_path / "out", "--scale", "huge"]
    assert "must be one of 'small', 'paper'" in jobs.told(jobs.sylva(*base, code=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fig5", "--values", "16"], "`--values` is not for fig5"),
        (["table2", "--seeds", "0"], "`--seeds` is not for table2"),
        (["fig4", "--device", "cpu"], "`--device` is not for fig4"),
        (["table3", "--scale", "paper"], "`--scale` is not for table3"),
    ],
)
def test_options_of_another_kind_of_table_are_refused(tmp_path, arguments, said):
    name, *options = arguments
    output = tmp_path / "out"
    result = jobs.sylva("reproduce", name, output, *options, code=2)
    assert said in jobs.told(result)
    assert not output.exists()


def test_a_table_of_samples_tells_how_many_there_were(here, home, tmp_path):
    settings = {"tiny": setting(home)}
    table = dataclasses.replace(
        SWEEP, methods=("sylva:gradient",), option="samples", values=(4, 1000)
    )
    found = reproduce(table, settings, tmp_path / "out")
    few, most = (run["scored"] for run in found["runs"])
    assert few == 4
    assert most < 1000
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| 4 |" in text
    assert f"| 1000 ({most} scored) |" in text
    assert f"1000 ({most} scored)" in (tmp_path / "out" / "table.svg").read_text()
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [row["scored"] for row in csv.DictReader(file)] == ["4", str(most)]


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    file = tmp_path / "package" / "room" / "file.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "this one")
    clean = provenance.commit()
    assert clean
    assert "-" not in clean
    # Results are written beside the package, and change nothing of it.
    (tmp_path / "results.json").touch()
    git("add", ".")
    assert provenance.commit() == clean
    file.write_text("changed")
    assert provenance.commit() == f"{clean}-dirty"


def test_a_resumed_table_tells_what_its_earlier_runs_were_made_with(
    here, home, tmp_path
):
    output = tmp_path / "out"
    settings = {"tiny": setting(home)}
    table = dataclasses.replace(SWEEP, methods=("sylva:magnitude",))
    now = reproduce(table, settings, output)["made"]
    assert "earlier" not in now
    stamps = [
        {name: now[name] for name in ("versions", "commit")} | {"date": "2026-02-02"},
        {
            "versions": now["versions"] | {"torch": "2.9"},
            "commit": "abc1234",
            "date": "2026-01-01",
        },
    ]
    rows = sorted(
        path
        for path in (output / "runs").glob("*.json")
        if not path.name.endswith(".spec.json")
    )
    for path, stamp in zip(rows, stamps, strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"made": stamp}))
    made = reproduce(table, settings, output, resume=True)["made"]
    assert made["date"] == "2026-02-02"  # not that of writing the table again
    assert made["earlier"] == ["torch 2.9, commit abc1234"]
    assert "with torch 2.9, commit abc1234." in (output / "table.md").read_text()


@pytest.mark.parametrize(("worst", "scale"), [(20.0, "linear"), (250.0, "log")])
def test_one_bad_perplexity_does_not_squeeze_the_others(worst, scale):
    scores = {"full": 5.0, "lora": 6.0, "kfac-pruner": worst}
    results = {
        "option": "block_size",
        "settings": {"text": {"metric": "perplexity", "eval_examples": 9}},
        "runs": [
            {
                "setting": "text",
                "method": method,
                "value": 16,
                "seed": 0,
                "score": score,
            }
            for method, score in scores.items()
        ],
    }
    figures = []
    svg_file(lambda: figures.append(draw(results)) or figures[0])
    (axes,) = figures[0].axes
    assert axes.get_xscale() == scale
    assert axes.get_title(loc="left") == "text, by block size"


def test_words_stand_left_and_numbers_right():
    header, rows = ("", "method", "ms"), [("a", "Full, ZeRO-2", "46 [43, 52]")]
    _, sides, row = markdown(header, rows).splitlines()
    assert sides == "| :-- | :-- | --: |"
    assert row == "| a | Full, ZeRO-2 | 46 [43,\xa052] |"  # breaks before the bracket
    assert markdown(header, []).endswith("| :-- | --: | --: |\n")
