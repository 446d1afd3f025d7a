"""Which detection finds which object, and the precision over recall that follows from it.

The rules are pycocotools'; the work is done by faster-coco-eval (C++), one class at a time with the images in which
the class occurs: it keeps a record for every image, class and size that it is given, which for all of LVIS at once
would be some 15 GB.
Objects without an outline are no ground truth of masks; a detection that no mask matches is ignored where its box has
the IoU of the threshold with the box of one of them (any number of detections), as if that were a crowd.
Letters of the tables, as in pycocotools: T IoU thresholds, R recalls, K classes, A size ranges, M limits of detections.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle

from vitdet.data.annotation_file import Annotation
from vitdet.data.segmentation import compressed, read_outline
from vitdet.evaluation.matches import IOUS, RECALLS, Matches
from vitdet.evaluation.results import Truth, check_code, check_results, uncollected
from vitdet.evaluation.runs import areas

SIZES = ("all", "small", "medium", "large")  # up to 32 x 32 pixels, up to 96 x 96, above
LARGEST = 1e5**2  # area in pixels of what pycocotools takes part in "all"

# objects or results of each category, as faster-coco-eval takes them
ByClass = Mapping[int, list[dict]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Precision (T, R, K, A, M) and recall (T, K, A, M) in 0..1, -1 where a class has no object; the K categories and
    the M limits of detections; the matches, and their N detections and G objects as `index` returns them.
    """

    precision: np.ndarray
    recall: np.ndarray
    categories: tuple[dict, ...]
    limits: tuple[int, ...]
    matches: Matches
    detections: list[dict]
    objects: list[dict]

    def ap(
        self, iou: float | None = None, size: str = "all", chosen: Sequence[int] | None = None
    ) -> float | None:
        """Average precision in percent, most detections: of one IoU threshold or all, of `chosen` classes (indices)
        or all; None where these have no object.
        """
        table = self.precision[..., SIZES.index(size), -1]
        table = table if iou is None else table[[int(np.abs(IOUS - iou).argmin())]]
        return _mean(table if chosen is None else table[:, :, chosen])

    def ar(self, size: str = "all", limit: int = -1) -> float | None:
        """Average recall in percent, with the `limit`-th limit of detections; None where there is no object."""
        return _mean(self.recall[..., SIZES.index(size), limit])


def choose(
    truth: Truth, results: Sequence[dict], kinds: Iterable[str], image_ids: Iterable[int] | None
) -> tuple[list[int], list[dict]]:
    """The images to look at, all of the truth or `image_ids`, in order, and their results.

    Raises ValueError for results that cannot be compared.
    """
    chosen = sorted(truth.images if image_ids is None else set(image_ids))
    check_results(truth, results, kinds, chosen)
    inside = set(chosen)
    return chosen, list(results) if len(chosen) == len(truth.images) else [
        item for item in results if item["image_id"] in inside
    ]


@uncollected()
def index(
    truth: Truth,
    image_ids: Sequence[int],
    results: Sequence[dict],
    kind: str,
    crowds: bool = True,
    empty: bool = True,
    unsure: Collection[tuple[int, int]] = (),
    size_by: str = "",
) -> tuple[ByClass, ByClass]:
    """The objects of `image_ids` and the results there, as `match` wants them, to be compared by 'bbox' or 'segm'.

    crowds: whether iscrowd means anything. empty: whether what has no area takes part. unsure: pairs (image id,
    category id) of which not every object is annotated: what is found beyond the annotated ones is not counted.
    size_by: which form, 'bbox' or 'segm', says how large a detection is ('': that of `kind`). Raises ValueError for a
    broken mask.
    """
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    objects, boxes = _objects(truth, places, kind, crowds)
    found = _found(truth, places, results, kind, unsure, size_by or kind)
    _mark(found, boxes)
    return _by_class(objects, empty), _by_class(found, empty)


