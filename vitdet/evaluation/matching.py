"""Match detections with objects, and compute the resulting precision and recall.

faster-coco-eval (C++) implements the matching rules of pycocotools. It is called for each class
separately, with only the images that contain objects or detections of the class, because it keeps a
record for every image, class and size range: about 15 GB for all classes of LVIS at once.

If masks are compared, objects without an outline are excluded. A detection that matches no mask is
ignored if its box and the box of an excluded object of the same class have an IoU of at least the
threshold. As with crowds, one excluded object can cause any number of detections to be ignored.

Notation, as in pycocotools: T IoU thresholds, R recalls, K classes, A size ranges, M detection
limits.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle

from vitdet.data.segmentation import compressed, read_outline
from vitdet.evaluation.matches import IOUS, RECALLS, Matches
from vitdet.evaluation.results import Truth, check_code, check_results, uncollected
from vitdet.evaluation.run_lengths import areas

SIZES = ("all", "small", "medium", "large")  # small: up to 32 x 32 pixels; medium: up to 96 x 96
LARGEST = 1e5**2  # upper limit of pycocotools' area range "all", in pixels

# category id -> its objects or results, in faster-coco-eval's format
ByClass = defaultdict[int, list[dict]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The comparison of results with an annotation file; notation as in the module's docstring.

    Attributes:
        precision: (T, R, K, A, M), in 0..1; -1 for classes without objects of this size.
        recall: (T, K, A, M), in 0..1; -1 for classes without objects of this size.
        categories: the K categories of the annotation file.
        limits: the M detection limits.
        matches: matches of N detections with G objects.
        detections, objects: these detections and objects, in the order of `matches`.
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
        """Return AP in percent with the largest detection limit; None without objects.

        By default, the mean over all IoU thresholds and classes; `chosen` contains class indices.
        """
        table = self.precision[..., SIZES.index(size), -1]
        table = table if iou is None else table[[int(np.abs(IOUS - iou).argmin())]]
        return _mean(table if chosen is None else table[:, :, chosen])

    def ar(self, size: str = "all", limit: int = -1) -> float | None:
        """Return AR in percent with up to `self.limits[limit]` detections; None without objects."""
        return _mean(self.recall[..., SIZES.index(size), limit])

    def aps(self, chosen: Sequence[int] | None = None) -> dict[str, float | None]:
        """Return AP, AP50, AP75 and AP by object size, of the classes with indices `chosen`."""
        aps = {"ap": self.ap(chosen=chosen)}
        aps |= {f"ap{100 * iou:.0f}": self.ap(iou, chosen=chosen) for iou in (0.5, 0.75)}
        return aps | {f"ap_{size}": self.ap(None, size, chosen) for size in SIZES[1:]}

    def ars(self) -> dict[str, float | None]:
        """Return AR with each detection limit, and AR of each object size."""
        ars = {f"ar_{limit}": self.ar(limit=index) for index, limit in enumerate(self.limits)}
        return ars | {f"ar_{size}": self.ar(size) for size in SIZES[1:]}


def choose(
    truth: Truth, results: Sequence[dict], kinds: Iterable[str], image_ids: Iterable[int] | None
) -> tuple[list[int], list[dict]]:
    """Return the sorted ids of the images to evaluate, by default all, and their results.

    Raises ValueError for results that cannot be compared, and for unknown image ids.
    """
    check_results(truth, results, kinds)
    if image_ids is None:
        return sorted(truth.images), list(results)
    chosen = set(image_ids)
    if unknown := chosen - truth.images.keys():
        raise ValueError(f"{truth.path}: contains no image with id {min(unknown)}")
    return sorted(chosen), [item for item in results if item["image_id"] in chosen]


@uncollected()
def match(
    truth: Truth,
    image_ids: Sequence[int],
    results: Sequence[dict],
    kind: str,
    limits: Sequence[int],
    *,
    crowds: bool = True,
    empty: bool = True,
    unsure: Collection[tuple[int, int]] = (),
    boxed: bool = False,
) -> Comparison:
    """Compare results with the objects of the images `image_ids`.

    Args:
        image_ids, results: as returned by `choose` for `truth`.
        kind: "bbox" or "segm".
        limits: maximum numbers of detections per class and image, ascending.
        crowds: respect iscrowd; if False, crowds are normal objects.
        empty: include objects and results with an area of 0.
        unsure: pairs (image id, category id). Detections of the category in the image that match no
            object are ignored.
        boxed: use the area of a detection's box as the area of its mask.

    Raises:
        ValueError: a mask is invalid.
    """
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    objects, bare = _objects(truth, index_of, kind, crowds, empty)
    found = _found(truth, index_of, results, kind, empty, unsure, boxed, bare)
    categories = tuple(truth.categories.values())
    shape = (len(IOUS), len(RECALLS), len(categories), len(SIZES), len(limits))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    partners, ignored = [np.zeros((len(IOUS), 0), int)], [np.zeros((len(IOUS), 0), bool)]
    ranked_of: list[list[dict]] = []  # ranked results of each class
    wanted_of: list[list[dict]] = []  # objects of each class that are not ignored
    for column, category in enumerate(truth.categories):
        present, ranked = objects[category], _ranked(found[category], limits[-1])
        if present or ranked:
            precision[:, :, column], recall[:, column], *pairs = _match_class(
                present, ranked, category, kind, limits
            )
            partners.append(pairs[0])
            ignored.append(pairs[1])
        ranked_of.append(ranked)
        wanted_of.append([item for item in present if _counts(item)])
    partner, skipped = np.hstack(partners), np.hstack(ignored)
    true = (partner > 0) & ~skipped
    detections, targets = (list(chain.from_iterable(side)) for side in (ranked_of, wanted_of))
    classes, object_classes = (
        np.repeat(np.arange(len(side), dtype=np.int32), np.array([*map(len, side)], int))
        for side in (ranked_of, wanted_of)
    )
    position = {item["id"]: index for index, item in enumerate(targets)}
    first = zip(partner[0].tolist(), true[0].tolist(), strict=True)  # at IoU 0.5
    matches = Matches(
        kind=kind,
        image_ids=np.array(image_ids, np.int64),
        category_ids=np.array(list(truth.categories), np.int64),
        class_names=tuple(str(category["name"]) for category in categories),
        image=np.array([item["image_id"] for item in detections], np.int32),
        category=classes,
        score=np.array([item["score"] for item in detections], float),
        matched=np.ascontiguousarray(true.T),
        ignored=np.ascontiguousarray(skipped.T),
        found=np.array([position[number] if hit else -1 for number, hit in first], np.int32),
        object_image=np.array([item["image_id"] for item in targets], np.int32),
        object_category=object_classes,
    )
    return Comparison(precision, recall, categories, tuple(limits), matches, detections, targets)


def _objects(
    truth: Truth, index_of: Mapping[int, int], kind: str, crowds: bool, empty: bool
) -> tuple[ByClass, dict[tuple[int, int], list[Sequence[float]]]]:
    """Return the objects by category id and, for masks, the boxes of objects without an outline by
    (image index, category id).
    """
    objects: ByClass = defaultdict(list)
    bare: dict[tuple[int, int], list[Sequence[float]]] = defaultdict(list)
    # new ids from 1: pycocotools and similar packages treat a match with object id 0 as no match
    for number, item in enumerate(truth.objects, start=1):
        if item.image_id not in index_of:
            continue
        index, area, code = index_of[item.image_id], item.area, None
        if kind == "segm" or area is None:
            size = truth.sides(item.image_id)
            outline = read_outline(item.segmentation, size).shape
            code = None if outline is None else compressed(outline, *size)
        if kind == "segm" and code is None:
            bare[index, item.category_id].append(item.bbox)
            continue
        if area is None:
            area = item.bbox[2] * item.bbox[3] if code is None else float(rle.area(code))
        if empty or area > 0:
            record = {
                "id": number,
                "image_id": index,
                "category_id": item.category_id,
                "area": area,
                "iscrowd": item.iscrowd or 0 if crowds else 0,
            }
            shape = {"bbox": list(item.bbox)} if kind == "bbox" else {"rle": code}
            objects[item.category_id].append(record | shape)
    return objects, bare


def _found(
    truth: Truth,
    index_of: Mapping[int, int],
    results: Sequence[dict],
    kind: str,
    empty: bool,
    unsure: Collection[tuple[int, int]],
    boxed: bool,
    bare: Mapping[tuple[int, int], Sequence[Sequence[float]]],
) -> ByClass:
    mask_areas: list[float] = []
    if kind == "bbox":
        key, shapes = "bbox", [item["bbox"] for item in results]
    else:
        key, (shapes, mask_areas) = "rle", _masks(results, truth)
    box_areas = boxed or kind == "bbox"
    sizes = [item["bbox"][2] * item["bbox"][3] for item in results] if box_areas else mask_areas
    found = defaultdict(list)
    rows = zip(results, shapes, sizes, strict=True)
    for number, (item, shape, area) in enumerate(rows, start=1):
        if not empty and area <= 0:
            continue
        image_id, category = item["image_id"], item["category_id"]
        record = {
            "id": number,
            "image_id": index_of[image_id],
            "category_id": category,
            "score": item["score"],
            "area": area,
            key: shape,
            "lvis_mark": (image_id, category) in unsure,
        }
        if others := bare.get((index_of[image_id], category)):
            box = np.array([item.get("bbox") or rle.toBbox(shape)], float)
            ious = rle.iou(box, np.array(others, float), [0] * len(others))
            record["overlap"] = float(ious.max())
        found[category].append(record)
    return found


def _masks(results: Sequence[dict], truth: Truth) -> tuple[list[dict], list[float]]:
    """Return the results' masks as compressed RLE with counts as bytes, and their areas."""
    codes = []
    for item in results:
        code, size = item["segmentation"], truth.sides(item["image_id"])
        fits = isinstance(code, dict) and code.get("size") == list(size)
        counts = code.get("counts") if fits else None
        if isinstance(counts, str):
            code = {"size": list(size), "counts": counts.encode("utf-8", "surrogatepass")}
        elif not isinstance(counts, bytes):
            code = compressed(check_code(item, size), *size)
        codes.append(code)
    pixels = [code["size"][0] * code["size"][1] for code in codes]
    sizes, valid = areas([code["counts"] for code in codes], pixels)
    for index in np.flatnonzero(~valid).tolist():
        item = results[index]
        check_code(item, truth.sides(item["image_id"]))
        sizes[index] = rle.area(codes[index])
    return codes, sizes.astype(float).tolist()


