"""The tiny data set: reproducible, complete, and not solvable by color."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitdet.data.outlines import fill, trace
from vitdet.demo.tiny import CATEGORIES, PRETRAIN_SEED, draw_scene, make_tiny

TRAIN, VAL = 300, 120
# SHA-256 of 32 + 8 images with seed 0, and of scenes (0, 0) to (0, 7) before JPEG
FROZEN_ANNOTATIONS = "b345dadd7ce88403c583a8aa2be9148fffb8baa7e38eae5971d79b8ff120669a"
FROZEN_PIXELS = "6f91d0d379e58cc5e6528f0332d9cacaae278e0e499bd1df07e21bdd02e84c64"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    assert make_tiny(folder, TRAIN, VAL)
    return folder


def read(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_bytes_are_fixed_and_independent_of_the_number_of_processes(tmp_path: Path) -> None:
    assert make_tiny(tmp_path / "one", 32, 8, processes=1)
    assert make_tiny(tmp_path / "two", 32, 8, processes=2)
    a, b = files(tmp_path / "one"), files(tmp_path / "two")
    assert a == b and len(a) == 42
    annotations = b"".join(a[f"annotations/instances_{split}.json"] for split in ("train", "val"))
    assert hashlib.sha256(annotations).hexdigest() == FROZEN_ANNOTATIONS
    pixels = b"".join(draw_scene(0, index).image.tobytes() for index in range(8))
    assert hashlib.sha256(pixels).hexdigest() == FROZEN_PIXELS


def test_a_repeated_call_does_nothing_and_a_different_call_fails(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert make_tiny(folder, 3, 2)
    before = files(folder)
    assert not make_tiny(folder, 3, 2)
    for other in ({"train": 4, "val": 2}, {"train": 3, "val": 2, "seed": 1}):
        with pytest.raises(ValueError, match="contains something other"):
            make_tiny(folder, **other)
    next((folder / "train").iterdir()).unlink()
    with pytest.raises(ValueError, match="contains something other"):
        make_tiny(folder, 3, 2)
    assert len(files(folder)) == len(before) - 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # no temporary folder remains


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"val": -1}, {"seed": -1}, {"seed": PRETRAIN_SEED}]
)
def test_counts_and_seeds_out_of_range_are_rejected(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_tiny(tmp_path / "tiny", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_call_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        make_tiny(tmp_path / "tiny", 2, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_no_image_is_in_two_splits_or_among_the_pretraining_scenes(tiny: Path) -> None:
    train, val = (
        {hashlib.sha256(path.read_bytes()).digest() for path in (tiny / split).glob("*.jpg")}
        for split in ("train", "val")
    )
    assert len(train) == TRAIN and len(val) == VAL and not train & val
    scenes = [(seed, index) for seed in (0, 1, PRETRAIN_SEED) for index in range(40)]
    assert len({draw_scene(*scene).image.tobytes() for scene in scenes}) == 120


def test_the_data_has_every_feature_of_real_data(tiny: Path) -> None:
    document = read(tiny, "train")
    images, annotations = document["images"], document["annotations"]
    assert {entry["id"]: entry["name"] for entry in document["categories"]} == CATEGORIES
    assert document["info"]["version"] == 1 and document["info"]["seed"] == 0
    sizes = {(image["height"], image["width"]) for image in images}
    assert all(max(size) == 128 and 88 <= min(size) for size in sizes)
    assert any(h > w for h, w in sizes) and any(h < w for h, w in sizes)
    of_image = {
        image["id"]: [a for a in annotations if a["image_id"] == image["id"]] for image in images
    }
    counts = np.array([len(found) for found in of_image.values()])
    assert (counts == 0).any() and (counts == 1).any() and counts.max() >= 10 and counts.max() <= 12
    things = [a for a in annotations if not a["iscrowd"]]
    longer = np.array([max(a["bbox"][2:]) for a in things])
    assert longer.min() < 16 and longer.max() > 70 and longer.max() < 81
    assert {a["category_id"] for a in things} == set(CATEGORIES)
    assert sum(len(a["segmentation"]) > 1 for a in things) > 0.05 * len(things)
    assert 0.01 < len({a["image_id"] for a in annotations if a["iscrowd"]}) / TRAIN < 0.12
    assert min(a["area"] for a in things) >= 40
    assert all(3 <= len(part) // 2 <= 60 for a in things for part in a["segmentation"])
    every = [*annotations, *read(tiny, "val")["annotations"]]
    assert len({a["id"] for a in every}) == len(every)


def test_outlines_fit_box_area_and_image(tiny: Path) -> None:
    document = read(tiny, "val")
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    for annotation in document["annotations"]:
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert 0 <= x and 0 <= y and x + w <= width and y + h <= height
        if annotation["iscrowd"]:
            region = annotation["segmentation"]
            assert region["size"] == [height, width] and sum(region["counts"]) == height * width
            encoded = rle.frPyObjects(region, height, width)
            assert rle.area(encoded) == annotation["area"]
            assert rle.toBbox(encoded).tolist() == annotation["bbox"]
            continue
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in annotation["segmentation"]])
        assert np.allclose([*points.min(axis=0), *np.ptp(points, axis=0)], annotation["bbox"])
        area = rle.area(rle.merge(rle.frPyObjects(annotation["segmentation"], height, width)))
        assert abs(float(area) - annotation["area"]) < 0.15 * annotation["area"] + 6
        assert annotation["area"] >= 40


def test_image_files_have_the_annotated_size(tiny: Path) -> None:
    for entry in read(tiny, "val")["images"][:20]:
        with Image.open(tiny / "val" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"]) and image.mode == "RGB"


COUNTS = (3, 2)


def draw(folder: Path, ready: Barrier, answers: Queue) -> None:
    """Run one process, which renames its folder only when all others are about to rename theirs."""
    rename = Path.replace

    def together(temporary: Path, target: Path) -> Path:
        ready.wait()
        return rename(temporary, target)

    Path.replace = together
    try:
        answers.put(make_tiny(folder, *COUNTS, processes=1))
    except Exception as error:
        answers.put(repr(error))


def test_one_of_several_concurrent_processes_creates_the_data_set(
    tmp_path: Path,
) -> None:
    # fork, as in make_tiny: importing the package takes a second
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(3), context.Queue()
    racing = [
        context.Process(target=draw, args=(tmp_path / "tiny", ready, answers), daemon=True)
        for _ in range(3)
    ]
    for process in racing:
        process.start()
    given = [answers.get() for _ in racing]
    for process in racing:
        process.join()
    assert sorted(given, key=str) == [False, False, True]
    assert [path.name for path in tmp_path.iterdir()] == [
        "tiny"
    ]  # the other processes' folders are removed
    assert not make_tiny(tmp_path / "tiny", *COUNTS)


@pytest.mark.parametrize(
    ("theirs", "refused"),
    [((3, 2), ""), ((4, 2), "contains something other than the tiny data set")],
)
def test_the_data_set_of_another_process_is_used_if_it_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int], refused: str
) -> None:
    make_tiny(tmp_path / "theirs", *theirs, processes=1)
    rename = Path.replace

    def too_late(temporary: Path, target: Path) -> Path:
        shutil.copytree(tmp_path / "theirs", target)
        return rename(temporary, target)

    monkeypatch.setattr(Path, "replace", too_late)
    folder = tmp_path / "tiny"
    if refused:
        with pytest.raises(ValueError, match=refused):
            make_tiny(folder, *COUNTS, processes=1)
    else:
        assert make_tiny(folder, *COUNTS, processes=1) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "tiny"]


def test_other_problems_with_the_folder_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(temporary: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        make_tiny(tmp_path / "tiny", *COUNTS, processes=1)
    assert not list(tmp_path.iterdir())


# Baseline: a region without the background's colors is an object; its colors determine its class.
# The background pixels are given, so only touching objects must be separated and classified.


def color_bins(pixels: np.ndarray) -> np.ndarray:
    """Return the histogram (64,) of pixels (P, 3), 4 levels per channel, with sum 1."""
    level = pixels.astype(int) // 64
    counts = np.bincount(level[:, 0] * 16 + level[:, 1] * 4 + level[:, 2], minlength=64)
    return counts / max(counts.sum(), 1)


def covered(objects: list[dict], height: int, width: int) -> np.ndarray:
    """Return the union (H, W) bool of the objects' pixels."""
    regions = [
        rle.decode(rle.frPyObjects(a["segmentation"], height, width)).any(axis=2)
        for a in objects
        if not a["iscrowd"]
    ]
    return np.any([np.zeros((height, width), dtype=bool), *regions], axis=0)


