"""Download of COCO 2017 and LVIS v1 to a folder DIR with this layout:

  DIR/train2017/*.jpg, DIR/val2017/*.jpg           images of both data sets
  DIR/annotations/instances_{train,val}2017.json   COCO
  DIR/annotations/lvis_v1_{train,val}.json         LVIS
  DIR/manifest.json                                checksums (`vitdet.data.download_record`)

All archives are downloaded in parallel, verified, then extracted in parallel. An interrupted run
leaves DIR/.archives/NAME.part (partial downloads), DIR/.archives/NAME (verified archives) and
DIR/.FOLDER.part (incomplete image folders), from which the next run resumes. An image folder gets
its final name when it is complete. Images and annotation files are never overwritten.
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

IMAGE_NAME = re.compile(r"\d{12}\.jpg")  # file names of COCO's images
BLOCK = 4096  # disk block size in bytes
PATIENT = Patience()
MOVE_AWAY = "move it away and repeat the command"
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
    """Download the archives and extract them below `root`; return False if nothing was missing.

    Args:
        archives: the archives to fetch.
        root: the folder of the data sets.
        show: maps the name of a step to its progress display.
        mirror: base URL that replaces the host of the published URLs; '' for none.
        local: folder with downloaded archives; None to download the archives.
        keep: move downloaded archives to root/archives instead of removing them.
        patience: retry policy.

    Raises:
        FileNotFoundError: an archive is missing in `local` or on the server.
        ValueError: an archive is not the published one, or an existing file has different content.
        OSError: a download fails, the disk has too little free space, or a file cannot be written.
    """
    if not (root / ".archives").exists() and not _missing(archives, root):
        return False
    root.mkdir(parents=True, exist_ok=True)
    waiting = f"{root}: another process is downloading; waiting"
    with locked(root / ".fetching", waiting=waiting, remove=True):
        todo = _missing(archives, root)  # a concurrent process may have fetched some archives
        if todo:
            _check_places(todo, root)
            _check_space(todo, root, local)
            if local:
                files = _local(todo, local)
            else:
                files = _downloaded(todo, root, show("downloading"), mirror, patience)
            found = _unpacked(todo, files, root, show("unpacking"))
            log.info("%s: extracted; syncing to disk", root)
            download_record.write(root, download_record.read(root).with_(found))
        _tidy(archives, root, keep)
    return bool(todo)


def _missing(archives: Sequence[Archive], root: Path) -> list[Archive]:
    """Return the archives that are not fully extracted; raise ValueError for changed files."""
    record = download_record.read(root)
    return [archive for archive in archives if not _is_extracted(archive, root, record)]


def _is_extracted(archive: Archive, root: Path, record: DownloadRecord) -> bool:
    part = record.only((archive.name,), archive.paths)
    if not part.archives or len(part.files) + len(part.folders) < len(archive.paths):
        return False
    try:
        download_record.compare(root, part)
    except FileNotFoundError as error:
        log.warning("%s; extracting it again", error)
        return False
    except ValueError as error:
        if archive.members or len(os.listdir(root / archive.folder)) >= archive.count:
            raise ValueError(f"{error}; {MOVE_AWAY}") from error
        log.warning("%s; extracting the missing files", error)
        return False
    return True


def _check_places(todo: Sequence[Archive], root: Path) -> None:
    """Raise OSError if a target folder is a symbolic link, ValueError for unexpected files."""
    for archive in todo:
        folder = root / archive.folder
        if folder.is_symlink():
            raise OSError(
                f"{folder}: symbolic links are not followed; remove the link, or fetch to the "
                "parent of the folder that it points to"
            )
        if archive.members or not folder.exists():
            continue
        there = os.listdir(folder)
        foreign = [name for name in there if not IMAGE_NAME.fullmatch(name)]
        if foreign:
            raise ValueError(f"{folder / min(foreign)}: not in {archive.name}; {MOVE_AWAY}")
        if len(there) > archive.count:
            more = f"contains more than the {archive.count:,} files of {archive.name}"
            raise ValueError(f"{folder}: {more}; {MOVE_AWAY}")


def _check_space(todo: Sequence[Archive], root: Path, local: Path | None) -> None:
    """Raise OSError if the archives and their content do not fit on the disk."""
    kept = root / "archives"
    missing = [archive for archive in todo if not local and not (kept / archive.name).exists()]
    folders = [archive.folder for archive in todo if not archive.members]
    download = sum(archive.size - _used(root / ".archives" / archive.name) for archive in missing)
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
    """Return the size in bytes of the files in a folder, or of a file or its partial download."""
    if path.is_dir():
        with os.scandir(path) as listed:
            return sum(entry.stat(follow_symlinks=False).st_size + BLOCK for entry in listed)
    files = (path, path.with_name(f"{path.name}.part"))
    return max((file.stat().st_size for file in files if file.is_file()), default=0)


def _local(todo: Sequence[Archive], local: Path) -> list[Path]:
    """Verify the archives in the user's folder; return their paths."""
    paths = [local / archive.name for archive in todo]
    pairs = list(zip(paths, todo, strict=True))
    missing = [f"{archive.name} ({archive.url})" for path, archive in pairs if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{local}: does not contain {', '.join(missing)}")
    log.info("verifying %s", ", ".join(archive.name for archive in todo))
    run_parallel([partial(_verify, *pair) for pair in pairs], threading.Event())
    return paths


def _downloaded(
    todo: Sequence[Archive], root: Path, bar: Watcher, mirror: str, patience: Patience
) -> list[Path]:
    """Download the missing archives; return the paths of all archives after verification."""
    urls = [mirrored(archive.url, mirror) if mirror else archive.url for archive in todo]
    (root / ".archives").mkdir(exist_ok=True)
    stop = threading.Event()
    progress = SharedProgress(bar, sum(archive.size for archive in todo), stop)
    files: dict[str, Path] = {}

    def obtain(archive: Archive, url: str) -> None:
        kept, path = (root / folder / archive.name for folder in ("archives", ".archives"))
        watcher = progress.watcher(archive.name)
        files[archive.name] = kept if kept.is_file() else path
        if kept.is_file():
            _verify(kept, archive)
        elif not path.is_file():
            part = path.with_name(f"{path.name}.part")
            download(url, part, watcher, patience, archive.size)
            log.info("%s: verifying", archive.name)
            try:
                _verify(part, archive)
            except ValueError as error:
                discard(part)
                raise ValueError(f"{url}: {error}; the download was removed") from error
            part.replace(path)
        watcher.at(archive.size, archive.size)

    run_parallel([partial(obtain, *pair) for pair in zip(todo, urls, strict=True)], stop)
    bar.end()
    return [files[archive.name] for archive in todo]


def _verify(path: Path, archive: Archive) -> None:
    size, other = path.stat().st_size, f"not the published {archive.name}"
    if size != archive.size:
        raise ValueError(f"{path}: {size:,} bytes, expected {archive.size:,}: {other}")
    if archive.sha256 and (found := sha256(path)) != archive.sha256:
        raise ValueError(f"{path}: sha256 {found}, expected {archive.sha256}: {other}")
    if not archive.sha256:
        log.warning("%s: no checksum is published; only the size was verified", archive.name)


def _unpacked(
    todo: Sequence[Archive], files: Sequence[Path], root: Path, bar: Watcher
) -> DownloadRecord:
    """Extract the archives; return the record of their content."""
    stop, record = threading.Event(), DownloadRecord()
    progress = SharedProgress(bar, sum(archive.unpacked for archive in todo), stop)

    def extract(archive: Archive, path: Path) -> None:
        nonlocal record
        watcher, done = progress.watcher(archive.name), 0

        def seen(size: int) -> None:
            nonlocal done
            done += size
            watcher.at(min(done, archive.unpacked - 1), None)  # `unpacked` is only approximate

        entries = _extract(archive, path, root, seen)
        described = _describe(archive, path, root, entries)
        with progress.lock:
            record = record.with_(described)
        watcher.at(archive.unpacked, None)

    run_parallel([partial(extract, *pair) for pair in zip(todo, files, strict=True)], stop)
    bar.end()
    return record


def _extract(archive: Archive, path: Path, root: Path, seen: Callable[[int], None]) -> list[Entry]:
    """Extract to an existing folder, or to a temporary folder that is renamed when complete."""
    folder = root / archive.folder
    limits = Limits(archive.count, archive.unpacked + archive.unpacked // 10)
    there = bool(archive.members) or folder.exists()
    work = folder if there else root / f".{archive.folder}.part"
    entries = unpack(path, work, archive.choose, limits, seen, overwrite=not there)
    if len(entries) != archive.count:
        parts = f"{len(entries):,} of the {archive.count:,} files of {archive.folder}"
        raise ValueError(f"{path}: contains {parts}")
    foreign = () if archive.members else set(os.listdir(work)) - {entry.name for entry in entries}
    if foreign:
        files = f"not in {archive.name} (unexpected files: {len(foreign):,}); move these files away"
        raise ValueError(f"{work / min(foreign)}: {files} and repeat the command")
    if not there:
        work.rename(folder)
    return entries


def _describe(archive: Archive, path: Path, root: Path, entries: Sequence[Entry]) -> DownloadRecord:
    published, size = bool(archive.sha256), path.stat().st_size
    checksum = archive.sha256 or sha256(path)
    source = download_record.Archive(archive.name, archive.url, size, checksum, published)
    if archive.members:
        sizes = {f"{archive.folder}/{entry.name}": entry.size for entry in entries}
        files = (File(name, size, sha256(root / name)) for name, size in sizes.items())
        return DownloadRecord((source,), tuple(files))
    names = digest(f"{entry.name} {entry.size}" for entry in entries)
    content = digest(f"{entry.name} {entry.size} {entry.crc:08x}" for entry in entries)
    total = sum(entry.size for entry in entries)
    images = Images(archive.folder, len(entries), total, names, content)
    return DownloadRecord((source,), (), (images,))


def _tidy(archives: Sequence[Archive], root: Path, keep: bool) -> None:
    """If `keep`, move these archives to root/archives; otherwise, remove them."""
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
