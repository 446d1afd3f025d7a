"""Downloading COCO 2017 and LVIS v1 to the usual folders.

  DIR/train2017/*.jpg, DIR/val2017/*.jpg           both data sets; LVIS uses coco_url below DIR
  DIR/annotations/instances_{train,val}2017.json   COCO
  DIR/annotations/lvis_v1_{train,val}.json         LVIS
  DIR/manifest.json                                record: `vitdet.data.download_record`

All archives are downloaded in parallel, verified, then extracted in parallel. An interrupted run
leaves DIR/.archives/NAME.part (a download), DIR/.archives/NAME (verified) and DIR/.train2017.part
(an incomplete folder), from which the next run resumes. An image folder is renamed when it is
complete. Existing files are never overwritten.
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
from vitdet.data.download_record import DownloadRecord, File, Images, digest
from vitdet.datasets.download import Patience, Watcher, discard, download, mirrored
from vitdet.datasets.extract import Entry, Limits, unpack
from vitdet.datasets.parallel import SharedProgress, run_parallel
from vitdet.datasets.published import Archive
from vitdet.files import locked, sha256

PICTURE = re.compile(r"\d{12}\.jpg")  # file names of COCO's images
BLOCK = 4096  # block size of a disk in bytes
PATIENT = Patience()
AWAY = "move it away and repeat the command"
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
    """Download and extract the archives below `root`; return False if everything exists.

    Args:
        archives: the archives to fetch.
        root: the folder of the data sets.
        show: creates the progress display of a step.
        mirror: where to download from instead of the published addresses.
        local: a folder with the archives, which are then not downloaded.
        keep: keep the archives in root/archives.
        patience: retry policy.

    Raises:
        FileNotFoundError: an archive is not in `local`.
        ValueError: an archive is not the published one, or other files are in its place.
        OSError: not enough space, or the folder is not writable; also the errors of `download`.
    """
    if not (root / ".archives").exists() and not _lacking(archives, root):
        return False
    root.mkdir(parents=True, exist_ok=True)
    waiting = f"{root}: another process is downloading; waiting"
    with locked(root / ".fetching", waiting=waiting, remove=True):
        todo = _lacking(archives, root)  # a concurrent process may have finished it
        if todo:
            _check_places(todo, root)
            _check_space(todo, root, local)
            if local:
                files = _given(todo, local)
            else:
                files = _downloaded(todo, root, show("downloading"), mirror, patience)
            found = _unpacked(todo, files, root, show("unpacking"))
            log.info("%s: extracted; syncing to disk", root)
            download_record.write(root, download_record.read(root).with_(found))
        _tidy(archives, root, keep)
    return bool(todo)


def _lacking(archives: Sequence[Archive], root: Path) -> list[Archive]:
    """Return the archives whose content is missing, by the record and the sizes of the files."""
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
            raise ValueError(f"{error}; {AWAY}") from error
        log.warning("%s; downloading what is missing", error)
        return False
    return True


def _check_places(todo: Sequence[Archive], root: Path) -> None:
    """Raise an error, before downloading, for an image folder that cannot be completed."""
    for archive in todo:
        folder = root / archive.folder
        if folder.is_symlink():
            raise OSError(
                f"{folder}: a link, which is not followed; remove it, or fetch to the parent of "
                "the folder that it points to"
            )
        if archive.members or not folder.exists():
            continue
        there = os.listdir(folder)
        foreign = [name for name in there if not PICTURE.fullmatch(name)]
        if foreign:
            raise ValueError(f"{folder / min(foreign)}: not of {archive.name}; {AWAY}")
        if len(there) > archive.count:
            more = f"has more than the {archive.count:,} files of {archive.name}"
            raise ValueError(f"{folder}: {more}; {AWAY}")


def _check_space(todo: Sequence[Archive], root: Path, local: Path | None) -> None:
    """Raise OSError if the archives and their content do not fit on the disk."""
    lacking = [one for one in todo if not local and not (root / "archives" / one.name).exists()]
    folders = [archive.folder for archive in todo if not archive.members]
    download = sum(archive.size - _used(root / ".archives" / archive.name) for archive in lacking)
    content = sum(archive.unpacked + archive.count * BLOCK for archive in todo)
    content -= sum(_used(root / name) + _used(root / f".{name}.part") for name in folders)
    free = shutil.disk_usage(root).free
    if download + content > free:
        raise OSError(
            f"{root}: {(download + content) / 1e9:.1f} GB is needed ({download / 1e9:.1f} for "
            f"archives, {content / 1e9:.1f} for their content), but only {free / 1e9:.1f} GB "
            "is free; free some space or choose a folder on another disk"
        )


def _used(path: Path) -> int:
    """Return the bytes of a (partial) file, or the disk space of the files in a folder."""
    if path.is_dir():
        with os.scandir(path) as listed:
            return sum(entry.stat(follow_symlinks=False).st_size + BLOCK for entry in listed)
    files = (path, path.with_name(f"{path.name}.part"))
    return max((file.stat().st_size for file in files if file.is_file()), default=0)


def _given(todo: Sequence[Archive], local: Path) -> list[Path]:
    """Return the verified archives in the user's folder."""
    missing = [f"{one.name} ({one.url})" for one in todo if not (local / one.name).is_file()]
    if missing:
        raise FileNotFoundError(f"{local}: lacks {', '.join(missing)}")
    log.info("verifying %s", ", ".join(archive.name for archive in todo))
    run_parallel([partial(_verify, local / one.name, one) for one in todo], threading.Event())
    return [local / archive.name for archive in todo]


