"""What a training image costs the processor: ours, Detectron2's mapper where it is installed, and plain Pillow.

Each takes the same photos in turns, all in one process: read, large-scale jitter (0.1 to 2.0 of 1024), crop, flip,
boxes and masks. Detectron2's is DatasetMapper with the augmentations of its ViTDet configs (RandomFlip, ResizeScale,
FixedSizeCrop without padding), with polygons as these configs train and with bitmasks. Plain Pillow reads, resizes to
1024 and copies into an array: a fixed piece of work to compare machines by. Times are of the processor, user and
system, of this process.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vitdet.config import DataConfig
from vitdet.data.dataset import TrainData, read_split
from vitdet.data.loader import configure_process
from vitdet.data.records import Record

SIDE = 1024


def measure(
    folder: Path | str, splits: tuple[str, ...] = ("train2017", "val2017"), rounds: int = 5
) -> dict:
    """Milliseconds of the processor an image, mean and least of the rounds over all images with objects of these
    splits of a folder in COCO's layout, and the ratios of our mean to Detectron2's.

    Raises what `read_split` raises, and ValueError where there is nothing to measure.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    configure_process()
    stream = [
        _stream(
            DataConfig(
                root=str(folder), train_split=split, val_split=split, image_size=SIDE, workers=0
            )
        )
        for split in splits
    ]
    records = [record for data in stream for record in data.records]
    ways: dict[str, Callable[[int], None]] = {"vitdet": lambda turn: _ours(stream, turn)}
    ways |= {f"detectron2 {form}": way for form, way in _detectron2(records).items()}
    ways["pillow"] = lambda _: _plain(records)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):  # the first turn fills caches and imports
        for name, way in ways.items():
            start = time.process_time()
            way(turn)
            if turn >= 0:
                found[name].append(1000 * (time.process_time() - start) / len(records))
    mean = {name: float(np.mean(those)) for name, those in found.items()}
    return {
        "images": len(records),
        "objects": sum(map(len, records)),
        "rounds": rounds,
        "cpu_ms": {
            name: {"mean": round(mean[name], 2), "least": round(min(those), 2)}
            for name, those in found.items()
        },
        "ratio": {name: round(mean["vitdet"] / mean[name], 3) for name in ways if name != "vitdet"},
    }


def _stream(data: DataConfig) -> TrainData:
    """Training data that reads each file each time, as of a data set that does not fit into memory."""
    return TrainData(read_split(data, data.train_split), data, seed=0, cache=0)


def _ours(stream: list[TrainData], turn: int) -> None:
    for data in stream:
        for place in range(len(data.records)):
            data[(turn + 1) * len(data.records) + place]


def _plain(records: list[Record]) -> None:
    for record in records:
        with Image.open(record.path) as file:
            np.asarray(file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _detectron2(records: list[Record]) -> dict[str, Callable[[int], None]]:
    """A turn over the records for each form of masks; none where detectron2 or shapely, with which it crops, lacks."""
    try:
        import shapely.geometry  # noqa: F401
        from detectron2.data import DatasetMapper, transforms
        from detectron2.structures import BoxMode
    except ImportError:
        return {}
    entries = [
        {
            "file_name": str(record.path),
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "annotations": [
                {
                    "bbox": box.tolist(),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": int(label),
                    "iscrowd": 0,
                    "segmentation": outline,
                }
                for box, label, outline in zip(
                    record.boxes, record.labels, record.segmentations, strict=True
                )
            ],
        }
        for record in records
    ]
    chain = [
        transforms.RandomFlip(horizontal=True),
        transforms.ResizeScale(0.1, 2.0, SIDE, SIDE),
        transforms.FixedSizeCrop((SIDE, SIDE), pad=False),
    ]

    def way(form: str) -> Callable[[int], None]:
        mapper = DatasetMapper(
            is_train=True,
            augmentations=chain,
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format=form,
            recompute_boxes=True,
        )

        def turn_over(turn: int) -> None:
            np.random.seed(turn + 1)  # detectron2 draws from numpy's own generator
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for entry in entries:
                    mapper(entry)

        return turn_over

    return {form: way(form) for form in ("polygon", "bitmask")}
