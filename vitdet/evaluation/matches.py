"""Matches of detections with objects, as arrays for computing AP with a weight per image.

Notation: I images, K classes, N detections, G objects, T IoU thresholds (0.5, 0.55, ..., 0.95).
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
# array -> shape in the notation above, dtype.kind, axis that the values index ("" if none)
COLUMNS = {
    "image_ids": ("I", "i", ""),
    "category_ids": ("K", "i", ""),
    "class_names": ("K", "U", ""),
    "image": ("N", "i", "I"),
    "category": ("N", "i", "K"),
    "score": ("N", "f", ""),
    "matched": ("NT", "b", ""),
    "ignored": ("NT", "b", ""),
    "found": ("N", "i", "G"),
    "object_image": ("G", "i", "I"),
    "object_category": ("G", "i", "K"),
}


@dataclass(frozen=True)
class Matches:
    """The matches of boxes or masks, with the largest detection limit.

    Detections are sorted by class, image and descending score; ties keep the order of the results.

    Attributes:
        kind: "bbox" or "segm".
        image_ids: (I,) int64, all evaluated images in ascending order.
        category_ids: (K,) int64, all classes of the annotation file.
        class_names: names of these classes.
        image, category: (N,) int32, each detection's indices into image_ids and category_ids.
        score: (N,) float64.
        matched: (N, T) bool, true positives.
        ignored: (N, T) bool, neither true nor false positives: matched with a crowd or an object
            without an outline, or unmatched and of a class not exhaustively annotated in the image.
        found: (N,) int32, index (0..G-1) of the object matched at IoU 0.5; -1 if there is none.
        object_image, object_category: (G,) int32, each object's indices into image_ids and
            category_ids. Objects are sorted by class; ignored objects are excluded.
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
    """Return the precision (T, R) at each of R recalls, interpolated as in COCO: the highest
    precision at this recall or above, or 0 if the recall is not reached.

    Args:
        true, false: (N, T), weights of true and false positives by descending score.
        objects: total weight of the objects, above 0.
    """
    found, wrong = true.cumsum(0), false.cumsum(0)
    # as in pycocotools: avoids division by 0 with the same rounding
    precision = found / (found + wrong + np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    best = np.concatenate([best, np.zeros((1, best.shape[1]))])
    recall = found / objects
    return np.stack([best[np.searchsorted(recall[:, t], recalls), t] for t in range(best.shape[1])])


def save_matches(path: str | Path, matches: Mapping[str, Matches]) -> None:
    """Write the matches of each kind ("bbox", "segm") to an .npz file, atomically."""
    columns: dict[str, Any] = {
        f"{kind}.{name}": np.asarray(getattr(arrays, name))
        for kind, arrays in matches.items()
        for name in COLUMNS
    }
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **columns)


def load_matches(path: str | Path) -> dict[str, Matches]:
    """Return the matches in a file written by `save_matches`, by kind.

    Raises FileNotFoundError, or ValueError with a one-line message if the file is invalid.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            kinds = list(dict.fromkeys(name.partition(".")[0] for name in file.files))
            return {kind: _checked(kind, file) for kind in kinds}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such matches file") from error
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not readable as a matches file ({error}); run `vitdet evaluate CHECKPOINT "
            "--plots FOLDER` again"
        ) from error


def _checked(kind: str, file: Mapping[str, np.ndarray]) -> Matches:
    columns: dict[str, Any] = {name: file[f"{kind}.{name}"] for name in COLUMNS}
    lengths = {"T": len(IOUS)}
    for name, column in columns.items():
        for letter, length in zip(COLUMNS[name][0], column.shape, strict=False):
            lengths.setdefault(letter, length)
    for name, (shape, type_, indexed) in COLUMNS.items():
        column, expected = columns[name], tuple(lengths.get(letter) for letter in shape)
        if column.dtype.kind != type_ or column.shape != expected:
            found = f"{column.dtype} of shape {column.shape}"
            raise ValueError(f"{kind}.{name}: {found}, expected kind {type_!r} of shape {expected}")
        least = -1 if name == "found" else 0
        if indexed and column.size and not least <= column.min() <= column.max() < lengths[indexed]:
            raise ValueError(f"{kind}.{name}: index out of range")
    columns["class_names"] = tuple(columns["class_names"].tolist())
    return Matches(kind, **columns)
