"""What is said while something takes long."""

from __future__ import annotations

import math

import pytest

from sylva_train import progress
from sylva_train.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "under 0.1 s"),
        (0.2, "0.2 s"),
        (0.96, "1.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (119.7, "2 min"),
        (170, "2 min 50 s"),
        (3570, "1 h"),
        (3569, "59 min"),
        (5400, "1 h 30 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds, words):
    assert duration(seconds) == words


def test_progress_says_nothing_at_first_and_lines_later(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Progress() as bars:
        for second in range(100):
            now[0] += 1
            bars.report("scoring", second, 100)
            if second < 2:
                assert capsys.readouterr().err == ""
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  scoring: 2%, 1 min 38 s left"
    assert len(lines) == math.ceil(98 / progress.INTERVAL)


def test_progress_that_is_off_is_silent(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Progress(enabled=False) as bars:
        bars.say("hello")
        for second in range(100):
            now[0] += 1
            bars.report("scoring", second, 100)
    assert capsys.readouterr() == ("", "")


def test_bars_are_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress() as bars:
        for second in range(5):
            now[0] += 1
            bars.report("scoring", second, 10, words=f"scoring {second}")
        bars.bars.refresh()
        bars.report("scoring", 10, 10)
    drawn = capsys.readouterr().err
    assert "scoring 4" in drawn
    assert "6 s left" in drawn
