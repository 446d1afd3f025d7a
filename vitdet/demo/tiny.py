"""The tiny data set: a generated data set in COCO's layout, with the same bytes for the same seed.

In a data set with seed s, the training images are the scenes of seed 2 s, and the validation images
are the scenes of seed 2 s + 1. The scenes of PRETRAIN_SEED are for pre-training without labels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from vitdet.demo.scenes import CATEGORIES, VERSION, Scene, SceneObject, draw_scene
from vitdet.files import atomic_dir, write_jpeg

__all__ = ["CATEGORIES", "PRETRAIN_SEED", "Scene", "SceneObject", "draw_scene", "make_tiny"]

PRETRAIN_SEED = 1_000_000
LARGEST = 500_000  # maximum number of images per split


def make_tiny(
    folder: Path, train: int = 4000, val: int = 200, seed: int = 0, processes: int = 0
) -> bool:
    """Write folder/{train,val}/*.jpg and folder/annotations/instances_{train,val}.json.

    The result does not depend on `processes` (0: one per available processor). Returns False if the
    data set already exists. Raises ValueError if the counts or the seed are out of range, or if the
    folder has other content.
    """
    folder = Path(folder)
    if not (0 < train <= LARGEST and 0 < val <= LARGEST):
        raise ValueError(f"expected 1 to {LARGEST} images per split, got {train} and {val}")
    if not 0 <= seed < PRETRAIN_SEED // 2:
        raise ValueError(f"expected a seed from 0 to {PRETRAIN_SEED // 2 - 1}, got {seed}")
    if _is_there(folder, train, val, seed):
        return False
    try:
        with atomic_dir(folder) as temporary:
            (temporary / "annotations").mkdir()
            for order, (split, count) in enumerate((("train", train), ("val", val))):
                (temporary / split).mkdir()
                first_id = 1 + LARGEST * order
                tables = _write_split(
                    temporary / split, count, 2 * seed + order, first_id, processes
                )
                document = {"info": _info(split, count, seed), "licenses": [], **tables}
                path = temporary / "annotations" / f"instances_{split}.json"
                path.write_text(json.dumps(document))
    except OSError:
        if not _is_there(folder, train, val, seed):
            raise
        return False  # completed by a concurrent process, e.g. another pod of the job
    return True


def _is_there(folder: Path, train: int, val: int, seed: int) -> bool:
    """Return whether the folder contains this data set; raise ValueError for other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (_contains(folder, "train", train, seed) and _contains(folder, "val", val, seed)):
        raise ValueError(
            f"{folder}: contains something other than the tiny data set (version {VERSION}, seed "
            f"{seed}, {train} + {val} images); choose another folder or delete this one"
        )
    return True


def _info(split: str, count: int, seed: int) -> dict[str, str | int]:
    number = {"version": VERSION, "seed": seed}
    return {"description": "vitdet tiny", **number, "split": split, "images": count}


def _contains(folder: Path, split: str, count: int, seed: int) -> bool:
    try:
        path = folder / "annotations" / f"instances_{split}.json"
        info = json.loads(path.read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not the tiny data set
    return info == _info(split, count, seed) and len([*(folder / split).glob("*.jpg")]) == count


def _write_split(
    folder: Path, count: int, seed: int, first_id: int, processes: int
) -> dict[str, object]:
    """Draw and write the images; return the tables of the annotation file."""
    affinity = hasattr(os, "sched_getaffinity")  # missing on macOS
    processes = processes or (len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1)
    work = partial(_write_image, folder, seed, first_id)
    if min(processes, count // 16) > 1:
        # fork avoids another import of the package; workers do not use the parent's thread pools
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with context.Pool(processes) as pool:
            scenes = pool.map(work, range(count), chunksize=8)
    else:
        scenes = [work(index) for index in range(count)]
    pairs = [(image["id"], obj) for image, objects in scenes for obj in objects]
    annotations = [
        {
            "id": 2 * first_id + number,
            "image_id": image_id,
            "category_id": obj.category_id,
            "bbox": list(obj.bbox),
            "area": obj.area,
            "segmentation": obj.segmentation,
            "iscrowd": int(obj.crowd),
        }
        for number, (image_id, obj) in enumerate(pairs)
    ]
    categories = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in CATEGORIES.items()
    ]
    images = [image for image, _ in scenes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_image(
    folder: Path, seed: int, first_id: int, index: int
) -> tuple[dict[str, object], tuple[SceneObject, ...]]:
    """Write an image; return its entry in the annotation file, and its objects."""
    scene, number = draw_scene(seed, index), first_id + index
    (height, width), name = scene.image.shape[:2], f"{number:012d}.jpg"
    write_jpeg(folder / name, Image.fromarray(scene.image), quality=92, subsampling=0)
    return {"id": number, "file_name": name, "height": height, "width": width}, scene.objects
