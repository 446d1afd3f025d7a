"""What a server has of a run's points."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """Step -> the last value there."""
    points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
    return {point.step: point.value for point in points}


def same_number(ours: float, theirs: float) -> bool:
    """Whether two values are the same for MLflow, which stores NaN, and the largest number for infinity."""
    largest = sys.float_info.max
    return (
        ours == theirs or ours != ours and theirs != theirs or abs(ours) >= largest <= abs(theirs)
    )
