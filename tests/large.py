"""Writes a folder in COCO's layout as large as COCO's training split, to measure how its reading scales.

    python tests/large.py DIR [IMAGES OBJECTS]     118,287 and 860,001, a file of 450 MB; no data set for training

Outlines are star-shaped with as many corners as COCO's on average, one object in 85 is a crowd; the image files are
links to a few drawn pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

SIZES = ((480, 640), (427, 640), (640, 480), (333, 500))  # height, width


def write(folder: Path, images: int = 118_287, objects: int = 860_001, split: str = "train", first: int = 1) -> Path:
    """FOLDER/annotations/instances_SPLIT.json and FOLDER/SPLIT/; image ids from `first` on."""
    rng = np.random.default_rng(first)
    place = folder / split
    for path in (place, folder / "annotations"):
        path.mkdir(parents=True, exist_ok=True)
    for height, width in SIZES:
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        noise.resize((width, height)).save(folder / f"{height}x{width}.jpg")
    heads, owners = [], np.sort(rng.integers(0, images, objects))
    for number in range(images):
        height, width = SIZES[number % len(SIZES)]
        name = f"{first + number:012d}.jpg"
        heads.append({"license": 4, "file_name": name, "height": height, "width": width, "id": first + number,
                      "coco_url": f"http://images.cocodataset.org/{split}2017/{name}",
                      "date_captured": "2013-11-14 11:18:45"})
        if not (place / name).is_symlink():
            (place / name).symlink_to(f"../{height}x{width}.jpg")
    categories = [{"supercategory": "thing", "id": 1 + k, "name": f"class {k}"} for k in range(80)]
    path = folder / "annotations" / f"instances_{split}.json"
    with open(path, "wb") as file:
        file.write(b'{"images": ' + msgspec.json.encode(heads) + b', "categories": ' + msgspec.json.encode(categories))
        file.write(b', "annotations": [')
        for number in rng.permutation(objects).tolist():
            annotation = _object(rng, heads[owners[number]]) | {"id": 900_100_000_000 + number}
            file.write(msgspec.json.encode(annotation) + b", ")
        file.seek(-2, 2)
        file.write(b"]}")
    return path


def _object(rng: np.random.Generator, head: dict) -> dict:
    height, width = head["height"], head["width"]
    many = rng.random() < 1 / 85
    corners = int(np.clip(rng.lognormal(3.0, 0.6), 4, 200))
    turns = np.arange(corners) * (2 * np.pi / corners)
    radius = np.exp(rng.uniform(1.5, 5.0)) * rng.uniform(0.7, 1.3, corners)
    centre = rng.uniform((20, 20), (width - 20, height - 20))
    points = centre + radius[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    points = points.clip(0, (width, height)).round(2)
    low, high = points.min(0), points.max(0)
    outline = {"size": [height, width], "counts": [height * 7, *[9, height - 9] * (width - 20)]}
    outline["counts"].append(height * width - sum(outline["counts"]))
    box = np.concatenate([low, high - low]).round(2).tolist()
    return {"segmentation": outline if many else [points.ravel().tolist()], "area": round(0.6 * box[2] * box[3], 4),
            "iscrowd": int(many), "image_id": head["id"], "bbox": box, "category_id": int(rng.integers(1, 81))}


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
