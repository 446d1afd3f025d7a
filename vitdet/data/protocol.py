"""Evaluation protocol: the validation data and the settings that affect AP."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vitdet.config import Config, flatten
from vitdet.config.digest import LATER

# Settings that affect the AP of a given checkpoint on given data. The image size is not listed,
# since resizing is part of the detector.
SETTINGS = (
    "data.dataset",
    "evaluate.score_threshold",
    "evaluate.nms_iou",
    "evaluate.max_detections",
    "evaluate.max_images",
    "evaluate.precision",
)


def settings_of(config: Config) -> str:
    """Return the settings that affect AP, as one string.

    Settings added after version 0.1 are omitted if they have their default value, so that AP
    measured with version 0.1 remains comparable.
    """
    values, defaults = flatten(config), flatten(Config())
    keys = [key for key in SETTINGS if key not in LATER or values[key] != defaults[key]]
    return " ".join(f"{key}={values[key]}" for key in keys)


@dataclass(frozen=True)
class Protocol:
    """Fingerprint of the validation split ("" if unknown) and settings that affect AP."""

    fingerprint: str
    settings: str

    @classmethod
    def of(cls, config: Config, fingerprint: str) -> Protocol:
        """Return the protocol of an evaluation on the split with this fingerprint."""
        return cls(fingerprint, settings_of(config))

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that identify the protocol."""
        return hashlib.sha256(f"{self.fingerprint} {self.settings}".encode()).hexdigest()[:12]

    def tag(self, metric: str) -> str:
        """Return the name of the model version tag that stores this metric under this protocol."""
        return f"{metric}_{self.digest}"

    def tags(self) -> dict[str, str]:
        """Return the tags of a model version whose AP was measured under this protocol.

        Returns {} if the fingerprint is unknown, since AP is then not comparable.
        """
        if not self.fingerprint:
            return {}
        return {"val_fingerprint": self.fingerprint, "evaluate_settings": self.settings}
