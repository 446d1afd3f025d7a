"""CPU time of reading a training image with vitdet, Detectron2's DatasetMapper and Pillow.

The readers process the same images in a single process. vitdet and Detectron2 read an image, apply
large-scale jitter (0.1 to 2.0 times 1024), crop, flip, and transform boxes and masks. Detectron2 is
measured if it is installed, with the augmentations of its ViTDet configs (RandomFlip, ResizeScale,
FixedSizeCrop without padding), for polygons and for bitmasks. Pillow only reads an image, resizes
it to 1024 x 1024 and copies it into an array, as a reference for the speed of the machine. Times
are user and system CPU time.
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
    """Return CPU milliseconds per image for each reader: mean and minimum over `rounds` passes
    through all images with objects. `ratio` is vitdet's mean divided by another reader's mean.

    The splits are read from a folder in COCO's layout. Raises the errors of `read_split`, and
    ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    configure_process()
    stream = []
    for split in splits:
        data = DataConfig(
            root=str(folder), train_split=split, val_split=split, image_size=SIDE, workers=0
        )
        # cache=0: do not cache decoded images, as for large data sets
        stream.append(TrainData(read_split(data, split), data, seed=0, cache=0))
    records = [record for data in stream for record in data.records]
    readers: dict[str, Callable[[int], None]] = {"vitdet": lambda turn: _read_all(stream, turn)}
    readers |= {f"detectron2 {form}": read for form, read in _detectron2(records).items()}
    readers["pillow"] = lambda _: _read_with_pillow(records)
    found: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(-1, rounds):  # warm-up: round -1 imports modules and fills caches
        for name, read in readers.items():
            start = time.process_time()
            read(turn)
            if turn >= 0:
                found[name].append(1000 * (time.process_time() - start) / len(records))
    mean = {name: float(np.mean(times)) for name, times in found.items()}
    return {
        "images": len(records),
        "objects": sum(map(len, records)),
        "rounds": rounds,
        "cpu_ms": {
            name: {"mean": round(mean[name], 2), "least": round(min(times), 2)}
            for name, times in found.items()
        },
        "ratio": {name: round(mean["vitdet"] / mean[name], 3) for name in list(readers)[1:]},
    }


def _read_all(stream: list[TrainData], turn: int) -> None:
    for data in stream:
        for index in range(len(data.records)):
            data[(turn + 1) * len(data.records) + index]


def _read_with_pillow(records: list[Record]) -> None:
    for record in records:
        with Image.open(record.path) as file:
            np.asarray(file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _detectron2(records: list[Record]) -> dict[str, Callable[[int], None]]:
    """Return, for each mask format, a function that reads all records with Detectron2's mapper.

    Returns {} if detectron2 or shapely, which detectron2 uses to crop polygons, is not installed.
    """
    try:
        import shapely.geometry  # noqa: F401
        from detectron2.data import DatasetMapper, transforms
        from detectron2.structures import BoxMode
    except ImportError:
        return {}

    def annotations(record: Record) -> list[dict]:
        columns = zip(record.boxes, record.labels, record.segmentations, strict=True)
        shared = {"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
        return [
            {"bbox": box.tolist(), "category_id": int(label), "segmentation": outline, **shared}
            for box, label, outline in columns
        ]

    entries = [
        {
            "file_name": str(record.path),
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "annotations": annotations(record),
        }
        for record in records
    ]
    chain = [
        transforms.RandomFlip(horizontal=True),
        transforms.ResizeScale(0.1, 2.0, SIDE, SIDE),
        transforms.FixedSizeCrop((SIDE, SIDE), pad=False),
    ]

    def reader(form: str) -> Callable[[int], None]:
        mapper = DatasetMapper(
            is_train=True,
            augmentations=chain,
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format=form,
            recompute_boxes=True,
        )

        def read(turn: int) -> None:
            np.random.seed(turn + 1)  # detectron2 uses numpy's global generator
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for entry in entries:
                    mapper(entry)

        return read

    return {form: reader(form) for form in ("polygon", "bitmask")}
