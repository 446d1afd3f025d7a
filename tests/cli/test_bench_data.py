"""The benchmark of reading and augmenting images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.cli.test_cli import Run, refused


def test_the_benchmark_prints_and_writes_the_time_per_image(
    vitdet: Run, tiny: Path, tmp_path: Path
) -> None:
    options = ("--split", "val", "--rounds", "2", "--output", tmp_path / "bench.json")
    code, output, _ = vitdet("bench", "data", tiny, *options)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert code == 0 and figures["rounds"] == 2 and figures["images"] > 0 and figures["objects"] > 0
    there = all(map(importlib.util.find_spec, ("detectron2", "shapely")))
    others = ["detectron2 polygon", "detectron2 bitmask", "pillow"] if there else ["pillow"]
    assert list(figures["cpu_ms"]) == ["vitdet", *others] and list(figures["ratio"]) == others
    for name, times in figures["cpu_ms"].items():
        assert 0 < times["least"] <= times["mean"] and name in output
    assert figures["ratio"]["pillow"] == pytest.approx(
        figures["cpu_ms"]["vitdet"]["mean"] / figures["cpu_ms"]["pillow"]["mean"], rel=0.02
    )
    refused(vitdet("bench", "data", tiny, "--rounds", "0"), "rounds must be at least 1")
    message = "instances_train2017.json: no such file or folder; the splits are train, val"
    refused(vitdet("bench", "data", tiny), message)
