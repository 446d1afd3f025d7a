"""CPU time of vitdet's and pycocotools' evaluation of the same synthetic files.

The files resemble COCO's validation split and a detector's results. Images have 640 x 480 pixels
and, on average, 7.3 objects from up to three of 80 classes. The masks of objects are polygons; a
few objects are crowds, whose masks are RLE. Detections have boxes and masks (RLE of ellipses). Most
detections are moved and scaled copies of objects, with scores that tend to decrease with the
displacement. Times are user and system CPU time.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitdet.evaluation import coco
from vitdet.evaluation.results import KINDS, read_results, read_truth
from vitdet.files import write_json

HEIGHT, WIDTH, CLASSES = 480, 640, 80


def measure(images: int = 5000, detections: int = 100, rounds: int = 1, seed: int = 0) -> dict:
    """Return the CPU seconds of each step in the fastest round of vitdet and of pycocotools, the
    ratio of the totals, and the largest difference in a metric, in percentage points.
    """
    if min(images, detections, rounds) < 1:
        raise ValueError(
            "images, detections and rounds must be at least 1, "
            f"got {images}, {detections}, {rounds}"
        )
    runs: dict[str, list[dict[str, float]]] = {"vitdet": [], "pycocotools": []}
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations, results = Path(folder) / "annotations.json", Path(folder) / "results.json"
        write_set(annotations, results, images, detections, seed)
        for _ in range(rounds):
            for name, evaluation in (("vitdet", _ours), ("pycocotools", _plain)):
                seconds: dict[str, float] = {}
                metrics[name] = evaluation(annotations, results, seconds)
                runs[name].append({**seconds, "total": sum(seconds.values())})
        sizes = {
            f"{path.stem}_mb": round(path.stat().st_size / 2**20, 1)
            for path in (annotations, results)
        }
    best = {name: min(rows, key=lambda run: run["total"]) for name, rows in runs.items()}
    differences = np.abs(np.subtract(metrics["vitdet"], metrics["pycocotools"]))
    return {
        "images": images,
        "detections_per_image": detections,
        "classes": CLASSES,
        **sizes,
        "cpu_seconds": {
            name: {step: round(value, 2) for step, value in run.items()}
            for name, run in best.items()
        },
        "ratio": round(best["pycocotools"]["total"] / best["vitdet"]["total"], 2),
        "largest_difference": float(differences.max()),
        "box_ap": metrics["vitdet"][0],
        "mask_ap": metrics["vitdet"][12],
    }


def _ours(annotations: Path, results: Path, seconds: dict[str, float]) -> list[float]:
    with _step(seconds, "read"):
        truth, found = read_truth(annotations), read_results(results)
    with _step(seconds, "compare"):
        finished = coco.compare(truth, found)
    with _step(seconds, "summarize"):
        return list(coco.summary(finished).values())


def _plain(annotations: Path, results: Path, seconds: dict[str, float]) -> list[float]:
    metrics: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        with _step(seconds, "read"):
            truth, found = COCO(annotations), json.loads(results.read_bytes())
        for kind, key in KINDS.items():
            with _step(seconds, "compare"):
                # with boxes, loadRes would use the box's area as the mask's area
                others = set(KINDS.values()) - {key}
                index = truth.loadRes(
                    [{name: item[name] for name in item if name not in others} for item in found]
                )
                evaluation = COCOeval(truth, index, kind)
                evaluation.evaluate()
                evaluation.accumulate()
            with _step(seconds, "summarize"):
                evaluation.summarize()
            metrics += [100 * float(value) for value in evaluation.stats]
    return metrics


@contextlib.contextmanager
def _step(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start


def write_set(annotations: Path, results: Path, images: int, detections: int, seed: int) -> None:
    """Write COCO files with synthetic annotations and results; detections: number per image."""
    rng = np.random.default_rng(seed)
    often = 1 / np.arange(1, CLASSES + 1) ** 0.8
    often /= often.sum()
    objects: list[dict] = []
    found: list[dict] = []
    for image_id in range(1, images + 1):
        count = 1 + rng.poisson(6.3)
        classes = rng.choice(rng.choice(CLASSES, 3, p=often), count)
        shapes = _shapes(rng, count)
        crowd = rng.random(count) < 0.012
        for label, shape, many in zip(classes, shapes, crowd, strict=True):
            number = len(objects) + 1
            objects.append({"id": number, **_object(image_id, int(label) + 1, shape, bool(many))})
        source = rng.integers(0, count, detections)
        near = rng.random(detections) < 0.6
        loose = rng.random(detections)
        moved = shapes[source]
        moved[:, :2] += moved[:, 2:] * rng.normal(0, 0.4, (detections, 2)) * loose[:, None]
        moved[:, 2:] *= np.exp(rng.normal(0, 0.3, (detections, 2)) * loose[:, None])
        right = near & (rng.random(detections) < 0.8)
        labels = np.where(right, classes[source], rng.choice(CLASSES, detections, p=often))
        close = (1 - loose) * rng.uniform(0.3, 1, detections)
        scores = np.where(near, close, 0.3 * rng.random(detections) ** 2)
        shapes = np.where(near[:, None], moved, _shapes(rng, detections))
        for label, shape, score in zip(labels, shapes, scores, strict=True):
            found.append(_result(image_id, int(label) + 1, shape, float(score)))
    heads = [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, images + 1)]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    tree = {"images": heads, "annotations": objects, "categories": categories}
    write_json(annotations, tree, indent=None)
    write_json(results, found, indent=None)


def _shapes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return random ellipses (count, 4): center x, center y and two semi-axes, in pixels."""
    side = np.exp(rng.uniform(np.log(12), np.log(380), count))
    aspect = np.exp(rng.normal(0, 0.4, count))
    x, y = rng.uniform(0, WIDTH, count), rng.uniform(0, HEIGHT, count)
    return np.stack([x, y, side * aspect / 2, side / aspect / 2], axis=1)


def _object(image_id: int, category: int, shape: np.ndarray, crowd: bool) -> dict:
    x, y, a, b = shape
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + a * np.cos(turns), y + b * np.sin(turns)], axis=1)
    points = np.clip(points, 0, [WIDTH, HEIGHT])
    low, high = points.min(0), points.max(0)
    polygon = [points.round(2).ravel().tolist()]
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(np.pi * a * b),
        "iscrowd": int(crowd),
        "segmentation": _runs(shape) if crowd else polygon,
    }


def _result(image_id: int, category: int, shape: np.ndarray, score: float) -> dict:
    center, half = shape[:2], shape[2:]
    low, high = np.maximum(center - half, 0), np.minimum(center + half, [WIDTH, HEIGHT])
    code = rle.frPyObjects(_runs(shape), HEIGHT, WIDTH)
    return {
        "image_id": image_id,
        "category_id": category,
        "score": score,
        "bbox": [*low.tolist(), *np.maximum(high - low, 0).tolist()],
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()},
    }


def _runs(shape: np.ndarray) -> dict:
    """Return the uncompressed RLE of an ellipse."""
    x, y, a, b = shape
    columns = np.arange(max(int(x - a), 0), min(int(x + a) + 1, WIDTH))
    half = b * np.sqrt(np.clip(1 - ((columns + 0.5 - x) / a) ** 2, 0, None))
    low, high = (np.clip(np.round(side), 0, HEIGHT).astype(int) for side in (y - half, y + half))
    ends = np.stack([columns * HEIGHT + low, columns * HEIGHT + high], axis=1)[high > low].ravel()
    counts = np.diff(ends, prepend=0, append=HEIGHT * WIDTH).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}
