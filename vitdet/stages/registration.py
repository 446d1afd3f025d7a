"""Comparison with the champion (the gate), registration and promotion in the model registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.config import Config, load_config
from vitdet.files import write_json
from vitdet.stages.outcomes import recorded, write_verdict
from vitdet.stages.workspace import champion_file, registry, runs_folder

if TYPE_CHECKING:
    from vitdet.data.protocol import Protocol
    from vitdet.tracking.measured import Measured
    from vitdet.tracking.registry import Registered


def register(
    checkpoint: Path,
    *,
    folder: Path,
    alias: str,
    config: Config | None = None,
    metrics: dict[str, float] | None = None,
    protocol: Protocol | None = None,
    measured: Measured | None = None,
    plots: Path | None = None,
) -> Registered:
    """Add a checkpoint to the model registry; raise ValueError if MLflow is not installed.

    `vitdet.tracking.registry.register_checkpoint` documents the arguments and other errors.
    """
    from vitdet.tracking.runs import require_mlflow

    require_mlflow()
    from vitdet.tracking.registry import register_checkpoint

    return register_checkpoint(
        checkpoint,
        folder=folder,
        alias=alias,
        config=config,
        metrics=metrics,
        protocol=protocol,
        measured=measured,
        plots=plots,
    )


def gate(
    figures: str, configs: str, name: str, workspace: str, run_id: str, verdict: str
) -> tuple[bool, str]:
    """Return whether the detector passes the gate, and the reason.

    Writes the result, with the content of `figures`, to the JSON file `verdict`.
    """
    from vitdet.tracking import champion

    with recorded(workspace, name, run_id, "gate"):
        row, config = _read(figures), load_config(Path(configs) / f"{name}.yaml")
        found = champion.judge(**_candidate(row, config, name, workspace, run_id))
        judged = {**row, "passed": found.passed, "reason": found.reason}
        write_json(verdict, judged)
        write_verdict(workspace, name, run_id, judged)
        return found.passed, found.reason


def register_recipe(
    checkpoint: str, figures: str, configs: str, name: str, workspace: str, run_id: str
) -> str:
    """Register the detector, and promote it to champion if it still passes the gate.

    Returns one line with the version and the gate's reason. Raises the errors of `register`.
    """
    from vitdet.tracking import champion, evaluations

    with recorded(workspace, name, run_id, "register"):
        row, config = _read(figures), load_config(Path(configs) / f"{name}.yaml")
        found = register(
            Path(checkpoint),
            folder=runs_folder(workspace),
            alias="candidate",
            config=config,
            metrics=row["metrics"],
            protocol=evaluations.protocol_of(row),
            plots=evaluations.plots_of(row),
        )
        candidate = _candidate(row, config, name, workspace, run_id)
        verdict = champion.promote(found.version, **candidate)
        mark = f" ({champion.ALIAS})" if verdict.passed else ""
        return f"{found.name}, version {found.version}{mark}: {verdict.reason}"


def _candidate(
    row: dict[str, Any], config: Config, name: str, workspace: str, run_id: str
) -> dict[str, Any]:
    """Return keyword arguments of `champion.judge` and `promote` from an evaluation's record."""
    from vitdet.tracking import evaluations
    from vitdet.tracking.champion import Evaluated

    champion = champion_file(workspace, name, run_id)
    return {
        "candidate": evaluations.recorded_evaluation(row),
        "protocol": evaluations.protocol_of(row),
        "gate": config.gate,
        "evaluated": Evaluated(**_read(champion)) if champion.is_file() else None,
        **registry(config, workspace),
    }


def _read(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())
