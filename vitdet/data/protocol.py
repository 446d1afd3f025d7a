"""What an AP was measured on: the validation data, and the settings that change AP."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vitdet.config import Config, flatten

# What changes the AP of a given checkpoint on given data. How a detector resizes its images belongs
# to the detector.
SETTINGS = (
    "data.dataset",
    "evaluate.score_threshold",
    "evaluate.nms_iou",
    "evaluate.max_detections",
)


def settings_of(config: Config) -> str:
    """The settings of an evaluation with this config that change AP, as one text."""
    values = flatten(config)
    return " ".join(f"{key}={values[key]}" for key in SETTINGS)


@dataclass(frozen=True)
class Protocol:
    """The fingerprint of the validation split ('': not known), and the settings that change AP."""

    fingerprint: str
    settings: str

    @classmethod
    def of(cls, config: Config, fingerprint: str) -> Protocol:
        """The protocol of an evaluation with this config on the split of this fingerprint."""
        return cls(fingerprint, settings_of(config))

    @property
    def tag(self) -> str:
        """The tag of a version that holds its box AP under this protocol."""
        text = f"{self.fingerprint} {self.settings}"
        return f"box_ap_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def tags(self) -> dict[str, str]:
        """The tags of a version that was evaluated under this protocol when it was registered.

        None where the data is not known: such an AP cannot be compared.
        """
        if not self.fingerprint:
            return {}
        return {"val_fingerprint": self.fingerprint, "evaluate_settings": self.settings}
