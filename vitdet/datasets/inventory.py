"""What was brought into a folder, so that anyone can see later that it still is that: DIR/manifest.json.

It names every archive that came (address, size, sha256), every annotation file (size, sha256) and every folder of
images (number, bytes, and a sha256 over the sorted lines "NAME SIZE" and one over "NAME SIZE CRC32"). The same data
gives the same manifest on every machine, so its digest names the data, and a version control that tracks this file and
the annotations tracks the data without holding 118,000 files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from vitdet.datasets.extract import crc32
from vitdet.files import written

NAME = "manifest.json"


@dataclass(frozen=True)
class Archive:
    """A file that came. `known`: whether its sha256 was known beforehand; else it is that of what came."""

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
    """A folder of files, by its path; `names` and `content`: digests over its sorted names, sizes and checksums."""

    path: str
    count: int
    size: int
    names: str
    content: str


@dataclass(frozen=True)
class Manifest:
    """All that came, by name or path, in order."""

    archives: tuple[Archive, ...] = ()
    files: tuple[File, ...] = ()
    folders: tuple[Images, ...] = ()

    def with_(self, other: Manifest) -> Manifest:
        """This and another; what both name is as the other says."""
        return Manifest(
            *(
                tuple(sorted({_key(one): one for one in (*ours, *theirs)}.values(), key=_key))
                for ours, theirs in zip(_parts(self), _parts(other), strict=True)
            )
        )

    def only(self, archives: Collection[str], paths: Collection[str]) -> Manifest:
        """The part about these archives and paths."""
        return Manifest(
            tuple(one for one in self.archives if one.name in archives),
            tuple(one for one in self.files if one.path in paths),
            tuple(one for one in self.folders if one.path in paths),
        )


def exists(root: Path) -> bool:
    """Whether the folder has a manifest."""
    return (root / NAME).is_file()


def read(root: Path) -> Manifest:
    """The manifest of the folder; an empty one if there is none. Raises ValueError for one that cannot be read."""
    try:
        stored = json.loads((root / NAME).read_text())
        return Manifest(
            *(
                tuple(kind(**one) for one in stored[key])
                for key, kind in (("archives", Archive), ("files", File), ("folders", Images))
            )
        )
    except FileNotFoundError:
        return Manifest()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{root / NAME}: not a manifest of `vitdet data` ({error}); remove it and fetch again: what "
            "is there will be compared with the archives"
        ) from error


def write(root: Path, manifest: Manifest) -> None:
    """Writes the manifest, all or nothing, after everything it speaks of has reached the disk."""
    with written(root / NAME) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        os.sync()


def verify(root: Path, contents: bool = False) -> str:
    """The digest of the data in a folder, which is what its manifest says; `contents`: every image is read, too.

    Raises FileNotFoundError or ValueError, in one line, for the first thing that is not as it came.
    """
    if not exists(root):
        raise FileNotFoundError(
            f"{root / NAME}: not there; `vitdet data coco|lvis {root}` makes it"
        )
    manifest = read(root)
    compare(root, manifest, contents)
    for file in manifest.files:
        with open(root / file.path, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            raise ValueError(f"{root / file.path}: sha256 {found}, it came with {file.sha256}")
    return hashlib.sha256((root / NAME).read_bytes()).hexdigest()


def compare(root: Path, manifest: Manifest, contents: bool = False) -> None:
    """Raises as `verify` does, for names and sizes alone (or with `contents` the images' checksums)."""
    for file in manifest.files:
        path = root / file.path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: gone")
        if path.stat().st_size != file.size:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes, it came with {file.size:,}")
    for images in manifest.folders:
        folder = root / images.path
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: gone")
        with os.scandir(folder) as listed:
            found = {one.name: one.stat().st_size for one in listed}
        same = (
            len(found) == images.count
            and digest(f"{name} {size}" for name, size in found.items()) == images.names
        )
        if not same:
            raise ValueError(
                f"{folder}: {len(found):,} files of {sum(found.values()):,} bytes, it came with "
                f"{images.count:,} of {images.size:,}; the names or sizes are others"
            )
        if (
            contents
            and digest(f"{name} {size} {crc32(folder / name):08x}" for name, size in found.items())
            != images.content
        ):
            raise ValueError(f"{folder}: the content of a file is not what came")


def look(root: Path, annotations: Path, images: Path) -> None:
    """Raises as `compare` does, and says what to do, for a split that is not as the manifest, if there is one, says.

    images: the folder that the names of the split's images start from. A manifest.json of another program is none.
    """
    try:
        known = read(root)
    except ValueError:
        return
    used = {
        str(annotations.relative_to(root)),
        *(one.path for one in known.folders if images in (root, root / one.path)),
    }
    try:
        compare(root, known.only((), used))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. `vitdet data coco|lvis {root}` brings what is missing; if the change is meant, "
            f"remove {root / NAME}"
        ) from error


def digest(lines: Iterable[str]) -> str:
    """sha256 over the sorted lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def _parts(manifest: Manifest) -> tuple[tuple, tuple, tuple]:
    return manifest.archives, manifest.files, manifest.folders


def _key(one: Archive | File | Images) -> str:
    return one.name if isinstance(one, Archive) else one.path
