"""ROOT/manifest.json, the record of the files that `vitdet data coco|lvis` downloaded to ROOT.

The record lists every archive (URL, size, sha256), every annotation file (size, sha256) and every
image folder (number of files, total size, sha256 of the sorted lines "NAME SIZE", sha256 of the
sorted lines "NAME SIZE CRC32"). `vitdet.datasets.fetch` writes the record; training, evaluation and
`vitdet data check` compare the files with the record.
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

from vitdet.files import atomic_write, sha256

NAME = "manifest.json"
DOWNLOADED = re.compile(r"\d{12}\.jpg")  # name of a COCO image
CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """Downloaded archive; `known` states whether the sha256 was known before the download."""

    name: str
    url: str
    size: int
    sha256: str
    known: bool


@dataclass(frozen=True)
class File:
    """Downloaded annotation file; `path` is relative to the folder of the data set."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Images:
    """Image folder; `names` is a digest of names and sizes; `content` also covers the CRC-32s."""

    path: str
    count: int
    size: int
    names: str
    content: str


@dataclass(frozen=True)
class DownloadRecord:
    """All downloaded archives, files and image folders, ordered by name or path."""

    archives: tuple[Archive, ...] = ()
    files: tuple[File, ...] = ()
    folders: tuple[Images, ...] = ()

    def with_(self, other: DownloadRecord) -> DownloadRecord:
        """Merge two records; an entry of `other` replaces the entry with the same name or path."""
        return DownloadRecord(
            *(
                tuple(sorted({_key(entry): entry for entry in (*ours, *theirs)}.values(), key=_key))
                for ours, theirs in zip(_parts(self), _parts(other), strict=True)
            )
        )

    def only(self, archives: Collection[str], paths: Collection[str]) -> DownloadRecord:
        """Return the archives with these names, and the files and folders with these paths."""
        return DownloadRecord(
            tuple(archive for archive in self.archives if archive.name in archives),
            tuple(file for file in self.files if file.path in paths),
            tuple(folder for folder in self.folders if folder.path in paths),
        )


def exists(root: Path) -> bool:
    """Return whether a folder contains a download record."""
    return (root / NAME).is_file()


def read(root: Path) -> DownloadRecord:
    """Return a folder's record (empty if missing). Raises ValueError for an invalid record."""
    try:
        stored = json.loads((root / NAME).read_text())
        return DownloadRecord(
            tuple(Archive(**archive) for archive in stored["archives"]),
            tuple(File(**file) for file in stored["files"]),
            tuple(Images(**folder) for folder in stored["folders"]),
        )
    except FileNotFoundError:
        return DownloadRecord()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{root / NAME}: not a manifest of `vitdet data` ({error}); remove the file and "
            "download the data again; existing files will be compared with the archives"
        ) from error


def write(root: Path, record: DownloadRecord) -> None:
    """Write a record atomically, after the files listed in the record are synced to disk."""
    with atomic_write(root / NAME) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        os.sync()


def verify(root: Path, contents: bool = False) -> str:
    """Compare the downloaded files in a folder with its record; return the record's sha256.

    If `contents`, also compares the checksum of every image. Raises FileNotFoundError or ValueError
    with a one-line message for the first difference.
    """
    if not exists(root):
        raise FileNotFoundError(
            f"{root / NAME}: no such file; `vitdet data coco|lvis {root}` creates it"
        )
    record = read(root)
    compare(root, record, contents=contents)
    for file in record.files:
        if (found := sha256(root / file.path)) != file.sha256:
            raise ValueError(
                f"{root / file.path}: sha256 {found}, but {file.sha256} when downloaded"
            )
    return sha256(root / NAME)


def compare(
    root: Path, record: DownloadRecord, used: Collection[str] = (), contents: bool = False
) -> None:
    """Compare file names and sizes with a record and, if `contents`, also image checksums.

    An image folder may contain additional files. `used` are the paths, relative to root, of the
    images in use. Raises the errors of `verify`.
    """
    for file in record.files:
        path = root / file.path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing")
        if path.stat().st_size != file.size:
            raise ValueError(
                f"{path}: {path.stat().st_size:,} bytes, but {file.size:,} when downloaded"
            )
    for images in record.folders:
        folder = root / images.path
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: missing")
        with os.scandir(folder) as listed:
            found = {entry.name: entry.stat().st_size for entry in listed}
        downloaded = _downloaded(found, images, used)
        if downloaded is None:
            then = f"{images.count:,} files, {images.size:,} bytes"
            now = f"{len(found):,} files, {sum(found.values()):,} bytes"
            raise ValueError(f"{folder}: {now}, but {then} when downloaded; names or sizes differ")
        if contents and images.content != digest(
            f"{name} {size} {crc32(folder / name):08x}" for name, size in downloaded.items()
        ):
            raise ValueError(f"{folder}: the content of a file has changed since the download")


def _downloaded(
    found: dict[str, int], images: Images, used: Collection[str]
) -> dict[str, int] | None:
    """Return the downloaded files with their sizes, or None if they differ from the record."""

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
    """Compare the size of a split's annotation file with the download record, if there is one.

    Raises the errors of `compare`, with a remedy in the message.
    """
    _check(root, {str(annotations.relative_to(root))}, ())


def check_images(root: Path, images: Path, names: Iterable[str]) -> None:
    """Compare the image folders of a split with the download record, if there is one.

    `names` are the paths of the split's images, relative to the folder `images`. Raises the errors
    of `check_split`.
    """
    if exists(root):
        folders = read_if_ours(root).folders
        paths = {folder.path for folder in folders if images in (root, root / folder.path)}
        start = "" if images == root else f"{images.relative_to(root)}/"
        _check(root, paths, [f"{start}{name}" for name in names] if paths else ())


def _check(root: Path, paths: Collection[str], used: Collection[str]) -> None:
    try:
        compare(root, read_if_ours(root).only((), paths), used)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. To restore the files, remove any changed file and run "
            f"`vitdet data coco|lvis {root}`; if the change is intended, remove {root / NAME}"
        ) from error


def read_if_ours(root: Path) -> DownloadRecord:
    """Return a folder's record, or an empty record if the file is missing or invalid."""
    try:
        return read(root)
    except ValueError:
        return DownloadRecord()


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 digest of the sorted lines in hexadecimal."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def crc32(path: Path) -> int:
    """Return the CRC-32 checksum of a file."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _parts(record: DownloadRecord) -> tuple[tuple, tuple, tuple]:
    return record.archives, record.files, record.folders


def _key(entry: Archive | File | Images) -> str:
    return entry.name if isinstance(entry, Archive) else entry.path
