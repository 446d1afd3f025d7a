"""Average precision as COCO measures it (Lin et al. 2014, cocodataset.org/#detection-eval): pycocotools is the arbiter.

Boxes and masks are compared apart: a detection's size is that of its box in one and of its mask in the other, as
Detectron2 does it. Figures are percent. A figure for which the annotations hold no object (AP of small objects where
there are none) is left out, so every number is finite and fit for JSON.
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
    """The comparison of each kind; image_ids limits it to these images (default: all of the file). most: detections
    of a class in an image that count; of more than COCO's 100, the figures are no longer comparable with published ones.

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
    """Nothing more is needed of an annotation file than `files.truth_of` demands."""


def counts(item: Annotation) -> bool:
    """Return whether an object counts in AP."""
    return not item.iscrowd


def summary(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """COCO's twelve figures a kind in percent: box_ap, box_ap50, ..., box_ar_large, mask_ap, ..., mask_ar_large; with
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
    finished: Mapping[str, Comparison], figures: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float]:
    """The figures of each kind as one table, without those of no object."""
    return {
        f"{NAMES[kind]}_{name}": value
        for kind in finished
        for name, value in figures[kind].items()
        if value is not None
    }
