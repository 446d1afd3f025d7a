"""The job's annotation `vitdet/progress`, from lines that a training run writes."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime

from components.launcher.progress import INTERVAL, PROGRESS, Progress, parse
from tests.cluster.test_following import DONE, RUNNING, Record, follow
from tests.cluster.test_launcher import pod
from vitdet.tracking import tracker

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POINTS = {"loss": 3.5, "loss_cls": 1.25, "images_per_second": 12.34}


def progress_line(step: int, values: dict[str, float], left: float) -> str:
    """Return the log line of this step of 90000, with `left` seconds left."""
    stream = io.StringIO()
    shown = tracker.Progress(tracker.Tracker(), 90_000, 0, stream)
    shown.since -= left / max(90_000 - step, 1) * step
    shown.log(values, step)
    return stream.getvalue().rstrip("\n")


def test_the_progress_lines_of_training_are_parsed() -> None:
    line = progress_line(45_000, POINTS, 3 * 86_400 + 65)
    assert parse(line, NOW) == {
        "step": 45_000,
        "steps": 90_000,
        "images_per_second": 12.3,
        "eta": "2026-01-04T00:01:05Z",
        "time": "2026-01-01T00:00:00Z",
    }
    assert parse(progress_line(89_000, POINTS, 30), NOW)["eta"] == "2026-01-01T00:00:30Z"
    for other in (
        progress_line(1200, {"box_ap": 35.2}, 60),
        "step 3",
        "launcher: step 1/2  0:01 left",
    ):
        assert parse(other, NOW) is None


def test_progress_is_published_every_thirty_seconds_and_at_the_end() -> None:
    progress = Progress()
    assert progress.due(0) == ""
    progress.read(progress_line(100, POINTS, 60))
    assert json.loads(progress.due(0))["step"] == 100
    progress.read(progress_line(200, POINTS, 60))
    progress.read("a line without progress")
    assert progress.due(INTERVAL - 1) == ""
    assert json.loads(progress.due(INTERVAL))["step"] == 200
    progress.read(progress_line(90_000, POINTS, 0))
    assert progress.due(INTERVAL + 1) == "" and progress.due(2 * INTERVAL, final=True)
    assert progress.due(3 * INTERVAL, final=True) == ""  # nothing new


def test_rank_0s_progress_is_annotated_and_a_failed_annotation_is_logged() -> None:
    class Mute(Record):
        def annotate(self, annotations: dict[str, str]) -> None:
            if PROGRESS in annotations:
                raise RuntimeError("cannot patch pytorchjobs")

    looks = [(RUNNING, [pod()]), (RUNNING, [pod()]), (DONE, [pod()])]
    for kind in (Record, Mute):
        record = kind(*looks)
        record.logs["w-0"] = [f"2026-01-01T00:00:00.1Z {progress_line(100, POINTS, 60)}"]
        lines, error = follow(record)
        assert not error and any(line.startswith("step 100/90000") for line in lines)
        if kind is Record:
            assert json.loads(record.annotations[PROGRESS])["step"] == 100
        else:
            assert any("with its progress: cannot patch" in line for line in lines)
