"""Average precision as defined by LVIS (Gupta et al. 2019, lvisdataset.org); the reference is the package lvis 0.5.3.

An image of LVIS is annotated for some categories only. Detections of a category that is neither annotated there nor
named as absent (neg_category_ids) are left out; where not every object of a category is annotated
(not_exhaustive_category_ids), what is found beyond the annotated ones is not counted. The 300 best detections of an
image count, of all categories together. There are no crowds, and what has no area does not take part.

The size of a detection whose mask is compared is that of its mask in `compare`, as in the published metrics of
Detectron2, which removes the boxes; it is that of its box in `compare_file`, as the package itself does for a file with both.
Only AP and AR of small, medium and large masks differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.coco import named
from vitdet.evaluation.matching import Comparison, choose, index, match
from vitdet.evaluation.results import Truth, kinds_of

LIMIT = 300  # detections of an image
UNCOUNTED = "all have an area of 0, which LVIS leaves out"
# in at most 10, at most 100, more images of the training split
GROUPS = {"rare": "r", "common": "c", "frequent": "f"}


def compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
) -> dict[str, Comparison]:
    """Return the comparison of each kind; arguments and errors as of `coco.compare`.

    Raises ValueError as well for an annotation file without LVIS's own fields.
    """
    return _compare(truth, results, kinds, image_ids, boxed=False)


def compare_file(
    truth: Truth, results: Sequence[dict], kinds: Sequence[str]
) -> dict[str, Comparison]:
    """The same with sizes as the package gives them to a file of these results."""
    return _compare(
        truth, results, kinds, None, boxed=bool(results) and "bbox" in kinds_of(results)
    )


def _compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str],
    image_ids: Iterable[int] | None,
    boxed: bool,
) -> dict[str, Comparison]:
    check(truth)
    image_ids, results = choose(truth, results, {*kinds, *(["bbox"] if boxed else [])}, image_ids)
    results = federated(truth, best(results))
    unsure = {
        (image_id, category)
        for image_id in image_ids
        for category in truth.images[image_id]["not_exhaustive_category_ids"]
    }
    sides = {
        kind: index(
            truth,
            image_ids,
            results,
            kind,
            crowds=False,
            empty=False,
            unsure=unsure,
            size_by="bbox" if boxed else "",
        )
        for kind in kinds
    }
    return {
        kind: match(*sides[kind], truth.categories.values(), image_ids, kind, (LIMIT,))
        for kind in kinds
    }


def check(truth: Truth) -> None:
    """Raises ValueError, in one line, for an annotation file without LVIS's own fields."""
    for items, keys in (
        (truth.images, ("neg_category_ids", "not_exhaustive_category_ids")),
        (truth.categories, ("frequency",)),
    ):
        for key in keys:
            lacking = next((one["id"] for one in items.values() if key not in one), None)
            if lacking is not None:
                raise ValueError(
                    f"{truth.path}: {key} of {'image' if items is truth.images else 'category'} "
                    f"{lacking} is missing, which LVIS has; with COCO's annotations take dataset coco"
                )


def counts(item: Annotation) -> bool:
    """Return whether an object counts in AP."""
    return item.area != 0


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return the thirteen metrics of LVIS per kind in percent: box_ap, ..., box_ap_rare, ..., box_ar_large, mask_ap, ..."""
    metrics = {}
    for kind, one in finished.items():
        groups = {
            name: [
                place
                for place, category in enumerate(one.categories)
                if category["frequency"] == letter
            ]
            for name, letter in GROUPS.items()
        }
        metrics[kind] = {
            "ap": one.ap(),
            "ap50": one.ap(0.5),
            "ap75": one.ap(0.75),
            "ap_small": one.ap(size="small"),
            "ap_medium": one.ap(size="medium"),
            "ap_large": one.ap(size="large"),
            **{f"ap_{name}": one.ap(chosen=places) for name, places in groups.items()},
            "ar_300": one.ar(),
            "ar_small": one.ar("small"),
            "ar_medium": one.ar("medium"),
            "ar_large": one.ar("large"),
        }
    return named(finished, metrics)


def best(results: Sequence[dict]) -> list[dict]:
    """Return the LIMIT results of highest score of each image; of equal scores, the first ones."""
    images = defaultdict(list)
    for item in results:
        images[item["image_id"]].append(item)
    return [
        item
        for items in images.values()
        for item in (
            items
            if len(items) <= LIMIT
            else sorted(items, key=lambda item: item["score"], reverse=True)[:LIMIT]
        )
    ]


def federated(truth: Truth, results: Sequence[dict]) -> list[dict]:
    """Return the results that the annotations can judge: of a category annotated in the image or listed
    as absent from it.
    """
    known = {(item.image_id, item.category_id) for item in truth.objects if counts(item)}
    known |= {
        (image_id, category)
        for image_id, image in truth.images.items()
        for category in image["neg_category_ids"]
    }
    return [item for item in results if (item["image_id"], item["category_id"]) in known]
