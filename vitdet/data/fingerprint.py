"""What a data set is made of, so that a later step can see that it still is: the annotation files by their sha256, the
images by number and size, and one digest of all that training and evaluation depend on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vitdet.config import DataConfig
from vitdet.data.dataset import read_split
from vitdet.data.layout import missing, split_files
from vitdet.datasets import inventory

COCO_URL = re.compile(
    rb'"coco_url": *"[^"]*?([^/"]+/[^/"]+)"'
)  # reading 1 GB as JSON takes a minute


def describe(data: DataConfig) -> dict:
    """{"root", "digest", "classes", "files": [{"path", "size", "sha256"}], "images": {split: {"count", "bytes"}}}.

    Both splits are read: raises FileNotFoundError or ValueError, in one line, for what training could not use, and for
    data that `vitdet data coco|lvis` brought and that is no longer as it came.
    """
    if inventory.exists(Path(data.root)):
        inventory.verify(Path(data.root))
    identity = dataset_digest(data)
    files, images, classes = [], {}, []
    for split in (data.train_split, data.val_split):
        annotations, _ = split_files(data, split)
        with open(annotations, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(
            {
                "path": str(annotations.relative_to(data.root)),
                "size": annotations.stat().st_size,
                "sha256": sha256,
            }
        )
        found = read_split(data, split)
        images[split] = {
            "count": len(found.records),
            "bytes": sum(one.path.stat().st_size for one in found.records),
        }
        classes.append(list(found.class_names))
    if classes[0] != classes[1]:
        raise ValueError(
            f"{data.root}: {data.train_split} and {data.val_split} have different classes"
        )
    return {
        "root": str(data.root),
        "digest": identity,
        "classes": classes[0],
        "files": files,
        "images": images,
    }


def verify(manifest: dict, data: DataConfig) -> str:
    """The digest of the data, which is still what the manifest says.

    Raises ValueError, naming the first difference, when it is not, and FileNotFoundError when it is gone.
    """
    root = Path(data.root)
    for file in manifest["files"]:
        path = root / file["path"]
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: gone since the data was verified; bring the data back, and run the step "
                "`data` again (without its cache)"
            )
    found = dataset_digest(data)
    if found == manifest["digest"]:
        return found
    for file in manifest["files"]:
        with open(root / file["path"], "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise ValueError(
                    f"{root / file['path']}: no longer the file that was verified ({file['sha256'][:12]})"
                )
    raise ValueError(
        f"{root}: its images are not those that were verified (digest {found}, then "
        f"{manifest['digest']}); run the step `data` again (without its cache)"
    )


def dataset_digest(data: DataConfig) -> str:
    """16 hex digits that change when annotations, image names, image file sizes or data.max_images change.

    Looked at are all files of a split's folder, and of LVIS those that coco_urls of the annotation file name.
    """
    digest = hashlib.sha256(str(data.max_images).encode())
    for split in (data.train_split, data.val_split):
        annotations, images = split_files(data, split)
        for path in (annotations, images):
            if not path.exists():
                raise missing(path, data)
        with open(annotations, "rb") as file:
            digest.update(f"\n{split}\n".encode() + hashlib.file_digest(file, "sha256").digest())
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


def _files(folder: Path) -> Iterator[str]:
    return (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
