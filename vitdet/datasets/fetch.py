"""COCO 2017 and LVIS v1 from where they are published to where every COCO tool expects them.

  DIR/train2017/*.jpg, DIR/val2017/*.jpg           both data sets; LVIS names its images by coco_url below DIR
  DIR/annotations/instances_{train,val}2017.json   COCO
  DIR/annotations/lvis_v1_{train,val}.json         LVIS
  DIR/manifest.json                                what came: `vitdet.data.download_record`

All archives are downloaded side by side, verified, then unpacked side by side. Whoever is killed on the way has left,
for the next run to go on from: DIR/.archives/NAME.part (a download), DIR/.archives/NAME (verified) and
DIR/.train2017.part (a folder that is not whole). A folder of images takes its name when it is whole. Nothing that is
there is ever written over.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vitdet.data import download_record
from vitdet.data.download_record import DownloadRecord
from vitdet.datasets.download import Patience, Watcher, discard, download, mirrored
from vitdet.datasets.extract import Entry, Limits, unpack
from vitdet.datasets.parallel import Together, side_by_side
from vitdet.datasets.published import Archive
from vitdet.files import locked, sha256

PICTURE = re.compile(r"\d{12}\.jpg")  # as all of COCO's are named
BLOCK = 4096  # bytes that a disk gives a file at a time
PATIENT = Patience()
log = logging.getLogger(__name__)


def fetch(
    archives: Sequence[Archive],
    root: Path,
    show: Callable[[str], Watcher],
    mirror: str = "",
    local: Path | None = None,
    keep: bool = False,
    patience: Patience = PATIENT,
) -> bool:
    """Brings the content of the archives below `root`; False if all of it was there.

    show: makes what shows how far a step is. local: a folder that has the archives, which are then not downloaded.
    keep: the archives stay, in root/archives. Raises what `download` raises, FileNotFoundError for an archive that is
    not in `local`, ValueError for one that is not the published one or for other files in the place of those that it
    holds, OSError when the disk will not take it.
    """
    if not (root / ".archives").exists() and not _lacking(archives, root):
        return False
    root.mkdir(parents=True, exist_ok=True)
    waiting = f"{root}: another process is downloading; waiting"
    with locked(root / ".fetching", waiting=waiting, remove=True):
        todo = _lacking(archives, root)  # another process may have been faster
        if todo:
            _check_places(todo, root)
            _check_space(todo, root, local)
            files = (
                _given(todo, local) if local else _downloaded(todo, root, show, mirror, patience)
            )
            found = _unpacked(todo, files, root, show)
            log.info("%s: unpacked; waiting until all of it is on the disk", root)
            download_record.write(root, download_record.read(root).with_(found))
        _tidy(archives, root, keep)
    return bool(todo)


def _lacking(archives: Sequence[Archive], root: Path) -> list[Archive]:
    """The archives whose content is not there, by the manifest and the sizes of the files."""
    known = download_record.read(root)
    return [archive for archive in archives if not _is_there(archive, root, known)]


def _is_there(archive: Archive, root: Path, known: DownloadRecord) -> bool:
    part = known.only((archive.name,), archive.paths)
    if not part.archives or len(part.files) + len(part.folders) < len(archive.paths):
        return False
    try:
        download_record.compare(root, part)
    except FileNotFoundError as error:
        log.warning("%s; downloading it again", error)
        return False
    except ValueError as error:
        if archive.members or len(os.listdir(root / archive.folder)) >= archive.count:
            raise ValueError(f"{error}; move it away and repeat the command") from error
        log.warning("%s; downloading what is missing", error)
        return False
    return True


def _check_places(todo: Sequence[Archive], root: Path) -> None:
    """Raises, before anything is downloaded, for a folder of images that could not be completed."""
    for archive in todo:
        folder = root / archive.folder
        if folder.is_symlink():
            raise OSError(
                f"{folder}: a link; nothing is written through it. Remove it, or fetch into the folder above "
                "the one that it leads to"
            )
        if archive.members or not folder.exists():
            continue
        there = os.listdir(folder)
        foreign = [name for name in there if not PICTURE.fullmatch(name)]
        if foreign:
            raise ValueError(
                f"{folder / min(foreign)}: not of {archive.name}; move it away and repeat the command"
            )
        if len(there) > archive.count:
            raise ValueError(
                f"{folder}: has more than the {archive.count:,} files of {archive.name}; move it away and "
                "repeat the command"
            )


def _check_space(todo: Sequence[Archive], root: Path, local: Path | None) -> None:
    """Raises OSError if the archives and what they hold do not fit beside what is there."""
    download = (
        0
        if local
        else sum(
            archive.size - _used(root / ".archives", archive.name)
            for archive in todo
            if not (root / "archives" / archive.name).exists()
        )
    )
    content = sum(archive.unpacked + archive.count * BLOCK for archive in todo)
    content -= sum(
        _used(root, folder)
        for archive in todo
        for folder in (archive.folder, f".{archive.folder}.part")
        if not archive.members
    )
    free = shutil.disk_usage(root).free
    if download + content > free:
        raise OSError(
            f"{root}: {(download + content) / 1e9:.1f} GB are needed ({download / 1e9:.1f} for archives, "
            f"{content / 1e9:.1f} for what they hold), {free / 1e9:.1f} GB are free; free some space or name "
            "a folder on another disk"
        )


def _used(root: Path, name: str) -> int:
    """Bytes of a file or its beginning, or of a folder's files with their blocks."""
    if (root / name).is_dir():
        with os.scandir(root / name) as listed:
            return sum(one.stat(follow_symlinks=False).st_size + BLOCK for one in listed)
    return max(
        (path.stat().st_size for path in (root / name, root / f"{name}.part") if path.is_file()),
        default=0,
    )


