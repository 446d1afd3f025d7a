"""The load of this machine during training, as MLflow's system metrics, and GPU hours."""

from __future__ import annotations

import time
from contextlib import suppress

import torch

from vitdet import distributed


class SystemMetrics:
    """The load of this machine's CPUs, memory and GPUs, and the run's GPU hours.

    gpu_hours: GPU hours of earlier processes of the same run. GPU metrics require the package
    nvidia-ml-py. `read` takes a few milliseconds.
    """

    def __init__(self, gpu_hours: float = 0.0) -> None:
        # imported here, as the import takes seconds and only training needs it
        from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self._monitors.append(GPUMonitor())
        gpus = distributed.world_size() if torch.cuda.is_available() else 0
        self._rate, self._hours, self._start = gpus / 3600, gpu_hours, time.monotonic()

    def read(self) -> dict[str, float]:
        """Return `system/gpu_0_utilization_percentage` and similar metrics, and `gpu_hours`."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics = monitor.aggregate_metrics()
            values |= {f"system/{name}": float(value) for name, value in metrics.items()}
            monitor.clear_metrics()
        if self._rate:
            values["gpu_hours"] = self._hours + self._rate * (time.monotonic() - self._start)
            for index in range(torch.cuda.device_count()):
                with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no sensor
                    name = f"system/gpu_{index}_temperature_celsius"
                    values[name] = float(torch.cuda.temperature(index))
        return values
