"""The tiny data set: a generated data set in COCO's layout, with the same bytes for the same seed.

Training uses the scenes of seed 2 x seed, validation those of 2 x seed + 1; scenes of PRETRAIN_SEED
and above are for pre-training without labels.
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


def make_tiny(
    folder: Path, train: int = 4000, val: int = 200, seed: int = 0, processes: int = 0
) -> bool:
    """Write folder/{train,val}/*.jpg and folder/annotations/instances_{train,val}.json; return
    False if they exist.

    processes: 0: all available processors; the result does not depend on it. Raises ValueError if
    the counts or the seed are out of range, or the folder contains something else.
    """
    folder = Path(folder)
    if not (0 < train <= 500_000 and 0 < val <= 500_000):
        raise ValueError(f"expected 1 to 500000 images a split, got {train} and {val}")
    if not 0 <= seed < PRETRAIN_SEED // 2:
        raise ValueError(f"expected a seed from 0 to {PRETRAIN_SEED // 2 - 1}, got {seed}")
    if _is_there(folder, train, val, seed):
        return False
    try:
        with atomic_dir(folder) as temporary:
            (temporary / "annotations").mkdir()
            for order, (split, count) in enumerate((("train", train), ("val", val))):
                (temporary / split).mkdir()
                document = _write_split(
                    temporary / split, count, 2 * seed + order, 1 + 500_000 * order, processes
                )
                document["info"] = _info(split, count, seed)
                (temporary / "annotations" / f"instances_{split}.json").write_text(
                    json.dumps(document)
                )
    except OSError:
        if not _is_there(folder, train, val, seed):
            raise
        return False  # finished by a concurrent process meanwhile, e.g. another pod of the job
    return True


def _is_there(folder: Path, train: int, val: int, seed: int) -> bool:
    """Return whether the folder is this data set; False if it is missing or empty. Raises
    ValueError for other content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not _holds(folder, train, val, seed):
        raise ValueError(
            f"{folder}: contains something else than the tiny data set (version {VERSION}, seed "
            f"{seed}, {train} + {val} images); choose another folder or delete this one"
        )
    return True


def _info(split: str, count: int, seed: int) -> dict[str, str | int]:
    return {
        "description": "vitdet tiny",
        "version": VERSION,
        "seed": seed,
        "split": split,
        "images": count,
    }


def _holds(folder: Path, train: int, val: int, seed: int) -> bool:
    for split, count in (("train", train), ("val", val)):
        path = folder / "annotations" / f"instances_{split}.json"
        try:
            info = json.loads(path.read_text())["info"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not the tiny data set
        if info != _info(split, count, seed) or len(list((folder / split).glob("*.jpg"))) != count:
            return False
    return True


def _write_split(
    folder: Path, count: int, seed: int, first_id: int, processes: int
) -> dict[str, object]:
    """Draw and write the images; return the annotation document."""
    affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    processes = processes or (len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1)
    work = partial(_write_image, folder, seed, first_id)
    if min(processes, count // 16) > 1:
        # fork: the workers use nothing that runs threads, and start without importing the package
        # again
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with context.Pool(processes) as pool:
            scenes = pool.map(work, range(count), chunksize=8)
    else:
        scenes = [work(index) for index in range(count)]
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index, (name, height, width, objects) in enumerate(scenes):
        images.append({"id": first_id + index, "file_name": name, "height": height, "width": width})
        for thing in objects:
            annotations.append(
                {
                    "id": 2 * first_id + len(annotations),
                    "image_id": first_id + index,
                    "category_id": thing.category_id,
                    "bbox": list(thing.bbox),
                    "area": thing.area,
                    "segmentation": thing.segmentation,
                    "iscrowd": int(thing.crowd),
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in CATEGORIES.items()
    ]
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _write_image(
    folder: Path, seed: int, first_id: int, index: int
) -> tuple[str, int, int, tuple[SceneObject, ...]]:
    scene = draw_scene(seed, index)
    name = f"{first_id + index:012d}.jpg"
    write_jpeg(folder / name, Image.fromarray(scene.image), quality=92, subsampling=0)
    return name, *scene.image.shape[:2], scene.objects