def _ranked(found: list[dict], limit: int) -> list[dict]:
    """Sort a class's detections by image and descending score; keep up to `limit` per image."""
    images = np.array([item["image_id"] for item in found])
    order = np.lexsort((-np.array([item["score"] for item in found], float), images))
    images = images[order]
    rank = np.arange(len(order)) - np.searchsorted(images, images)
    return [found[index] for index in order[rank < limit]]


def _counts(item: dict) -> bool:
    """Return whether an object is not a crowd and its area is in COCO's range "all"."""
    return not item["iscrowd"] and 0 <= item["area"] <= LARGEST


def _match_class(
    objects: list[dict], found: list[dict], category: int, kind: str, limits: Sequence[int]
) -> list[np.ndarray]:
    """Return precision (T, R, A, M) and recall (T, A, M) of a class with n detections and, for each
    detection (T, n), the id of the matched object (0: none) and whether the detection is ignored.
    """
    if not any(item.get("overlap", 0) for item in found):
        return _run(objects, found, category, kind, limits, IOUS)
    tables = []
    for iou in IOUS:  # the threshold determines which detections are ignored
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
    image_ids = sorted({item["image_id"] for items in (objects, found) for item in items})
    images = [{"id": image_id, "height": 0, "width": 0} for image_id in image_ids]
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
    # The matches of an image are only accessible in its pickled state: item 0 contains the object
    # ids and item 4 the ignore flags, per threshold and detection, by descending score. The first
    # len(images) states belong to size range "all".
    states = [image.__getstate__() for image in work._evalImgs_cpp[: len(images)]]
    partners, ignored = (
        np.hstack([np.array(state[part], kind).reshape(len(ious), -1) for state in states])
        for part, kind in ((0, int), (4, bool))
    )
    return [work.eval["precision"][:, :, 0], work.eval["recall"][:, 0], partners, ignored]


def _mean(table: np.ndarray) -> float | None:
    table = table[table > -1]
    return 100 * float(table.mean()) if len(table) else None
