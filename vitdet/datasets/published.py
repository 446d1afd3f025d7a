"""Which archives COCO 2017 and LVIS v1 are published in, and what we take of them.

Addresses: cocodataset.org/#download and lvisdataset.org/dataset. images.cocodataset.org answers without TLS only (its
certificate is that of s3.amazonaws.com); the same bucket with TLS is https://s3.amazonaws.com/images.cocodataset.org.
Neither project publishes checksums. Sizes and sha256 are those that TensorFlow Datasets records of the same addresses
(github.com/tensorflow/datasets, tensorflow_datasets/url_checksums/coco2017.txt at 2282548 and
tensorflow_datasets/object_detection/lvis/checksums.tsv at 8be2f33), so a download is right whatever way it came.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

COCO = "http://images.cocodataset.org"
LVIS = "https://dl.fbaipublicfiles.com/LVIS"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Archive:
    """A zip archive and what is taken of it: the files `members`, or all of its folder if none is named.

    size: its bytes. sha256: '' where nobody knows it. unpacked: bytes of the files that are taken, as far as known.
    prefix: where in the archive they lie. folder: where below the root they go. count: how many they are.
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
        """The file's name."""
        return PurePosixPath(self.url).name

    @property
    def paths(self) -> tuple[str, ...]:
        """What it brings, below the root: its files, or its folder."""
        return tuple(f"{self.folder}/{member}" for member in self.members) or (self.folder,)

    def choose(self, member: str) -> str | None:
        """The name below the folder of a file of the archive; None for one that is not taken.

        Raises ValueError for a file in a folder of images that is none.
        """
        name = member.removeprefix(self.prefix)
        if self.members:
            return name if member.startswith(self.prefix) and name in self.members else None
        if not member.startswith(self.prefix) or "/" in name:
            raise ValueError(f"{self.name}: holds {member!r}, expected files of {self.prefix} only")
        return name


# JPEG files do not get smaller in an archive: what they unpack to is the archive's size, or a little more.
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
    """The archive of COCO's annotations, of which the object instances of these splits are taken."""
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
    """The archives of "coco" or "lvis"; with `split` only those that "train" or "val" needs.

    LVIS divides COCO's images anew: images of its val split lie in train2017 as well, so it takes both folders.
    """
    splits = (split,) if split else SPLITS
    if dataset == "lvis":
        return [TRAIN2017, VAL2017, *(LVIS_V1[each] for each in splits)]
    folders = {"train": TRAIN2017, "val": VAL2017}
    return [instances(*splits), *(folders[each] for each in splits)]