def two_colors(pixels: np.ndarray) -> np.ndarray:
    """Return the two k-means centers (2, 3) of pixels (P, 3)."""
    centers = pixels[[pixels.sum(axis=1).argmin(), pixels.sum(axis=1).argmax()]]
    for _ in range(8):
        nearest = np.linalg.norm(pixels[:, None] - centers, axis=2).argmin(axis=1)
        for k in set(nearest.tolist()):
            centers[k] = pixels[nearest == k].mean(axis=0)
    return centers


def components(picture: np.ndarray, ground: np.ndarray) -> list[np.ndarray]:
    """Return connected regions (H, W) bool, as large as objects, that differ from both background colors."""
    colors = two_colors(picture[ground].astype(float))
    away = np.linalg.norm(picture[:, :, None].astype(float) - colors, axis=3)
    regions = [fill(part, *ground.shape) for part in trace([away.min(axis=2) > 55], 0.0)[0]]
    return [region for region in regions if region.sum() >= 60]


def detect_by_color(folder: Path) -> list[dict]:
    """Return COCO results: each component with each class, scored by color similarity to the class mean."""
    known: dict[int, list[np.ndarray]] = {category: [] for category in CATEGORIES}
    for picture, objects, _ in pictures(folder, "train"):
        for annotation in objects:
            if not annotation["iscrowd"]:
                inside = covered([annotation], *picture.shape[:2])
                known[annotation["category_id"]].append(color_bins(picture[inside]))
    means = {category: np.mean(histograms, axis=0) for category, histograms in known.items()}
    results = []
    for picture, objects, number in pictures(folder, "val"):
        for region in components(picture, ~covered(objects, *picture.shape[:2])):
            encoded = rle.encode(np.asfortranarray(region, dtype=np.uint8))
            bins = color_bins(picture[region])
            likeness = {c: np.sqrt(bins * mean).sum() for c, mean in means.items()}
            total = sum(value**8 for value in likeness.values())
            for category, value in likeness.items():
                region = {"bbox": rle.toBbox(encoded).tolist(), "segmentation": encoded}
                found = {"image_id": number, "category_id": category, "score": value**8 / total}
                results.append(found | region)
    return results


def pictures(folder: Path, split: str) -> Iterator[tuple[np.ndarray, list[dict], int]]:
    document = read(folder, split)
    for entry in document["images"]:
        objects = [a for a in document["annotations"] if a["image_id"] == entry["id"]]
        yield np.asarray(Image.open(folder / split / entry["file_name"])), objects, entry["id"]


def average_precision(folder: Path, results: list[dict], kind: str, classes: bool) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations" / "instances_val.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.useCats = int(classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


@pytest.mark.slow
def test_color_and_connected_components_do_not_solve_the_task(tiny: Path) -> None:
    results = detect_by_color(tiny)
    assert average_precision(tiny, results, "bbox", classes=True) < 15
    assert average_precision(tiny, results, "segm", classes=True) < 15
    one_each = results[:: len(CATEGORIES)]
    # the baseline finds objects, but not their classes
    assert average_precision(tiny, one_each, "bbox", classes=False) > 15
