"""The record of what `vitdet data coco|lvis` downloaded into a folder: ROOT/manifest.json.

It lists every archive (address, size, sha256), every annotation file (size, sha256) and every folder of images (number,
bytes, one sha256 over the sorted lines "NAME SIZE" and one over "NAME SIZE CRC32"). `vitdet.datasets.fetch` writes it;
training, evaluation and `vitdet data check` compare the files with it. The same download has the same record on every
machine, so a version control that tracks this file and the annotations tracks the data without holding 118,000 images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from vitdet.files import sha256, written

NAME = "manifest.json"
DOWNLOADED = re.compile(r"\d{12}\.jpg")  # the name of every image of COCO
CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A downloaded file. `known`: whether its sha256 was known beforehand; else it is that of what was downloaded."""

    name: str
    url: str
    size: int
    sha256: str
    known: bool


@dataclass(frozen=True)
class File:
    """A file, by its path below the folder."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Images:
    """A folder of images, by its path; `names` and `content`: digests over their sorted names, sizes and checksums."""

    path: str
    count: int
    size: int
    names: str
    content: str


@dataclass(frozen=True)
class DownloadRecord:
    """Everything that was downloaded, ordered by name or path."""

    archives: tuple[Archive, ...] = ()
    files: tuple[File, ...] = ()
    folders: tuple[Images, ...] = ()

    def with_(self, other: DownloadRecord) -> DownloadRecord:
        """This record and another; entries of `other` replace those of the same name."""
        return DownloadRecord(
            *(
                tuple(sorted({_key(one): one for one in (*ours, *theirs)}.values(), key=_key))
                for ours, theirs in zip(_parts(self), _parts(other), strict=True)
            )
        )

    def only(self, archives: Collection[str], paths: Collection[str]) -> DownloadRecord:
        """The entries of these archives and paths."""
        return DownloadRecord(
            tuple(one for one in self.archives if one.name in archives),
            tuple(one for one in self.files if one.path in paths),
            tuple(one for one in self.folders if one.path in paths),
        )


def exists(root: Path) -> bool:
    """Whether the folder has a record."""
    return (root / NAME).is_file()


def read(root: Path) -> DownloadRecord:
    """The record of the folder; an empty one if there is none. Raises ValueError for a file that is not a record."""
    try:
        stored = json.loads((root / NAME).read_text())
        return DownloadRecord(
            tuple(Archive(**one) for one in stored["archives"]),
            tuple(File(**one) for one in stored["files"]),
            tuple(Images(**one) for one in stored["folders"]),
        )
    except FileNotFoundError:
        return DownloadRecord()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{root / NAME}: not a manifest of `vitdet data` ({error}); remove it and fetch again: what "
            "is there will be compared with the archives"
        ) from error


def write(root: Path, record: DownloadRecord) -> None:
    """Writes the record atomically, after all files that it lists have reached the disk."""
    with written(root / NAME) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        os.sync()


def verify(root: Path, contents: bool = False) -> str:
    """Compare all files of a folder with its record and return the record's sha256.

    contents: also read every image. Raises FileNotFoundError or ValueError, in one line, for the first difference.
    """
    if not exists(root):
        raise FileNotFoundError(
            f"{root / NAME}: not there; `vitdet data coco|lvis {root}` makes it"
        )
    record = read(root)
    compare(root, record, contents=contents)
    for file in record.files:
        if (found := sha256(root / file.path)) != file.sha256:
            raise ValueError(f"{root / file.path}: sha256 {found}, it came with {file.sha256}")
    return sha256(root / NAME)


def compare(
    root: Path, record: DownloadRecord, used: Collection[str] = (), contents: bool = False
) -> None:
    """Raises as `verify` does; compares names and sizes, and with `contents` the checksums of the images.

    used: paths below root of the images that are used. Files of a folder of images that were not downloaded into it
    and are not used make no difference.
    """
    for file in record.files:
        path = root / file.path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: gone")
        if path.stat().st_size != file.size:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes, it came with {file.size:,}")
    for images in record.folders:
        folder = root / images.path
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: gone")
        with os.scandir(folder) as listed:
            found = {one.name: one.stat().st_size for one in listed}
        downloaded = _downloaded(found, images, used)
        if downloaded is None:
            raise ValueError(
                f"{folder}: {len(found):,} files of {sum(found.values()):,} bytes, it came with "
                f"{images.count:,} of {images.size:,}; the names or sizes are others"
            )
        if contents and images.content != digest(
            f"{name} {size} {crc32(folder / name):08x}" for name, size in downloaded.items()
        ):
            raise ValueError(f"{folder}: the content of a file is not what came")


def _downloaded(
    found: dict[str, int], images: Images, used: Collection[str]
) -> dict[str, int] | None:
    """Those files of a folder that are the downloaded ones; None if files are missing, added or of another size."""

    def is_complete(part: dict[str, int]) -> bool:
        lines = (f"{name} {size}" for name, size in part.items())
        return len(part) == images.count and digest(lines) == images.names

    if is_complete(found):
        return found
    start = f"{images.path}/"
    names = {path[len(start) :] for path in used if path.startswith(start)}
    for part in (
        {name: size for name, size in found.items() if name in names},
        {name: size for name, size in found.items() if DOWNLOADED.fullmatch(name)},
    ):
        if is_complete(part):
            return part
    return None


def check_split(root: Path, annotations: Path) -> None:
    """Compare a split's annotation file with the record, if there is one: its size, before it is read.

    Raises as `compare` does, with what to do. A manifest.json of another program is no record.
    """
    _check(root, {str(annotations.relative_to(root))}, ())


def check_images(root: Path, images: Path, names: Iterable[str]) -> None:
    """Compare the image folders of a split with the record, if there is one. Raises as `check_split` does.

    names: of the split's images, relative to the folder `images`.
    """
    if exists(root):
        folders = read_if_ours(root).folders
        paths = {one.path for one in folders if images in (root, root / one.path)}
        start = "" if images == root else f"{images.relative_to(root)}/"
        _check(root, paths, [f"{start}{name}" for name in names] if paths else ())


def _check(root: Path, paths: Collection[str], used: Collection[str]) -> None:
    try:
        compare(root, read_if_ours(root).only((), paths), used)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. `vitdet data coco|lvis {root}` brings what is missing; if the change is meant, "
            f"remove {root / NAME}"
        ) from error


def read_if_ours(root: Path) -> DownloadRecord:
    """As `read`, but empty for a manifest.json of another program."""
    try:
        return read(root)
    except ValueError:
        return DownloadRecord()


def digest(lines: Iterable[str]) -> str:
    """sha256 over the sorted lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def crc32(path: Path) -> int:
    """The checksum of a file, as zip archives have it."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _parts(record: DownloadRecord) -> tuple[tuple, tuple, tuple]:
    return record.archives, record.files, record.folders


def _key(one: Archive | File | Images) -> str:
    return one.name if isinstance(one, Archive) else one.path
