"""What a data set is made of, so that a later step can see that it still is: the annotation files by their sha256, the
images by number and size, and one digest of all that training and evaluation depend on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vitdet.config import DataConfig
from vitdet.data import dataset_digest, inventory, read_split
from vitdet.data.layout import split_files


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
