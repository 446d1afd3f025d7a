"""From a folder in COCO's or LVIS's layout to batches: the training stream and the validation images."""

from vitdet.data.dataset import TrainData, ValData, read_split
from vitdet.data.loader import train_loader, val_loader

__all__ = ["TrainData", "ValData", "read_split", "train_loader", "val_loader"]
