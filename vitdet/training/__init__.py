"""Training a detector."""

from vitdet.training.stop import Stopped
from vitdet.training.trainer import train

__all__ = ["Stopped", "train"]
