"""Average precision as defined by COCO (Lin et al. 2014, cocodataset.org/#detection-eval); the reference is pycocotools.

Boxes and masks are compared separately: the size of a detection is that of its box or of its mask, as in Detectron2.
Metrics are in percent. A metric without objects (AP of small objects if there are none) is absent, so every number is
finite and valid in JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vitdet.data.annotation_file import Annotation
from vitdet.evaluation.matching import Comparison, choose, index, match
from vitdet.evaluation.results import Truth

NAMES = {"bbox": "box", "segm": "mask"}
LIMITS = (1, 10, 100)  # detections of a class in an image
UNCOUNTED = "all are crowds"


def compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    most: int = LIMITS[-1],
) -> dict[str, Comparison]:
    """Return the comparison of each kind; image_ids limits it to these images (default: all of the file). most: detections
    of a class in an image that count; of more than COCO's 100, the metrics are no longer comparable with published ones.

    Raises ValueError, in one line, for results that cannot be compared: of unknown images or categories, without a
    key that is needed, with values that are not numbers, with broken masks.
    """
    image_ids, results = choose(truth, results, kinds, image_ids)
    return {
        kind: match(
            *index(truth, image_ids, results, kind),
            truth.categories.values(),
            image_ids,
            kind,
            (*LIMITS[:-1], most),
        )
        for kind in kinds
    }


def check(truth: Truth) -> None:
    """Accept every annotation file that `truth_of` accepts."""


def counts(item: Annotation) -> bool:
    """Return whether an object counts in AP."""
    return not item.iscrowd


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return the twelve metrics of COCO per kind in percent: box_ap, box_ap50, ..., box_ar_large, mask_ap, ..., mask_ar_large; with
    another limit of detections than 100, box_ar_300 or the like in place of box_ar_100.
    """
    return named(
        finished,
        {
            kind: {
                "ap": one.ap(),
                "ap50": one.ap(0.5),
                "ap75": one.ap(0.75),
                "ap_small": one.ap(size="small"),
                "ap_medium": one.ap(size="medium"),
                "ap_large": one.ap(size="large"),
                "ar_1": one.ar(limit=0),
                "ar_10": one.ar(limit=1),
                f"ar_{one.limits[-1]}": one.ar(),
                "ar_small": one.ar("small"),
                "ar_medium": one.ar("medium"),
                "ar_large": one.ar("large"),
            }
            for kind, one in finished.items()
        },
    )


def named(
    finished: Mapping[str, Comparison], metrics: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float]:
    """Return the metrics of all kinds by name, without those that have no object."""
    return {
        f"{NAMES[kind]}_{name}": value
        for kind in finished
        for name, value in metrics[kind].items()
        if value is not None
    }
