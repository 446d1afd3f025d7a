"""LVIS's average precision (Gupta et al. 2019, lvisdataset.org), as in lvis 0.5.3 (PyPI).

An LVIS image is annotated only for some categories. Detections of a category that is neither
annotated in the image nor listed as absent (neg_category_ids) are excluded. If a category is not
exhaustively annotated in the image (not_exhaustive_category_ids), its detections that match no
object are ignored. In each image, only the 300 detections with the highest scores over all
categories are evaluated. iscrowd is ignored; objects and detections with zero area are excluded.

If masks are compared, `compare` uses the area of a detection's mask. Detectron2 does the same: it
removes the boxes before it compares masks. If a results file contains boxes, `compare_file` uses
the area of the box, as the lvis package does. This affects AP and AR of small, medium and large
masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.coco import named
from vitdet.evaluation.matching import Comparison, choose, match
from vitdet.evaluation.results import Truth, kinds_of

LIMIT = 300  # maximum number of detections per image
UNCOUNTED = "all have an area of 0, which LVIS ignores"  # reason why AP is undefined
# rare: classes in at most 10 training images; common: in 11 to 100; frequent: in more than 100
GROUPS = {"rare": "r", "common": "c", "frequent": "f"}


def compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    *,
    boxed: bool = False,
) -> dict[str, Comparison]:
    """Return the comparison of each kind; see `coco.compare` for the arguments and errors.

    With `boxed`, the area of a detection's box is used as the area of its mask. Also raises
    ValueError for an annotation file without LVIS's additional fields.
    """
    check(truth)
    image_ids, results = choose(truth, results, {*kinds, *(["bbox"] if boxed else [])}, image_ids)
    results = federated(truth, best(results))
    unsure = {
        (image_id, category)
        for image_id in image_ids
        for category in truth.images[image_id]["not_exhaustive_category_ids"]
    }
    compared = partial(match, crowds=False, empty=False, unsure=unsure, boxed=boxed)
    return {kind: compared(truth, image_ids, results, kind, (LIMIT,)) for kind in kinds}


def compare_file(
    truth: Truth, results: Sequence[dict], kinds: Sequence[str]
) -> dict[str, Comparison]:
    """Return the comparison of a results file, with areas as computed by the lvis package."""
    return compare(truth, results, kinds, boxed=bool(results) and "bbox" in kinds_of(results))


def check(truth: Truth) -> None:
    """Raise ValueError with a one-line message if LVIS's additional fields are missing."""
    image_keys = ("neg_category_ids", "not_exhaustive_category_ids")
    for what, items, keys in (
        ("image", truth.images, image_keys),
        ("category", truth.categories, ("frequency",)),
    ):
        for key in keys:
            lacking = next((item["id"] for item in items.values() if key not in item), None)
            if lacking is not None:
                raise ValueError(
                    f"{truth.path}: {what} {lacking} has no {key}, which LVIS requires; for "
                    "annotations in COCO's format, set data.dataset or --dataset to coco"
                )


def counts(item: Annotation) -> bool:
    """Return whether an object is included in AP."""
    return item.area != 0


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return LVIS's thirteen metrics of each kind in percent: box_ap, ..., mask_ar_large."""
    metrics = {}
    for kind, comparison in finished.items():
        groups = {}
        for name, letter in GROUPS.items():
            categories = enumerate(comparison.categories)
            chosen = [index for index, item in categories if item["frequency"] == letter]
            groups[f"ap_{name}"] = comparison.ap(chosen=chosen)
        metrics[kind] = comparison.aps() | groups | comparison.ars()
    return named(metrics)


def best(results: Sequence[dict]) -> list[dict]:
    """Return up to LIMIT results per image, those with the highest scores; in a tie, the first."""
    images = defaultdict(list)
    for item in results:
        images[item["image_id"]].append(item)
    for image_id, items in images.items():
        if len(items) > LIMIT:
            images[image_id] = sorted(items, key=itemgetter("score"), reverse=True)[:LIMIT]
    return list(chain.from_iterable(images.values()))


def federated(truth: Truth, results: Sequence[dict]) -> list[dict]:
    """Return the results whose category is annotated in the image or in neg_category_ids."""
    known = {(item.image_id, item.category_id) for item in truth.objects if counts(item)}
    for image_id, image in truth.images.items():
        known |= {(image_id, category) for category in image["neg_category_ids"]}
    return [item for item in results if (item["image_id"], item["category_id"]) in known]
