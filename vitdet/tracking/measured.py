"""The provenance of a file of metrics or matches: the checkpoint, data and settings of the evaluation.

It is stored in a second file, as `dvc metrics` and other readers expect only numbers in the metrics
file. That file contains the sha256 of the metrics file and of the checkpoint, so that metrics that
were edited or restored from elsewhere are not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, from_dict, to_dict
from vitdet.data.fingerprint import fingerprint
from vitdet.data.protocol import Protocol, settings_of
from vitdet.files import sha256, write_json

DATA = ("dataset", "val_split", "max_images")  # settings in `data` that select the images


@dataclass(frozen=True)
class Measured:
    """The provenance of metrics: checkpoint, validation split, and two sections of the config."""

    checkpoint_sha256: str
    val_fingerprint: str
    data: Mapping[str, Any]
    evaluate: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Path, config: Config, val_fingerprint: str) -> Measured:
        """Create the provenance of an evaluation of this checkpoint with this config."""
        tree = to_dict(config)
        return cls(sha256(checkpoint), val_fingerprint, tree["data"], tree["evaluate"])

    @property
    def protocol(self) -> Protocol:
        """The protocol of the evaluation."""
        settings = {"data": {"dataset": self.data["dataset"]}, "evaluate": self.evaluate}
        return Protocol.of(from_dict(settings), self.val_fingerprint)

    def config(self, own: Config) -> Config:
        """Return the config of the evaluation. own: the config in the checkpoint."""
        return from_dict(to_dict(own) | {"data": self.data, "evaluate": self.evaluate})


def agree(ours: Config, theirs: Config) -> bool:
    """Whether two configs select the same validation images and evaluate them in the same way.

    The location of the data is ignored.
    """
    keys_agree = all(getattr(ours.data, key) == getattr(theirs.data, key) for key in DATA)
    return keys_agree and settings_of(ours) == settings_of(theirs)


def write_metrics(path: Path, metrics: Mapping[str, float], measured: Measured | None) -> None:
    """Write metrics, and their provenance to the file `beside(path)`.

    measured: None if the detector that produced the results is unknown.
    """
    beside(path).unlink(missing_ok=True)
    write_json(path, metrics)
    if measured is not None:
        write_measured(path, measured)


def write_evaluation(
    checkpoint: Path,
    overrides: Sequence[str],
    config: Config | None,
    metrics: Mapping[str, float],
    output: Path | None,
    plots: Path | None,
) -> None:
    """Write metrics to the file `output`, and the provenance of these and of the matches in the folder `plots`.

    overrides, config: of the evaluation, as in `vitdet.evaluate`.
    """
    if output is None and plots is None:
        return
    from vitdet.evaluation.evaluator import evaluation_config
    from vitdet.evaluation.matches import MATCHES

    own = from_dict(load_model_file(checkpoint)["config"])
    used, _ = evaluation_config(own, overrides, config)
    measured = Measured.of(checkpoint, used, fingerprint(used.data, used.data.val_split))
    if output:
        write_metrics(output, metrics, measured)
    if plots:
        write_measured(plots / MATCHES, measured)


def write_measured(path: Path, measured: Measured) -> None:
    """Write the provenance of a file of metrics or matches beside it."""
    write_json(beside(path), {"metrics_sha256": sha256(path), **asdict(measured)})


def read_metrics(path: Path) -> dict[str, float]:
    """Return the metrics in a file of `write_metrics`. Raises ValueError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); expected metrics") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, int | float | None) for value in content.values()
    ):
        raise ValueError(f"{path}: expected metrics, a name and a number each")
    return content


def read_measured(path: Path) -> Measured | None:
    """Return the provenance of the metrics or matches in this file; None if unknown."""
    try:
        content = json.loads(beside(path).read_text())
        if content.pop("metrics_sha256") == sha256(path):
            return Measured(**content)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside(path)}: not a file of `vitdet evaluate`; remove it") from error
    return None


def beside(path: Path) -> Path:
    """Return the path of the file with the provenance of this one."""
    return path.with_name(f"{path.stem}.measured.json")
