"""Jobs: processes that end together, what they tell, and how long they will take."""

from __future__ import annotations

import sys
import time

import pytest

from sylva_train._checks import DataError
from sylva_train.comparison import Job, jobs_folder, run_jobs
from sylva_train.comparison.events import Clock, decode_event, send
from sylva_train.comparison.process import TOLD, Processes


@pytest.mark.slow
def test_jobs_side_by_side_share_their_fate(tmp_path):
    here = "tests.sylva_train.test_jobs"
    specs = {"a": {"text": "a"}, "b": {"text": "b"}, "long": {"wait": True}}
    specs["bad"] = {"error": "no luck"}
    todo = {
        name: Job(
            name=name, label=f"job {name}", kind="x", spec=spec, function=f"{here}:echo"
        )
        for name, spec in specs.items()
    }
    with jobs_folder([], tmp_path / "out"):
        pair = [todo["a"], todo["b"]]
        rows = run_jobs(pair, tmp_path / "out", lambda _: None, workers=2)
        assert [row["text"] for row in rows] == ["a", "b"]
        assert all(row["made"]["versions"] for row in rows)
        # One that would wait for ever is ended with the one that fails.
        with pytest.raises(DataError, match="job bad: no luck"):
            run_jobs(list(todo.values()), tmp_path / "out", lambda _: None, workers=2)
    names = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert {"a.json", "b.json"} <= names
    assert not {"long.json", "bad.json"} & names


def test_a_process_that_starts_too_late_is_ended_too():
    processes = Processes()
    processes.kill()
    code = "import time; time.sleep(60)"
    with processes.child([sys.executable, "-c", code]) as process:
        assert process.wait(timeout=30) != 0


def echo(spec, tell):
    """What a job's process does in the test above."""
    if "error" in spec:
        raise DataError(spec["error"])
    while "wait" in spec:
        time.sleep(0.1)
    return spec


def test_the_clock_takes_a_method_for_as_long_as_it_took():
    clock = Clock(["a", "b", "a", "b"])
    assert clock.left(0) is None
    clock.finish(0, 10.0)
    assert clock.left(1) == 30.0  # b is as long as the mean
    clock.finish(1, 4.0)
    assert clock.left(2) == 14.0
    assert clock.left(2, elapsed=3.0) == 11.0
    assert clock.left(2, elapsed=99.0) == 4.0
    clock.finish(2)  # kept
    assert clock.left() == 4.0
    clock.finish(3, 4.0)
    assert clock.left() == 0.0
    assert Clock(["a"], workers=2).left() is None


def test_lines_that_are_no_events_are_none(capsys):
    body = {"stage": "scoring", "done": 1, "total": 2}
    send(**body)
    told = capsys.readouterr().out
    assert decode_event(told) == body
    for line in ("", "hello", told[:-5], "\x1esylva [1]"):
        assert decode_event(line) is None


@pytest.mark.slow
def test_a_process_ends_when_its_parent_does():
    code = (
        "import time; from sylva_train.comparison.process import end_with_parent as f;"
        " f(); print(flush=True); time.sleep(600)"
    )
    with Processes().child([sys.executable, "-c", code]) as process:
        process.stdout.readline()
        process.stdin.close()
        assert process.wait(timeout=60) == TOLD
