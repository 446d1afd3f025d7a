"""How long an evaluation takes, against plain pycocotools on the same made-up files.

The set is like COCO's validation split and a detector's output there: 640 x 480, 7.3 objects an image of at most three
classes out of 80, some of them crowds, polygons; detections that are mostly objects displaced and stretched, with
scores that fall with the displacement, boxes and masks (ellipses, RLE). Times are of the processor, user and system,
of this process, which is to be alone on its core; the two evaluations take turns.
Letters: N ellipses.
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

from vitdet.evaluation import coco, matching
from vitdet.evaluation.results import KINDS, read_results, read_truth
from vitdet.files import write_json

HEIGHT, WIDTH, CLASSES = 480, 640, 80


def measure(images: int = 5000, detections: int = 100, rounds: int = 1, seed: int = 0) -> dict:
    """Seconds of the processor by step, for vitdet and for pycocotools, the least of `rounds`; their ratio; and the
    largest difference of their metrics in percent points.
    """
    if min(images, detections, rounds) < 1:
        raise ValueError(
            f"images, detections and rounds must be at least 1, got {images}, {detections}, {rounds}"
        )
    runs: dict[str, list[dict[str, float]]] = {"vitdet": [], "pycocotools": []}
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations, results = Path(folder) / "annotations.json", Path(folder) / "results.json"
        write_set(annotations, results, images, detections, seed)
        for _ in range(rounds):
            for name, evaluation in (("vitdet", _ours), ("pycocotools", _plain)):
                seconds: dict[str, float] = {}
                start = time.process_time()
                metrics[name] = evaluation(annotations, results, seconds)
                runs[name].append({**seconds, "total": time.process_time() - start})
        sizes = {
            path.stem + "_mb": round(path.stat().st_size / 2**20, 1)
            for path in (annotations, results)
        }
    best = {name: min(those, key=lambda run: run["total"]) for name, those in runs.items()}
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
        "largest_difference": float(
            np.abs(np.subtract(metrics["vitdet"], metrics["pycocotools"])).max()
        ),
        "box_ap": metrics["vitdet"][0],
        "mask_ap": metrics["vitdet"][12],
    }


def _ours(annotations: Path, results: Path, seconds: dict[str, float]) -> list[float]:
    with _step(seconds, "read"):
        truth, found = read_truth(annotations), read_results(results)
    with _step(seconds, "check"):
        image_ids, found = matching.choose(truth, found, list(KINDS), None)
    finished = {}
    for kind in KINDS:
        with _step(seconds, "index"):
            sides = matching.index(truth, image_ids, found, kind)
        with _step(seconds, "evaluate"):  # and accumulate, in one call
            finished[kind] = matching.match(
                *sides, truth.categories.values(), image_ids, kind, coco.LIMITS
            )
    with _step(seconds, "summarize"):
        return list(coco.summary(finished).values())


def _plain(annotations: Path, results: Path, seconds: dict[str, float]) -> list[float]:
    metrics: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        with _step(seconds, "read"):
            truth, found = COCO(annotations), json.loads(results.read_bytes())
        for kind, key in KINDS.items():
            with _step(seconds, "index"):  # the other form away, else masks have their boxes' areas
                others = set(KINDS.values()) - {key}
                index = truth.loadRes(
                    [{name: one[name] for name in one if name not in others} for one in found]
                )
            evaluation = COCOeval(truth, index, kind)
            for step in ("evaluate", "accumulate", "summarize"):
                with _step(seconds, step):
                    getattr(evaluation, step)()
            metrics += [100 * float(value) for value in evaluation.stats]
    return metrics


def write_set(annotations: Path, results: Path, images: int, detections: int, seed: int) -> None:
    """Writes made-up annotations and results, as the module describes them."""
    rng = np.random.default_rng(seed)
    often = 1 / np.arange(1, CLASSES + 1) ** 0.8
    objects, found = [], []
    for image_id in range(1, images + 1):
        count = 1 + rng.poisson(6.3)
        classes = rng.choice(rng.choice(CLASSES, 3, p=often / often.sum()), count)
        shapes = _shapes(rng, count)
        crowd = rng.random(count) < 0.012
        objects += [
            _object(image_id, int(label) + 1, shape, bool(many))
            for label, shape, many in zip(classes, shapes, crowd, strict=True)
        ]
        source, near, loose = (
            rng.integers(0, count, detections),
            rng.random(detections) < 0.6,
            rng.random(detections),
        )
        moved = shapes[source]
        moved[:, :2] += moved[:, 2:] * rng.normal(0, 0.4, (detections, 2)) * loose[:, None]
        moved[:, 2:] *= np.exp(rng.normal(0, 0.3, (detections, 2)) * loose[:, None])
        right = near & (rng.random(detections) < 0.8)
        labels = np.where(
            right, classes[source], rng.choice(CLASSES, detections, p=often / often.sum())
        )
        scores = np.where(
            near, (1 - loose) * rng.uniform(0.3, 1, detections), 0.3 * rng.random(detections) ** 2
        )
        shapes = np.where(near[:, None], moved, _shapes(rng, detections))
        found += [
            _result(image_id, int(label) + 1, shape, float(score))
            for label, shape, score in zip(labels, shapes, scores, strict=True)
        ]
    for number, item in enumerate(objects, start=1):
        item["id"] = number
    heads = [
        {"id": image_id, "height": HEIGHT, "width": WIDTH} for image_id in range(1, images + 1)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    tree = {"images": heads, "annotations": objects, "categories": categories}
    write_json(annotations, tree, indent=None)
    write_json(results, found, indent=None)


def _shapes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ellipses (N, 4): centre x, y and half axes, of sides between 12 and 380 pixels."""
    side, aspect = (
        np.exp(rng.uniform(np.log(12), np.log(380), count)),
        np.exp(rng.normal(0, 0.4, count)),
    )
    return np.stack(
        [
            rng.uniform(0, WIDTH, count),
            rng.uniform(0, HEIGHT, count),
            side * aspect / 2,
            side / aspect / 2,
        ],
        axis=1,
    )


