"""CPU time of reading a training image: vitdet, Detectron2's mapper if installed, plain Pillow.

All three process the same photos alternately, in one process: read, large-scale jitter (0.1 to 2.0
of 1024), crop, flip, boxes and masks. Detectron2's DatasetMapper has the augmentations of its
ViTDet configs (RandomFlip, ResizeScale, FixedSizeCrop without padding), with polygons as in these
configs and with bitmasks. Plain Pillow reads, resizes to 1024 and copies into an array, as a
reference for the speed of the machine. Times are user and system CPU time.
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
    """Return CPU milliseconds per image, mean and minimum of the rounds over all images with
    objects of these splits of a folder in COCO's layout, and the ratios of vitdet's mean to the
    others'.

    Raises the errors of `read_split`, and ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    configure_process()
    stream = []
    for split in splits:
        data = DataConfig(
            root=str(folder), train_split=split, val_split=split, image_size=SIDE, workers=0
        )
        # without a cache, as for a data set that does not fit into memory
        stream.append(TrainData(read_split(data, split), data, seed=0, cache=0))
    records = [record for data in stream for record in data.records]
    ways: dict[str, Callable[[int], None]] = {"vitdet": lambda turn: _ours(stream, turn)}
    ways |= {f"detectron2 {form}": way for form, way in _detectron2(records).items()}
    ways["pillow"] = lambda _: _plain(records)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):  # the first round imports modules and fills caches
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


def _ours(stream: list[TrainData], turn: int) -> None:
    for data in stream:
        for place in range(len(data.records)):
            data[(turn + 1) * len(data.records) + place]


def _plain(records: list[Record]) -> None:
    for record in records:
        with Image.open(record.path) as file:
            np.asarray(file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _detectron2(records: list[Record]) -> dict[str, Callable[[int], None]]:
    """Return a function that processes the records for each mask format; none if detectron2, or
    shapely, which it uses for cropping, is not installed.
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

    def way(form: str) -> Callable[[int], None]:
        mapper = DatasetMapper(
            is_train=True,
            augmentations=chain,
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format=form,
            recompute_boxes=True,
        )

        def pass_over(turn: int) -> None:
            np.random.seed(turn + 1)  # detectron2 draws from numpy's own generator
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for entry in entries:
                    mapper(entry)

        return pass_over

    return {form: way(form) for form in ("polygon", "bitmask")}