@uncollected()
def match(
    objects: ByClass,
    found: ByClass,
    categories: Iterable[dict],
    image_ids: Sequence[int],
    kind: str,
    limits: Sequence[int],
) -> Comparison:
    """What `index` gave, compared by `kind`; limits: detections of a class in an image that count, rising."""
    categories = tuple(categories)
    shape = (len(IOUS), len(RECALLS), len(categories), len(SIZES), len(limits))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    detections: list[dict] = []
    targets: list[dict] = []
    partners, ignored = [np.zeros((len(IOUS), 0), int)], [np.zeros((len(IOUS), 0), bool)]
    category_of, target_of = [], []
    for column, category in enumerate(category["id"] for category in categories):
        if category not in objects and category not in found:
            continue
        ranked = _ranked(found.get(category, []), limits[-1])
        present = objects.get(category, [])
        precision[:, :, column], recall[:, column], *pairs = _match_class(
            present, ranked, category, kind, limits
        )
        partners.append(pairs[0])
        ignored.append(pairs[1])
        wanted = [item for item in present if _counts(item)]
        category_of.append(np.full(len(ranked), column))
        target_of.append(np.full(len(wanted), column))
        detections += ranked
        targets += wanted
    partner, unsure = np.hstack(partners), np.hstack(ignored)
    true = (partner > 0) & ~unsure
    places = {item["id"]: place for place, item in enumerate(targets)}
    matches = Matches(
        kind=kind,
        image_ids=np.array(image_ids, np.int64),
        category_ids=np.array([category["id"] for category in categories], np.int64),
        class_names=tuple(str(category["name"]) for category in categories),
        image=np.array([item["image_id"] for item in detections], np.int32),
        category=np.concatenate([[], *category_of]).astype(np.int32),
        score=np.array([item["score"] for item in detections], float),
        matched=np.ascontiguousarray(true.T),
        ignored=np.ascontiguousarray(unsure.T),
        found=np.array(
            [
                places[number] if hit else -1
                for number, hit in zip(partner[0], true[0], strict=True)
            ],
            np.int32,
        ),
        object_image=np.array([item["image_id"] for item in targets], np.int32),
        object_category=np.concatenate([[], *target_of]).astype(np.int32),
    )
    return Comparison(precision, recall, categories, tuple(limits), matches, detections, targets)


def _ranked(found: list[dict], limit: int) -> list[dict]:
    """The detections of a class by image and falling score, at most `limit` of an image."""
    images = np.array([item["image_id"] for item in found])
    order = np.lexsort((-np.array([item["score"] for item in found], float), images))
    images = images[order]
    rank = np.arange(len(order)) - np.searchsorted(images, images)
    return [found[place] for place in order[rank < limit]]


def _counts(item: dict) -> bool:
    """Whether an object counts in AP: not a crowd, and of an area in the range of all sizes."""
    return not item["iscrowd"] and 0 <= item["area"] <= LARGEST


def _match_class(
    objects: list[dict], found: list[dict], category: int, kind: str, limits: Sequence[int]
) -> list[np.ndarray]:
    """Precision (T, R, A, M) and recall (T, A, M) of one class; of each of its n detections the id of the object that
    it matches (T, n), 0 without one, and whether it is ignored (T, n).
    """
    if not any(item.get("overlap", 0) for item in found):
        return _run(objects, found, category, kind, limits, IOUS)
    tables = []
    for iou in IOUS:  # which detections are ignored depends on it
        marked = [
            item | {"lvis_mark": item["lvis_mark"] or item.get("overlap", 0) >= iou}
            for item in found
        ]
        tables.append(_run(objects, marked, category, kind, limits, np.array([iou])))
    return [np.concatenate(parts) for parts in zip(*tables, strict=True)]


def _run(
    objects: list[dict],
    found: list[dict],
    category: int,
    kind: str,
    limits: Sequence[int],
    ious: np.ndarray,
) -> list[np.ndarray]:
    images = [
        {"id": place, "height": 0, "width": 0}
        for place in sorted({item["image_id"] for items in (objects, found) for item in items})
    ]
    sides = []
    for items in (objects, found):
        side = COCO()
        side.dataset = {"images": images, "categories": [{"id": category}], "annotations": items}
        side.createIndex()
        sides.append(side)
    work = COCOeval_faster(
        *sides, kind, print_function=log.debug, rle_iou_max_workers=1, separate_eval=True
    )
    work.params.maxDets = list(limits)
    work.params.iouThrs, work.params.recThrs = ious, RECALLS
    work.evaluate()
    work.accumulate()
    # What is known of an image is readable as the state that would be pickled: per threshold and
    # detection, by falling score, the object's id, ..., whether it is ignored. All sizes come first.
    states = [one.__getstate__() for one in work._evalImgs_cpp[: len(images)]]
    partners, ignored = (
        np.hstack([np.array(state[part], kind).reshape(len(ious), -1) for state in states])
        for part, kind in ((0, int), (4, bool))
    )
    return [work.eval["precision"][:, :, 0], work.eval["recall"][:, 0], partners, ignored]


