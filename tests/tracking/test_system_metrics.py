"""System metrics and GPU hours, logged with the training speed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tracking.test_tracking import start
from vitdet.tracking.journal import find
from vitdet.tracking.system_metrics import SystemMetrics


def test_system_metrics_are_logged_and_gpu_hours_continue_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(
        "vitdet.tracking.system_metrics.time", SimpleNamespace(monotonic=lambda: clock[0])
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("vitdet.distributed.world_size", lambda: 4)
    first = start(tmp_path, "")
    clock[0] = 1800.0
    first.log({"images_per_second": 1.0}, 10)
    first.log({"box_ap": 1.0}, 10)
    first.close("KILLED")
    clock[0] = 5000.0
    second = start(tmp_path, "", run_id=first.run_id, resume_step=10)
    clock[0] += 900.0
    second.log({"images_per_second": 1.0}, 20)
    second.close()
    journal = find(tmp_path, first.run_id)
    logged = [record for record, _ in journal.records() if "points" in record]
    hours = [record["points"].get("gpu_hours") for record in logged]
    assert hours == [2.0, None, 3.0] and journal.last_points()["gpu_hours"] == (20, 3.0)
    for record in (logged[0], logged[2]):
        assert 0 <= record["points"]["system/cpu_utilization_percentage"] <= 100
        assert record["points"]["system/system_memory_usage_megabytes"] > 0
    assert set(logged[1]["points"]) == {"box_ap"}


def test_gpus_found_by_nvml_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class GPUMonitor:
        def collect_metrics(self) -> None:
            self.values = {"gpu_0_utilization_percentage": 50.0, "gpu_0_power_usage_watts": 300.0}

        def aggregate_metrics(self) -> dict[str, float]:
            return self.values

        def clear_metrics(self) -> None:
            self.values = {}

    monkeypatch.setattr("mlflow.system_metrics.metrics.gpu_monitor.GPUMonitor", GPUMonitor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "temperature", lambda index: 60 + index)
    values = SystemMetrics().read()
    assert values["system/gpu_0_utilization_percentage"] == 50.0
    assert values["system/gpu_0_power_usage_watts"] == 300.0
    assert values["system/gpu_0_temperature_celsius"] == 60.0


def test_without_gpu_or_nvml_there_are_no_gpu_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert not any("gpu" in name for name in SystemMetrics().read())
