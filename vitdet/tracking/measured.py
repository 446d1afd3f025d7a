"""What a metrics file was measured on, in a file beside it.

The metrics file itself holds numbers only, as `dvc metrics` and other readers expect. The file
beside it names the sha256 of the metrics file and of the checkpoint: metrics that were edited or
restored from elsewhere are not taken for measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitdet.config import Config, from_dict, to_dict
from vitdet.data.protocol import settings_of
from vitdet.files import sha256, write_json

DATA = ("dataset", "val_split", "max_images")  # the settings of `data` that choose the images


@dataclass(frozen=True)
class Measured:
    """What metrics were measured on: the checkpoint, the validation split, sections of the config."""

    checkpoint_sha256: str
    val_fingerprint: str
    data: Mapping[str, Any]
    evaluate: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Path, config: Config, val_fingerprint: str) -> Measured:
        """Of an evaluation of this checkpoint with this config."""
        tree = to_dict(config)
        return cls(sha256(checkpoint), val_fingerprint, tree["data"], tree["evaluate"])

    def config(self, own: Config) -> Config:
        """The config of the evaluation; own: the checkpoint's."""
        return from_dict(to_dict(own) | {"data": self.data, "evaluate": self.evaluate})


def agree(ours: Config, theirs: Config) -> bool:
    """Whether two configs choose the same validation images and evaluate them alike.

    Where the data is stored does not count.
    """
    keys_agree = all(getattr(ours.data, key) == getattr(theirs.data, key) for key in DATA)
    return keys_agree and settings_of(ours) == settings_of(theirs)


def write_metrics(path: Path, metrics: Mapping[str, float], measured: Measured | None) -> None:
    """Write metrics, and beside them what they were measured on.

    measured: None for metrics of results whose detector is not known.
    """
    beside(path).unlink(missing_ok=True)
    write_json(path, metrics)
    if measured is not None:
        write_json(beside(path), {"metrics_sha256": sha256(path), **asdict(measured)})


def read_measured(path: Path) -> Measured | None:
    """What the metrics in this file were measured on; None where it is not known."""
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
    """The file that says what a metrics file was measured on."""
    return path.with_name(f"{path.stem}.measured.json")
