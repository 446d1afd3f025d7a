"""Promotion of a version to champion (`vitdet promote`), and its reversal (`vitdet rollback`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, load_stored
from vitdet.data.protocol import Protocol, settings_of
from vitdet.tracking import champion, history
from vitdet.tracking.address import hide_credentials
from vitdet.tracking.client import Client
from vitdet.tracking.evaluations import model_id_of, read_evaluation
from vitdet.tracking.lookup import open_store
from vitdet.tracking.packaged_model import download, download_checkpoint
from vitdet.tracking.registry import CANDIDATE, CONFIG

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def promote_version(
    model_name: str,
    version: str | None,
    *,
    uri: str,
    folder: Path,
    config: Config | None = None,
    force: str | None = None,
) -> tuple[str, str]:
    """Make a registered version the champion if it passes the gate; return (version, reason).

    Args:
        version: The version number. Default: the version with the alias `candidate`.
        uri, folder: The MLflow store, as for `tracking_uri`.
        config: The gate, and the data and settings of the evaluation. Default: the config with
            which the version was registered.
        force: The reason for skipping the gate, which is stored. Default: the gate is applied.

    Raises LookupError if the model or version does not exist, and ValueError if the gate rejects
    the version or cannot be applied, or if `force` is given for the current champion.
    """
    client = open_store(uri, folder)
    number = version or _alias(client, model_name, CANDIDATE, "select a version with --version N")
    try:
        found = client.get_model_version(model_name, number)
    except LookupError as error:
        missing = hide_credentials(f"{model_name}: no version {number} ({error})")
        raise LookupError(missing) from error
    shown = f"{model_name}, version {number}"
    if force is not None:
        with champion.promoting(folder):
            before = history.champion_of(client, model_name)
            if before == number:
                raise ValueError(f"{shown}, is already the champion")
            history.set_champion(client, model_name, number, history.FORCED, before or "", force)
        return number, f"without the gate ({force})"
    tags = found.tags
    protocol = Protocol(tags.get("val_fingerprint", ""), tags.get("evaluate_settings", ""))
    if not protocol.fingerprint:
        raise ValueError(
            f"{shown}: the data that its metrics were measured on is unknown; register it again "
            "with the --metrics file of `vitdet evaluate`, or skip the gate with --force REASON"
        )
    used = config or _config_of(client, found)
    model: dict[str, Any] = {"uri": uri, "folder": folder, "model_name": model_name}

    def evaluate(checkpoint: Path, plots: Path) -> Mapping[str, float | None]:
        if settings_of(used) != protocol.settings:
            raise ValueError(
                f"the config differs from the candidate's settings ({protocol.settings}); pass "
                "the config of the candidate's evaluation with --config"
            )
        with tempfile.TemporaryDirectory(prefix="vitdet-candidate-") as work:
            file = download_checkpoint(client.uri, model_name, number, Path(work))
            names = [str(name) for name in load_model_file(file)["class_names"]]
        return champion.evaluation_like(used, names, protocol)(checkpoint, plots)

    candidate = read_evaluation(client, found, protocol, matches=True)
    verdict = champion.judge(
        candidate, protocol, used.gate, **model, evaluate=evaluate, version=number
    )
    if verdict.passed:
        verdict = champion.promote(number, candidate, protocol, used.gate, **model)
    if not verdict.passed:
        raise ValueError(f"{shown}, is not promoted: {verdict.reason}")
    return number, verdict.reason


def roll_back(model_name: str, *, uri: str, folder: Path, reason: str) -> tuple[str, str]:
    """Restore the previous champion; return the version numbers (replaced, restored).

    Raises LookupError if the model does not exist or has no champion, and ValueError if no
    earlier champion still exists.
    """
    client = open_store(uri, folder)
    with champion.promoting(folder):
        current = _alias(client, model_name, champion.ALIAS, "there is nothing to roll back")
        versions = client.search_model_versions(f"name = '{model_name}'")
        numbers = {str(version.version) for version in versions}
        earlier = history.predecessors(history.events(client, model_name), current)
        existing = [number for number in earlier if number in numbers]
        if not existing:
            raise ValueError(
                f"{model_name}: no existing version was champion before version {current}; select "
                f"a version with `vitdet promote {model_name} --version N`"
            )
        event = existing[0], history.ROLLED_BACK, current, reason
        history.set_champion(client, model_name, *event)
    return current, existing[0]


def _alias(client: Client, model_name: str, alias: str, otherwise: str) -> str:
    models = client.search_registered_models(f"name = '{model_name}'")
    if not models:
        raise LookupError(f"{model_name}: no such registered model; `vitdet register` creates one")
    if alias not in models[0].aliases:
        raise LookupError(f"{model_name}: no version has the alias {alias}; {otherwise}")
    return str(models[0].aliases[alias])


def _config_of(client: Client, found: ModelVersion) -> Config:
    """Return the config stored with a version. Raises ValueError if the version has no config."""
    model = model_id_of(found)
    stored = client.list_logged_model_artifacts(model) if model else []
    if not any(artifact.path == CONFIG for artifact in stored):
        raise ValueError(
            f"{found.name}, version {found.version}, was registered without its config; pass the "
            "config with --config FILE"
        )
    artifact = f"models:/{found.name}/{found.version}/{CONFIG}"
    with tempfile.TemporaryDirectory(prefix="vitdet-config-") as work:
        return load_stored(download(client.uri, artifact, Path(work)))
