"""COCO's average precision (Lin et al. 2014, cocodataset.org/#detection-eval), as in pycocotools.

Boxes and masks are compared separately. As in Detectron2, the area of a detection is the area of
its box if boxes are compared, and the area of its mask if masks are compared. Metrics are in
percent. Undefined metrics are omitted, e.g. AP of small objects if there are no small objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.matching import Comparison, choose, match
from vitdet.evaluation.results import Truth

NAMES = {"bbox": "box", "segm": "mask"}
LIMITS = (1, 10, 100)  # maximum numbers of detections per class and image
UNCOUNTED = "all are crowds"  # reason why AP is undefined


def compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    most: int = LIMITS[-1],
) -> dict[str, Comparison]:
    """Compare results with the objects of an annotation file; return the comparison of each kind.

    Args:
        kinds: "bbox" and/or "segm".
        image_ids: images to evaluate; default: all images in the file.
        most: maximum number of detections per class and image. If it is above COCO's limit of
            100, the metrics are not comparable with published values.

    Raises:
        ValueError: unknown images or categories, missing keys, values that are not numbers, or
            invalid masks. The message is one line.
    """
    image_ids, results = choose(truth, results, kinds, image_ids)
    limits = (*LIMITS[:-1], most)
    return {kind: match(truth, image_ids, results, kind, limits) for kind in kinds}


def counts(item: Annotation) -> bool:
    """Return whether an object is included in AP."""
    return not item.iscrowd


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return COCO's twelve metrics of each kind in percent: box_ap, box_ap50, ..., mask_ar_large.

    With a limit of 300 detections, for example, box_ar_300 replaces box_ar_100.
    """
    return named({kind: found.aps() | found.ars() for kind, found in finished.items()})


def named(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return the metrics of all kinds by name; undefined metrics are omitted."""
    return {
        f"{NAMES[kind]}_{name}": value
        for kind, values in metrics.items()
        for name, value in values.items()
        if value is not None
    }
