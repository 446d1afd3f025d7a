"""The protocol of an evaluation: the validation data and the settings that affect AP."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vitdet.config import Config, flatten

# Settings that affect the AP of a given checkpoint on given data. How images are resized is part of
# the detector.
SETTINGS = (
    "data.dataset",
    "evaluate.score_threshold",
    "evaluate.nms_iou",
    "evaluate.max_detections",
)
PRECISION = "evaluate.precision"


def settings_of(config: Config) -> str:
    """Return the settings of this config that affect AP, as one string."""
    values = flatten(config)
    # Named only where it is not fp32, in which all AP was measured before there was this setting
    keys = SETTINGS if config.evaluate.precision == "fp32" else (*SETTINGS, PRECISION)
    return " ".join(f"{key}={values[key]}" for key in keys)


@dataclass(frozen=True)
class Protocol:
    """The fingerprint of the validation split ("" if unknown) and the settings that affect AP."""

    fingerprint: str
    settings: str

    @classmethod
    def of(cls, config: Config, fingerprint: str) -> Protocol:
        """Create the protocol of an evaluation with this config on the split with this fingerprint."""
        return cls(fingerprint, settings_of(config))

    @property
    def tag(self) -> str:
        """The name of the model version tag that stores the box AP under this protocol."""
        text = f"{self.fingerprint} {self.settings}"
        return f"box_ap_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def tags(self) -> dict[str, str]:
        """Return the tags of a version that was registered with an AP under this protocol.

        Empty if the data is unknown, as such an AP cannot be compared.
        """
        if not self.fingerprint:
            return {}
        return {"val_fingerprint": self.fingerprint, "evaluate_settings": self.settings}
