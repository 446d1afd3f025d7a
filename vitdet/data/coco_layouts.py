"""File layouts of the tools that export COCO and LVIS annotations.

* COCO, https://cocodataset.org/#download: annotations/instances_SPLIT.json, SPLIT/
* CVAT, https://docs.cvat.ai/docs/dataset_management/formats/format-coco: as COCO, or with the
  images in images/SPLIT/ or images/
* Roboflow, https://roboflow.com/formats/coco-json: SPLIT/_annotations.coco.json, SPLIT/
* Label Studio, https://labelstud.io/guide/export: result.json; file names start with images/ or,
  since version 1.16, are paths of uploads on its server
* FiftyOne, https://docs.voxel51.com (COCODetectionDataset): labels.json, data/
* labelme2coco and others: JSON files next to the images
* LVIS, https://www.lvisdataset.org/dataset: annotations/lvis_v1_SPLIT.json, images by coco_url
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

ONLY = "default"  # split name of an export without splits; CVAT also uses this name
SNIFFED = 1 << 14  # bytes read from the start of a JSON file
# path of an image on Label Studio's server; in its export, the image is in images/
UPLOAD = re.compile(r"\.\..*[/\\]upload[/\\]\d+[/\\]([^/\\]+)")
TABLES = re.compile(rb'"(images|annotations|categories)"\s*:')


class SplitFiles(NamedTuple):
    """An annotation file and the folder to which its image names are relative."""

    annotations: Path
    images: Path


def coco_files(root: Path, split: str) -> SplitFiles:
    """Return the files of a split in COCO's layout."""
    return SplitFiles(root / "annotations" / f"instances_{split}.json", root / split)


def lvis_files(root: Path, split: str) -> SplitFiles:
    """Return the files of a split in LVIS's layout."""
    return SplitFiles(root / "annotations" / f"lvis_v1_{split}.json", root)


def find_splits(root: Path, dataset: str = "coco") -> dict[str, SplitFiles]:
    """Return the files of the splits in a folder, by split name; uses the first matching layout."""
    if dataset == "lvis":
        names = _split_names(root / "annotations", "lvis_v1_")
        return {name: lvis_files(root, name) for name in names}
    found = {
        name: _images_of(root, coco_files(root, name), name)
        for name in _split_names(root / "annotations", "instances_")
    }
    if not found:
        files = sorted(root.glob("[!.]*/_annotations.coco.json"))
        found = {path.parent.name: SplitFiles(path, path.parent) for path in files}
    if not found and (path := root / "result.json").is_file():
        found = {ONLY: SplitFiles(path, root)}
    if not found and (path := root / "labels.json").is_file() and (root / "data").is_dir():
        found = {ONLY: SplitFiles(path, root / "data")}
    if not found:
        files = [path for path in sorted(root.glob("[!.]*.json")) if _is_coco(path)]
        only = len(files) == 1 and files[0].stem not in ("train", "val", "valid", "test")
        found = {ONLY if only else path.stem: SplitFiles(path, root) for path in files}
    return found


def root_of(annotations: Path) -> Path:
    """Return the data set folder in which `find_splits` finds this annotation file."""
    folder = annotations.parent
    deeper = folder.name == "annotations" or annotations.name == "_annotations.coco.json"
    return folder.parent if deeper else folder


def _split_names(folder: Path, start: str) -> list[str]:
    return sorted(path.stem.removeprefix(start) for path in folder.glob(f"{start}*.json"))


def _images_of(root: Path, files: SplitFiles, split: str) -> SplitFiles:
    for images in (files.images, root / "images" / split, root / "images"):
        if images.is_dir():
            return files._replace(images=images)
    return files


def _is_coco(path: Path) -> bool:
    """Return whether the start of a JSON file resembles COCO's format, not LabelMe's."""
    try:
        with open(path, "rb") as file:
            start = file.read(SNIFFED)
    except OSError:
        return False
    return bool(TABLES.search(start)) and not re.search(rb'"shapes"\s*:', start)


def image_name(head: dict, lvis: bool) -> str:
    """Return an image's path: file_name; for LVIS, the last two parts of coco_url if it is set.

    For an upload of Label Studio, returns the path in its export instead of that on its server.
    """
    url = head.get("coco_url") if lvis else None
    if url:
        return "/".join(url.split("/")[-2:])
    upload = UPLOAD.fullmatch(head["file_name"])
    return f"images/{upload[1]}" if upload else head["file_name"]


def existing_name(folder: Path | str, name: str) -> str:
    """Return the name under which an image exists in `folder`, or `name` if it does not exist.

    If the name has backslashes (from Windows), also tries forward slashes and the bare file name.
    """
    slashed = name.replace("\\", "/")
    for candidate in (name, slashed, slashed.rpartition("/")[2]) if slashed != name else ():
        if os.path.isfile(f"{folder}/{candidate}"):
            return candidate
    return name