def _given(todo: Sequence[Archive], local: Path) -> list[Path]:
    """The archives in a folder of the user's, verified."""
    files = [local / archive.name for archive in todo]
    missing = [
        f"{archive.name} ({archive.url})"
        for archive, path in zip(todo, files, strict=True)
        if not path.is_file()
    ]
    if missing:
        raise FileNotFoundError(f"{local}: lacks {', '.join(missing)}")
    log.info("verifying %s", ", ".join(path.name for path in files))
    side_by_side(
        [partial(_verify, path, archive) for path, archive in zip(files, todo, strict=True)],
        threading.Event(),
    )
    return files


def _downloaded(
    todo: Sequence[Archive],
    root: Path,
    show: Callable[[str], Watcher],
    mirror: str,
    patience: Patience,
) -> list[Path]:
    """The archives, verified: kept ones, and the others from the network."""
    addresses = [mirrored(archive.url, mirror) if mirror else archive.url for archive in todo]
    (root / ".archives").mkdir(exist_ok=True)
    stop = threading.Event()
    together = Together(show("downloading"), sum(archive.size for archive in todo), stop)
    files: dict[str, Path] = {}

    def bring(archive: Archive, address: str) -> None:
        kept, path = root / "archives" / archive.name, root / ".archives" / archive.name
        files[archive.name] = kept if kept.is_file() else path
        if kept.is_file():
            _verify(kept, archive)
        elif not path.is_file():
            part = path.with_name(f"{path.name}.part")
            download(address, part, together.watcher(archive.name), patience, archive.size)
            log.info("%s: verifying", archive.name)
            try:
                _verify(part, archive)
            except ValueError as error:
                discard(part)
                raise ValueError(f"{address}: {error}; the download was thrown away") from error
            part.replace(path)
        together.watcher(archive.name).at(archive.size, archive.size)

    side_by_side([partial(bring, *one) for one in zip(todo, addresses, strict=True)], stop)
    together.bar.end()
    return [files[archive.name] for archive in todo]


