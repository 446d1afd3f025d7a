"""The archives of COCO 2017 and LVIS v1.

The URLs are those of cocodataset.org/#download and lvisdataset.org/dataset. images.cocodataset.org
does not support TLS (the server sends the certificate of s3.amazonaws.com); with TLS, the files are
at https://s3.amazonaws.com/images.cocodataset.org. Neither project publishes checksums. Sizes
and SHA-256 checksums are those that TensorFlow Datasets recorded for the same URLs
(github.com/tensorflow/datasets, commit 2282548, tensorflow_datasets/url_checksums/coco2017.txt;
commit 8be2f33, tensorflow_datasets/object_detection/lvis/checksums.tsv).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

COCO = "http://images.cocodataset.org"
LVIS = "https://dl.fbaipublicfiles.com/LVIS"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Archive:
    """A published zip archive. Only `members` are extracted, or all files if `members` is empty."""

    url: str
    size: int  # size of the archive in bytes
    sha256: str  # '' if unknown
    unpacked: int  # approximate total size of the extracted files in bytes
    prefix: str  # folder of the files in the archive, e.g. "train2017/"; '' for the top level
    folder: str  # target folder, relative to the root folder
    count: int  # number of extracted files
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file name of the archive."""
        return PurePosixPath(self.url).name

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of `members`, or `folder` if all files are extracted, relative to the root."""
        return tuple(f"{self.folder}/{member}" for member in self.members) or (self.folder,)

    def choose(self, member: str) -> str | None:
        """Return the name under which to extract a file of the archive, or None to skip the file.

        Raises ValueError if `members` is empty and the file is not directly in `prefix`.
        """
        inside, name = member.startswith(self.prefix), member.removeprefix(self.prefix)
        if self.members:
            return name if inside and name in self.members else None
        if not inside or "/" in name:
            expected = f"expected only files in {self.prefix}"
            raise ValueError(f"{self.name}: contains {member!r}, {expected}")
        return name


def _images(name: str, size: int, count: int, sha256: str) -> Archive:
    # JPEG is already compressed: the extracted files are about as large as the archive
    return Archive(f"{COCO}/zips/{name}.zip", size, sha256, size, f"{name}/", name, count)


def _lvis(name: str, size: int, unpacked: int, sha256: str) -> Archive:
    return Archive(f"{LVIS}/{name}.zip", size, sha256, unpacked, "", "annotations", 1, (name,))


TRAIN2017 = _images(
    "train2017",
    19_336_861_798,
    118_287,
    "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
)
VAL2017 = _images(
    "val2017",
    815_585_330,
    5_000,
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
)
LVIS_V1 = {
    "train": _lvis(
        "lvis_v1_train.json",
        350_264_821,
        1_097_154_875,
        "334a4caa374030a7817cf050364525e910f7960f9b6968cef47cffbf3893f8ba",
    ),
    "val": _lvis(
        "lvis_v1_val.json",
        64_026_968,
        201_235_232,
        "5cae9a3c79aadb667550c2b5dcf7f4d86e059a41ec91ef690225b667e28e9ba5",
    ),
}
UNPACKED = {"train": 469_785_474, "val": 19_987_840}  # size of instances_SPLIT2017.json in bytes


def instances(*splits: str) -> Archive:
    """Return COCO's annotation archive, limited to instances_SPLIT2017.json of these splits."""
    return Archive(
        f"{COCO}/annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        sum(UNPACKED[split] for split in splits),
        "annotations/",
        "annotations",
        len(splits),
        tuple(f"instances_{split}2017.json" for split in splits),
    )


def archives(dataset: str, split: str = "") -> list[Archive]:
    """Return the archives of data set "coco" or "lvis" for a split, by default for both splits.

    LVIS always includes both image archives: its val split has images of train2017 and val2017.
    """
    splits = (split,) if split else SPLITS
    if dataset == "lvis":
        return [TRAIN2017, VAL2017, *(LVIS_V1[name] for name in splits)]
    folders = {"train": TRAIN2017, "val": VAL2017}
    return [instances(*splits), *(folders[name] for name in splits)]
