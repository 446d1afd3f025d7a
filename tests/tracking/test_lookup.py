"""Lookup of MLflow runs by name."""

from __future__ import annotations

from mlflow.entities import Run as Stored
from mlflow.entities import RunInfo
from mlflow.entities.run_data import RunData

from vitdet.tracking.lookup import find_run


class Server:
    """An MLflow client for a server with 1500 experiments, of which the oldest contains the run."""

    def search_experiments(self, max_results: int = 1000) -> list:
        return [type("Experiment", (), {"experiment_id": str(i)}) for i in range(1500)][
            :max_results
        ]

    def search_runs(self, experiments: list[str], query: str) -> list[Stored]:
        info = RunInfo("r", "1499", "me", "FINISHED", 0, 1, "active", run_name="mine")
        return [Stored(info, RunData())] if "1499" in experiments else []


def test_a_run_is_found_on_a_server_with_many_experiments() -> None:
    assert find_run(Server(), "mine").run_id == "r"