def _verify(path: Path, archive: Archive) -> None:
    size = path.stat().st_size
    if size != archive.size:
        raise ValueError(
            f"{path}: {size:,} bytes, expected {archive.size:,}: not the published {archive.name}"
        )
    if archive.sha256 and (found := sha256(path)) != archive.sha256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {archive.sha256}: not the published {archive.name}"
        )
    if not archive.sha256:
        log.warning("%s: no checksum is published; only its size was verified", archive.name)


def _unpacked(
    todo: Sequence[Archive], files: Sequence[Path], root: Path, show: Callable[[str], Watcher]
) -> DownloadRecord:
    """Unpacks the archives and describes what they held."""
    stop, found = threading.Event(), []
    together = Together(show("unpacking"), sum(archive.unpacked for archive in todo), stop)

    def one(archive: Archive, path: Path) -> None:
        watcher, done = together.watcher(archive.name), 0

        def seen(size: int) -> None:
            nonlocal done
            done += size
            # how much it will be is known about only
            watcher.at(min(done, archive.unpacked - 1), None)

        found.append(_describe(archive, path, root, _place(archive, path, root, seen)))
        watcher.at(archive.unpacked, None)

    side_by_side([partial(one, *each) for each in zip(todo, files, strict=True)], stop)
    together.bar.end()
    manifest = DownloadRecord()
    for each in found:
        manifest = manifest.with_(each)
    return manifest


def _place(archive: Archive, path: Path, root: Path, seen: Callable[[int], None]) -> list[Entry]:
    """Unpacks one archive: files beside others that are there, or a folder that takes its name when it is whole."""
    folder = root / archive.folder
    limits = Limits(archive.count, archive.unpacked + archive.unpacked // 10)
    there = bool(archive.members) or folder.exists()
    work = folder if there else root / f".{archive.folder}.part"
    entries = unpack(path, work, archive.choose, limits, seen, ours=not there)
    if len(entries) != archive.count:
        raise ValueError(
            f"{path}: holds {len(entries):,} of the {archive.count:,} files of {archive.folder}"
        )
    foreign = () if archive.members else set(os.listdir(work)) - {entry.name for entry in entries}
    if foreign:
        raise ValueError(
            f"{work / min(foreign)}: not of {archive.name}, and {len(foreign) - 1} more files; move them "
            "away and repeat the command"
        )
    if not there:
        work.rename(folder)
    return entries


def _describe(archive: Archive, path: Path, root: Path, entries: Sequence[Entry]) -> DownloadRecord:
    checksum = archive.sha256 or sha256(path)
    source = download_record.Archive(
        archive.name, archive.url, path.stat().st_size, checksum, bool(archive.sha256)
    )
    if archive.members:
        return DownloadRecord(
            (source,),
            tuple(
                download_record.File(
                    f"{archive.folder}/{entry.name}",
                    entry.size,
                    sha256(root / archive.folder / entry.name),
                )
                for entry in entries
            ),
        )
    names = download_record.digest(f"{entry.name} {entry.size}" for entry in entries)
    content = download_record.digest(
        f"{entry.name} {entry.size} {entry.crc:08x}" for entry in entries
    )
    size = sum(entry.size for entry in entries)
    return DownloadRecord(
        (source,), (), (download_record.Images(archive.folder, len(entries), size, names, content),)
    )


def _tidy(archives: Sequence[Archive], root: Path, keep: bool) -> None:
    """Puts these archives where they stay, or removes them; those of another data set go on waiting."""
    waiting = root / ".archives"
    if not waiting.exists():
        return
    for archive in archives:
        if keep and (waiting / archive.name).is_file():
            (root / "archives").mkdir(exist_ok=True)
            (waiting / archive.name).replace(root / "archives" / archive.name)
        for name in (archive.name, f"{archive.name}.part", f"{archive.name}.part.json"):
            (waiting / name).unlink(missing_ok=True)
    if not os.listdir(waiting):
        waiting.rmdir()
