"""Fingerprints, which identify the data in a split.

A fingerprint covers the bytes of the annotation file, and the names and file sizes of the images
that the file lists. The fingerprint changes if an image is added, an annotation is edited or the
size of an image file changes, but does not depend on the data set's location or on other files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from vitdet.config import DataConfig
from vitdet.data import download_record
from vitdet.data.annotation_file import Entries, read_entries
from vitdet.data.coco_layouts import existing_name, image_name
from vitdet.data.dataset import read_split
from vitdet.data.layout import missing, split_files
from vitdet.data.records import Records
from vitdet.files import sha256

COCO_URL = re.compile(rb'"coco_url": *"[^"]*?([^/"]+/[^/"]+)"')


def fingerprint(data: DataConfig, split: str, records: Records | None = None) -> str:
    """Return 16 hex digits that identify the split, limited to data.max_images images.

    records: the records from `read_split`, if the split was already read. Raises FileNotFoundError
    or ValueError with a one-line message if files are missing or cannot be read.
    """
    annotations, images = split_files(data, split)
    for path in (annotations, images):
        if not path.exists():
            raise missing(path, data)
    names = _names(data, split) if records is None else records.names()
    digest = hashlib.sha256(sha256(annotations).encode())
    for name, size in sorted(_sizes(images, names, data)):
        digest.update(f"\n{name} {size}".encode())
    return digest.hexdigest()[:16]


def fingerprints(data: DataConfig) -> dict[str, str]:
    """Return {"train": ..., "val": ...}, the fingerprints of both splits.

    Raises the errors of `fingerprint`.
    """
    return {"train": fingerprint(data, data.train_split), "val": fingerprint(data, data.val_split)}


def combined(prints: Mapping[str, str]) -> str:
    """Return the fingerprints of both splits as one string, joined by a hyphen."""
    return f"{prints['train']}-{prints['val']}"


def change(stored: Mapping, data: DataConfig, found: Mapping[str, str]) -> str:
    """Describe how the data differs from the data of a checkpoint or training state.

    `stored` is the content of the checkpoint or training state; version 0.1 stored a dataset_digest
    instead of fingerprints. `found` are the current fingerprints. Returns "" if equal.
    """
    before = stored.get("fingerprints")
    if before is None:
        old, now = stored["dataset_digest"], legacy_dataset_digest(data)
        return "" if old == now else f"{old}, now {now}"
    return "; ".join(
        f"{split} split {before.get(split, 'unknown')}, now {found[split]}"
        for split in found
        if before.get(split) != found[split]
    )


def describe(data: DataConfig) -> dict:
    """Return a description of both splits as a JSON-compatible dict.

    {"root", "classes", "fingerprints", "files": [{"path", "size", "sha256"}],
    "images": {split: {"count", "bytes"}}}

    Raises FileNotFoundError or ValueError with a one-line message for data that training cannot use
    and for data that differs from the record of `vitdet data coco|lvis`.
    """
    root = Path(data.root)
    recorded = {file.path: file.sha256 for file in download_record.read_if_ours(root).files}
    files, images, classes, prints = [], {}, [], {}
    for key, split in (("train", data.train_split), ("val", data.val_split)):
        found = read_split(data, split)
        annotations, _ = split_files(data, split)
        path, checksum = str(annotations.relative_to(root)), sha256(annotations)
        # `read_split` has already compared file sizes, but not checksums, with the record
        if recorded.get(path, checksum) != checksum:
            raise ValueError(
                f"{annotations}: sha256 {checksum}, but {recorded[path]} when downloaded; remove "
                f"the file and run `vitdet data coco|lvis {root}` to restore it; if the change is "
                f"intended, remove {root / download_record.NAME}"
            )
        files.append({"path": path, "size": annotations.stat().st_size, "sha256": checksum})
        images[split] = {
            "count": len(found.records),
            "bytes": sum(path.stat().st_size for path in found.records.paths()),
        }
        classes.append(list(found.class_names))
        prints[key] = fingerprint(data, split, found.records)
    if classes[0] != classes[1]:
        raise ValueError(
            f"{data.root}: {data.train_split} and {data.val_split} have different classes"
        )
    return {
        "root": str(data.root),
        "classes": classes[0],
        "fingerprints": prints,
        "files": files,
        "images": images,
    }


def verify(data: DataConfig, expected: str) -> dict[str, str]:
    """Verify that the data has the `expected` fingerprints (see `combined`).

    Returns the result of `fingerprints`. Raises ValueError with the name of the split if a
    fingerprint differs, and FileNotFoundError for missing files.
    """
    try:
        found = fingerprints(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. The file was removed after the data was verified; restore it or start a "
            "new run"
        ) from error
    for key, before in zip(("train", "val"), expected.split("-"), strict=True):
        if found[key] != before:
            split = data.train_split if key == "train" else data.val_split
            raise ValueError(
                f"{data.root}: {split} has changed since it was verified (fingerprint "
                f"{found[key]}, was {before}); start a new run"
            )
    return found


def legacy_dataset_digest(data: DataConfig) -> str:
    """Return the digest of both splits as in version 0.1, for comparison with a stored digest.

    Covers annotations, and names and sizes of image files (LVIS: the images listed by coco_url).
    """
    digest = hashlib.sha256(str(data.max_images).encode())
    for split in (data.train_split, data.val_split):
        annotations, images = split_files(data, split)
        for path in (annotations, images):
            if not path.exists():
                raise missing(path, data)
        digest.update(f"\n{split}\n".encode() + bytes.fromhex(sha256(annotations)))
        found = _files(images)
        if data.dataset == "lvis":
            found = (
                str(images / name.decode())
                for name in set(COCO_URL.findall(annotations.read_bytes()))
            )
        start = len(str(images)) + 1
        files = sorted(
            (path[start:], os.stat(path).st_size) for path in found if os.path.isfile(path)
        )
        digest.update("\n".join(f"{name} {size}" for name, size in files).encode())
    return digest.hexdigest()[:16]


def _names(data: DataConfig, split: str) -> Iterator[str]:
    """Return the names of a split's images, without validating the annotations if possible."""
    if not data.max_images:
        try:
            content: Any = read_entries(split_files(data, split)[0])
            heads = content.get("images") if isinstance(content, dict) else None
            if isinstance(heads, list | Entries):
                images = cast("Iterable[dict]", heads)
                folder = split_files(data, split)[1]
                names = [image_name(image, data.dataset == "lvis") for image in images]
                return iter([existing_name(folder, name) for name in names])
        except (ValueError, KeyError, AttributeError, TypeError):
            pass  # `read_split` reports the error
    return read_split(data, split).records.names()


def _sizes(folder: Path, names: Iterable[str], data: DataConfig) -> Iterator[tuple[str, int]]:
    start = str(folder)
    for name in names:
        try:
            yield name, os.stat(f"{start}/{name}").st_size
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder / name}: no such file; `vitdet data check {data.root}` lists all problems"
            ) from error


def _files(folder: Path) -> Iterator[str]:
    return (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
