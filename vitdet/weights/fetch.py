"""Downloading, verifying and converting published weights.

FOLDER/NAME.safetensors (.pt for a detector) is written atomically. FOLDER/.NAME.part.SUFFIX is an
incomplete or unconverted download, which is locked so that concurrent processes download the file
only once.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from vitdet.datasets.download import Patience, Watcher, discard, download, mirrored
from vitdet.files import atomic_write, locked
from vitdet.weights.catalogue import Entry, cache_folder, fetched, unavailable_reason

Convert = Callable[[Path, Path], None]  # arguments: the published file, the file to write
PATIENT = Patience()
log = logging.getLogger(__name__)


class _Silent:
    """A progress display that shows nothing."""

    def at(self, done: int, total: int | None) -> None:
        pass

    def end(self) -> None:
        pass


def fetch_published(
    entry: Entry,
    folder: Path | None,
    show: Callable[[str], Watcher] = lambda _: _Silent(),
    mirror: str = "",
    local: Path | None = None,
) -> Path:
    """Fetch an entry's file; return its path in `folder`, by default in the package or the cache.

    If `local` is None, a packaged or cached file is used instead of a download. `show` creates the
    progress display of a download. Raises the errors of `fetch`."""

    def convert(source: Path, target: Path) -> None:
        from vitdet.weights.convert import convert_file

        for line in convert_file(source, target, entry.format, entry.recipe or None):
            log.info(line)

    if is_here(entry) and not local:
        return copy(fetched(entry.name), folder) if folder else fetched(entry.name)
    return fetch(entry, folder or cache_folder(), convert, show(entry.name), mirror, local)


def is_here(entry: Entry) -> bool:
    """Return whether the entry's file is in the package or the cache."""
    try:
        fetched(entry.name)
    except FileNotFoundError:
        return False
    return True


def copy(source: Path, folder: Path) -> Path:
    """Copy a file to a folder atomically."""
    target = folder / source.name
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


def fetch(
    entry: Entry,
    folder: Path,
    convert: Convert,
    watcher: Watcher,
    mirror: str = "",
    local: Path | None = None,
    patience: Patience = PATIENT,
) -> Path:
    """Download, verify and convert an entry's file, unless it exists in the folder.

    `local` is a copy of the published file to use instead of a download. Raises the errors of
    `download`, FileNotFoundError if `local` does not exist, and ValueError if the file is not the
    published one, cannot be converted, or cannot be downloaded.
    """
    target = folder / entry.file
    if target.is_file():
        return target
    if local is None and not entry.downloadable:
        reason = unavailable_reason(entry)
        raise ValueError(f"{entry.name} cannot be downloaded: {reason}; {entry.instead}")
    if local is not None and not local.is_file():
        raise FileNotFoundError(f"{local}: no such file (--from)")
    address = "" if local else mirrored(entry.url, mirror) if mirror else entry.url
    folder.mkdir(parents=True, exist_ok=True)
    # the suffix of the published file determines the reader
    part = folder / f".{entry.name}.part{PurePosixPath(urlsplit(entry.url).path).suffix}"
    with _locked(part):
        if not target.is_file():  # a concurrent process may have fetched the file
            if address:
                # the disk must have space for two files: the download and the converted file
                download(address, part, watcher, patience, entry.size, copies=2)
                log.info("%s: verifying and converting", entry.name)
            _finish(local or part, target, entry, convert, address)
        discard(part)
    return target


def verify(path: Path, entry: Entry) -> bool:
    """Check a file's size and published checksums; return whether a checksum verifies its content.

    Raises ValueError for a difference. An MD5 inferred from the file name only causes a warning.
    """
    size, other = path.stat().st_size, f"not the published {entry.name}"
    if entry.size is not None and size != entry.size:
        raise ValueError(f"{size:,} bytes, expected {entry.size:,}: {other}")
    for kind, expected in (("sha256", entry.sha256), ("md5", entry.md5)):
        if not expected:
            continue
        with open(path, "rb") as file:
            algorithm = partial(hashlib.new, kind, usedforsecurity=False)
            found = hashlib.file_digest(file, algorithm).hexdigest()[: len(expected)]
        if found != expected:
            text = f"{kind} {found}, expected {expected}"
            if kind == "sha256" or not entry.md5_of_name:
                raise ValueError(f"{text}: {other}")
            text += " according to the published file name; it may be a different file"
            log.warning("%s: %s", entry.name, text)
    if not entry.sha256 and not entry.md5:
        log.warning(
            "%s: %s",
            entry.name,
            "neither a checksum nor a size is published; nothing was verified"
            if entry.size is None
            else "no checksum is published; only the size was verified",
        )
    return bool(entry.sha256 or (entry.md5 and not entry.md5_of_name))


def _finish(source: Path, target: Path, entry: Entry, convert: Convert, address: str) -> None:
    """Verify and convert a file. On ValueError, remove a download that no checksum has verified."""
    verified = False
    try:
        verified = verify(source, entry)
        _convert_atomically(source, target, convert)
    except ValueError as error:
        if not address:
            raise ValueError(f"{source}: {error}") from error
        if not verified:
            discard(source)
        fate = f"the download was {'kept' if verified else 'removed'}"
        raise ValueError(f"{entry.name}, from {address}: {error}; {fate}") from error


def _convert_atomically(source: Path, target: Path, convert: Convert) -> None:
    """Convert in a temporary folder. After a kill, the next process removes the folder."""
    temporary = target.with_name(f".{target.stem}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        convert(source, temporary / target.name)
        (temporary / target.name).replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Lock a download's file, and remove the file afterwards if it is empty."""
    with locked(part, waiting=f"{part}: in use by another process; waiting"):
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                discard(part)
                part.unlink()