def _downloaded(
    todo: Sequence[Archive], root: Path, bar: Watcher, mirror: str, patience: Patience
) -> list[Path]:
    """Return the verified archives, existing or downloaded."""
    addresses = [mirrored(archive.url, mirror) if mirror else archive.url for archive in todo]
    (root / ".archives").mkdir(exist_ok=True)
    stop = threading.Event()
    progress = SharedProgress(bar, sum(archive.size for archive in todo), stop)
    files: dict[str, Path] = {}

    def bring(archive: Archive, address: str) -> None:
        kept, path = (root / folder / archive.name for folder in ("archives", ".archives"))
        watcher = progress.watcher(archive.name)
        files[archive.name] = kept if kept.is_file() else path
        if kept.is_file():
            _verify(kept, archive)
        elif not path.is_file():
            part = path.with_name(f"{path.name}.part")
            download(address, part, watcher, patience, archive.size)
            log.info("%s: verifying", archive.name)
            try:
                _verify(part, archive)
            except ValueError as error:
                discard(part)
                raise ValueError(f"{address}: {error}; the download was removed") from error
            part.replace(path)
        watcher.at(archive.size, archive.size)

    run_parallel([partial(bring, *pair) for pair in zip(todo, addresses, strict=True)], stop)
    bar.end()
    return [files[archive.name] for archive in todo]


def _verify(path: Path, archive: Archive) -> None:
    size, other = path.stat().st_size, f"not the published {archive.name}"
    if size != archive.size:
        raise ValueError(f"{path}: {size:,} bytes, expected {archive.size:,}: {other}")
    if archive.sha256 and (found := sha256(path)) != archive.sha256:
        raise ValueError(f"{path}: sha256 {found}, expected {archive.sha256}: {other}")
    if not archive.sha256:
        log.warning("%s: no checksum is published; only its size was verified", archive.name)


def _unpacked(
    todo: Sequence[Archive], files: Sequence[Path], root: Path, bar: Watcher
) -> DownloadRecord:
    """Extract the archives and describe their content."""
    stop, record = threading.Event(), DownloadRecord()
    progress = SharedProgress(bar, sum(archive.unpacked for archive in todo), stop)

    def one(archive: Archive, path: Path) -> None:
        nonlocal record
        watcher, done = progress.watcher(archive.name), 0

        def seen(size: int) -> None:
            nonlocal done
            done += size
            watcher.at(min(done, archive.unpacked - 1), None)  # the total is approximate

        found = _describe(archive, path, root, _place(archive, path, root, seen))
        with progress.lock:
            record = record.with_(found)
        watcher.at(archive.unpacked, None)

    run_parallel([partial(one, *each) for each in zip(todo, files, strict=True)], stop)
    bar.end()
    return record


def _place(archive: Archive, path: Path, root: Path, seen: Callable[[int], None]) -> list[Entry]:
    """Extract files to an existing folder, or a folder that is renamed when complete."""
    folder = root / archive.folder
    limits = Limits(archive.count, archive.unpacked + archive.unpacked // 10)
    there = bool(archive.members) or folder.exists()
    work = folder if there else root / f".{archive.folder}.part"
    entries = unpack(path, work, archive.choose, limits, seen, ours=not there)
    if len(entries) != archive.count:
        parts = f"{len(entries):,} of the {archive.count:,} files of {archive.folder}"
        raise ValueError(f"{path}: contains {parts}")
    foreign = () if archive.members else set(os.listdir(work)) - {entry.name for entry in entries}
    if foreign:
        more = f"not of {archive.name}, and {len(foreign) - 1} more files"
        raise ValueError(f"{work / min(foreign)}: {more}; move them away and repeat the command")
    if not there:
        work.rename(folder)
    return entries


def _describe(archive: Archive, path: Path, root: Path, entries: Sequence[Entry]) -> DownloadRecord:
    published, size = bool(archive.sha256), path.stat().st_size
    checksum = archive.sha256 or sha256(path)
    source = download_record.Archive(archive.name, archive.url, size, checksum, published)
    if archive.members:
        paths = [f"{archive.folder}/{entry.name}" for entry in entries]
        sizes = [entry.size for entry in entries]
        files = (File(*pair, sha256(root / pair[0])) for pair in zip(paths, sizes, strict=True))
        return DownloadRecord((source,), tuple(files))
    names = digest(f"{entry.name} {entry.size}" for entry in entries)
    content = digest(f"{entry.name} {entry.size} {entry.crc:08x}" for entry in entries)
    total = sum(entry.size for entry in entries)
    images = Images(archive.folder, len(entries), total, names, content)
    return DownloadRecord((source,), (), (images,))


def _tidy(archives: Sequence[Archive], root: Path, keep: bool) -> None:
    """Move these archives to their final folder, or remove them; others remain."""
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
