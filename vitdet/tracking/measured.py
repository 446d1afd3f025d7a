"""The provenance of metrics and matches: the checkpoint, data and settings of their evaluation.

The provenance is stored in a second file, as `dvc metrics` and other readers expect only numbers in
the metrics file. The second file contains the sha256 of the metrics file and of the checkpoint, so
that a change of either file is detected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, from_dict, to_dict
from vitdet.data.fingerprint import change, fingerprint, fingerprints
from vitdet.data.protocol import Protocol, settings_of
from vitdet.files import sha256, write_json

DATA = ("dataset", "val_split", "max_images")  # settings of `data` that select the images


@dataclass(frozen=True)
class Measured:
    """The provenance of metrics: two digests, and the config sections `data` and `evaluate`."""

    checkpoint_sha256: str
    val_fingerprint: str
    data: Mapping[str, Any]
    evaluate: Mapping[str, Any]

    @property
    def protocol(self) -> Protocol:
        """The protocol of the evaluation."""
        settings = {"data": {"dataset": self.data["dataset"]}, "evaluate": self.evaluate}
        return Protocol.of(from_dict(settings), self.val_fingerprint)

    def config(self, stored: Config) -> Config:
        """Return the config of the evaluation. stored: the config in the checkpoint."""
        return from_dict(to_dict(stored) | {"data": self.data, "evaluate": self.evaluate})


def write_metrics(path: Path, metrics: Mapping[str, float], measured: Measured | None) -> None:
    """Write metrics to a file, and their provenance to `beside(path)`.

    measured: the provenance; None if the detector that produced the results is unknown.
    """
    beside(path).unlink(missing_ok=True)
    write_json(path, metrics)
    if measured is not None:
        _write_measured(path, measured)


def write_evaluation(
    checkpoint: Path,
    digest: str,
    overrides: Sequence[str],
    config: Config | None,
    metrics: Mapping[str, float],
    output: Path | None,
    plots: Path | None,
) -> None:
    """Write metrics to `output`, their provenance, and the provenance of the matches in `plots`.

    digest: the sha256 of the evaluated checkpoint, which may have been replaced since.
    overrides, config: as passed to `vitdet.evaluate` for this evaluation.
    """
    if output is None and plots is None:
        return
    from vitdet.evaluation.evaluator import evaluation_config
    from vitdet.evaluation.matches import MATCHES

    own = from_dict(load_model_file(checkpoint)["config"])
    used, _ = evaluation_config(own, overrides, config)
    tree, found = to_dict(used), fingerprint(used.data, used.data.val_split)
    measured = Measured(digest, found, tree["data"], tree["evaluate"])
    if output:
        write_metrics(output, metrics, measured)
    if plots:
        _write_measured(plots / MATCHES, measured)


def _write_measured(path: Path, measured: Measured) -> None:
    write_json(beside(path), {"metrics_sha256": sha256(path), **asdict(measured)})


def read_metrics(path: Path) -> dict[str, float]:
    """Return {metric: value} from a JSON file. Raises ValueError for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); expected metrics") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, int | float | None) for value in content.values()
    ):
        raise ValueError(f"{path}: expected a JSON object that maps metric names to numbers")
    return content


def read_measured(path: Path) -> Measured | None:
    """Return the provenance of metrics or matches; None if its file is missing or outdated."""
    file = beside(path)
    try:
        content = json.loads(file.read_text())
        if content.pop("metrics_sha256") == sha256(path):
            return Measured(**content)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged, or not written by `vitdet evaluate`; remove the file"
        ) from error
    return None


def beside(path: Path) -> Path:
    """Return the path of the provenance file next to a file of metrics or matches."""
    return path.with_name(f"{path.stem}.measured.json")


def own_protocol(stored: Mapping, may_read: bool) -> Protocol:
    """Return the protocol of the metrics in a checkpoint; unknown data has the fingerprint "".

    stored: the content of the checkpoint. may_read: whether the dataset may be read, which is
    necessary for checkpoints of vitdet 0.1.
    """
    own, known = from_dict(stored["config"]), stored.get("fingerprints")
    if known or not stored.get("dataset_digest") or not may_read:
        return Protocol.of(own, (known or {}).get("val", ""))
    try:  # vitdet 0.1 stored one digest of both splits: compare it with the current data
        found = fingerprints(own.data)
        return Protocol.of(own, "" if change(stored, own.data, found) else found["val"])
    except (OSError, ValueError):
        return Protocol.of(own, "")


def protocol_of_file(
    checkpoint: Path, stored: Mapping, config: Config | None, measured: Measured | None, gated: bool
) -> tuple[Config, Protocol]:
    """Return the config and protocol of the metrics in a file; unknown data has the fingerprint "".

    stored: the content of the checkpoint. config, measured: the metrics' config and provenance, if
    known. gated: whether the gate will be applied. Raises ValueError if the gate would use metrics
    of a different checkpoint or config.
    """
    own = from_dict(stored["config"])
    unknown = config or own, Protocol.of(config or own, "")
    if measured is None:
        if config is None or not gated:
            return unknown
        return config, Protocol.of(config, _fingerprint_now(config, own, stored))
    used, problem = measured.config(own), ""
    if measured.checkpoint_sha256 != sha256(checkpoint):
        problem = "belong to a different checkpoint"
    elif config is not None and not _agree(config, used):
        problem = "were measured with different data or evaluate settings than those in --config"
    if problem and gated:
        raise ValueError(
            f"{checkpoint}: the metrics in --metrics {problem}; run `vitdet evaluate` again and "
            "pass its new --output file"
        )
    return unknown if problem else (config or used, Protocol.of(used, measured.val_fingerprint))


def _agree(ours: Config, theirs: Config) -> bool:
    """Return whether two configs evaluate the same images with the same settings."""
    same = all(getattr(ours.data, key) == getattr(theirs.data, key) for key in DATA)
    return same and settings_of(ours) == settings_of(theirs)


def _fingerprint_now(config: Config, own: Config, stored: Mapping) -> str:
    """Return the data's fingerprint; if the data is missing, the stored fingerprint or ""."""
    try:
        return fingerprint(config.data, config.data.val_split)
    except FileNotFoundError:
        keys = (*DATA, "root")
        same = all(getattr(config.data, key) == getattr(own.data, key) for key in keys)
        return own_protocol(stored, True).fingerprint if same else ""