def _object(image_id: int, category: int, shape: np.ndarray, crowd: bool) -> dict:
    x, y, a, b = shape
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack(
        [np.clip(x + a * np.cos(turns), 0, WIDTH), np.clip(y + b * np.sin(turns), 0, HEIGHT)],
        axis=1,
    )
    low, high = points.min(0), points.max(0)
    outline = (
        {"size": [HEIGHT, WIDTH], "counts": _runs(shape)}
        if crowd
        else [points.round(2).ravel().tolist()]
    )
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(np.pi * a * b),
        "iscrowd": int(crowd),
        "segmentation": outline,
    }


def _result(image_id: int, category: int, shape: np.ndarray, score: float) -> dict:
    x, y, a, b = shape.tolist()
    left, top, right, bottom = (
        max(x - a, 0.0),
        max(y - b, 0.0),
        min(x + a, float(WIDTH)),
        min(y + b, float(HEIGHT)),
    )
    code = rle.frPyObjects({"size": [HEIGHT, WIDTH], "counts": _runs(shape)}, HEIGHT, WIDTH)
    return {
        "image_id": image_id,
        "category_id": category,
        "score": score,
        "bbox": [left, top, max(right - left, 0.0), max(bottom - top, 0.0)],
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()},
    }


def _runs(shape: np.ndarray) -> list[int]:
    """An ellipse's run lengths, down the columns."""
    x, y, a, b = shape
    columns = np.arange(max(int(x - a), 0), min(int(x + a) + 1, WIDTH))
    half = b * np.sqrt(np.clip(1 - ((columns + 0.5 - x) / a) ** 2, 0, None))
    low, high = (np.clip(np.round(side), 0, HEIGHT).astype(int) for side in (y - half, y + half))
    ends = np.stack([columns * HEIGHT + low, columns * HEIGHT + high], axis=1)[high > low].ravel()
    return np.diff(ends, prepend=0, append=HEIGHT * WIDTH).tolist()


@contextlib.contextmanager
def _step(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