def _objects(
    truth: Truth, places: dict[int, int], kind: str, crowds: bool
) -> tuple[list[dict], dict[tuple[int, int], list[Sequence[float]]]]:
    """The objects to find; and, when masks are compared, the boxes of those without an outline by place and category."""
    # ids are counted anew: pycocotools and its like take an object with id 0 for never found
    items: list[dict] = []
    boxes: dict[tuple[int, int], list[Sequence[float]]] = defaultdict(list)
    for number, item in enumerate(truth.objects, start=1):
        if item.image_id not in places:
            continue
        place, area, code = places[item.image_id], item.area, None
        if kind == "segm" or area is None:
            code = _code_of(item, truth.sides(item.image_id))
        if kind == "segm" and code is None:
            boxes[place, item.category_id].append(item.bbox)
            continue
        if area is None:  # own data sets often leave areas out
            area = item.bbox[2] * item.bbox[3] if code is None else float(rle.area(code))
        one = {
            "id": number,
            "image_id": place,
            "category_id": item.category_id,
            "area": area,
            "iscrowd": item.iscrowd or 0 if crowds else 0,
        }
        items.append({**one, "bbox": list(item.bbox)} if kind == "bbox" else {**one, "rle": code})
    return items, boxes


def _mark(
    found: Iterable[dict], boxes: Mapping[tuple[int, int], Sequence[Sequence[float]]]
) -> None:
    """Note with each detection the largest IoU of its box with one of these boxes of its image and category."""
    for item in found if boxes else ():
        if others := boxes.get((item["image_id"], item["category_id"])):
            box = item.get("box") or rle.toBbox(item["rle"]).tolist()
            ious = rle.iou(np.array([box], float), np.array(others, float), [0] * len(others))
            item["overlap"] = float(ious.max())


def _code_of(item: Annotation, size: tuple[int, int]) -> dict | None:
    """The outline of an object as compressed RLE; None without one."""
    shape = read_outline(item.segmentation, size).shape
    return None if shape is None else compressed(shape, *size)


def _found(
    truth: Truth,
    places: dict[int, int],
    results: Sequence[dict],
    kind: str,
    unsure: Collection[tuple[int, int]],
    size_by: str,
) -> list[dict]:
    if kind == "bbox":
        key, forms = "bbox", [item["bbox"] for item in results]
    else:
        key, forms = (
            "rle",
            [_text(item, number, truth) for number, item in enumerate(results, start=1)],
        )
        sizes = _areas(forms, results, truth)
    if size_by == "bbox":
        sizes = [item["bbox"][2] * item["bbox"][3] for item in results]
    return [
        {
            "id": number,
            "image_id": places[item["image_id"]],
            "category_id": item["category_id"],
            "score": item["score"],
            "area": size,
            key: form,
            "lvis_mark": (item["image_id"], item["category_id"]) in unsure,
            **({"box": item["bbox"]} if kind == "segm" and "bbox" in item else {}),
        }
        for number, (item, form, size) in enumerate(
            zip(results, forms, sizes, strict=True), start=1
        )
    ]


def _text(item: dict, number: int, truth: Truth) -> dict:
    """A result's mask as compressed RLE with counts in bytes."""
    code, size = item["segmentation"], truth.sides(item["image_id"])
    counts = (
        code.get("counts") if isinstance(code, dict) and code.get("size") == list(size) else None
    )
    if isinstance(counts, str):
        return {"size": list(size), "counts": counts.encode("utf-8", "surrogatepass")}
    if isinstance(counts, bytes):
        return code
    return compressed(check_code(item, f"result {number}", size), *size)


def _areas(codes: list[dict], results: Sequence[dict], truth: Truth) -> list[float]:
    sizes, sound = areas(
        [code["counts"] for code in codes], [code["size"][0] * code["size"][1] for code in codes]
    )
    for index in np.flatnonzero(~sound).tolist():
        check_code(results[index], f"result {index + 1}", truth.sides(results[index]["image_id"]))
        sizes[index] = rle.area(codes[index])
    return sizes.astype(float).tolist()


def _by_class(items: list[dict], empty: bool) -> dict[int, list[dict]]:
    classes = defaultdict(list)
    for item in items:
        if empty or item["area"] > 0:
            classes[item["category_id"]].append(item)
    return classes


def _mean(table: np.ndarray) -> float | None:
    table = table[table > -1]
    return 100 * float(table.mean()) if len(table) else None
