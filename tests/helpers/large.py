"""Write a data set of COCO's or LVIS's size, to measure how reading scales.

    python tests/helpers/large.py DIR [IMAGES OBJECTS]     default 118,287 860,001: a file of 450 MB; train split only
    python tests/helpers/large.py DIR lvis                 both splits of LVIS v1 (100,170 images with 1,270,141 objects;
                                                   19,809 with 244,707; 1,203 classes), files of 1 and 0.2 GB

Outlines are star-shaped, with as many corners on average as real ones; one object in 85 is a crowd (none in LVIS).
The image files are links to a few drawn pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

SIZES = ((480, 640), (427, 640), (640, 480), (333, 500))  # height, width


def write(
    folder: Path,
    images: int = 118_287,
    objects: int = 860_001,
    split: str = "train",
    first: int = 1,
    lvis: bool = False,
) -> Path:
    """Write FOLDER/annotations/instances_SPLIT.json (LVIS: lvis_v1_SPLIT.json) and the images in FOLDER/SPLIT (LVIS: the
    folder of their coco_url); image IDs start at `first`.
    """
    rng = np.random.default_rng(first)
    place = folder / (f"{split}2017" if lvis else split)
    for path in (place, folder / "annotations"):
        path.mkdir(parents=True, exist_ok=True)
    for height, width in SIZES:
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        noise.resize((width, height)).save(folder / f"{height}x{width}.jpg")
    heads, owners = [], np.sort(rng.integers(0, images, objects))
    for number in range(images):
        height, width = SIZES[number % len(SIZES)]
        name = f"{first + number:012d}.jpg"
        url = f"http://images.cocodataset.org/{split}2017/{name}"
        head = {"license": 4, "file_name": name, "height": height, "width": width}
        head |= {"id": first + number, "coco_url": url, "date_captured": "2013-11-14 11:18:45"}
        heads.append(head | (_searched(rng) if lvis else {}))
        if not (place / name).is_symlink():
            (place / name).symlink_to(f"../{height}x{width}.jpg")
    classes = 1203 if lvis else 80
    categories = [
        {"supercategory": "thing", "id": 1 + k, "name": f"class {k}"}
        | ({"frequency": "fcr"[k % 3]} if lvis else {})
        for k in range(classes)
    ]
    path = folder / "annotations" / f"{'lvis_v1' if lvis else 'instances'}_{split}.json"
    with open(path, "wb") as file:
        file.write(b'{"images": ' + msgspec.json.encode(heads))
        file.write(b', "categories": ' + msgspec.json.encode(categories))
        file.write(b', "annotations": [')
        for number in rng.permutation(objects).tolist():
            annotation = _object(rng, heads[owners[number]], lvis)
            annotation["id"] = 900_100_000_000 + number
            # in LVIS, many classes are rare
            annotation["category_id"] = int(classes * rng.random() ** (3 if lvis else 1)) + 1
            file.write(msgspec.json.encode(annotation) + b", ")
        file.seek(-2, 2)
        file.write(b"]}")
    return path


def _searched(rng: np.random.Generator) -> dict[str, list[int]]:
    """Return an LVIS image's negative categories, and its categories that are not annotated exhaustively."""
    ids = rng.permutation(1203)[:8] + 1
    return {"neg_category_ids": ids[:6].tolist(), "not_exhaustive_category_ids": ids[6:].tolist()}


def _object(rng: np.random.Generator, head: dict, lvis: bool) -> dict:
    height, width = head["height"], head["width"]
    many = not lvis and rng.random() < 1 / 85
    corners = int(np.clip(rng.lognormal(3.65 if lvis else 3.0, 0.6), 4, 300))
    turns = np.arange(corners) * (2 * np.pi / corners)
    radius = np.exp(rng.uniform(1.5, 5.0)) * rng.uniform(0.7, 1.3, corners)
    center = rng.uniform((20, 20), (width - 20, height - 20))
    points = center + radius[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    points = points.clip(0, (width, height)).round(2)
    low, high = points.min(0), points.max(0)
    outline = {"size": [height, width], "counts": [height * 7, *[9, height - 9] * (width - 20)]}
    outline["counts"].append(height * width - sum(outline["counts"]))
    box = np.concatenate([low, high - low]).round(2).tolist()
    segmentation = outline if many else [points.ravel().tolist()]
    found = {"segmentation": segmentation, "area": round(0.6 * box[2] * box[3], 4)}
    found |= {"image_id": head["id"], "bbox": box}
    return found | ({} if lvis else {"iscrowd": int(many)})


if __name__ == "__main__":
    if sys.argv[2:] == ["lvis"]:
        write(Path(sys.argv[1]), 100_170, 1_270_141, lvis=True)
        write(Path(sys.argv[1]), 19_809, 244_707, "val", 200_001, lvis=True)
    else:
        write(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
