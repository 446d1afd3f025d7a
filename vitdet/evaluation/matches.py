"""The matches of detections and objects, as columns from which AP can be computed for any weights of the images.

Letters: I images, K classes, N detections, G objects, T IoU thresholds (0.5, 0.55, ..., 0.95).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdet.files import atomic_write

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MATCHES = "matches.npz"
# column -> its shape in letters and the kinds of its type (numpy's dtype.kind)
COLUMNS = {
    "image_ids": ("I", "i"),
    "category_ids": ("K", "i"),
    "class_names": ("K", "U"),
    "image": ("N", "i"),
    "category": ("N", "i"),
    "score": ("N", "f"),
    "matched": ("NT", "b"),
    "ignored": ("NT", "b"),
    "found": ("N", "i"),
    "object_image": ("G", "i"),
    "object_category": ("G", "i"),
}
# column of indices -> the letter of the dimension that it indexes
INDICES = {
    "image": "I",
    "category": "K",
    "found": "G",
    "object_image": "I",
    "object_category": "K",
}


@dataclass(frozen=True)
class Matches:
    """The detections of one kind ("bbox" or "segm"), of all sizes, that the largest limit of detections admits.

    Sorted by class, image and falling score; of equal scores in the order of the results.
    image_ids (I,) int64: every evaluated image, in ascending order, also those without objects or
    detections. category_ids (K,) int64 and class_names: all classes of the annotation file.
    image, category (N,) int32: indices into these. score (N,) float64.
    matched (N, T) bool: true positives. ignored (N, T) bool: neither true nor false positives, as a
    detection of a crowd, of a class that is not exhaustively annotated in its image, or of an object
    without an outline. found (N,) int32: the object that is matched at IoU 0.5, -1 without one.
    object_image, object_category (G,) int32: the objects to find, in the order of the classes.
    """

    kind: str
    image_ids: np.ndarray
    category_ids: np.ndarray
    class_names: tuple[str, ...]
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    found: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray


def precisions(
    true: np.ndarray, false: np.ndarray, objects: float, recalls: np.ndarray = RECALLS
) -> np.ndarray:
    """Return the precision at these recalls (R,), (T, R), as COCO interpolates it.

    true, false (n, T): the weights of true and of false positives by falling score. objects: the
    weight of all objects, above 0. The precision at a recall is the best at that recall or a larger
    one, 0 where it is not reached.
    """
    found, wrong = true.cumsum(0), false.cumsum(0)
    # as pycocotools: no division by 0, the same last digits
    precision = found / (found + wrong + np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    best = np.concatenate([best, np.zeros((1, best.shape[1]))])
    recall = found / objects
    return np.stack([best[np.searchsorted(recall[:, t], recalls), t] for t in range(best.shape[1])])


def save_matches(path: str | Path, matches: Mapping[str, Matches]) -> None:
    """Write the matches of each kind ("bbox", "segm") to one .npz file, atomically."""
    columns: dict[str, Any] = {
        f"{kind}.{name}": np.asarray(getattr(one, name))
        for kind, one in matches.items()
        for name in COLUMNS
    }
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **columns)


def load_matches(path: str | Path) -> dict[str, Matches]:
    """Return what `save_matches` wrote, by kind.

    Raises FileNotFoundError without the file and ValueError, in one line, for any other file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            kinds = list(dict.fromkeys(name.partition(".")[0] for name in file.files))
            return {kind: _checked(kind, file) for kind in kinds}
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such file of matches") from error
        raise ValueError(
            f"{path}: not a file of matches ({error}); run `vitdet evaluate CHECKPOINT --plots FOLDER` again"
        ) from error


def _checked(kind: str, file: Mapping[str, np.ndarray]) -> Matches:
    columns: dict[str, Any] = {name: file[f"{kind}.{name}"] for name in COLUMNS}
    lengths = {"T": len(IOUS)}
    for name, (shape, types) in COLUMNS.items():
        column = columns[name]
        for letter, length in zip(shape, column.shape, strict=False):
            lengths.setdefault(letter, length)
        expected = tuple(lengths.get(letter) for letter in shape)
        if column.dtype.kind not in types or column.shape != expected:
            raise ValueError(
                f"{kind}.{name}: {column.dtype} of shape {column.shape}, expected {expected}"
            )
    for name, letter in INDICES.items():
        column, least = columns[name], -1 if name == "found" else 0
        if column.size and not (least <= column.min() and column.max() < lengths[letter]):
            raise ValueError(f"{kind}.{name}: index out of range")
    columns["class_names"] = tuple(columns["class_names"].tolist())
    return Matches(kind, **columns)
