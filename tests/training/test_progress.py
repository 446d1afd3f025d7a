"""Progress output: one updated line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from tests.conftest import Recorder
from vitdet.tracking.tracker import Progress, clock

POINTS = {"loss": 3.5, "loss_cls": 1.25, "loss_mask": 0.7, "images_per_second": 12.34}
AP = {"box_ap": 35.21, "mask_ap": 30.05}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> tuple[str, Recorder]:
    recorder = Recorder()
    progress = Progress(recorder, steps=100, start=20, stream=stream)
    progress.log(POINTS, 40)
    progress.log(POINTS, 60)
    progress.log(AP, 60)
    progress.log(POINTS, 100)
    progress.close("KILLED")
    return stream.getvalue(), recorder


def test_a_log_has_plain_lines() -> None:
    text, recorder = show(io.StringIO())
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 4 and text.endswith("\n")
    assert lines[0].startswith("step 40/100  ")
    assert "12.3 images/s" in lines[0] and " left" in lines[0]
    assert "loss 3.500 (cls 1.250  mask 0.700)" in lines[0]
    assert lines[2] == "step 60/100  box AP 35.2  mask AP 30.1"
    assert recorder.points == {40: POINTS, 60: {**POINTS, **AP}, 100: POINTS}
    assert recorder.status == "KILLED"


def test_a_terminal_shows_one_line_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text, _ = show(Terminal())
    shown = text.split("\r\x1b[2K")
    assert shown[0] == "" and len(shown) == 5
    # the line with AP remains, and close ends the last line
    assert [part.endswith("\n") for part in shown[1:]] == [False, False, True, True]
    # a wrapped line could not be overwritten
    assert all(len(part.rstrip("\n")) < 60 for part in shown)
    assert "images/s  loss 3.500" in shown[1]


def test_the_time_left_counts_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("vitdet.tracking.tracker.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(Recorder(), steps=100, start=80, stream=stream)
    now[0] += 30  # ten steps
    progress.log(POINTS, 90)
    assert "  0:30 left  " in stream.getvalue()
    assert (clock(0), clock(65), clock(3725)) == ("0:00", "1:05", "1:02:05")
