"""COCO's average precision (Lin et al. 2014, cocodataset.org/#detection-eval), as in pycocotools.

Boxes and masks are compared separately: the size of a detection is that of its box or of its mask,
as in Detectron2. Metrics are in percent. Metrics without objects, such as AP of small objects if
there are none, are absent, so that all values are finite and valid JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.matching import Comparison, choose, match
from vitdet.evaluation.results import Truth

NAMES = {"bbox": "box", "segm": "mask"}
LIMITS = (1, 10, 100)  # detections per class and image
UNCOUNTED = "all are crowds"


def compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    most: int = LIMITS[-1],
) -> dict[str, Comparison]:
    """Return the comparison of each kind.

    Args:
        image_ids: images to evaluate; default: all images in the file.
        most: maximum number of detections per class and image; above COCO's 100, the metrics are
            not comparable with published values.

    Raises:
        ValueError: unknown images or categories, missing keys, values that are not numbers, or
            invalid masks, in one line.
    """
    image_ids, results = choose(truth, results, kinds, image_ids)
    limits = (*LIMITS[:-1], most)
    return {kind: match(truth, image_ids, results, kind, limits) for kind in kinds}


def counts(item: Annotation) -> bool:
    """Return whether an object counts in AP."""
    return not item.iscrowd


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return COCO's twelve metrics of each kind in percent: box_ap, box_ap50, ..., box_ar_large,
    mask_ap, ..., mask_ar_large; with a limit of 300 detections, box_ar_300 replaces box_ar_100.
    """
    return named({kind: one.aps() | one.ars() for kind, one in finished.items()})


def named(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return the metrics of all kinds by name, except metrics without objects."""
    return {
        f"{NAMES[kind]}_{name}": value
        for kind, values in metrics.items()
        for name, value in values.items()
        if value is not None
    }
