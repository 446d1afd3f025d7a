"""The archives of COCO 2017 and LVIS v1.

Addresses: cocodataset.org/#download and lvisdataset.org/dataset. images.cocodataset.org supports no
TLS (its certificate is that of s3.amazonaws.com); the same bucket with TLS is
https://s3.amazonaws.com/images.cocodataset.org. Neither project publishes checksums. Sizes and
sha256 are those that TensorFlow Datasets recorded of the same addresses
(github.com/tensorflow/datasets, tensorflow_datasets/url_checksums/coco2017.txt at 2282548 and
tensorflow_datasets/object_detection/lvis/checksums.tsv at 8be2f33).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

COCO = "http://images.cocodataset.org"
LVIS = "https://dl.fbaipublicfiles.com/LVIS"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Archive:
    """A zip archive and its used content: the files `members`, or its whole folder if empty.

    size: bytes of the archive. sha256: '' if unknown. unpacked: approximate bytes of the used
    files. prefix: their folder in the archive. folder: their folder below the root. count: their
    number.
    """

    url: str
    size: int
    sha256: str
    unpacked: int
    prefix: str
    folder: str
    count: int
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file name."""
        return PurePosixPath(self.url).name

    @property
    def paths(self) -> tuple[str, ...]:
        """The files or the folder that it provides, below the root."""
        return tuple(f"{self.folder}/{member}" for member in self.members) or (self.folder,)

    def choose(self, member: str) -> str | None:
        """Return the name of an archive's file in the folder; None for unused files.

        Raises ValueError for a file in an image folder that is not an image.
        """
        name = member.removeprefix(self.prefix)
        if self.members:
            return name if member.startswith(self.prefix) and name in self.members else None
        if not member.startswith(self.prefix) or "/" in name:
            raise ValueError(
                f"{self.name}: contains {member!r}, expected files of {self.prefix} only"
            )
        return name


# JPEG files do not get smaller in an archive: what they unpack to is the archive's size, or a
# little more.
TRAIN2017 = Archive(
    f"{COCO}/zips/train2017.zip",
    19_336_861_798,
    "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    19_336_861_798,
    "train2017/",
    "train2017",
    118_287,
)
VAL2017 = Archive(
    f"{COCO}/zips/val2017.zip",
    815_585_330,
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    815_585_330,
    "val2017/",
    "val2017",
    5_000,
)
UNPACKED = {"train": 469_785_474, "val": 19_987_840}  # bytes of instances_*2017.json


def instances(*splits: str) -> Archive:
    """Return the archive of COCO's annotations, for the object instances of these splits."""
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


LVIS_V1 = {
    "train": Archive(
        f"{LVIS}/lvis_v1_train.json.zip",
        350_264_821,
        "334a4caa374030a7817cf050364525e910f7960f9b6968cef47cffbf3893f8ba",
        1_097_154_875,
        "",
        "annotations",
        1,
        ("lvis_v1_train.json",),
    ),
    "val": Archive(
        f"{LVIS}/lvis_v1_val.json.zip",
        64_026_968,
        "5cae9a3c79aadb667550c2b5dcf7f4d86e059a41ec91ef690225b667e28e9ba5",
        201_235_232,
        "",
        "annotations",
        1,
        ("lvis_v1_val.json",),
    ),
}


def archives(dataset: str, split: str = "") -> list[Archive]:
    """Return the archives of "coco" or "lvis"; with `split` only those for "train" or "val".

    LVIS splits COCO's images differently: images of its val split are in train2017 too, so it needs
    both folders.
    """
    splits = (split,) if split else SPLITS
    if dataset == "lvis":
        return [TRAIN2017, VAL2017, *(LVIS_V1[each] for each in splits)]
    folders = {"train": TRAIN2017, "val": VAL2017}
    return [instances(*splits), *(folders[each] for each in splits)]
