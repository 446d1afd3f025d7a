"""Random annotations and results with the corner cases of an evaluation.

Crowds, sizes at the limits, equal scores, classes without objects, empty masks, several results at one location.
"""

from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.results import Truth

SIDE = 150


def random_set(seed, images=30, categories=6, lvis=False):
    """Return a Truth and a list of results with boxes and masks; annotation IDs start at 1."""
    rng = np.random.default_rng(seed)
    heads = {
        int(key): {"id": int(key), "height": SIDE, "width": SIDE}
        for key in np.sort(rng.choice(10**6, images, replace=False))
    }
    kinds = {2 * k + 3: {"id": 2 * k + 3, "name": f"class {k}"} for k in range(categories)}
    objects, results = [], []
    for image_id in heads:
        present = rng.choice(list(kinds), 3)
        for _ in range(rng.integers(0, 9)):
            box = random_box(rng)
            crowd = int(not lvis and rng.random() < 0.2)
            item = {"id": len(objects) + 1, "image_id": image_id}
            item |= {"category_id": int(rng.choice(present)), "bbox": box}
            item |= {"area": random_area(rng, box), "iscrowd": crowd}
            item["segmentation"] = code(box) if crowd else polygon(box)
            objects.append(item)
            for _ in range(rng.integers(0, 5)):
                near = [max(0.0, value + rng.normal(0, 2)) for value in box]
                results.append(result(rng, image_id, item["category_id"], near))
        for _ in range(rng.integers(0, 12)):
            results.append(result(rng, image_id, int(rng.choice(list(kinds))), random_box(rng)))
    if lvis:
        for image_id, head in heads.items():
            here = {item["category_id"] for item in objects if item["image_id"] == image_id}
            absent = [key for key in kinds if key not in here and rng.random() < 0.5]
            partly = [key for key in sorted(here) if rng.random() < 0.3]
            head.update(neg_category_ids=absent, not_exhaustive_category_ids=partly)
        for key, letter in zip(kinds, "rccfff" * categories, strict=False):
            kinds[key]["frequency"] = letter
    truth = Truth(Path("random.json"), heads, kinds, [Annotation(**item) for item in objects])
    return truth, [results[i] for i in rng.permutation(len(results))]


def result(rng, image_id, category, box):
    score = float(rng.choice([0.1, 0.3, 0.5, 0.9])) if rng.random() < 0.5 else float(rng.random())
    found = {"image_id": image_id, "category_id": category, "bbox": box}
    return {**found, "score": score, "segmentation": code(box)}


def random_box(rng):
    width, height = np.exp(rng.uniform(np.log(3), np.log(140), 2))
    if rng.random() < 0.2:
        width = height = float(rng.choice([32, 96]))
    x, y = rng.uniform(0, SIDE - min(width, SIDE)), rng.uniform(0, SIDE - min(height, SIDE))
    return [float(np.round(value, 1)) for value in (x, y, width, height)]


def random_area(rng, box):
    return float(rng.choice([32**2, 96**2, box[2] * box[3]], p=[0.1, 0.1, 0.8]))


def polygon(box):
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x + 1, y + height]]


def code(box):
    mask = rle.merge(rle.frPyObjects(polygon(box), SIDE, SIDE))
    return {"size": mask["size"], "counts": mask["counts"].decode()}
