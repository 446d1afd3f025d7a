"""Training a detector."""

from vitdet.training.trainer import Stopped, train

__all__ = ["Stopped", "train"]
