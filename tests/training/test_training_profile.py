"""`vitdet train --profile`: the trace, and the time of each part of a step."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import profile, record_function

from tests.conftest import minimal
from vitdet.config import load_config
from vitdet.training import train
from vitdet.training.profile import IDLE, OPERATORS, PARTS, STEPS, part_lookup, union

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=[on_gpu, pytest.mark.cuda])],
)
def test_the_profile_reports_every_part_of_a_step(
    device: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = minimal(tiny, **{"optim.steps": STEPS, "train.eval_every": STEPS})
    with caplog.at_level(logging.INFO):
        train(load_config("tiny", settings), tmp_path / "run", profile=True)
    parts = json.loads((tmp_path / "run/profile/parts.json").read_text())
    assert list(parts) == list(PARTS)
    assert min(parts.values()) >= 0 and all(parts[part] > 0 for part in PARTS if part != IDLE)
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    assert set(PARTS) - {IDLE, "other", "NMS"} <= {event.get("name") for event in events}
    logged = next(
        entry.message for entry in caplog.records if "time per step of each part" in entry.message
    )
    rows = [line.split() for line in logged.splitlines()[1:]]
    assert len(rows) == len(PARTS) + 1 and rows[-1][0] == "step"
    assert sum(float(row[-3]) for row in rows[:-1]) == pytest.approx(float(rows[-1][1]), abs=0.1)
    assert sum(float(row[-1].rstrip("%")) for row in rows[:-1]) == pytest.approx(100, abs=1)


def test_profiling_too_few_steps_is_refused_at_the_start(tiny: Path, tmp_path: Path) -> None:
    config = load_config("tiny", minimal(tiny, **{"optim.steps": STEPS - 1}))
    with pytest.raises(
        ValueError, match=f"at least {STEPS} steps; steps left in this run: {STEPS - 1}; start"
    ):
        train(config, tmp_path / "run", profile=True)
    assert not (tmp_path / "run").exists()


def test_a_gradient_belongs_to_the_part_of_its_operator() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    with profile() as trace:
        with record_function("MLP"):
            hidden = first(torch.randn(4, 8))
            with record_function("attention"):  # the innermost scope wins
                hidden = second(hidden)
        hidden.exp().sum().backward()
    events = list(trace.events())
    part_of = part_lookup(events)
    found = {(event.name, part_of(event)) for event in events}
    products = {part for name, part in found if name == "aten::addmm"}
    assert products == {"MLP", "attention"}
    assert {part for name, part in found if name == "aten::mm"} == {"MLP", "attention"}
    assert {part for name, part in found if name in ("aten::exp", "ExpBackward0")} == {"other"}


def test_every_kernel_of_a_step_belongs_to_a_part() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if "vitdet::" in name}
    assert registered - {"vitdet::paste"} <= set(OPERATORS)  # masks are pasted only in evaluations
    assert set(OPERATORS.values()) <= set(PARTS)


def test_overlapping_time_is_counted_once() -> None:
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    assert union([]) == 0
